"""What the server refuses, over real sockets: strangers, bytes, pixels, bombs, URLs, fields; and what it tells."""

from __future__ import annotations

import base64
import contextlib
import hmac
import io
import json
import socket
import threading
import time
from typing import Any

import bombs
import httpx2
import pytest
from PIL import Image
from serving import WAIT_S, Served, ask, make_settings, metric, png, wait_until

from fluxfire.serve import access, pictures
from fluxfire.serve.errors import ServeError

ADA, BOB = "ada-0123456789abcdef", "bob-0123456789abcdef"
KEYS = ({"name": "ada", "key": ADA, "pictures_per_minute": 3}, {"name": "bob", "key": BOB})


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_api_key_is_needed_for_all_but_health_and_pictures_and_each_has_its_quota(served: Served):
    with served.beside(api_keys=KEYS) as http:
        assert {path: http.get(path).status_code for path in ("/livez", "/readyz", "/metrics")} == {
            "/livez": 200,
            "/readyz": 200,
            "/metrics": 200,
        }
        fields = {"prompt": "a", "steps": 1, "num_images": 2, "width": 16, "height": 16}
        for headers in ({}, bearer("wrong"), bearer(ADA + "x"), {"Authorization": ADA}, {"Authorization": "Bearer é"}):
            refused = http.post("/inference", json=fields, headers={k: v.encode() for k, v in headers.items()})
            assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
        assert http.get("/v1/models").status_code == 401
        assert http.post("/inference", json=fields, headers=bearer(ADA)).status_code == 200
        used_up = http.post("/inference", json=fields, headers=bearer(ADA))
        assert (used_up.status_code, used_up.json()["error"]["code"]) == (429, "quota_exceeded")
        assert 1 <= int(used_up.headers["retry-after"]) <= 20  # one more picture in a third of a minute
        never = http.post("/inference", json=fields | {"num_images": 4}, headers=bearer(ADA))
        assert (never.status_code, never.json()["error"]["code"]) == (422, "quota_too_small")
        for _ in range(2):
            assert http.post("/inference", json=fields, headers=bearer(BOB)).status_code == 200


def test_every_api_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch):
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(access.hmac, "compare_digest", counting)
    known = access.Access(make_settings(api_keys=KEYS).api_keys)
    assert known.who(f"Bearer {ADA}") == "ada"
    with pytest.raises(ServeError):
        known.who("Bearer short")
    assert compared == [(32, 32)] * 4  # all keys, digests of one length, whatever was given


def test_body_of_a_stranger_is_not_read(served: Served):
    with served.beside(api_keys=KEYS) as http:
        status, read = send_endlessly(http, {"Content-Length": str(10**9)})
    assert status == 401
    assert read < 2**23  # what fits into the sockets' buffers


def test_body_over_the_limit_is_refused_by_its_length_and_by_its_bytes(served: Served):
    with served.beside(max_body_bytes=100_000) as http:
        for header in ({"Content-Length": str(10**9)}, {"Transfer-Encoding": "chunked"}):
            status, read = send_endlessly(http, header)
            assert status == 413
            assert read < 2**23


