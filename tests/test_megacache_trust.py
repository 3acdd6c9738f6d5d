"""What comes from elsewhere: only what a trusted key has signed is interpreted, whoever may write there."""

from __future__ import annotations

import contextlib
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxfire.store import Manifest, Store, StoreError, shelves
from fluxfire.store.manifest import digest
from fluxfire.store.remote import fetch, give, keys_on, take
from fluxfire.store.shelves import Bucket, Pack, Patient, packing, shelf_at
from fluxfire.store.trust import Keys, unseal


def fields(number: int) -> dict[str, Any]:
    return {"environment": {"torch": "2.13.0"}, "number": number}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    keys = Keys(tmp_path / "keys")
    keys.make("the tests")
    return keys


@pytest.fixture
def theirs(tmp_path: Path) -> Keys:
    """Somebody whom `keys` does not trust."""
    theirs = Keys(tmp_path / "their keys")
    theirs.make("somebody")
    return theirs


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    for number in range(3):
        store.put(fields(number), {"made": "here"}, b"payload %d" % number)
    return store


@pytest.fixture
def shelf(tmp_path: Path, store: Store, keys: Keys) -> Any:
    """A mounted folder with the store's entries, signed by `keys`."""
    shelf = Bucket(f"file://{tmp_path}/shelf")
    assert {moved.what for moved in give(shelf, store, keys)} == {"done"}
    return shelf


def everything(shelf: Any, keys: Keys) -> list[bytes]:
    """All payloads that can be had."""
    found = []
    for key in keys_on(shelf):
        with contextlib.suppress(StoreError):
            entry = fetch(shelf, key, keys.trusted())
            found += [entry[1]] if entry else []
    return sorted(found)


ALL = [b"payload 0", b"payload 1", b"payload 2"]


def test_what_is_given_is_taken(tmp_path: Path, store: Store, keys: Keys, shelf: Any) -> None:
    assert everything(shelf, keys) == ALL
    other = Store(tmp_path / "other")
    assert [moved.what for moved in take(shelf, other, keys)] == ["done"] * 3
    assert sorted(map(other.payload, other.manifests())) == ALL and other.verify() == {}
    assert {manifest.facts["signed_by"] for manifest in other.manifests()} == {keys.own()}
    assert {manifest.facts["from"] for manifest in other.manifests()} == {shelf.place}
    assert {moved.what for moved in take(shelf, other, keys)} == {"there"}
    assert {moved.what for moved in give(shelf, store, keys)} == {"there"}


def test_an_entry_here_is_never_replaced_by_one_from_elsewhere(tmp_path: Path, keys: Keys, shelf: Any) -> None:
    other = Store(tmp_path / "other")
    other.put(fields(1), {}, b"my own")
    assert sorted(moved.what for moved in take(shelf, other, keys)) == ["done", "done", "there"]
    assert other.payload(other.manifest(digest(fields(1)))) == b"my own"


def test_a_stranger_s_signature_is_refused_until_he_is_trusted(shelf: Any, keys: Keys, theirs: Keys) -> None:
    key = keys_on(shelf)[0]
    with pytest.raises(StoreError, match=rf"you do not trust: fluxfire megacache key trust {keys.own()}"):
        fetch(shelf, key, theirs.trusted())
    theirs.trust(keys.own(), "a friend")
    assert len(everything(shelf, theirs)) == 3
    assert theirs.untrust("a friend") == keys.own()
    assert everything(shelf, theirs) == []


def test_an_unsigned_entry_is_refused(tmp_path: Path, keys: Keys, shelf: Any) -> None:
    for path in (tmp_path / "shelf" / "entries").iterdir():
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(StoreError, match="without a signature"):
        fetch(shelf, keys_on(shelf)[0], keys.trusted())
    assert everything(shelf, keys) == []


def no_json(*_: Any, **__: Any) -> None:
    raise AssertionError("something was interpreted")


