"""A worker without a model, for what does not depend on one: it starts at once. Its prompts say how it goes wrong."""

from __future__ import annotations

import json
import os
import sys
import time


def read(size: int) -> bytes:
    data = sys.stdin.buffer.read(size)
    if len(data) < size:
        os._exit(0)
    return data


def send(kind: str, *blobs: bytes, **values: object) -> None:
    head = json.dumps({"kind": kind, "sizes": [len(blob) for blob in blobs], "values": values}).encode()
    sys.stdout.buffer.write(b"".join((len(head).to_bytes(4, "big"), head, *blobs)))
    sys.stdout.buffer.flush()


FACTS = {
    "side": 16,
    "steps": 1,
    "guidance": 1.0,
    "multiple": 16,
    "text_tokens": 1,
    "takes_picture": False,
    "cache_threshold": None,
    "device": "cpu",
    "pixels_at_once": None,
    "seconds_per_cost": 1e-6,
}

options = json.loads(sys.argv[1])
if options["model"] == "nowhere":
    send("refused", reason="OSError: nowhere is no model")
    sys.exit()
print("the worker has", os.environ.get("HF_TOKEN"), os.environ.get("FLUXFIRE_S3_SECRET_ACCESS_KEY"), file=sys.stderr)
FACTS["name"] = options["name"] or "stub"
send("ready", facts=FACTS, recompilations=0)
while True:
    message = json.loads(read(int.from_bytes(read(4), "big")))
    if message["kind"] != "run":
        continue
    shape, pictures = message["values"]["shape"], message["values"]["pictures"]
    prompts = " ".join(picture["prompt"] for picture in pictures)
    if "hang" in prompts:
        time.sleep(3600)
    if "die" in prompts:
        os._exit(9)
    if "half" in prompts:  # dies in the middle of a message
        sys.stdout.buffer.write(b"\0\0\xff\xff{")
        sys.stdout.buffer.flush()
        os._exit(9)
    if "nonsense" in prompts:
        sys.stdout.buffer.write(b"\0\0\0\2{]")
        sys.stdout.buffer.flush()
        time.sleep(3600)
    while "held" in prompts and os.path.exists(f"{os.environ['FLUXTEST_GATES']}/held"):
        time.sleep(0.01)
    size = 3 * shape["width"] * shape["height"]
    rgb = os.urandom(size) if "noise" in prompts else bytes(size)
    done = [(picture["name"], 0, 1) for picture in pictures]
    seconds = {"prepare": 0.0, "denoise": 0.0, "previews": 0.0, "decode": 0.0}
    send("done", *[rgb] * len(pictures), pictures=done, seconds=seconds, batch=len(pictures))
    send("idle", recompilations=0)
