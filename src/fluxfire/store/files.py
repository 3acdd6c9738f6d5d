"""Files of one private folder, through its descriptor: no path is looked up twice, no link is followed.

What lies in the store is executed when it is loaded, so nobody else may be able to write it: every folder from the root
down to the store must belong to this user or to root, and none may be writable for others (a sticky one such as /tmp
may: nobody can replace what is ours in it). The store itself must be ours.

A file is written under a temporary name, synced, then renamed, and the folder is synced: after a crash there is the old
file, the new one or none, and perhaps a temporary one that `sweep` removes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

TEMPORARY: Final = ".tmp-"
STALE_S: Final = 3600.0  # a temporary file older than this is of a writer that died


class StoreError(Exception):
    """The store cannot be used, or this entry cannot: what was found and what is needed."""


class Folder:
    """One folder by its descriptor. All names are single components."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor, self.path = descriptor, path

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self._descriptor)

    def child(self, name: str, *, create: bool) -> Folder:
        """A folder in this one.

        Raises:
            StoreError: it is a link, or not private to us.
            OSError: there is none, or it cannot be made.
        """
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=self._descriptor)
        path = os.path.join(self.path, name)
        descriptor = _open_folder(name, self._descriptor, path)
        try:
            _check_ours(os.fstat(descriptor), path)
        except StoreError:
            os.close(descriptor)
            raise
        return Folder(descriptor, path)

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a file of at most `limit` bytes.

        Raises:
            StoreError: it is no regular file of ours, or larger.
            OSError: there is none, or it is a link.
        """
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._descriptor)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            path = os.path.join(self.path, name)
            if not stat.S_ISREG(found.st_mode):
                raise StoreError(f"found {path}, no regular file")
            _check_ours(found, path)
            if found.st_size > limit:
                raise StoreError(f"found {path} of {found.st_size} bytes, needed at most {limit}")
            return file.read(limit + 1)

    def write(self, name: str, data: bytes) -> None:
        """Puts a file in place as a whole, or not at all.

        Raises:
            OSError: no space, no permission. Nothing of it stays.
        """
        temporary = f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex}"
        try:
            self.write_new(temporary, data)
            self.rename(temporary, name)
        except OSError:
            with contextlib.suppress(OSError):
                self.remove(temporary)
            raise
        self.sync()

    def write_new(self, name: str, data: bytes) -> None:
        """A file that did not exist, synced."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=self._descriptor)
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())

    def rename(self, name: str, to: str) -> None:
        """Puts a file in the place of another."""
        os.rename(name, to, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)

    def remove(self, name: str) -> None:
        """Removes a file."""
        os.unlink(name, dir_fd=self._descriptor)

    def sync(self) -> None:
        """Makes renames and removals last over a crash."""
        os.fsync(self._descriptor)

    def touch(self, name: str) -> None:
        """Marks a file as used now."""
        os.utime(name, dir_fd=self._descriptor, follow_symlinks=False)

    def names(self) -> list[str]:
        """The files, without temporary ones."""
        return sorted(name for name in os.listdir(self._descriptor) if not name.startswith("."))

    def stat(self, name: str) -> os.stat_result:
        """Size and times of a file."""
        return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)

    def sweep(self) -> None:
        """Removes temporary files of writers that died."""
        for name in os.listdir(self._descriptor):
            with contextlib.suppress(OSError):
                if name.startswith(TEMPORARY) and time.time() - self.stat(name).st_mtime > STALE_S:
                    self.remove(name)

    @contextlib.contextmanager
    def locked(self, name: str, wait_s: float) -> Iterator[None]:
        """Holds a lock between processes; the system lets go of it when its holder dies.

        Raises:
            StoreError: somebody else held it for longer than `wait_s`.
            OSError: the file system has no locks, or the folder cannot be written.
        """
        import fcntl

        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=self._descriptor)
        deadline = time.monotonic() + wait_s
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
                        raise
                    if time.monotonic() > deadline:
                        raise StoreError(f"found {self.path} locked by another process for {wait_s:g} s") from None
                time.sleep(0.02)
            yield
        finally:
            os.close(descriptor)


def open_private(path: str | os.PathLike[str]) -> Folder:
    """The folder at `path`, made if there is none, every part of the way checked.

    Raises:
        StoreError: a link or a folder that others can write on the way, or this system has no owners and modes.
        OSError: it cannot be made or read.
    """
    if not hasattr(os, "geteuid") or not hasattr(os, "O_NOFOLLOW"):
        raise StoreError("found a system without owners and modes of files, needed them to keep code that is executed")
    target = Path(os.path.abspath(path))
    descriptor, at = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), "/"
    parts = target.parts[1:]
    try:
        for number, part in enumerate(parts):
            last, at = number == len(parts) - 1, os.path.join(at, part)
            with contextlib.suppress(FileExistsError):
                if not _exists(part, descriptor):
                    os.mkdir(part, 0o700, dir_fd=descriptor)
            following = _open_folder(part, descriptor, at)
            os.close(descriptor)
            descriptor = following
            (_check_ours if last else _check_parent)(os.fstat(descriptor), at)
    except BaseException:
        os.close(descriptor)
        raise
    return Folder(descriptor, at)


def _exists(name: str, descriptor: int) -> bool:
    try:
        os.stat(name, dir_fd=descriptor, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _open_folder(name: str, descriptor: int, path: str) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=descriptor)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise StoreError(
                f"found {path}, a link or no folder, needed folders: type {os.path.realpath(path)}"
            ) from None
        raise


def _check_parent(found: os.stat_result, path: str) -> None:
    if found.st_uid not in (0, os.geteuid()):
        raise StoreError(f"found {path} owned by user {found.st_uid}, needed this user ({os.geteuid()}) or root")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        raise StoreError(f"found {path} writable for others, needed a private folder: chmod go-w {path}")


def _check_ours(found: os.stat_result, path: str) -> None:
    if found.st_uid != os.geteuid():
        raise StoreError(f"found {path} owned by user {found.st_uid}, needed this user ({os.geteuid()})")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StoreError(f"found {path} writable for others, needed it private: chmod go-w {path}")