def test_nothing_is_interpreted_before_the_signature(
    tmp_path: Path, keys: Keys, theirs: Keys, shelf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a manifest of somebody else, nor one of ours with a bit changed; and no payload is read."""
    key, trusted = keys_on(shelf)[0], keys.trusted()
    path = tmp_path / "shelf" / "entries" / f"{key}.json"
    good = path.read_bytes()
    bad = [theirs.seal(Manifest.decode(good.splitlines(keepends=True)[0], key)), good.replace(b"here", b"hero")]
    monkeypatch.setattr(json, "loads", no_json)
    (tmp_path / "shelf" / "payloads").rename(tmp_path / "away")
    for data in bad:
        path.write_bytes(data)
        with pytest.raises(StoreError, match=r"whom you do not trust|it was changed"):
            fetch(shelf, key, trusted)


def test_a_swapped_payload_under_a_valid_manifest_is_refused(tmp_path: Path, keys: Keys, shelf: Any) -> None:
    paths = sorted((tmp_path / "shelf" / "payloads").iterdir())
    first = paths[0].read_bytes()
    paths[0].write_bytes(paths[1].read_bytes())
    paths[1].write_bytes(first)
    assert len(everything(shelf, keys)) == 1
    paths[2].write_bytes(b"payload 9")
    assert everything(shelf, keys) == []


def test_a_signature_is_worth_nothing_beside_another_entry(tmp_path: Path, keys: Keys, shelf: Any) -> None:
    """The whole signed entry under another key; its signature after another manifest; after one made to fit."""
    folder = tmp_path / "shelf" / "entries"
    one, other = sorted(folder.iterdir())[:2]
    (manifest, signature), (other_manifest, _) = (path.read_bytes().splitlines(keepends=True) for path in (one, other))
    forged = Manifest.of(fields(1), {}, b"evil").encode()
    forms = {other.stem: (manifest + signature, other_manifest + signature), digest(fields(1)): (forged + signature,)}
    for key, datas in forms.items():
        for data in datas:
            with pytest.raises(StoreError, match=r"damaged manifest|it was changed"):
                unseal(data, key, keys.trusted())


def test_a_signature_for_another_purpose_is_none(keys: Keys) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    manifest = Manifest.of(fields(1), {}, b"payload")
    secret: Any = load_pem_private_key((Path(keys.path) / "signing.pem").read_bytes(), None)
    data = manifest.encode()
    line = f'{{"key":"{keys.own()}","signature":"{secret.sign(data).hex()}"}}\n'.encode()
    with pytest.raises(StoreError, match="it was changed"):
        unseal(data + line, manifest.key, keys.trusted())


def test_no_mutated_signed_entry_is_accepted(keys: Keys) -> None:
    chance, manifest = random.Random(0), Manifest.of(fields(1), {}, b"payload")
    sealed, trusted = keys.seal(manifest), keys.trusted()
    assert unseal(sealed, manifest.key, trusted) == (manifest, keys.own())
    for _ in range(2000):
        at = chance.randrange(len(sealed))
        bad = chance.choice(
            [
                sealed[:at],
                sealed[:at] + bytes([sealed[at] ^ 1 << chance.randrange(8)]) + sealed[at + 1 :],
                sealed[:at] + chance.randbytes(2) + sealed[at:],
                sealed + chance.choice([b"\n", b" ", sealed]),
            ]
        )
        with pytest.raises(StoreError):
            unseal(bad, manifest.key, trusted)


@pytest.mark.parametrize(
    "name", ["entries/../../evil.json", "entries/" + "0" * 63 + ".json", "entries/" + "0" * 64 + ".json/x", "x/y"]
)
def test_names_from_elsewhere_become_no_paths(name: str, store: Store, keys: Keys, tmp_path: Path) -> None:
    asked: list[str] = []

    class Evil:
        place = "evil://"

        def names(self) -> list[str]:
            return [name]

        def read(self, name: str, limit: int) -> bytes:
            asked.append(name)
            raise FileNotFoundError(name)

    assert list(take(Evil(), store, keys)) == [] and asked == []


def test_links_and_pipes_in_a_mounted_folder(tmp_path: Path, keys: Keys, shelf: Any, patience: None) -> None:
    """A link is followed, and what it leads to must be signed too; a pipe that never ends is given up."""
    path = tmp_path / "shelf" / "entries" / f"{keys_on(shelf)[0]}.json"
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(StoreError, match="without a signature"):
        fetch(shelf, path.stem, keys.trusted())
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match=r"no answer|unusable"):
        fetch(Patient(shelf), path.stem, keys.trusted())
    with contextlib.suppress(OSError):  # lets the thread go
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves, "WAIT_S", 0.2)


class Slow:
    """A place that answers when it is told to."""

    place = "slow://"

    def __init__(self) -> None:
        import threading

        self.calls, self.go = 0, threading.Event()

    def read(self, name: str, limit: int) -> bytes:
        self.calls += 1
        self.go.wait(60)
        return b""

    def names(self) -> list[str]:
        raise ConnectionError("no route\nto host")


def test_a_place_that_hangs_is_left_alone(patience: None, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    patient = Patient(slow)
    for _ in range(3):
        with pytest.raises(StoreError, match=r"found slow:// unusable: StoreError: no answer for 0\.2"):
            patient.read("entries/x", 10)
    assert slow.calls == 1
    slow.go.set()
    monkeypatch.setattr(patient, "_left_alone_until", 0.0)
    assert patient.read("entries/x", 10) == b""
    with pytest.raises(StoreError, match=r"ConnectionError: no route$"):
        patient.names()


def test_what_is_larger_than_it_says_is_not_read(tmp_path: Path, keys: Keys, shelf: Any) -> None:
    key = keys_on(shelf)[0]
    entry = tmp_path / "shelf" / "entries" / f"{key}.json"
    whole = fetch(shelf, key, keys.trusted())
    payload = tmp_path / "shelf" / "payloads" / whole[0].payload_sha256
    payload.write_bytes(whole[1] + b"more")
    with pytest.raises(StoreError, match="bytes, needed at most 9"):
        fetch(Patient(shelf), key, keys.trusted())
    os.truncate(payload, 3)
    with pytest.raises(StoreError, match="damaged payload"):
        fetch(shelf, key, keys.trusted())
    payload.unlink()
    with pytest.raises(StoreError, match="without its payload"):
        fetch(shelf, key, keys.trusted())
    os.truncate(entry, 2**23)
    with pytest.raises(StoreError, match="needed at most"):
        fetch(shelf, key, keys.trusted())


def test_two_writers_leave_one_whole_entry(tmp_path: Path, keys: Keys, theirs: Keys) -> None:
    """Every way in which the writes of two can fall between each other: each of their two writes is one piece."""
    import itertools

    key = digest(fields(1))
    keys.trust(theirs.own(), "somebody")
    for number, order in enumerate(sorted(set(itertools.permutations("aabb")))):
        shelf = Bucket(f"file://{tmp_path}/shelf {number}")
        writers = {}
        for name, mine in (("a", keys), ("b", theirs)):
            payload = b"made by " + name.encode()
            manifest = Manifest.of(fields(1), {}, payload)
            names = (f"payloads/{manifest.payload_sha256}", payload), (f"entries/{key}.json", mine.seal(manifest))
            writers[name] = iter(names)
        for name in order:
            shelf.write(*next(writers[name]))
        assert fetch(shelf, key, keys.trusted())[1] == b"made by " + order[-1].encode()


@pytest.fixture
def pack(tmp_path: Path, store: Store, keys: Keys) -> Path:
    path = tmp_path / "pack.fluxfire"
    with packing(path) as shelf:
        assert {moved.what for moved in give(shelf, store, keys)} == {"done"}
    return path


def test_one_file_carries_all(tmp_path: Path, pack: Path, keys: Keys) -> None:
    other = Store(tmp_path / "other")
    assert [moved.what for moved in take(shelf_at(pack), other, keys)] == ["done"] * 3
    assert sorted(map(other.payload, other.manifests())) == ALL
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path, pack: Path, keys: Keys) -> None:
    data, chance = pack.read_bytes(), random.Random(0)
    good = {bytes(payload) for payload in ALL}
    for number in range(120):
        at = chance.randrange(len(data))
        bad = data[:at] if number % 3 else data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        pack.write_bytes(bad)
        store = Store(tmp_path / f"other {number}")
        with contextlib.suppress(StoreError):
            list(take(Pack(pack), store, keys))
        assert {store.payload(manifest) for manifest in store.manifests()} <= good
        store.close()


def test_a_file_that_grows_when_it_is_read_is_refused(tmp_path: Path, pack: Path, keys: Keys) -> None:
    bomb, key = tmp_path / "bomb", keys_on(Pack(pack))[0]
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr(f"entries/{key}.json", bytes(2**20))
    with pytest.raises(StoreError, match="compressed"):
        fetch(Pack(bomb), key, keys.trusted())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="no regular file"):
        Pack(tmp_path / "pipe").names()
    with pytest.raises(FileNotFoundError):
        Pack(tmp_path / "nothing").names()


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), packing(tmp_path / "pack"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_keys_are_kept_private_and_made_once(tmp_path: Path, keys: Keys) -> None:
    assert (Path(keys.path) / "signing.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(StoreError, match="needed none: it would be lost"):
        keys.make("again")
    assert keys.trusted() == {keys.own(): "the tests"} == Keys(keys.path).trusted()
    Path(keys.path).chmod(0o777)
    with pytest.raises(StoreError, match="writable for others"):
        Keys(keys.path)


def test_without_a_key_nothing_is_given(tmp_path: Path, store: Store) -> None:
    moved = list(give(Bucket(f"file://{tmp_path}/shelf"), store, Keys(tmp_path / "no keys")))
    assert {one.what for one in moved} == {"refused"} and "fluxfire megacache key new" in moved[0].reason


BAD: dict[str, Callable[[Keys], object]] = {
    "short": lambda keys: keys.trust("ab" * 31, "x"),
    "capital": lambda keys: keys.trust("AB" * 32, "x"),
    "two lines": lambda keys: keys.trust("ab" * 32, f"x\n{'cd' * 32} y"),
    "nobody": lambda keys: keys.untrust("nobody"),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD.keys())
def test_bad_keys_and_names_are_refused(keys: Keys, call: Callable[[Keys], object]) -> None:
    with pytest.raises(StoreError, match=r"found .*, needed"):
        call(keys)
    assert len(keys.trusted()) == 1


def test_a_damaged_file_of_trusted_keys_trusts_nobody(keys: Keys) -> None:
    (Path(keys.path) / "trusted").write_text(f"{keys.own()} a\nnonsense\n")
    with pytest.raises(StoreError, match="needed lines of 64 digits"):
        keys.trusted()


@pytest.mark.parametrize("url", ["http://example.com/x", "ftp://x/y", "memory:///"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match="needed one of s3://"):
        shelf_at(url)
