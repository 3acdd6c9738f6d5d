"""The page in a real Chromium, against the real server: what a person sees, does and is told."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from serving import WAIT_S, Served, ask, lines, metric, open_picture, png, wait_until

import fluxfire
from fluxfire.serve import stream

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium on the PATH: apt-get install chromium", allow_module_level=True)
Axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = sync_api.expect
expect.set_options(timeout=WAIT_S * 1000)

# Without the quiet flags Chromium speaks to its maker's hosts at every start.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
FOLDER = Path(fluxfire.__file__).parent / "serve/page"
KEY = "ada-0123456789abcdef"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Seen:
    """A page and what happened behind it."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        self.asked: list[Any] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        page.on("request", lambda request: self.asked.append(request))
        page.set_default_timeout(WAIT_S * 1000)

    def __getitem__(self, css: str) -> Any:
        return self.page.locator(css)

    def open(self, url: str) -> Seen:
        self.page.goto(url)
        expect(self["#make"]).to_be_enabled()
        return self

    def write(self, prompt: str, **numbers: object) -> None:
        """Fills in the form; numbers by their fields' ids."""
        self["#prompt"].fill(prompt)
        if numbers:
            self["#more"].evaluate("details => { details.open = true; }")
        for name, value in numbers.items():
            self[f"#{name}"].fill(str(value))

    def make(self, prompt: str, **numbers: object) -> None:
        self.write(prompt, **numbers)
        self["#make"].click()

    def record(self, css: str) -> Callable[[], list[str]]:
        """Every text and description that these elements have from now on."""
        self.page.evaluate(
            """(css) => {
                window.recorded = [];
                const observer = new MutationObserver((changes) => {
                    for (const { target } of changes) window.recorded.push(target.alt ?? target.textContent);
                });
                for (const element of document.querySelectorAll(css)) {
                    observer.observe(element, { attributes: true, childList: true });
                }
            }""",
            css,
        )
        return lambda: self.page.evaluate("window.recorded")

    def orders(self) -> list[dict[str, Any]]:
        """What `/inference` was asked for."""
        return [request.post_data_json for request in self.asked if request.url.endswith("/inference")]


@pytest.fixture
def seen(browser: Any) -> Iterator[Seen]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    yield Seen(context.new_page())
    context.close()


@pytest.fixture
def page(seen: Seen, served: Served) -> Iterator[Seen]:
    yield seen.open(served.url)
    assert seen.errors == []


def test_files_are_the_servers_own_under_a_policy_that_lets_no_text_become_markup(page: Seen, served: Served):
    answer = served.http.get("/")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    page.make("teapot", steps=2, width=16, height=16)
    expect(page["#actions"]).to_be_visible()
    assert {urlsplit(request.url).netloc for request in page.asked if not request.url.startswith("blob:")} == {
        urlsplit(served.url).netloc
    }
    listed = {name.rsplit("/", 1)[1] for name in (request.url for request in page.asked) if "/page/" in name}
    assert listed == {file.name for file in FOLDER.iterdir()} - {"index.html"}
    for file in FOLDER.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://|style=", text), (
            file
        )
    assert served.http.get("/page/..%2fweb.py").status_code == served.http.get("/page/main.py").status_code == 404


def test_picture_and_baseline_stand_side_by_side_with_their_figures(page: Seen, tmp_path: Path):
    page.make("teapot", steps=6, seed=7, threshold=0.3, width=128, height=128)
    expect(page["#slider"]).to_be_visible()
    expect(page["#before-tag"]).to_contain_text(re.compile(r"^baseline [\d.]+ m?s$"))
    expect(page["#numbers"]).to_contain_text("PSNR to the baseline")
    fast, base = page.orders()
    assert fast == base | {"cache_threshold": 0.3}
    assert (base["cache_threshold"], base["seed"], base["stream"]) == (0, 7, True)

    rows = [row.get_attribute("aria-label") for row in page["#steps-chart svg"].all()]
    assert rows[0] == "baseline: 0 of 6 steps reused, 6 computed"
    found = re.fullmatch(r"fluxfire: (\d) of 6 steps reused, (\d) computed", rows[1])
    assert found and int(found[1]) > 0 and int(found[1]) + int(found[2]) == 6
    assert page["#steps-chart rect.reused"].count() == int(found[1])
    assert page["#times tbody tr"].count() == 6
    assert page["#times-chart svg"].count() == 2

    page["#slider"].focus()
    page.page.keyboard.press("Home")
    assert page["#pair"].evaluate("pair => pair.style.getPropertyValue('--at')") == "0%"
    for button, name in (("#download", "fluxfire-7-fluxfire.png"), ("#download-before", "fluxfire-7-baseline.png")):
        with page.page.expect_download() as download:
            page[button].click()
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
        assert open_picture((tmp_path / name).read_bytes()).size == (128, 128)


