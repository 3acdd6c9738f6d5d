"""A manifest: what a payload was made for, its size and SHA-256; itself under a checksum.

One JSON file an entry, in one form only: a byte more, less or other, and it is refused. The checksums find accidents;
against intent stands that the folder is private (`files.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Final

from fluxfire.store.files import StoreError

FORMAT: Final = 1
KEY: Final = re.compile(r"[0-9a-f]{64}")
MANIFEST_LIMIT: Final = 2**22  # bytes; a block's description is some 20 KB
PAYLOAD_LIMIT: Final = 2**31


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known of one payload. `key` is the digest of `fields`."""

    key: str
    fields: dict[str, Any]  # all must be equal for the payload to be used
    facts: dict[str, Any]  # what is checked or told besides
    payload_sha256: str
    payload_bytes: int

    @classmethod
    def of(cls, fields: dict[str, Any], facts: dict[str, Any], payload: bytes) -> Manifest:
        """The manifest of a new payload."""
        return cls(digest(fields), fields, facts, hashlib.sha256(payload).hexdigest(), len(payload))

    def encode(self) -> bytes:
        """The bytes of its file."""
        body = {"format": FORMAT, "key": self.key, "fields": self.fields, "facts": self.facts}
        body |= {"payload_sha256": self.payload_sha256, "payload_bytes": self.payload_bytes}
        text = canonical(body)
        return f'{{"manifest":{text},"sha256":"{hashlib.sha256(text.encode()).hexdigest()}"}}\n'.encode()

    @classmethod
    def decode(cls, data: bytes, key: str) -> Manifest:
        """The manifest in the file of `key`.

        Raises:
            StoreError: it is not, to the byte, what `encode` writes for this key.
        """
        try:
            body = json.loads(data)["manifest"]
            found = cls(body["key"], body["fields"], body["facts"], body["payload_sha256"], body["payload_bytes"])
            sound = (
                body["format"] == FORMAT
                and found.key == key == digest(found.fields)
                and isinstance(found.facts, dict)
                and isinstance(found.payload_bytes, int)
                and KEY.fullmatch(found.payload_sha256)
                and found.encode() == data
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = None
        if not sound:
            raise StoreError(f"found a damaged manifest of {key[:12]}")
        return found

    def check(self, payload: bytes) -> bytes:
        """The payload, if it is the one that was kept.

        Raises:
            StoreError: it is another.
        """
        if len(payload) != self.payload_bytes or hashlib.sha256(payload).hexdigest() != self.payload_sha256:
            raise StoreError(f"found a damaged payload of {self.key[:12]}")
        return payload


def canonical(value: Any) -> str:
    """JSON in one form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(fields: dict[str, Any]) -> str:
    """The key of these fields."""
    return hashlib.sha256(canonical(fields).encode()).hexdigest()
