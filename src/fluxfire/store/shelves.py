"""Places elsewhere: a bucket, a repository of the Hugging Face Hub, a mounted folder, or one file; names and bytes.

Names are made here and never taken from there, and what is read has a limit in bytes. Every answer is waited for only
so long; a place that gave none is left alone for a minute, and until then all it has is missed, with the reason.
Nothing that comes from there is believed: `remote.py` checks it.
"""

from __future__ import annotations

import functools
import os
import queue
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import urlsplit

from fluxfire.store.files import StoreError

SCHEMES: Final = ("s3", "gs", "az", "hf", "file")
WAIT_S: Final = 10.0  # for an answer; and a second more for each MiB of it
LEFT_ALONE_S: Final = 60.0
_T = TypeVar("_T")


class Shelf(Protocol):
    """A place with names and bytes."""

    place: str

    def read(self, name: str, limit: int) -> bytes:
        """The bytes under a name, of at most `limit`.

        Raises:
            FileNotFoundError: there are none.
            StoreError: they cannot be had.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Puts bytes under a name as a whole."""
        ...

    def names(self) -> list[str]:
        """The names under `entries/`."""
        ...


def is_url(place: object) -> bool:
    """Whether a place for artifacts is somewhere else."""
    return isinstance(place, str) and re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", place) is not None


def shelf_at(place: str | os.PathLike[str]) -> Shelf:
    """The shelf at a URL, or in a file.

    Raises:
        StoreError: no such scheme, a secret in the URL, or what it needs is not installed.
    """
    if not is_url(place):
        return Pack(place)
    parts = urlsplit(str(place))
    if parts.password or parts.query:  # the URL is told in manifests and logs
        raise StoreError(f"found a secret in the URL of {parts.scheme}://, needed it in the environment alone")
    scheme = parts.scheme
    if scheme not in SCHEMES:
        raise StoreError(f"found {scheme}://, needed one of {', '.join(f'{known}://' for known in SCHEMES)}")
    return Patient(Hub(str(place)) if scheme == "hf" else Bucket(str(place)))


class Bucket:
    """S3, Cloudflare R2 (by AWS_ENDPOINT_URL), Google Cloud Storage, Azure, a mounted folder: through obstore."""

    def __init__(self, url: str) -> None:
        try:
            from obstore.store import from_url
        except ModuleNotFoundError:
            raise StoreError(
                "found no obstore, needed it for a store elsewhere: pip install 'fluxfire[megacache]'"
            ) from None
        self.place = url.rstrip("/")
        more: dict[str, Any] = {"mkdir": True}
        if not url.startswith("file:"):
            retry = {"max_retries": 2, "retry_timeout": timedelta(seconds=WAIT_S)}
            options = {"connect_timeout": "5s", "timeout": "300s", "allow_http": True}  # where the endpoint says http
            more = {"client_options": options, "retry_config": retry}
        self._store: Any = from_url(self.place, **more)

    def read(self, name: str, limit: int) -> bytes:
        """One object, after a look at its size."""
        found = self._store.get(name)
        _limit(name, found.meta["size"], limit)
        return bytes(found.bytes())

    def write(self, name: str, data: bytes) -> None:
        """One object; stores put it in place as a whole."""
        self._store.put(name, data)

    def names(self) -> list[str]:
        """All objects under `entries/`."""
        return [found["path"] for chunk in self._store.list("entries") for found in chunk]


class Hub:
    """A repository of the Hugging Face Hub: hf://owner/name[@revision][/folder], hf://datasets/owner/name..."""

    def __init__(self, url: str) -> None:
        from huggingface_hub import HfFileSystem

        self.place = url.rstrip("/")
        self._path = self.place.removeprefix("hf://")
        self._files: Any = HfFileSystem(use_listings_cache=False, skip_instance_cache=True)

    def read(self, name: str, limit: int) -> bytes:
        """One file, after a look at its size."""
        path = f"{self._path}/{name}"
        _limit(name, self._files.info(path)["size"], limit)
        data: bytes = self._files.cat_file(path)
        return data

    def write(self, name: str, data: bytes) -> None:
        """One file, by a commit of its own."""
        self._files.pipe_file(f"{self._path}/{name}", data)

    def names(self) -> list[str]:
        """All files of `entries/`."""
        try:
            found = self._files.ls(f"{self._path}/entries", detail=False)
        except FileNotFoundError:
            return []
        return [f"entries/{path.rsplit('/', 1)[-1]}" for path in found]