def send_endlessly(http: httpx2.Client, header: dict[str, str]) -> tuple[int, int]:
    """Sends a body until there is an answer; the status, and how many bytes went out."""
    with socket.create_connection(("127.0.0.1", http.base_url.port)) as connection:
        lines = "".join(f"{name}: {value}\r\n" for name, value in header.items())
        connection.sendall(f"POST /inference HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
        connection.settimeout(0.05)
        sent, chunk = 0, b"x" * 65536
        if "Transfer-Encoding" in header:
            chunk = b"10000\r\n" + chunk + b"\r\n"
        answer = b""
        while not answer and sent < 2**26:
            try:
                answer = connection.recv(64)
            except TimeoutError:
                with contextlib.suppress(OSError):  # no room, or closed after an answer that is there to be read
                    sent += connection.send(chunk)
        return int(answer.split()[1]), sent


def test_body_that_does_not_arrive_is_given_up(served: Served):
    with served.beside(body_s=0.2) as http, socket.create_connection(("127.0.0.1", http.base_url.port)) as slow:
        slow.sendall(b"POST /inference HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        slow.settimeout(20)
        assert slow.recv(64).startswith(b"HTTP/1.1 408")


def test_bodies_of_all_open_requests_are_bounded_together(served: Served):
    def begin(http: httpx2.Client, header: str, part: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", http.base_url.port))
        connection.sendall(f"POST /inference HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode() + part)
        return connection

    with served.beside(max_body_bytes=1000, max_open_bytes=1500, body_s=WAIT_S) as http:

        def refused(header: str, part: bytes) -> bool:
            with begin(http, header, part) as other, contextlib.suppress(TimeoutError):  # it waits for the rest
                other.settimeout(0.5)
                return other.recv(64).startswith(b"HTTP/1.1 503")
            return False

        with begin(http, "Content-Length: 1000", b" "), begin(http, "Content-Length: 1000", b" " * 900):
            wait_until(lambda: refused("Content-Length: 600", b""))  # once the server has read the 900
            unsaid = b"258\r\n" + b" " * 600 + b"\r\n"
            wait_until(lambda: refused("Transfer-Encoding: chunked", unsaid))
            assert http.post("/inference", content=b" " * 500).status_code == 422
        wait_until(lambda: http.post("/inference", content=b" " * 1000).status_code == 422)  # there is room again


def test_slow_heads_and_too_many_connections_are_closed(served: Served):
    def closed(connection: socket.socket) -> bool:
        connection.settimeout(WAIT_S)
        with contextlib.suppress(ConnectionResetError):
            return connection.recv(1) == b""
        return True

    with (
        served.beside(head_s=0.3) as http,
        socket.create_connection(("127.0.0.1", http.base_url.port)) as silent,
        socket.create_connection(("127.0.0.1", http.base_url.port)) as slow,
    ):
        with contextlib.suppress(OSError):
            for byte in b"GET /livez HTTP/1.1\r\nX-Slow: " + b"a" * 10_000:
                slow.sendall(bytes([byte]))
                time.sleep(0.02)
            pytest.fail("a head may take as long as it likes")
        assert closed(silent)
    with served.beside(max_connections=2) as http:
        both = [socket.create_connection(("127.0.0.1", http.base_url.port)) for _ in range(2)]
        with socket.create_connection(("127.0.0.1", http.base_url.port)) as third:
            assert closed(third)
        for probe in ("/livez", "/readyz", "/metrics"):
            with pytest.raises(httpx2.TransportError):
                http.get(probe)
        both[0].sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        both[0].settimeout(WAIT_S)
        assert both[0].recv(64).startswith(b"HTTP/1.1 200")
        for connection in both:
            connection.close()


@pytest.mark.parametrize("name", bombs.corpus())
def test_bomb_is_refused_without_decoding_it(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it came to the decoder"))
    with pytest.raises(ServeError) as refused:
        pictures.decode(bombs.corpus()[name], "image", 2**24)
    assert refused.value.status == 422


@pytest.mark.parametrize("name", bombs.damaged())
def test_damaged_picture_is_refused_or_harmless(name: str):
    data = bombs.damaged()[name]
    try:
        decoded = pictures.decode(data, "image", 2**24)
    except ServeError as refused:
        assert (refused.status, refused.message) == (422, "image: the picture is damaged or incomplete")
    else:
        assert decoded.size == pictures.size_of(data, "image")
        assert decoded.info == {} or "Comment" not in decoded.info


def test_bombs_are_refused_by_every_way_in(served: Served):
    for name, data in (bombs.corpus() | {"text": b"hello"}).items():
        given = ask(served, image=base64.b64encode(data).decode())
        assert (given.status_code, given.json()["error"]["param"]) == (422, "image"), name
        form = served.http.post("/v1/images/edits", data={"prompt": "a"}, files={"image": ("a.png", data)})
        assert (form.status_code, form.json()["error"]["param"]) == (422, "image"), name


@pytest.mark.parametrize(
    ("format", "modes"),
    [
        ("PNG", ("RGB", "L", "LA", "RGBA", "P", "I;16", "1")),
        ("JPEG", ("RGB", "L", "CMYK")),
        ("WEBP", ("RGB", "RGBA", "L")),
    ],
)
def test_ordinary_pictures_of_every_kind_are_taken(format: str, modes: tuple[str, ...]):
    for mode in modes:
        file = io.BytesIO()
        Image.new("RGB", (40, 24), "teal").convert("L" if mode == "I;16" else mode).convert(mode).save(file, format)
        decoded = pictures.decode(file.getvalue(), "image", 2**20)
        assert (decoded.size, decoded.mode) == ((40, 24), "RGB")


def test_transparent_parts_are_white_and_a_turned_photo_is_upright():
    clear, turned = io.BytesIO(), io.BytesIO()
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(clear, "PNG")
    assert pictures.decode(clear.getvalue(), "image", 2**20).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    Image.new("RGB", (32, 16)).save(turned, "JPEG", exif=exif)
    assert pictures.decode(turned.getvalue(), "image", 2**20).size == (16, 32)


def test_no_url_is_ever_fetched(served: Served):
    connections: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as canary:
        port = canary.getsockname()[1]
        threading.Thread(target=lambda: connections.append(canary.accept()), daemon=True).start()
        for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "user@127.0.0.1"):
            for scheme in ("http", "HTTPS", " http", "ftp", "file"):
                refused = ask(served, image=f"{scheme}://{host}:{port}/a.png")
                assert refused.status_code == 422
                assert "fetches none" in refused.json()["error"]["message"]
        for text in (
            f"//127.0.0.1:{port}/a.png",
            f"data:image/png,http://127.0.0.1:{port}",
            "data:text/html;base64,aaaa",
        ):
            assert ask(served, image=text).status_code == 422
        as_text = {"prompt": (None, "a"), "image": (None, f"http://127.0.0.1:{port}/a.png")}
        form = served.http.post("/v1/images/edits", files=as_text)
        assert (form.status_code, form.json()["error"]["param"]) == (422, "image")
        assert connections == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"wdith": 64}, "wdith"),
        ({"perf_dump_path": "/tmp/x"}, "perf_dump_path"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a" * 8001}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"width": 100}, "width"),
        ({"height": -16}, "height"),
        ({"width": 2**40 * 16}, "size"),
        ({"width": 4096, "height": 16}, "size"),
        ({"num_images": 11}, "num_images"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": 2, "output": "bytes"}, "num_images"),
        ({"steps": 101}, "steps"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"cache_threshold": -1}, "cache_threshold"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**53}, "seed"),
        ({"format": "gif"}, "format"),
        ({"image": "%%%"}, "image"),
    ],
)
def test_wrong_field_is_named_and_not_repeated(served: Served, fields: dict[str, Any], param: str):
    body = json.dumps({"prompt": "secretive", "steps": 2} | fields)
    answer = served.http.post("/inference", content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (422, "invalid_request_error", param)
    assert "secretive" not in answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"quality": "hd"}, "quality"),
        ({"background": "transparent"}, "background"),
        ({"size": "0x16"}, "size"),
        ({"output_compression": 50}, "output_compression"),
        ({"partial_images": 1}, "partial_images"),
        ({"stream": True, "response_format": "url"}, "response_format"),
        ({"output_format": "svg"}, "output_format"),
    ],
)
def test_openai_field_that_means_nothing_here_is_refused_not_ignored(
    served: Served, fields: dict[str, Any], param: str
):
    answer = served.http.post("/v1/images/generations", json={"prompt": "a"} | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


def test_edit_form_is_checked_like_json(served: Served):
    whole = {"image": ("a.png", png((16, 16)))}
    for data, files, param in (
        ({"prompt": "a", "n": "many"}, whole, "n"),
        ({"prompt": "a", "colour": "red"}, whole, "colour"),
        ({}, whole, "prompt"),
        ({"prompt": "a"}, whole | {"mask": ("m.png", png())}, "mask"),
        ({"prompt": ["a", "b"]}, whole, "prompt"),
        ({"prompt": "a"}, {"other": ("a.png", png())}, "other"),
    ):
        answer = served.http.post("/v1/images/edits", data=data, files=files)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
    assert served.http.post("/v1/images/edits", json={"prompt": "a"}).status_code == 422
    broken = {"Content-Type": "multipart/form-data; boundary=x"}
    assert served.http.post("/v1/images/edits", content=b"--y\r\n", headers=broken).status_code in (400, 422)
    two = [("image[]", ("a.png", png())), ("image[]", ("b.png", png()))]
    assert served.http.post("/v1/images/edits", data={"prompt": "a"}, files=two).status_code == 422


def test_errors_of_http_are_openais_error_objects(served: Served):
    for answer, status in (
        (served.http.get("/nothing"), 404),
        (served.http.get("/inference"), 405),
        (served.http.post("/inference", content=b"{", headers={"Content-Type": "application/json"}), 422),
        (served.http.post("/inference", content=b"[" * 100_000, headers={"Content-Type": "application/json"}), 422),
        (served.http.post("/inference", content=b'{"prompt": "\\ud800"}'), 422),
        (served.http.post("/inference", json={"prompt": "a"}, headers={"Idempotency-Key": "k" * 256}), 422),
    ):
        assert answer.status_code in (status, 400), answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_is_no_json_object_is_told_so(served: Served):
    json_type = {"Content-Type": "application/json"}
    as_form = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl says unless told
    for body, headers in ((b"{", json_type), (b"[1]", json_type), (b'{"prompt": "a"}', as_form), (b"", json_type)):
        error = served.http.post("/inference", content=body, headers=headers).json()["error"]
        assert "needs a JSON object, sent as Content-Type: application/json" in error["message"], (body, error)
        assert error["param"] is None


def test_requests_are_counted_by_route_and_refusals_by_code(served: Served):
    before = metric(served, 'fluxfire_requests_total{route="/inference",status="422"}')
    refused = metric(served, 'fluxfire_rejections_total{code="unknown_field"}')
    ask(served, wdith=64)
    assert metric(served, 'fluxfire_requests_total{route="/inference",status="422"}') == before + 1
    assert metric(served, 'fluxfire_rejections_total{code="unknown_field"}') == refused + 1
