"""`Idempotency-Key`: a request that is repeated with its key gets the first one's pictures, made once.

A key belongs to who sent it (their API key). With another request behind it, it is refused: 409. Jobs that failed are
forgotten, so that a repetition tries again. What is kept is bounded in time and in bytes; the oldest goes first.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from dataclasses import dataclass

from fluxfire.serve.errors import ServeError
from fluxfire.serve.jobs import Job, Made, Preview


@dataclass(frozen=True, slots=True)
class _Kept:
    fingerprint: bytes
    job: Job
    since: float


class Repeats:
    """Jobs by their keys."""

    def __init__(self, seconds: float, most_bytes: int) -> None:
        self._seconds, self._most_bytes = seconds, most_bytes
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()

    def find(self, owner: str, key: str, fingerprint: bytes) -> Job | None:
        """The job of an earlier request with this key.

        Raises:
            ServeError: 409, the key was used for another request.
        """
        self._forget()
        kept = self._kept.get((owner, key))
        if kept is None:
            return None
        if kept.fingerprint != fingerprint:
            message = "this Idempotency-Key was used for another request: use a new one"
            raise ServeError(409, message, code="idempotency_key_reused", param="Idempotency-Key")
        return kept.job

    def keep(self, owner: str, key: str, fingerprint: bytes, job: Job) -> None:
        """Remembers a job by its key."""
        self._kept.pop((owner, key), None)
        self._kept[owner, key] = _Kept(fingerprint, job, time.monotonic())

    def _forget(self) -> None:
        now, held = time.monotonic(), sum(_bytes(kept.job) for kept in self._kept.values())
        for name, kept in list(self._kept.items()):
            expired = now - kept.since > self._seconds
            if kept.job.ended and (expired or kept.job.error or held > self._most_bytes):
                held -= _bytes(kept.job)
                del self._kept[name]


def fingerprint(*parts: bytes) -> bytes:
    """A digest of a request's parts; each with its length, so that no two requests run together."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def _bytes(job: Job) -> int:
    sizes = (len(event.data) if isinstance(event, Preview | Made) else 100 for event in job.events)
    return 1000 + len(job.order.prompt) + sum(sizes)
