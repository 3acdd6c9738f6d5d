"""torch's own artifacts as the second tier: found again whole, and nothing but what torch itself would have written.

Small functions stand for the denoiser. A new process is stood for by a reset Dynamo and empty folders of inductor's
graphs; what the C++ compiler made stays.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe, run

import fluxfire
from fluxfire import torch_cache
from fluxfire.megacache import MegaCache
from fluxfire.store import StoreError
from fluxfire.torch_cache import TorchCache, load, merged, pack, unpack

GRAPH, OTHER = "f" + "a" * 51, "f" + "b" * 51
BEST = "ab/" + "0" * 64 + ".best_config"
SYSTEM = "c" * 64


class Pipe:
    """Something whose runs have no steps."""


@pytest.fixture
def new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], MegaCache]:
    """Forgets what torch has compiled; the store stays."""
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
    from torch._inductor.codecache import FxGraphCache

    count = 0

    def forget() -> MegaCache:
        nonlocal count
        count += 1
        torch._dynamo.reset()
        for cache in (FxGraphCache, AOTAutogradCache):
            folder = str(tmp_path / f"torch {count}" / cache.__name__)
            monkeypatch.setattr(cache, "_get_tmp_dir", staticmethod(lambda folder=folder: folder))
        return MegaCache(str(tmp_path / "store"))

    return forget


def double(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * 2).sum(-1)


def triple(x: torch.Tensor) -> torch.Tensor:
    return (x.cos() * 3 + 1).sum(-1)


def ran(cache: MegaCache, *functions: Callable[..., Any], fields: dict[str, Any] | None = None) -> TorchCache:
    """One pipeline that runs the functions, each a run of its own."""
    pipe, x = Pipe(), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    second = TorchCache(pipe, cache, fields or {"torch": {"scope": "test"}})
    with torch.no_grad():
        for function in functions:
            call = second.around(torch.compile(function))
            torch.testing.assert_close(second.around_run(call, x), function(x))
    return second


def test_what_one_process_compiled_the_next_one_finds(new_process: Callable[[], MegaCache], tmp_path: Path) -> None:
    """Also what was compiled after the first keeping: torch itself would lose the first half."""
    first = ran(new_process(), double, triple).stats()
    assert (first.hits, first.misses, first.loaded) == (0, 2, 0)
    assert first.kept >= 4 and first.reasons == (("compiled: the store is empty", 1),)
    second = ran(new_process(), double, triple).stats()
    assert (second.hits, second.misses, second.loaded, second.reasons) == (2, 0, first.kept, ())
    assert second.bytes > 1000
    # A run that touches half of it takes nothing away.
    assert ran(new_process(), triple).stats().misses == 0
    third = ran(new_process(), double, triple).stats()
    assert (third.hits, third.misses, third.loaded) == (2, 0, first.kept)
    # What the user saves himself is whole.
    restored = torch.compiler._cache.CacheArtifactManager.deserialize(torch.compiler.save_cache_artifacts()[0])
    assert len(restored["inductor"]) >= 2
    planted = tmp_path / "planted"
    (payload,) = (tmp_path / "store" / "payloads").iterdir()
    payload.write_bytes(pickle.dumps(Attack(str(planted))).ljust(payload.stat().st_size, b"\0"))
    hurt = ran(new_process(), double).stats()
    assert (hurt.hits, hurt.misses) == (0, 1) and not planted.exists()
    assert "damaged payload" in hurt.reasons[0][0]


class Attack:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def test_a_run_that_raises_keeps_nothing(new_process: Callable[[], MegaCache]) -> None:
    cache, pipe, x = new_process(), Pipe(), torch.ones(4, 8)
    second = TorchCache(pipe, cache, {"torch": {}})
    call = second.around(torch.compile(double))

    def crash(x: torch.Tensor) -> None:
        call(x)
        raise KeyboardInterrupt

    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        second.around_run(crash, x)
    assert cache.store.keys() == [] and cache._claims == {}
    with torch.no_grad():
        second.around_run(call, x)
    assert len(cache.store.keys()) == 1


def test_torch_loses_the_first_half_of_what_is_saved_twice() -> None:
    """Why `save_cache_artifacts` is not called. When this fails, torch is mended."""
    from torch.compiler._cache import CacheArtifactManager as Manager

    Manager._ensure_cache_artifacts_registered()
    with Manager.with_fresh_cache():
        for key in (GRAPH, OTHER):
            Manager.record_artifact("aot_autograd", key, b"content")
            blob, info = torch.compiler.save_cache_artifacts()
        assert info.artifacts["aot_autograd"] == [GRAPH, OTHER]
        assert [artifact.key for artifact in Manager.deserialize(blob)["aot_autograd"]] == [OTHER]


def test_torch_writes_keys_anywhere_and_fluxfire_refuses_them(tmp_path: Path) -> None:
    """Why keys are checked. The first half is torch alone."""
    key = str(tmp_path / "planted")
    artifacts = {("autotune", key, b"{}"): None}
    load(artifacts)
    assert os.path.exists(key)
    with pytest.raises(StoreError, match="needed a key of torch's"):
        unpack(pack(artifacts))


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("inductor", "../" + GRAPH[3:]),
        ("inductor", GRAPH + "/.."),
        ("inductor", GRAPH + "\n"),
        ("inductor", "a" + GRAPH[1:]),
        ("aot_autograd", GRAPH),
        ("aot_autograd", "/etc/passwd"),
        ("autotune", "../" + "0" * 64 + ".best_config"),
        ("autotune", "ab/../" + "0" * 64 + ".best_config"),
        ("autotune", "ab/" + "0" * 64 + ".so"),
        ("timings", "../cache"),
        ("precompile", "0" * 64),
        ("pgo", "anything"),
    ],
)
def test_keys_of_other_forms_are_refused(kind: str, key: str) -> None:
    assert unpack(pack({("inductor", GRAPH, b"1"): None, ("autotune", BEST, b"{}"): None}))
    with pytest.raises(StoreError, match="needed a key of torch's"):
        unpack(pack({(kind, key, b"{}"): None}))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\n",
        b"[]\n",
        b'{"format":1}\n',
        b'{"artifacts":[["inductor","x"]],"format":1}\n',
        b'{"artifacts":[],"format":2}\n',
        b'{"artifacts":[],"format":1}\nmore',
        b'{"artifacts":[["autotune","a",-1],["autotune","b",2]],"format":1}\nx',
        b"[" * 100_000 + b"\n",
        pickle.dumps([1]),
    ],
)
def test_other_forms_of_payloads_are_refused(payload: bytes) -> None:
    with pytest.raises(StoreError, match="in another form"):
        unpack(payload)


def test_merging_keeps_both_and_the_newer_of_what_there_is_one_of() -> None:
    old = {("inductor", GRAPH, b"1"): None, ("autotune", BEST, b'{"a":1}'): None}
    new = {("inductor", GRAPH, b"2"): None, ("inductor", OTHER, b"3"): None, ("autotune", BEST, b'{"a":2}'): None}
    both = merged(old, new)
    assert set(both) == {*new, ("inductor", GRAPH, b"1")}
    assert unpack(pack(both)) == both and merged(both, both) == both
    many = {("inductor", GRAPH, b"%d" % number): None for number in range(100)}
    assert list(merged(many, {}))[-1] == ("inductor", GRAPH, b"99") and len(merged(many, {})) == torch_cache.VARIANTS


def timings(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()


def test_timings_of_both_are_carried_and_those_measured_here_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the file in which inductor looks, and only on the same kind of machine."""
    from torch._inductor.codecache import CacheBase

    path, here = tmp_path / "cache" / SYSTEM, {"mm": {"4x4": {"highest": {"one": 1.0}}}}
    monkeypatch.setattr(CacheBase, "get_local_cache_path", staticmethod(lambda: path))
    monkeypatch.setattr(CacheBase, "get_system", staticmethod(lambda: {"hash": SYSTEM}))
    assert torch_cache._timings() == {}
    there = {"mm": {"4x4": {"highest": {"one": 9.0, "two": 2.0}}, "8x8": {"highest": {"one": 3.0}}}, "pad": True}
    load({("timings", SYSTEM, timings(there)): None})
    assert CacheBase().get_local_cache() == there
    CacheBase().update_local_cache(here)
    load({("timings", SYSTEM, timings(there)): None, ("timings", "d" * 64, timings({"other": 1})): None})
    there["mm"]["4x4"]["highest"]["one"] = 1.0
    assert CacheBase().get_local_cache() == there
    ((artifact, _),) = torch_cache._timings().items()
    assert json.loads(artifact[2]) == there and unpack(pack({artifact: None})) == {artifact: None}
    both = merged({("timings", SYSTEM, timings(here)): None}, {("timings", SYSTEM, timings({"addmm": {}})): None})
    assert json.loads(next(iter(both))[2]) == here | {"addmm": {}}


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a":"text"}', b'{"a":[1]}', b"nonsense"])
def test_what_is_no_timing_is_refused(content: bytes) -> None:
    with pytest.raises(StoreError, match="needed a key of torch's"):
        unpack(pack({("timings", SYSTEM, content): None}))


def test_the_entry_of_other_options_is_not_loaded(new_process: Callable[[], MegaCache]) -> None:
    ran(new_process(), double, fields={"torch": {}, "options": {"max_autotune": "True"}})
    other = ran(new_process(), double, fields={"torch": {}, "options": {"max_autotune": "False"}}).stats()
    assert (other.hits, other.misses) == (0, 1)
    assert other.reasons == (("compiled: options.max_autotune True, here False", 1),)


@pytest.mark.slow
def test_a_whole_denoiser_and_a_decoder(
    new_process: Callable[[], MegaCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluxfire import megacache

    baseline = run(make_pipe(blocks=(1, 1)), steps=2, output_type="pt")
    for hits, misses in ((0, 2), (2, 0)):
        new_process()
        monkeypatch.setattr(megacache, "_OPEN", {})
        pipe = make_pipe(blocks=(1, 1))
        fluxfire.apply_compile(pipe, scope="denoiser", vae=True, megacache=tmp_path / "store")
        torch.testing.assert_close(run(pipe, steps=2, output_type="pt"), baseline, rtol=1e-4, atol=1e-4)
        found = dict(fluxfire.report(pipe).other)["torch_cache"]
        assert (found.hits, found.misses) == (hits, misses)
