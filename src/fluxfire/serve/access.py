"""Who may ask for pictures, and for how many a minute."""

from __future__ import annotations

import hashlib
import hmac
import math
import time

from fluxfire.serve.errors import ServeError
from fluxfire.serve.settings import ApiKey

ANYBODY = "anybody"


class Access:
    """The API keys and what is left of their quotas. Without any key everybody may ask."""

    def __init__(self, keys: tuple[ApiKey, ...]) -> None:
        self._keys = [(key.name, _digest(key.key.get_secret_value())) for key in keys]
        self._per_minute = {key.name: key.pictures_per_minute for key in keys}
        self._left: dict[str, tuple[float, float]] = {}  # name -> (pictures left, when that was so)

    def who(self, authorization: str | None) -> str:
        """The name of the key in an `Authorization` header.

        Every key is compared, by digests of equal length and in constant time: how long it takes tells nothing.

        Raises:
            ServeError: 401.
        """
        if not self._keys:
            return ANYBODY
        scheme, _, given = (authorization or "").partition(" ")
        digest = _digest(given.strip())
        found = [name for name, known in self._keys if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not found:
            raise ServeError(401, "needed an API key: Authorization: Bearer <key>", code="invalid_api_key")
        return found[0]

    def spend(self, name: str, pictures: int) -> None:
        """Takes pictures off a key's quota, which fills up evenly: a minute's worth at most.

        Raises:
            ServeError: 429, with the time until there are enough; 422 when there never are.
        """
        limit = self._per_minute.get(name)
        if limit is None:
            return
        if pictures > limit:
            message = f"asked for {pictures} pictures, this API key has {limit} a minute"
            raise ServeError(422, message, code="quota_too_small", param="n")
        now = time.monotonic()
        left, since = self._left.get(name, (float(limit), now))
        left = min(limit, left + (now - since) * limit / 60)
        if left < pictures:
            self._left[name] = (left, now)
            wait = math.ceil((pictures - left) * 60 / limit)
            raise ServeError(429, "this API key's quota is used up", code="quota_exceeded", retry_after_s=wait)
        self._left[name] = (left - pictures, now)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
