"""The mega-cache shared by machines: a real S3 server on loopback, with faults before it; and the Hub's protocol."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from s3_server import ACCESS, SECRET, FaultyProxy, seaweed
from serving import wait_until
from test_cli import run as command

import fluxfire
import fluxfire.aot
import fluxfire.megacache
import fluxfire.structure
from fluxfire.megacache import Artifact, MegaCache
from fluxfire.store import Manifest, Store, remote, shelves
from fluxfire.store.files import StoreError
from fluxfire.store.manifest import digest
from fluxfire.store.remote import fetch, give, keys_on
from fluxfire.store.shelves import shelf_at
from fluxfire.store.trust import Keys


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with seaweed(tmp_path_factory.mktemp("seaweed")) as port:
        yield port


@pytest.fixture
def proxy(s3: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The way to the server, which is where the environment says it is."""
    proxy = FaultyProxy(s3)
    variables = {"ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "ALLOW_HTTP": "true", "REGION": "us-east-1"}
    for name, value in (variables | {"ACCESS_KEY_ID": ACCESS, "SECRET_ACCESS_KEY": SECRET}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield proxy
    proxy.close()


@pytest.fixture
def bucket(proxy: FaultyProxy, request: pytest.FixtureRequest) -> str:
    return f"s3://artifacts/{digest({'test': request.node.name})[:16]}/made"


@pytest.fixture
def keys() -> Keys:
    """This user's."""
    keys = Keys()
    keys.make("the tests")
    return keys


class Loaded:
    def disable_guard_check(self) -> None:
        pass


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What torch was given to load."""
    given: list[bytes] = []

    def load(file: Any) -> Loaded:
        given.append(file.read())
        return Loaded()

    monkeypatch.setattr(torch.compiler, "load_compiled_function", load)
    return given


def fields(number: int) -> dict[str, Any]:
    return {"environment": {}, "block": {"class": {"name": "x.Block"}}, "inputs": [], "number": number}


def made(number: int, payload: bytes = b"payload") -> Artifact:
    return Artifact(fields(number), None, (), payload, len(payload))


def not_made(why: str) -> Artifact:
    raise AssertionError(why)


def compiles(cache: MegaCache, number: int) -> str:
    """Asks for an artifact; why it was compiled."""
    whys: list[str] = []
    cache.get(fields(number), lambda why: whys.append(why) or made(number))
    return whys[0]


def test_what_one_machine_compiles_another_finds(tmp_path: Path, bucket: str, keys: Keys, loaded: list[bytes]) -> None:
    """Read-write, then read-only: found without compilation, kept here, and not asked for again."""
    writer = MegaCache(str(tmp_path / "one"), bucket, share=True)
    assert f"not in {bucket}; the store is empty" in compiles(writer, 1)
    assert writer.keep(made(1))
    reader = MegaCache(str(tmp_path / "two"), bucket)
    reader.get(fields(1), not_made)
    assert loaded == [b"payload"]
    (manifest,) = reader.store.manifests()
    assert (manifest.facts["from"], manifest.facts["signed_by"]) == (bucket, keys.own())
    assert compiles(reader, 2).startswith(f"not in {bucket}; number 1, here 2")
    assert reader.keep(made(2))
    assert keys_on(shelf_at(bucket)) == [digest(fields(1))]
    MegaCache(str(tmp_path / "two"), "s3://artifacts/nothing").get(fields(1), not_made)


def test_prefetch_fetches_what_fits_this_machine(tmp_path: Path, bucket: str, keys: Keys, loaded: list[bytes]) -> None:
    from fluxfire.environment import environment

    here = environment(torch.device(torch.accelerator.current_accelerator(check_available=True) or "cpu"))
    store = Store(tmp_path / "one")
    store.put(fields(1) | {"environment": here}, {"sources": {}}, b"ours")
    store.put(fields(2) | {"environment": {"gpu": "another"}}, {"sources": {}}, b"theirs")
    assert [moved.what for moved in give(shelf_at(bucket), store, keys)] == ["done"] * 2
    MegaCache(str(tmp_path / "two"), bucket).prefetch()
    assert loaded == [b"ours"]
    assert len(Store(tmp_path / "two").keys()) == 1


class Attack:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.mkdir, (Path(self.path),))


def test_what_a_stranger_put_there_is_never_loaded(
    tmp_path: Path, bucket: str, keys: Keys, loaded: list[bytes]
) -> None:
    """Under a signature of his own, with ours of another entry, and as other bytes of what we signed."""
    shelf, store = shelf_at(bucket), Store(tmp_path / "theirs")
    stranger = Keys(tmp_path / "their keys")
    stranger.make("a stranger")
    attack = pickle.dumps(Attack(str(tmp_path / "planted")))
    bad = store.put(fields(1), {"sources": {"os": "x"}}, attack)
    assert [moved.what for moved in give(shelf, store, stranger)] == ["done"]
    cache = MegaCache(str(tmp_path / "ours"), bucket)
    assert "whom you do not trust" in compiles(cache, 1)
    cache.forget(fields(1))
    good = Manifest.of(fields(2), {}, b"good")
    shelf.write(f"entries/{bad.key}.json", bad.encode() + keys.seal(good)[len(good.encode()) :])
    assert "it was changed" in compiles(cache, 1)
    shelf.write(f"entries/{good.key}.json", keys.seal(good))
    shelf.write(f"payloads/{good.payload_sha256}", b"evil")
    assert "damaged payload" in compiles(cache, 2)
    shelf.write(f"payloads/{good.payload_sha256}", attack)
    cache.forget(fields(2))
    assert "bytes, needed at most 4" in compiles(cache, 2)
    assert loaded == [] and not (tmp_path / "planted").exists() and cache.store.keys() == []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves, "WAIT_S", 1.0)


def test_a_server_that_stumbles_is_asked_again(tmp_path: Path, bucket: str, proxy: FaultyProxy, keys: Keys) -> None:
    writer = MegaCache(str(tmp_path / "one"), bucket, share=True)
    assert writer.keep(made(1))
    proxy.faults = ["unavailable", "reset"]
    MegaCache(str(tmp_path / "two"), bucket).get(fields(1), not_made)


def test_a_server_that_hangs_is_a_miss_and_is_left_alone(
    tmp_path: Path, bucket: str, proxy: FaultyProxy, keys: Keys, request: pytest.FixtureRequest
) -> None:
    assert MegaCache(str(tmp_path / "one"), bucket, share=True).keep(made(1))
    request.getfixturevalue("impatient")
    reader = MegaCache(str(tmp_path / "two"), bucket)
    proxy.faults = ["late"] * 99
    assert "unusable" in compiles(reader, 1)
    wait_until(lambda: len(proxy.faults) < 99)
    left = len(proxy.faults)
    assert left > 90
    assert "unusable" in compiles(reader, 2)
    assert len(proxy.faults) == left


@pytest.mark.usefixtures("impatient")
def test_nobody_there_is_a_miss(
    tmp_path: Path, keys: Keys, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from s3_server import free_ports

    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    cache = MegaCache(str(tmp_path / "one"), "s3://artifacts/x", share=True)
    assert "found s3://artifacts/x unusable" in compiles(cache, 1)
    assert cache.keep(made(1))  # here; what could not be shared is a line in the log
    assert "was not shared" in caplog.text


def test_wrong_credentials_are_a_miss_that_tells_no_secret(
    tmp_path: Path, bucket: str, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-canary")
    why = compiles(MegaCache(str(tmp_path / "one"), bucket), 1)
    assert "unusable" in why and "canary" not in why


def test_two_writers_at_once_leave_whole_entries(tmp_path: Path, bucket: str, keys: Keys) -> None:
    """Different payloads under the same keys: each entry is one writer's or the other's."""
    stores = [Store(tmp_path / name) for name in ("one", "two")]
    for name, store in zip((b"one", b"two"), stores, strict=True):
        for number in range(6):
            store.put(fields(number), {}, name + b" %d" % number)
    with ThreadPoolExecutor(2) as pool:
        moved = list(pool.map(lambda store: list(give(shelf_at(bucket), store, keys)), stores))
    assert {one.what for both in moved for one in both} == {"done"}
    shelf = shelf_at(bucket)
    for number in range(6):
        found = fetch(shelf, digest(fields(number)), keys.trusted())
        assert found and found[1] in (b"one %d" % number, b"two %d" % number)


def test_two_that_compile_the_same_at_once_compile_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stand for two processes: a lock of the system's between descriptors. The second waits until all is kept."""
    one, two = (MegaCache(str(tmp_path / "store")) for _ in range(2))
    begun = threading.Event()

    def first() -> None:
        for number in (1, 2):
            one.get(fields(number), lambda why, number=number: made(number), "group")
            begun.set()
        time.sleep(0.3)
        assert all(map(one.keep, (made(1), made(2))))
        one.release("group")

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    for number in (1, 2):
        two.get(fields(number), not_made, "group")
    thread.join()
    assert two._claims == {}  # who found it keeps nobody waiting
    assert one.claim("group") is False
    monkeypatch.setattr(fluxfire.megacache, "CLAIM_WAIT_S", 0.05)
    asked: list[str] = []
    two.get(fields(3), lambda why: asked.append(why) or made(3), "group")  # the wait has an end
    assert len(asked) == 1
    one.release("group")


def cli(capfd: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """What a command of `fluxfire megacache` prints as JSON; its exit code where that is not 0."""
    capfd.readouterr()
    code = command("megacache", *arguments, "--format", "json")
    out = capfd.readouterr().out
    return json.loads(out) if code in (0, None) else code if not out else (code, json.loads(out))


def test_the_tools(tmp_path: Path, bucket: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A machine that makes, one that loads and does not trust, then does."""
    store, other, file = tmp_path / "store", tmp_path / "other", tmp_path / "carried"
    opened = Store(store)
    for number in range(3):
        opened.put(fields(number), {"made_at_s": 1}, b"payload %d" % number)
    here = ("--store", store)
    assert "fluxfire megacache key new" in cli(capfd, "pack", file, *here) and not file.exists()
    public = cli(capfd, "key", "new", "mine")["key"]
    assert cli(capfd, "key", "ls") == [{"public": public, "name": "mine", "yours": True}]
    assert cli(capfd, "pack", file, *here)["done"] == cli(capfd, "push", bucket, *here)["done"] == 3
    assert cli(capfd, "push", bucket, *here)["there"] == 3
    rows = cli(capfd, "ls", *here)
    assert {(row["what"], row["from"]) for row in rows} == {("Block, batch 1", "here")}
    assert cli(capfd, "info", rows[0]["key"][:8], *here)["fields"] == opened.manifest(rows[0]["key"]).fields

    cli(capfd, "key", "untrust", "mine", *here)
    for place in (file, bucket):
        code, told = cli(capfd, "pull", place, "--store", other)
        assert code == 1 and told["refused"] == 3 and "do not trust" in told["entries"][0]["reason"]
    cli(capfd, "key", "trust", public, "friend")
    assert cli(capfd, "pull", file, "--store", other)["done"] == 3
    assert cli(capfd, "pull", bucket, "--store", other)["there"] == 3
    assert {row["signed_by"] for row in cli(capfd, "ls", "--store", other)} == {public}
    assert cli(capfd, "verify", "--store", other) == []
    next((other / "payloads").iterdir()).write_bytes(b"damaged 0")
    code, wrong = cli(capfd, "verify", "--store", other)
    assert code == 1 and "damaged payload" in wrong[0]["wrong"]
    assert len(cli(capfd, "key", "untrust", "friend", "--store", other)["removed"]) == 3
    cli(capfd, "key", "trust", public, "mine")
    for place in (file, bucket):
        assert cli(capfd, "sign", place)["done"] == 3
    assert len(cli(capfd, "prune", "--to", "0", *here)["removed"]) == 3
    assert cli(capfd, "clear", "--yes", *here) == {"removed": []}
    assert cli(capfd, "pull", file, *here)["done"] == 3
    assert len(cli(capfd, "clear", "--yes", *here)["removed"]) == 3


def test_signing_makes_strangers_entries_ones_own(tmp_path: Path, bucket: str, keys: Keys) -> None:
    stranger, store = Keys(tmp_path / "their keys"), Store(tmp_path / "theirs")
    stranger.make("a stranger")
    key = store.put(fields(1), {}, b"payload").key
    shelf = shelf_at(bucket)
    list(give(shelf, store, stranger))
    assert [moved.what for moved in remote.sign(shelf, shelf, keys)] == ["done"]
    assert fetch(shelf, key, keys.trusted())[2] == keys.own()


def test_one_call_saves_and_one_loads(tmp_path: Path, keys: Keys, bucket: str) -> None:
    Store(tmp_path / "one").put(fields(1), {}, b"payload")
    file, key = tmp_path / "carried", digest(fields(1))
    for place in (file, bucket):
        assert fluxfire.save_megacache(place, megacache=tmp_path / "one") == (key,)
        assert fluxfire.load_megacache(place) == (key,)
    keys.untrust("the tests")
    for call, words in (
        (lambda: fluxfire.load_megacache(file, megacache=tmp_path / "two"), "1 of 1 entries: .*do not trust"),
        (lambda: fluxfire.load_megacache(tmp_path / "nothing"), "No such file"),
        (lambda: fluxfire.save_megacache(file, megacache=tmp_path / "three"), "make a picture first"),
        (lambda: fluxfire.load_megacache("ftp://x/y"), "needed one of s3://"),
    ):
        with pytest.raises(fluxfire.ArtifactError, match=words):
            call()


def test_the_hub_keeps_what_a_bucket_keeps(tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from hub_server import hub

    with hub("someone/compiled") as (address, files):
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        constants = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        for name, value in constants.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
        store, url = Store(tmp_path / "one"), "hf://someone/compiled/made"
        for number in range(2):
            store.put(fields(number), {}, b"payload %d" % number)
        assert [moved.what for moved in give(shelf_at(url), store, keys)] == ["done"] * 2
        assert sorted(name.split("/")[1] for name in files) == ["entries"] * 2 + ["payloads"] * 2
        assert len(fluxfire.load_megacache(url, megacache=tmp_path / "two")) == 2
        assert sorted(map(store.payload, Store(tmp_path / "two").manifests())) == [b"payload 0", b"payload 1"]
        assert compiles(MegaCache(str(tmp_path / "three"), url), 7).startswith(f"not in {url}")
        with pytest.raises(fluxfire.ArtifactError, match="found nothing at hf://nobody"):
            fluxfire.load_megacache("hf://nobody/nothing", megacache=tmp_path / "two")


@pytest.mark.parametrize(
    ("place", "share", "words"),
    [("auto", True, "needed a URL for True"), ("s3://x", 1, "share: found 1"), ("http://x/y", False, "needed one of")],
)
def test_what_cannot_be_shared_is_refused(place: str, share: Any, words: str) -> None:
    from conftest import make_pipe

    with pytest.raises(fluxfire.ArgumentError, match=words):
        fluxfire.apply_compile(make_pipe(), megacache=place, share=share)


@pytest.mark.parametrize("place", ["s3://key:hunter2@bucket/x", "az://container/x?sig=hunter2"])
def test_a_url_with_a_secret_in_it_is_refused_without_it(place: str) -> None:
    with pytest.raises(StoreError, match="secret in the URL") as refused:
        shelf_at(place)
    assert "hunter2" not in str(refused.value)


def test_warm_makes_each_size_and_batch(calls: Callable[..., Any]) -> None:
    from conftest import embeds, make_pipe

    pipe = make_pipe()
    with pytest.raises(fluxfire.NotOptimizedError):
        fluxfire.warm(pipe, ["32x48"])
    fluxfire.optimize_pipeline(pipe, compile=False, cache_threshold=0)
    seen = calls(pipe.transformer)
    done = fluxfire.warm(pipe, ["48x32", (32, 32)], batch=(1, 3), call=embeds())
    assert list(done) == [(48, 32, 1), (48, 32, 3), (32, 32, 1), (32, 32, 3)] and seen == [8]
    fluxfire.restore_pipeline(pipe)
    fluxfire.apply_cache(pipe, schedule="##.")  # which takes its own number of steps and no other
    fluxfire.warm(pipe, ["48x32"], call=embeds())
    assert fluxfire.cache_stats(pipe).marks() == "##."
    for sizes, batch in ((["48"], (1,)), ([(0, 32)], (1,)), (["48x32"], (0,)), (["48x32"], (True,))):
        with pytest.raises(fluxfire.ArgumentError, match="needed"):
            fluxfire.warm(pipe, sizes, batch=batch, call=embeds())


def test_the_command_that_warms(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(fluxfire.aot, "compile_ahead", _not_compiled)
    assert command("warm", "--sizes", "32x32,48x32", "--batch", "1,2", "--device", "cpu", "--format", "json") == 0
    told = json.loads(capfd.readouterr().out)
    assert [(row["width"], row["height"], row["batch"]) for row in told["warmed"]] == [
        *((32, 32, batch) for batch in (1, 2)),
        *((48, 32, batch) for batch in (1, 2)),
    ]
    assert "compile" in [step["name"] for step in told["report"]["steps"]]
    assert command("warm", "--batch", "two") == 2


def _not_compiled(*_: Any) -> Any:
    raise fluxfire.structure.Unknown("not in this test")
