"""Messages between the server and its worker: a JSON object and raw bytes, each with its length before it.

A frame is the length of the JSON (4 bytes, big-endian), the JSON, then the blobs one after the other; their lengths
stand in the JSON. Nothing is unpickled: what a worker sends can be wrong, but never runs in the server.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, BinaryIO


@dataclass(frozen=True, slots=True)
class Message:
    """One message: what kind, its plain values, and bytes such as pixels."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    blobs: tuple[bytes, ...] = ()

    def pack(self) -> bytes:
        """The frame."""
        head = json.dumps({"kind": self.kind, "sizes": [len(blob) for blob in self.blobs], "values": self.values})
        return b"".join((len(head).to_bytes(4, "big"), head.encode(), *self.blobs))


def read(file: BinaryIO) -> Message | None:
    """The next message of a file; None at its end, also in the middle of a frame."""
    length = file.read(4)
    if len(length) < 4:
        return None
    head = file.read(int.from_bytes(length, "big"))
    if len(head) < int.from_bytes(length, "big"):
        return None
    sizes = _sizes(head)
    blobs = tuple(file.read(size) for size in sizes)
    return None if [len(blob) for blob in blobs] != sizes else _message(head, blobs)


async def read_async(stream: asyncio.StreamReader) -> Message | None:
    """The next message of a stream; None at its end, also in the middle of a frame."""
    try:
        head = await stream.readexactly(int.from_bytes(await stream.readexactly(4), "big"))
        return _message(head, tuple([await stream.readexactly(size) for size in _sizes(head)]))
    except asyncio.IncompleteReadError:
        return None


def _sizes(head: bytes) -> list[int]:
    sizes: list[int] = json.loads(head)["sizes"]
    return sizes


def _message(head: bytes, blobs: tuple[bytes, ...]) -> Message:
    frame = json.loads(head)
    return Message(frame["kind"], frame["values"], blobs)