def test_steps_and_previews_are_shown_as_they_come(page: Seen, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream, "QUIET_S", 0.001)  # comments between all events
    shown = page.record("#told, #after")
    page["#compare"].uncheck()
    page.make("teapot", steps=6, width=32, height=32)
    expect(page["#actions"]).to_be_visible()
    expect(page["#slider"]).to_be_hidden()
    texts = shown()
    assert "On the way" in texts
    for step in range(1, 7):
        assert [text for text in texts if re.fullmatch(rf"Picture: step {step} of 6, \d reused\.", text)]
    assert len(page.orders()) == 1


def test_keyboard_alone_makes_a_picture_and_cancels_one(page: Seen, served: Served, serve_log: Path):
    keys = page.page.keyboard
    page.write("held and called off", steps=100, width=16, height=16)
    with served.shut():
        keys.press("ControlOrMeta+Enter")
        expect(page["#told"]).to_have_text("Picture: begun.")
        expect(page["#cancel"]).to_be_focused()
        keys.press("Escape")
        expect(page["#told"]).to_have_text("Cancelled.")
        expect(page["#make"]).to_be_focused()
        wait_until(lambda: metric(served, 'fluxfire_rejections_total{code="client_gone"}') > 0)
    page.write("teapot", steps=2)
    keys.press("ControlOrMeta+Enter")
    expect(page["#actions"]).to_be_visible()
    assert len(lines(serve_log, "step", "called off")) < 100
    page["#slider"].focus()
    for name in ("download", "download-before", "edit", "another"):  # in this order, none left out
        keys.press("Tab")
        expect(page[f"#{name}"]).to_be_focused()


def test_reference_comes_by_file_paste_and_drop_and_can_be_taken_away(page: Seen):
    picture = png((200, 100))
    page["#file"].set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": picture})
    expect(page["#reference"]).to_be_visible()
    page["#compare"].uncheck()
    page["input[name=style][value=watercolour]"].check(force=True)
    page.make("", steps=2)
    expect(page["#actions"]).to_be_visible()
    expect(page["#slider"]).to_be_hidden()
    [order] = page.orders()
    assert order["prompt"] == "in watercolour style"
    assert base64.b64decode(order["image"].removeprefix("data:image/png;base64,")) == picture
    assert (order["width"], order["height"]) == (None, None)
    assert page["#after"].evaluate("image => [image.naturalWidth, image.naturalHeight]") == [176, 96]

    give = """([kind, text]) => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], "b.png", { type: "image/png" }));
        const event = kind === "paste" ? new ClipboardEvent("paste", { clipboardData: transfer, cancelable: true })
            : new DragEvent("drop", { dataTransfer: transfer, cancelable: true });
        window.dispatchEvent(event);
        return event.defaultPrevented;
    }"""
    for kind, width in (("paste", 30), ("drop", 3000)):
        page["#remove"].click()
        expect(page["#reference"]).to_be_hidden()
        assert page.page.evaluate(give, [kind, base64.b64encode(png((width, 20))).decode()])
        expect(page["#reference"]).to_be_visible()
        page["#reference"].evaluate("image => image.decode()")
        assert page["#reference"].evaluate("image => image.naturalWidth") == min(width, 2048)  # scaled down to be sent
    page["#file"].set_input_files({"name": "c.png", "mimeType": "image/png", "buffer": b"no picture"})
    expect(page["#problem-text"]).to_contain_text("cannot be read")


def test_picture_can_be_edited_on_and_has_another_seed(page: Seen):
    page["#compare"].uncheck()
    page.make("teapot", steps=2, width=32, height=32, seed=5)
    expect(page["#spoken"]).to_have_text("Done. Seed 5.")
    page["#another"].click()
    expect(page["#spoken"]).not_to_have_text("Done. Seed 5.")
    expect(page["#actions"]).to_be_visible()
    page["#edit"].click()
    expect(page["#reference"]).to_be_visible()
    expect(page["#prompt"]).to_be_focused()
    page.make("with a lid", steps=2)
    expect(page["#actions"]).to_be_visible()
    assert page.orders()[-1]["image"].startswith("data:image/png;base64,")


