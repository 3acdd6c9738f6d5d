"""The store: an entry is there whole or not at all, whatever dies, fills up or lies in the folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fluxfire
from fluxfire.store import Folder, Manifest, Store, StoreError, open_private
from fluxfire.store.files import STALE_S
from fluxfire.store.manifest import digest

# The store alone in a process of its own, without torch: the package's __init__ is passed over.
LIGHT = f"""
import sys, types
package = types.ModuleType("fluxfire")
package.__path__ = [{str(Path(fluxfire.__file__).parent)!r}]
sys.modules["fluxfire"] = package
from fluxfire.store import Store, StoreError
"""


def fields(number: int) -> dict[str, Any]:
    return {"environment": {"torch": "2.13.0", "gpu": "none"}, "number": number}


def content(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest() * 40


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def got(store: Store, number: int) -> bytes | None:
    """What is kept under these fields; None for nothing or damage."""
    try:
        manifest = store.manifest(digest(fields(number)))
        return store.payload(manifest) if manifest else None
    except (StoreError, OSError):
        return None


def test_what_is_put_is_got(store: Store) -> None:
    manifest = store.put(fields(1), {"made": "here"}, content(1))
    assert got(store, 1) == content(1) and got(store, 2) is None
    assert store.manifest(manifest.key) == manifest and store.manifests() == [manifest]
    assert store.verify() == {}
    store.put(fields(1), {}, content(2))
    assert got(store, 1) == content(2)
    assert len(list((Path(store.path) / "payloads").iterdir())) == 1  # what nothing names is gone
    store.remove(manifest.key)
    assert store.keys() == [] and store.size() == 0


def test_equal_payloads_are_kept_once(store: Store) -> None:
    for number in range(3):
        store.put(fields(number), {}, content(0))
    assert len(os.listdir(Path(store.path) / "payloads")) == 1
    store.remove(digest(fields(0)))
    assert got(store, 1) == got(store, 2) == content(0)


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", max_bytes=6000)
    for number in range(3):
        store.put(fields(number), {}, content(number))
        os.utime(tmp_path / "store" / "entries" / f"{digest(fields(number))}.json", (number, number))
    assert got(store, 0) == content(0)  # a read is a use
    store.put(fields(3), {}, content(3))
    assert [number for number in range(4) if got(store, number)] == [0, 2, 3]
    assert store.size() <= 6000
    with pytest.raises(StoreError, match="needed at most 6000"):
        store.put(fields(4), {}, bytes(6000))
    assert len(store.prune(2000)) == 2 and store.size() <= 2000


class Killed(BaseException):
    """The process is gone: nothing of it runs any more."""


def failing(at: int, fault: Callable[[], BaseException], torn: bool) -> tuple[Callable[..., Folder], list[int]]:
    """Opens folders of which the system call number `at` fails; a torn one has half of its effect."""
    calls = [0]

    class Failing(Folder):
        def child(self, name: str, *, create: bool) -> Folder:
            folder = super().child(name, create=create)
            return Failing(folder._descriptor, folder.path)

        def write_new(self, name: str, data: bytes) -> None:
            calls[0] += 1
            if calls[0] == at:
                if torn:
                    super().write_new(name, data[: len(data) // 2])
                raise fault()
            super().write_new(name, data)

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(Folder, name)

        def call(self: Folder, *args: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                if torn:
                    with contextlib.suppress(FileNotFoundError):
                        real(self, *args)
                raise fault()
            return real(self, *args)

        return call

    for name in ("rename", "remove", "sync"):
        setattr(Failing, name, counted(name))

    def opened(path: Any) -> Folder:
        folder = open_private(path)
        return Failing(folder._descriptor, folder.path)

    return opened, calls


def work(store: Store) -> None:
    """Puts, replaces, shares, evicts and removes."""
    for number in range(6):
        store.put(fields(number), {}, content(number))
    store.put(fields(1), {}, content(7))
    store.put(fields(2), {}, content(7))
    store.remove(digest(fields(3)))
    store.prune(3500)
    for number in range(4, 9):
        store.put(fields(number), {}, content(number))


ALLOWED = {number: {None, content(number)} for number in range(9)}
ALLOWED[1].add(content(7))
ALLOWED[2].add(content(7))


def check_sound(path: Path) -> None:
    """Claims that each entry is one that was put, or none; that all can be used; and that the store works on."""
    store = Store(path, max_bytes=7000)
    for number, allowed in ALLOWED.items():
        assert got(store, number) in allowed
    assert store.verify() == {}
    store.put(fields(9), {}, content(9))
    assert got(store, 9) == content(9)
    named = {manifest.payload_sha256 for manifest in store.manifests()}
    assert {path.name for path in (path / "payloads").iterdir() if not path.name.startswith(".")} == named
    store.close()


@pytest.mark.parametrize("torn", [False, True], ids=["before", "half-way"])
def test_killed_at_every_system_call(tmp_path: Path, torn: bool) -> None:
    """Twice some 100 points; with the test below, more than 270."""
    for at in itertools.count(1):
        opened, calls = failing(at, Killed, torn)
        path = tmp_path / f"store {at}"
        try:
            work(Store(path, max_bytes=7000, folder=opened))
        except Killed:
            check_sound(path)
        else:
            break
    assert at > 90 and calls[0] < at


def test_killed_by_the_system_while_writing(tmp_path: Path) -> None:
    """Real processes and SIGKILL, at 75 moments."""
    code = LIGHT + (
        "import hashlib, itertools\n"
        "store = Store(sys.argv[1], max_bytes=7000)\n"
        "print('ready', flush=True)\n"
        "for number in itertools.cycle(range(6)):\n"
        "    fields = {'environment': {'torch': '2.13.0', 'gpu': 'none'}, 'number': number}\n"
        "    store.put(fields, {}, hashlib.sha256(str(number).encode()).digest() * 40)\n"
    )
    chance, path = random.Random(0), tmp_path / "store"
    for _ in range(75):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.readline() == b"ready\n"
        time.sleep(chance.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        check_sound(path)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
def test_a_fault_of_the_disk_leaves_the_store_as_it_was(tmp_path: Path, fault: int) -> None:
    """A full disk, at every call that can meet it: an error, all entries sound, no temporary file."""
    opened, calls = failing(-1, Killed, torn=False)
    whole = Store(tmp_path / "whole", folder=opened)
    whole.put(fields(0), {}, content(0))
    before = calls[0]
    whole.put(fields(1), {}, content(1))
    for at in range(before + 1, calls[0] + 1):
        path = tmp_path / f"store {at}"
        opened, _ = failing(at, lambda: OSError(fault, os.strerror(fault)), torn=False)
        store = Store(path, folder=opened)
        store.put(fields(0), {}, content(0))
        with pytest.raises(OSError, match=os.strerror(fault)):
            store.put(fields(1), {}, content(1))
        assert got(store, 0) == content(0)
        assert not [name for name in os.listdir(path / "payloads") if name.startswith(".")]
        check_sound(path)


def test_a_full_disk_as_the_system_tells_it(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the system's own error, in the middle of a write."""
    code = LIGHT + (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "store = Store(sys.argv[1])\n"
        "store.put({'a': 1}, {}, b'x' * 1000)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        "    store.put({'a': 2}, {}, b'y' * 100_000)\n"
        "except OSError as error:\n"
        "    print(type(error).__name__, store.verify(), len(store.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], capture_output=True, text=True, check=True)
    assert done.stdout == "OSError {} 1\n"
    assert len(os.listdir(tmp_path / "s" / "payloads")) == 1


def test_a_folder_that_can_only_be_read_serves_and_takes_nothing(tmp_path: Path) -> None:
    Store(tmp_path / "store").put(fields(1), {}, content(1))

    class ReadOnly(Folder):
        def child(self, name: str, *, create: bool) -> Folder:
            folder = super().child(name, create=create)
            return ReadOnly(folder._descriptor, folder.path)

        def touch(self, name: str) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        def locked(self, name: str, wait_s: float) -> Any:
            raise OSError(errno.EROFS, "Read-only file system")

    def opened(path: Any) -> Folder:
        folder = open_private(path)
        return ReadOnly(folder._descriptor, folder.path)

    store = Store(tmp_path / "store", folder=opened)
    assert got(store, 1) == content(1)
    with pytest.raises(OSError, match="Read-only"):
        store.put(fields(2), {}, content(2))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_to_write(tmp_path: Path) -> None:
    Store(tmp_path / "store").put(fields(1), {}, content(1))
    for name in ("store", "store/entries", "store/payloads"):
        (tmp_path / name).chmod(0o500)
    store = Store(tmp_path / "store")
    assert got(store, 1) == content(1)
    with pytest.raises(OSError, match="Permission denied"):
        store.put(fields(2), {}, content(2))
    for name in ("store", "store/entries", "store/payloads"):
        (tmp_path / name).chmod(0o700)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The data with a bit, a byte, a run or a field changed."""
    at, kind = chance.randrange(len(data)), chance.randrange(7)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + chance.randbytes(chance.randint(1, 9)) + data[at:]
    if kind == 3:
        return data[:at] + data[at + chance.randint(1, 40) :]
    if kind == 4:
        return data + chance.choice([b"\0", b" ", b"\n", b"{}", data])
    if kind == 5:
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    other = chance.randrange(len(data))
    return data[:at] + data[other : other + 16] + data[at + 16 :]


def test_no_mutated_entry_is_accepted(store: Store) -> None:
    """12,000 entries, by their bytes; and 600 of them on the disk."""
    chance = random.Random(0)
    manifest = store.put(fields(1), {"sources": {"a": "b"}}, content(1))
    data, payload, differing = manifest.encode(), content(1), 0
    while differing < 12_000:
        bad = mutated(data, chance)
        if bad != data:
            differing += 1
            with pytest.raises(StoreError):
                Manifest.decode(bad, manifest.key)
        worse = mutated(payload, chance)
        if worse != payload:
            differing += 1
            with pytest.raises(StoreError):
                manifest.check(worse)
    entry = Path(store.path) / "entries" / f"{manifest.key}.json"
    kept = Path(store.path) / "payloads" / manifest.payload_sha256
    for path, good in ((entry, data), (kept, payload)):
        for _ in range(300):
            path.write_bytes(mutated(good, chance))
            assert path.read_bytes() == good or got(store, 1) is None
        path.write_bytes(good)
    assert got(store, 1) == content(1)


def test_manifests_in_any_other_form_are_refused(store: Store) -> None:
    """JSON that says the same in other bytes, or other things under a right checksum."""
    manifest = store.put(fields(1), {}, content(1))
    whole = json.loads(manifest.encode())
    body = whole["manifest"]

    def sealed(**changes: Any) -> bytes:
        text = json.dumps(body | changes, sort_keys=True, separators=(",", ":"))
        return f'{{"manifest":{text},"sha256":"{hashlib.sha256(text.encode()).hexdigest()}"}}\n'.encode()

    assert Manifest.decode(sealed(), manifest.key) == manifest
    forms = [
        json.dumps(whole, indent=1).encode(),
        sealed(format=2),
        sealed(key="0" * 64),
        sealed(fields=fields(2)),
        sealed(payload_sha256="../" * 10 + "etc/passwd"),
        sealed(payload_bytes=str(len(content(1)))),
        sealed(facts=[]),
        sealed(more=1),
        b"[" * 100_000,
        b"null",
        b"",
    ]
    for form in forms:
        with pytest.raises(StoreError, match="damaged"):
            Manifest.decode(form, manifest.key)
    with pytest.raises(StoreError, match="damaged"):
        Manifest.decode(manifest.encode(), "0" * 64)


def test_what_lies_about_is_no_entry_and_damage_is_removed(store: Store) -> None:
    entries, payloads = Path(store.path) / "entries", Path(store.path) / "payloads"
    store.put(fields(1), {}, content(1))
    (entries / ("0" * 64 + ".json")).write_text("{}")
    (payloads / "stray").write_text("x")
    old = payloads / ".tmp-1-old"
    old.write_text("x")
    os.utime(old, (time.time() - STALE_S - 60,) * 2)
    (payloads / ".tmp-2-new").write_text("x")
    assert len(store.manifests()) == 1
    store.put(fields(2), {}, content(2))
    assert sorted(path.suffix for path in entries.iterdir()) == [".json", ".json"]
    assert sorted(name for name in os.listdir(payloads) if not name.isalnum()) == [".tmp-2-new"]


def test_eight_processes_at_once(tmp_path: Path) -> None:
    """Each puts, reads, removes and prunes; nobody ever reads other bytes than those put, nobody fails."""
    code = LIGHT + (
        "import hashlib, random\n"
        "chance, store, reads = random.Random(sys.argv[2]), Store(sys.argv[1], max_bytes=8000, lock_wait_s=60), 0\n"
        "content = lambda number: hashlib.sha256(str(number).encode()).digest() * 40\n"
        "for _ in range(60):\n"
        "    number = chance.randrange(9)\n"
        "    fields = {'environment': {}, 'number': number}\n"
        "    action = chance.random()\n"
        "    if action < 0.5:\n"
        "        key = store.put(fields, {}, content(number)).key\n"
        "    elif action < 0.55:\n"
        "        store.prune(5000)\n"
        "    elif action < 0.6 and store.keys():\n"
        "        store.remove(chance.choice(store.keys() or ['0' * 64]))\n"
        "    for manifest in store.manifests():\n"
        "        try:\n"
        "            data = store.payload(manifest)\n"
        "        except (StoreError, FileNotFoundError):\n"
        "            continue  # removed since\n"
        "        assert data == content(manifest.fields['number'])\n"
        "        reads += 1\n"
        "print(reads)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    processes = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in range(8)
    ]
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert int(out) > 20
    store = Store(tmp_path / "store")
    assert store.verify() == {} and store.size() <= 8000


def test_the_wait_for_the_lock_is_bounded_and_readers_do_not_wait(tmp_path: Path) -> None:
    store, other = Store(tmp_path / "store"), Store(tmp_path / "store", lock_wait_s=0.05)
    store.put(fields(1), {}, content(1))
    with store._root.locked("lock", 1):
        with pytest.raises(StoreError, match="locked by another process"):
            other.put(fields(2), {}, content(2))
        assert got(other, 1) == content(1)
    other.put(fields(2), {}, content(2))


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_folders_that_others_can_write_are_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "shared" / "store"
    Store(path).put(fields(1), {}, content(1))
    for part in (path.parent, path, path / "entries", path / "payloads"):
        part.chmod(mode)
        with pytest.raises(StoreError, match=f"{part.name}.* writable for others, needed .*chmod go-w"):
            Store(path)
        part.chmod(0o700)
    assert got(Store(path), 1) == content(1)


def test_links_are_refused(tmp_path: Path) -> None:
    """On the way, as the store, in it, and in the place of its files."""
    real = tmp_path / "real"
    store = Store(real / "store")
    manifest = store.put(fields(1), {}, content(1))
    (tmp_path / "link").symlink_to(real)
    for path in (tmp_path / "link", tmp_path / "link" / "store"):
        with pytest.raises(StoreError, match="a link or no folder"):
            Store(path)
    elsewhere = tmp_path / "elsewhere"
    for name in (f"payloads/{manifest.payload_sha256}", f"entries/{manifest.key}.json"):
        path = real / "store" / name
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        assert got(store, 1) is None
        path.unlink()
        elsewhere.rename(path)
    (real / "store" / "payloads").rename(elsewhere)
    (real / "store" / "payloads").symlink_to(elsewhere)
    with pytest.raises(StoreError, match="a link or no folder"):
        Store(real / "store")


def test_no_files_but_regular_ones_of_ours_are_read(store: Store, tmp_path: Path) -> None:
    manifest = store.put(fields(1), {}, content(1))
    path = Path(store.path) / "payloads" / manifest.payload_sha256
    path.chmod(0o666)
    with pytest.raises(StoreError, match="writable for others"):
        store.payload(manifest)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(StoreError, match="no regular file"):
        store.payload(manifest)
    path.unlink()
    path.write_bytes(content(1) + b"more")
    with pytest.raises(StoreError, match="bytes, needed at most"):
        store.payload(manifest)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_files_are_refused(tmp_path: Path) -> None:
    Store(tmp_path / "theirs" / "store")
    for name in ("theirs", "theirs/store", "theirs/store/entries"):
        os.chown(tmp_path / name, 12345, -1)
        with pytest.raises(StoreError, match="owned by user 12345"):
            Store(tmp_path / "theirs" / "store")
        os.chown(tmp_path / name, 0, -1)


def test_a_new_store_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Store(tmp_path / "a" / "store").put(fields(1), {}, content(1))
    finally:
        os.umask(before)
    for path in [tmp_path / "a", *(tmp_path / "a").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_of_processes_that_make_the_same_at_once_one_makes_it(tmp_path: Path) -> None:
    """Whoever waited looks again; who dies while he makes it is waited for no longer."""
    code = LIGHT + (
        "import os\n"
        "store = Store(sys.argv[1], lock_wait_s=60)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "with store.claimed('block', 60):\n"
        "    if sys.argv[2] == 'dies':\n"
        "        print('claimed', flush=True)\n"
        "        sys.stdin.readline()\n"
        "        os.kill(os.getpid(), 9)\n"
        "    print('found' if store.keys() else store.put({'a': 1}, {}, b'payload') and 'made')\n"
    )

    def begin(what: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(tmp_path / "store"), what]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout and process.stdout.readline() == "ready\n"
        return process

    first = begin("dies")
    first.stdin.write("go\n")
    first.stdin.flush()
    assert first.stdout.readline() == "claimed\n"
    others = [begin("lives") for _ in range(4)]
    for process in others:
        process.stdin.write("go\n")
        process.stdin.flush()
    first.communicate("die\n", timeout=60)
    assert sorted(process.communicate(timeout=120)[0] for process in others) == ["found\n"] * 3 + ["made\n"]
