"""Where pictures are kept when a URL is asked for: a local directory, or S3 and Cloudflare R2 through obstore.

Names are random (192 bits) and say nothing of the request; who has the URL has the picture, until it expires. S3's URLs
are presigned, which happens here without asking the store. A picture whose keeping fails is not lost silently: by
`storage_fallback` the answer carries it as base64, or it is kept locally, or the request fails with 502.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from fluxfire.serve.errors import ServeError
from fluxfire.serve.jobs import Format
from fluxfire.serve.metrics import Metrics
from fluxfire.serve.settings import Settings

if TYPE_CHECKING:
    from obstore.store import S3Store

log = logging.getLogger("fluxfire.serve")

NAME: Final = re.compile(r"[A-Za-z0-9_-]{32}\.(png|jpeg|webp)")
TRY_S: Final = 10  # for one picture to reach the store, repetitions included


class Store(Protocol):
    """Something that keeps pictures."""

    async def keep(self, data: bytes, format: Format) -> str:
        """Keeps a picture; its URL, or its path on this server."""
        ...


class LocalStore:
    """Files in a directory, gone `seconds` after they were made: nothing older is given out, and writing sweeps."""

    def __init__(self, directory: Path, seconds: float) -> None:
        self._directory, self._seconds = directory, seconds
        self._swept = 0.0

    async def keep(self, data: bytes, format: Format) -> str:
        """Keeps a picture; its path on this server."""
        return await asyncio.to_thread(self._keep, data, _name(format))

    def find(self, name: str) -> bytes | None:
        """A picture that has not expired."""
        if not NAME.fullmatch(name):  # so no name leads out of the directory
            return None
        try:
            with open(self._directory / name, "rb") as file:
                return file.read() if self._fresh(os.fstat(file.fileno()).st_mtime) else None
        except FileNotFoundError:
            return None

    def _keep(self, data: bytes, name: str) -> str:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._sweep()
        part = self._directory / f"{name}.part"
        try:
            part.write_bytes(data)
            part.replace(self._directory / name)  # whole or not at all
        except OSError:
            part.unlink(missing_ok=True)
            raise
        return f"/pictures/{name}"

    def _fresh(self, made: float) -> bool:
        return time.time() - made < self._seconds

    def _sweep(self) -> None:
        """At most once a minute, and only files with names that are given here."""
        if time.monotonic() - self._swept < 60:
            return
        self._swept = time.monotonic()
        for path in self._directory.iterdir():
            if NAME.fullmatch(path.name.removesuffix(".part")):
                with contextlib.suppress(FileNotFoundError):
                    if not self._fresh(path.stat().st_mtime):
                        path.unlink()


class S3(Store):
    """A bucket of S3, or of something that speaks like it."""

    def __init__(self, settings: Settings) -> None:
        assert settings.s3_bucket and settings.s3_access_key_id and settings.s3_secret_access_key
        self._seconds = settings.url_s
        self._store = _s3_store(settings)

    async def keep(self, data: bytes, format: Format) -> str:
        """Keeps a picture; a presigned URL to get it with."""
        from obstore import put_async, sign_async

        name = _name(format)
        async with asyncio.timeout(TRY_S):
            await put_async(self._store, name, data, attributes={"Content-Type": f"image/{format}"})
            return await sign_async(self._store, "GET", name, timedelta(seconds=self._seconds))


class Keeper:
    """The configured store and what happens when it fails."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.local = LocalStore(settings.storage_dir, settings.url_s)
        self._store: Store = S3(settings) if settings.storage == "s3" else self.local
        self._fallback, self._metrics = settings.storage_fallback, metrics

    async def keep(self, data: bytes, format: Format) -> str | None:
        """A picture's URL, or its path on this server; None: it goes into the answer.

        Raises:
            ServeError: 502, if that is configured.
        """
        try:
            return await self._store.keep(data, format)
        except Exception as error:  # obstore's own kinds, timeouts, a full disk: all are "not kept"
            log.error("a picture could not be kept: %s", type(error).__name__)
            self._metrics.storage_failures.inc()
        if self._fallback == "local" and self._store is not self.local:
            try:
                return await self.local.keep(data, format)
            except OSError as error:
                log.error("nor locally: %s", type(error).__name__)
        if self._fallback == "error":
            raise ServeError(502, "the picture was made but could not be kept", code="storage_failed")
        return None


def _name(format: Format) -> str:
    return f"{secrets.token_urlsafe(24)}.{format}"


def _s3_store(settings: Settings) -> S3Store:
    try:
        from obstore.store import S3Store
    except ModuleNotFoundError:
        raise SystemExit("fluxfire: storage s3 needs obstore: pip install 'fluxfire[s3]'") from None
    assert settings.s3_access_key_id and settings.s3_secret_access_key
    return S3Store(
        settings.s3_bucket,
        endpoint=settings.s3_endpoint,
        region=settings.s3_region,
        access_key_id=settings.s3_access_key_id.get_secret_value(),
        secret_access_key=settings.s3_secret_access_key.get_secret_value(),
        virtual_hosted_style_request=False,
        client_options={"timeout": "5s", "connect_timeout": "2s", "allow_http": True},
        retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=TRY_S)},
    )