def test_full_queue_is_waited_for(seen: Seen, served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served.engine.queue, "limit", 16 * 16 * 2)
    seen.open(served.url)
    with ThreadPoolExecutor(1) as pool:
        with served.held(height=16):
            waiting = pool.submit(ask, served, width=16, height=16)
            wait_until(lambda: metric(served, "fluxfire_queue_pictures") == 1)
            seen.make("teapot", steps=2, width=16, height=16)
            expect(seen["#told"]).to_contain_text("The queue is full. Trying again in")
        assert waiting.result().status_code == 200
    expect(seen["#actions"]).to_be_visible()
    assert all("429" in error for error in seen.errors)


def test_key_is_asked_for_and_used(seen: Seen, served: Served):
    with served.beside(api_keys=({"name": "ada", "key": KEY},)) as http:
        seen.page.goto(str(http.base_url))
        expect(seen["#key"]).to_be_focused()
        expect(seen["#make"]).to_be_disabled()
        for key in ("wrong-0123456789abcdef", KEY):
            seen["#key"].fill(key)
            seen.page.keyboard.press("Enter")
            expect(seen["#key-wrong"] if key != KEY else seen["#prompt"]).to_be_visible()
        expect(seen["#key-form"]).to_be_hidden()
        seen.make("teapot", steps=2, width=16, height=16)
        expect(seen["#actions"]).to_be_visible()
        assert KEY not in seen.page.content()


def test_server_that_is_gone_is_said_and_found_again(seen: Seen, served: Served):
    seen.open(served.url)
    seen.page.context.set_offline(True)
    seen.make("teapot", steps=2, width=16, height=16)
    expect(seen["#problem-text"]).to_have_text("The server does not answer.")
    expect(seen["#server"]).to_have_text("not answering")
    seen.page.context.set_offline(False)
    expect(seen["#problem"]).to_be_hidden()
    expect(seen["#server"]).to_have_text("tested")
    seen["#make"].click()
    expect(seen["#actions"]).to_be_visible()


def test_failure_is_told_with_another_try(page: Seen):
    page.make("bug", steps=2, width=16, height=16)
    expect(page["#problem-text"]).to_have_text("the picture could not be made")
    page["#prompt"].fill("teapot")
    page["#again"].click()
    expect(page["#actions"]).to_be_visible()
    expect(page["#problem"]).to_be_hidden()


def test_words_of_others_stay_words(seen: Seen, served: Served):
    markup = "<img src=x onerror=alert(1)>"
    refusal = {"error": {"message": markup, "type": "invalid_request_error", "param": "steps", "code": "x"}}
    seen.page.route("**/inference", lambda route: route.fulfill(status=422, json=refusal))
    seen.open(served.url).make(markup, steps=2)
    expect(seen["#problem-text"]).to_have_text(markup)
    assert seen["#problem img"].count() == 0
    assert seen["#steps"].get_attribute("aria-invalid") is not None


def test_wrong_number_is_shown_where_it_stands(page: Seen):
    page["#width"].evaluate("field => { field.value = 100; }")
    page["#make"].click()
    expect(page["#width"]).to_be_focused()  # in the part that was closed
    assert page.orders() == []


def test_phone_shows_everything_in_its_width_accessibly_in_light_and_dark(browser: Any, served: Served):
    grounds = set()
    for scheme, width in (("light", 390), ("dark", 320)):
        options = {"viewport": {"width": width, "height": 844}, "color_scheme": scheme, "has_touch": True}
        with browser.new_context(**options, is_mobile=True, bypass_csp=True) as context:  # axe is a script of its own
            seen = Seen(context.new_page()).open(served.url)
            seen.make("teapot", steps=2, width=32, height=32)
            expect(seen["#actions"]).to_be_visible()
            assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
            expect(seen["#frame"]).to_be_in_viewport()
            assert [found["id"] for found in Axe().run(seen.page).response["violations"]] == []
            grounds.add(seen.page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
    assert len(grounds) == 2


def test_page_needs_no_key_and_what_it_asks_for_does(served: Served):
    with served.beside(api_keys=({"name": "ada", "key": KEY},)) as http:
        paths = ("/", "/page/main.js", "/about")
        assert [http.get(path).status_code for path in paths] == [200, 200, 401]
        about = http.get("/about", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert (about["model"], about["side"], about["steps"], about["multiple"]) == ("tested", 128, 4, 16)
    assert httpx2.get(f"{served.url}/page/icon.svg").headers["content-type"] == "image/svg+xml"
    assert ask(served, prompt="").status_code == 422
