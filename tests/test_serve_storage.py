"""Pictures by URL, kept in a real S3 server on loopback; and what happens when that fails."""

from __future__ import annotations

import base64
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from s3_server import ACCESS, SECRET, FaultyProxy, seaweed
from serving import TESTS, Served, make_settings, metric, open_picture, wait_until

from fluxfire.serve import process, storage
from fluxfire.serve.storage import LocalStore

ANYBODY = httpx2.Client()  # without a key, and with a pool: each new one reads all certificates


@pytest.fixture(scope="module", autouse=True)
def closing() -> Iterator[None]:
    with ANYBODY:
        yield


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with seaweed(tmp_path_factory.mktemp("seaweed")) as port:
        yield port


@pytest.fixture
def proxy(s3: int) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3)
    yield proxy
    proxy.close()


@contextmanager
def serving(proxy: FaultyProxy, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[Served]:
    """A server that keeps pictures behind the proxy; what it makes does not matter, so its worker has no model."""
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-S", str(TESTS / "stub_worker.py")))
    bucket = {"storage": "s3", "s3_bucket": "pictures", "s3_endpoint": f"http://127.0.0.1:{proxy.port}"}
    keys = {"s3_access_key_id": ACCESS, "s3_secret_access_key": SECRET, "storage_dir": folder}
    served = Served(make_settings(**(bucket | keys | settings)))
    wait_until(lambda: served.http.get("/readyz").status_code == 200)
    yield served
    served.stop()


def ask(served: Served, status: int = 200) -> dict[str, Any]:
    answer = served.http.post("/inference", json={"prompt": "a", "output": "url"})
    assert answer.status_code == status, answer.text
    return answer.json()["pictures"][0] if status == 200 else answer.json()["error"]


def test_s3_url_is_presigned_expires_and_cannot_be_changed(
    proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with serving(proxy, tmp_path, monkeypatch) as served:
        url, other = ask(served)["url"], ask(served)["url"]
        got = ANYBODY.get(url)
        assert (got.status_code, got.headers["content-type"]) == (200, "image/png")
        assert open_picture(got.content).size == (16, 16)
        name = re.search(r"/pictures/([A-Za-z0-9_-]{32}\.png)\?", url)[1]
        assert name not in other
        assert SECRET not in url
        for changed in (
            url.replace(name, name[::-1]),
            url[:-1] + "x",
            url.split("?")[0],
            re.sub("Expires=3600&", "Expires=9999&", url),
        ):
            assert changed != url
            assert ANYBODY.get(changed).status_code == 403
    with serving(proxy, tmp_path, monkeypatch, url_s=1) as served:
        short = ask(served)["url"]
        time.sleep(2.1)  # expiry is in whole seconds
        assert ANYBODY.get(short).status_code == 403
        # R2 refuses bodies in chunks with a checksum behind them: none may be sent.
        puts = [head for head in proxy.heads if head.startswith(b"PUT")]
        assert puts
        assert not [head for head in puts if b"x-amz-trailer" in head.lower() or b"aws-chunked" in head.lower()]
        assert metric(served, "fluxfire_storage_failures_total") == 0


@pytest.mark.parametrize("fault", ["reset", "unavailable"])
def test_short_fault_of_s3_is_outlived(proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str):
    with serving(proxy, tmp_path, monkeypatch) as served:
        proxy.faults = [fault] * 2
        assert ANYBODY.get(ask(served)["url"]).status_code == 200
        assert proxy.faults == []


@pytest.mark.parametrize("fallback", ["base64", "local", "error"])
def test_outage_of_s3_falls_back_as_configured_and_loses_no_picture_silently(
    proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fallback: str
):
    with serving(proxy, tmp_path, monkeypatch, storage_fallback=fallback) as served:
        for fault in ("reset", "unavailable", "late"):
            proxy.faults = [fault] * 100
            monkeypatch.setattr(storage, "TRY_S", 0.5)
            if fallback == "error":
                assert ask(served, 502)["code"] == "storage_failed"
            elif fallback == "local":
                url = ask(served)["url"]
                assert url.startswith(served.url)
                assert open_picture(ANYBODY.get(url).content).size == (16, 16)
            else:
                picture = ask(served)
                assert picture["url"] is None
                assert open_picture(picture["base64"]).size == (16, 16)
        assert metric(served, "fluxfire_storage_failures_total") == 3
        proxy.faults = []
        monkeypatch.setattr(storage, "TRY_S", 30)
        assert ANYBODY.get(ask(served)["url"]).status_code == 200
        assert SECRET not in served.http.get("/metrics").text


def test_slow_store_keeps_nobody_else_waiting(proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with serving(proxy, tmp_path, monkeypatch) as served, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(storage, "TRY_S", 30)
        proxy.faults = ["late"]
        late = pool.submit(ask, served)
        wait_until(lambda: not proxy.faults)
        assert served.http.post("/inference", json={"prompt": "a"}).status_code == 200
        assert not late.done()
        proxy.in_time.set()
        assert ANYBODY.get(late.result()["url"]).status_code == 200


def test_unwritable_directory_puts_the_picture_into_the_answer(
    proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("not a folder")
    with serving(proxy, tmp_path, monkeypatch, storage="local", storage_dir=tmp_path / "file") as served:
        picture = ask(served)
        assert picture["url"] is None
        assert base64.b64decode(picture["base64"])


def test_expired_files_are_swept_and_strange_ones_left(tmp_path: Path):
    store = LocalStore(tmp_path, 60)
    old, new = (store._keep(b"x", f"{letter * 32}.png").rsplit("/", 1)[1] for letter in "ab")
    (tmp_path / "notes.txt").write_text("mine")
    for name in (old, "notes.txt"):
        os.utime(tmp_path / name, (0, 0))
    store._swept = -1e9
    store._keep(b"x", f"{'c' * 32}.png")
    assert {path.name for path in tmp_path.iterdir()} == {new, "notes.txt", f"{'c' * 32}.png"}
    assert store.find("../" + new) is None
    assert store.find(new) == b"x"