class Pack:
    """One file with everything: a zip without compression, so that nothing grows when it is read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.place = os.fspath(path)

    def read(self, name: str, limit: int) -> bytes:
        """One member, after a look at its size."""
        with self._opened() as pack:
            try:
                member = pack.getinfo(name)
            except KeyError:
                raise FileNotFoundError(name) from None
            if member.compress_type != zipfile.ZIP_STORED:
                raise StoreError(f"found {name} compressed, needed a file that save_megacache made")
            _limit(name, member.file_size, limit)
            return pack.read(member)

    def write(self, name: str, data: bytes) -> None:
        """Not one by one: `packed` makes the file as a whole."""
        raise StoreError(f"found {self.place}, a file that is made as a whole")

    def names(self) -> list[str]:
        """The members under `entries/`."""
        with self._opened() as pack:
            return [name for name in pack.namelist() if name.startswith("entries/")]

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        if os.path.exists(self.place) and not os.path.isfile(self.place):
            raise StoreError(f"found {self.place}, no regular file")
        try:
            with zipfile.ZipFile(self.place) as pack:
                yield pack
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError) as error:
            raise StoreError(f"found {self.place}, no file that save_megacache made: {error}") from None


class _Packing(Pack):
    """A file that is being made."""

    def __init__(self, pack: zipfile.ZipFile, place: str) -> None:
        super().__init__(place)
        self._pack = pack

    def read(self, name: str, limit: int) -> bytes:
        raise FileNotFoundError(name)

    def write(self, name: str, data: bytes) -> None:
        if name not in self._pack.namelist():
            self._pack.writestr(name, data)


@contextmanager
def packing(path: str | os.PathLike[str]) -> Iterator[Shelf]:
    """A shelf to write on; the file is there, whole, when the block ends."""
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(part, "x", zipfile.ZIP_STORED) as pack:
            yield _Packing(pack, str(target))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


class Patient:
    """A shelf that is waited for only so long, and left alone for a while after it failed."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf, self.place = shelf, shelf.place
        self._left_alone_until, self._why = 0.0, ""

    def read(self, name: str, limit: int) -> bytes:
        """As the shelf's own."""
        return self._ask(functools.partial(self._shelf.read, name, limit), limit)

    def write(self, name: str, data: bytes) -> None:
        """As the shelf's own."""
        self._ask(functools.partial(self._shelf.write, name, data), len(data))

    def names(self) -> list[str]:
        """As the shelf's own."""
        return self._ask(self._shelf.names, 0)

    def _ask(self, function: Callable[[], _T], size: int) -> _T:
        if time.monotonic() < self._left_alone_until:
            raise StoreError(self._why)
        answers: queue.SimpleQueue[tuple[_T | None, Exception | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put((function(), None))
            except Exception as error:  # each library raises its own kinds
                answers.put((None, error))

        threading.Thread(target=ask, daemon=True, name="fluxfire-store").start()
        wait_s = WAIT_S + size / 2**20
        try:
            answer, error = answers.get(timeout=wait_s)
        except queue.Empty:
            answer, error = None, StoreError(f"no answer for {wait_s:g} s")
        if error is None:
            return answer  # type: ignore[return-value]
        if isinstance(error, FileNotFoundError | TooLarge):
            raise error
        text = next((line for line in str(error).splitlines() if line), "")
        self._why = f"found {self.place} unusable: {type(error).__name__}: {text[:300]}"
        self._left_alone_until = time.monotonic() + LEFT_ALONE_S
        raise StoreError(self._why) from None


class TooLarge(StoreError):
    """What is there is larger than it may be."""


def _limit(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise TooLarge(f"found {name} of {size} bytes, needed at most {limit}")
