"""The mega-cache on the embedded model: a second process compiles nothing; what does not fit is never served.

The blocks are compiled once for this file. In most tests `torch.compile` then gives the function back as it is, so that
whatever an artifact does not serve runs uncompiled.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pipe, run
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import fluxfire
from fluxfire import aot, demo, graphs, megacache, structure
from fluxfire.megacache import Artifact, MegaCache, megacache_at
from fluxfire.store.manifest import digest
from fluxfire.structure import Unknown, Watch, describe

DOUBLE, SINGLE = 2, 11  # the embedded model's blocks
CPU = torch.device("cpu")


def latents(pipe: Any, steps: int = 2, size: int = 64, **more: Any) -> torch.Tensor:
    """Latents of one call of the embedded model, (1, N, 64)."""
    arguments = demo.call_kwargs() | {"height": size, "width": 96, "max_area": size * 96, "output_type": "latent"}
    arguments |= {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
    out: torch.Tensor = pipe(prompt="a red apple, noto style", **arguments | more).images
    return out


def artifacts(pipe: Any) -> fluxfire.ArtifactStats:
    return dict(fluxfire.report(pipe).other)["megacache"]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def embedded() -> Any:
    pipe = demo.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Made:
    place: Path
    baseline: torch.Tensor
    first: fluxfire.ArtifactStats


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A store with the artifacts of the embedded model, made by its first picture."""
    place, pipe = tmp_path_factory.mktemp("megacache") / "store", embedded()
    baseline = latents(pipe)
    fluxfire.apply_compile(pipe, megacache=place)
    latents(pipe, steps=1, size=32)
    first = artifacts(pipe)
    assert relative(latents(pipe), baseline) <= 1e-5
    return Made(place, baseline, first)


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forgets what this process has loaded, and compiles nothing."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def forget() -> None:
        monkeypatch.setattr(megacache, "_OPEN", {})

    forget()
    return forget


def test_the_first_process_compiles_each_kind_of_block_once_and_keeps_it(made: Made) -> None:
    first = made.first
    assert (first.hits, first.misses, first.kept) == (0, 2, 2)
    assert (first.served, first.traced) == (DOUBLE + SINGLE, 0)
    assert [reason for reason, _ in first.reasons] == ["compiled: the store is empty"]
    assert len(os.listdir(made.place / "entries")) == len(os.listdir(made.place / "payloads")) == 2


def test_a_second_process_traces_nothing_and_finds_all(made: Made, tmp_path: Path) -> None:
    """A real process, with prefetch and optimize_pipeline."""
    torch.save(made.baseline, tmp_path / "baseline.pt")
    code = (
        "import sys, json, fluxfire\n"
        "fluxfire.prefetch(sys.argv[1])\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from test_megacache import embedded, latents, relative, artifacts\n"
        "pipe = embedded()\n"
        "fluxfire.optimize_pipeline(pipe, cache_threshold=0, megacache=sys.argv[1])\n"
        "error = relative(latents(pipe), torch.load(sys.argv[2]))\n"
        "found, report = artifacts(pipe), fluxfire.report(pipe)\n"
        "counted = torch._dynamo.utils.counters['stats']['unique_graphs']\n"
        "told = [error, counted, report.compile.graphs, found.hits, found.misses, found.served, found.traced]\n"
        "print(json.dumps(told), [row for row in report.rows() if row[0] == 'megacache'])\n"
    )
    paths = [str(Path(__file__).parent), str(Path(fluxfire.__file__).parents[1])]
    command = [sys.executable, "-c", code, str(made.place), str(tmp_path / "baseline.pt")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    error, *counts = json.loads(done.stdout[: done.stdout.index("]") + 1])
    assert error <= 1e-5
    assert counts == [0, 0, 2, 0, 2 * (DOUBLE + SINGLE), 0]
    assert "2 found" in done.stdout and "0 compiled" in done.stdout


@pytest.mark.usefixtures("new_process")
def test_two_artifacts_serve_all_sizes_with_the_cache_over_them(made: Made) -> None:
    pipe = embedded()
    eager = [latents(pipe, size=size) for size in (32, 64, 128)]
    fluxfire.optimize_pipeline(pipe, cache_threshold=0, megacache=made.place)
    for size, wanted in zip((32, 64, 128), eager, strict=True):
        assert relative(latents(pipe, size=size), wanted) <= 1e-5
    found = artifacts(pipe)
    assert (found.hits, found.misses, found.traced, found.served) == (2, 0, 0, 3 * 2 * (DOUBLE + SINGLE))
    assert found.reasons == ()
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(latents(pipe, size=32), eager[0])


class Silent(FluxAttnProcessor):
    """An attention that attends to nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        return tuple(torch.zeros_like(part) for part in out) if isinstance(out, tuple) else torch.zeros_like(out)


@pytest.mark.usefixtures("new_process")
def test_a_swapped_attention_processor_is_never_served_the_old_attention(made: Made) -> None:
    """Silent without the dispatcher: the artifact itself runs with the new processor, and does not see it."""
    pipe = embedded()
    fluxfire.apply_compile(pipe, megacache=made.place)
    assert relative(latents(pipe), made.baseline) <= 1e-5
    block = pipe.transformer.single_transformer_blocks[3]
    block.attn.set_processor(Silent())
    out = latents(pipe)
    found = artifacts(pipe)
    assert found.traced == 2 and found.served == 2 * 2 * (DOUBLE + SINGLE) - 2
    assert any("processor" in reason for reason, _ in found.reasons)
    fluxfire.restore_pipeline(pipe)
    assert relative(out, latents(pipe)) <= 1e-5
    assert relative(out, made.baseline) > 1e-3


@pytest.mark.usefixtures("new_process")
def test_an_artifact_with_wrong_numbers_is_not_used_and_goes(made: Made, tmp_path: Path) -> None:
    place = tmp_path / "store"
    subprocess.run(["cp", "-r", str(made.place), str(place)], check=True)
    cache = megacache_at(place)
    for manifest in cache.store.manifests():
        artifact = cache.get(manifest.fields, megacache._not_made)
        artifact.run = Wrong(artifact.run)
    pipe = embedded()
    fluxfire.apply_compile(pipe, megacache=place)
    assert torch.equal(latents(pipe), made.baseline)
    found = artifacts(pipe)
    assert found.served == 0 and found.traced == 2 * (DOUBLE + SINGLE)
    assert all("numbers are not the block's" in reason for reason, _ in found.reasons)
    assert cache.store.keys() == []


class Wrong:
    """A compiled function that is 3 % off."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.guard_check = real.guard_check

    def __call__(self, *args: Any) -> Any:
        out = self._real(*args)
        return tuple(1.03 * part for part in out) if isinstance(out, tuple) else 1.03 * out


@pytest.mark.usefixtures("new_process")
def test_a_traced_function_that_somebody_replaces_is_seen(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers.models.transformers.transformer_flux as flux

    pipe = embedded()
    fluxfire.apply_compile(pipe, megacache=made.place)
    latents(pipe)
    monkeypatch.setattr(flux, "_get_qkv_projections", _doubled(flux._get_qkv_projections))
    out = latents(pipe)
    found = artifacts(pipe)
    assert found.traced == 2 * (DOUBLE + SINGLE)
    assert any("transformer_flux changed" in reason for reason, _ in found.reasons)
    fluxfire.restore_pipeline(pipe)
    assert relative(out, latents(pipe)) <= 1e-5


def _doubled(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: tuple(None if part is None else 2 * part for part in real(*args, **kwargs))


def _other_torch(data: bytes) -> bytes:
    raise AssertionError("a payload was read")


@pytest.mark.usefixtures("new_process")
def test_a_miss_names_what_differs(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    here = megacache.environment(CPU)
    monkeypatch.setattr(aot, "environment", lambda _: here | {"torch": "1.0"})
    pipe = embedded()
    fluxfire.apply_compile(pipe, megacache=made.place)
    assert torch.equal(latents(pipe), made.baseline)
    reasons = [reason for reason, _ in artifacts(pipe).reasons]
    assert f"compiled: torch {torch.__version__}, here 1.0" in reasons


@pytest.mark.usefixtures("new_process")
def test_a_damaged_or_planted_payload_never_runs(made: Made, tmp_path: Path) -> None:
    """Bytes of somebody else in the place of both payloads; deserializing them would write a file."""
    place, planted = tmp_path / "store", tmp_path / "planted"
    subprocess.run(["cp", "-r", str(made.place), str(place)], check=True)
    attack = pickle.dumps(Attack(str(planted)))
    pickle.loads(attack)
    assert planted.exists()  # the attack works
    planted.rmdir()
    for path in (place / "payloads").iterdir():
        path.write_bytes(attack.ljust(path.stat().st_size, b"\0"))
    pipe = embedded()
    fluxfire.apply_compile(pipe, megacache=place)
    assert torch.equal(latents(pipe), made.baseline)
    assert not planted.exists()
    found = artifacts(pipe)
    assert found.hits == 0 and any("damaged payload" in reason for reason, _ in found.reasons)
    prefetched = fluxfire.prefetch(place)
    prefetched.join()
    assert not planted.exists()


class Attack:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


@pytest.mark.usefixtures("new_process")
def test_a_store_that_cannot_be_used_is_a_line_in_the_log(
    made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "open to all"
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    pipe = embedded()
    fluxfire.apply_compile(pipe, megacache=place)
    assert torch.equal(latents(pipe), made.baseline)
    assert "writable for others" in caplog.text
    assert any("the store cannot be used" in reason for reason, _ in artifacts(pipe).reasons)


@pytest.mark.usefixtures("new_process")
def test_the_artifacts_hold_no_pipelines_weights(made: Made) -> None:
    import gc
    import weakref

    pipe = embedded()
    fluxfire.apply_compile(pipe, megacache=made.place)
    latents(pipe, steps=1)
    weights = weakref.ref(pipe.transformer.transformer_blocks[0].ff.net[2].weight)
    del pipe
    gc.collect()
    assert weights() is None


def fields(number: int, **environment: str) -> dict[str, Any]:
    return {"environment": environment, "number": number}


def artifact(number: int) -> Artifact:
    return Artifact(fields(number), None, (), b"payload", 7)


def test_many_threads_make_an_artifact_once(tmp_path: Path) -> None:
    cache, calls, barrier = MegaCache(str(tmp_path / "store")), [], threading.Barrier(8)

    def make(why: str) -> Artifact:
        calls.append(why)
        return artifact(1)

    def ask(_: int) -> Artifact:
        barrier.wait(10)
        return cache.get(fields(1), make)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(map(id, pool.map(ask, range(8))))) == 1
    assert calls == ["the store is empty"]


def test_who_asks_after_a_failure_asks_anew(tmp_path: Path) -> None:
    cache = MegaCache(str(tmp_path / "store"))
    with pytest.raises(Unknown, match="store is empty"):
        cache.get(fields(1), megacache._not_made)
    assert cache.get(fields(1), lambda why: artifact(1)).kept_bytes == 7


def test_a_payload_that_torch_cannot_load_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = MegaCache(str(tmp_path / "store"))
    assert cache.keep(artifact(1))
    whys: list[str] = []
    cache.get(fields(1), lambda why: whys.append(why) or artifact(1))
    assert "could not be loaded" in caplog.text and "Error" in whys[0]


def test_an_artifact_of_changed_sources_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, whys = MegaCache(str(tmp_path / "store")), []
    changed = artifact(1)
    changed.modules = ("fluxfire.run",)
    assert cache.keep(changed)
    monkeypatch.setattr(megacache, "source_of", lambda module: "other")
    monkeypatch.setattr(torch.compiler, "load_compiled_function", _other_torch)
    cache.get(fields(1), lambda why: whys.append(why) or artifact(1))
    assert whys == ["the source of fluxfire.run changed"]


def test_the_nearest_entry_is_named_field_by_field(tmp_path: Path) -> None:
    cache, whys = MegaCache(str(tmp_path / "store")), []
    for entry in (fields(1, torch="2.11.0+cu130", gpu="H100"), fields(2, torch="2.9", gpu="A100")):
        cache.keep(Artifact(entry, None, (), digest(entry).encode(), 1))
    cache.get(fields(1, torch="2.13.0", gpu="H100"), lambda why: whys.append(why) or artifact(1))
    assert whys == ["torch 2.11.0+cu130, here 2.13.0"]


def test_what_cannot_be_kept_is_a_line_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fluxfire.store import Store

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "put", full)
    assert not MegaCache(str(tmp_path / "store")).keep(artifact(1))
    assert "No space left" in caplog.text


@pytest.mark.parametrize("place", ["", b"", 3, True])
def test_a_place_that_is_none_is_refused(place: Any) -> None:
    with pytest.raises(fluxfire.ArgumentError, match="megacache: found"):
        fluxfire.apply_compile(make_pipe(), megacache=place)
    with pytest.raises(fluxfire.ArgumentError):
        fluxfire.prefetch(place)


def test_auto_is_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(megacache_at("auto").path) == tmp_path / "caches" / "fluxfire" / "megacache"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert megacache.default_folder().is_relative_to(tmp_path)


@pytest.mark.parametrize(
    "knobs", [{"backend": "eager"}, {"scope": "denoiser"}, {"mode": "reduce-overhead"}], ids=lambda knobs: str(knobs)
)
def test_what_cannot_be_served_says_so(knobs: dict[str, Any]) -> None:
    pipe = make_pipe()
    fluxfire.apply_compile(pipe, **knobs)
    ((reason, _),) = artifacts(pipe).reasons
    assert reason.startswith("not used: ")
    fluxfire.restore_pipeline(pipe)
    fluxfire.apply_compile(pipe, megacache=None, **knobs)
    assert "megacache" not in dict(fluxfire.report(pipe).other)


def _add_lora(block: Any) -> None:
    from peft.tuners.lora import Linear

    block.attn.to_q = Linear(block.attn.to_q, "default", config=_lora(), r=2, lora_alpha=2)


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2)


def _hook(block: Any) -> None:
    block.ff.register_forward_hook(lambda *_: None)


def _forward(block: Any) -> None:
    block.ff.forward = lambda x: x


def _rename(block: Any) -> None:
    del block.absent
    block.other = None


CHANGES: dict[str, Callable[[Any], Any]] = {
    "processor": lambda block: block.attn.set_processor(Silent()),
    "attention backend": lambda block: setattr(block.attn.processor, "_attention_backend", "native"),
    "data type": lambda block: block.attn.to_q.to(torch.float64),
    "another parameter": lambda block: setattr(block.ff.net[2], "weight", torch.nn.Parameter(torch.zeros(32, 64))),
    "LoRA": _add_lora,
    "fused projections": lambda block: block.attn.fuse_projections(),
    "a module": lambda block: block.ff.net.insert(1, torch.nn.Identity()),
    "a number": lambda block: setattr(block.norm1.norm, "eps", 1e-2),
    "a hook": _hook,
    "forward of a child": _forward,
    "training": lambda block: block.ff.train(),
    "an attribute of the block": lambda block: setattr(block, "extra", 1),
    "an attribute of the block by another name": _rename,
    "an attribute of the block less": lambda block: delattr(block, "absent"),
    "an attribute of a child": lambda block: setattr(block.ff, "extra", None),
    "an attribute of a child less": lambda block: delattr(block.attn, "pruned_heads"),
    "an attribute of the processor": lambda block: setattr(block.attn.processor, "extra", None),
    "a buffer where none was": lambda block: block.ff.register_buffer("extra", torch.zeros(1)),
    "a module where none was": lambda block: block.ff.net[1].add_module("extra", torch.nn.Identity()),
    "a parameter less": lambda block: setattr(block.ff.net[2], "bias", None),
    "a list in place": lambda block: block.attn.pruned_heads.append(3),
    "an empty list in place": lambda block: block.attn.added.append(3),
    "a dict in place": lambda block: block.attn.scales.update(a=2.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_of_a_block_is_seen(change: Callable[[Any], Any]) -> None:
    block = make_pipe().transformer.transformer_blocks[0]
    block.absent, block.attn.pruned_heads, block.attn.added, block.attn.scales = None, [1], [], {"a": 1.0}
    watch, before = Watch(block), describe(block, CPU)
    assert watch.unchanged()
    change(block)
    assert not watch.unchanged()
    try:
        assert describe(block, CPU) != before
    except Unknown as reason:
        assert str(reason).startswith("block.ff")


def test_what_is_equal_and_another_object_is_a_change() -> None:
    """1 and True are equal, and are two graphs."""
    block = make_pipe().transformer.transformer_blocks[0]
    for owner in (block, block.ff, block.attn.processor):
        owner.count = 1
        watch = Watch(block)
        owner.count = True
        assert not watch.unchanged()


def test_what_comes_after_all_else_is_seen_to_come_and_go() -> None:
    block = make_pipe().transformer.transformer_blocks[0]
    *_, last = block.modules()
    last.noted = types.SimpleNamespace(first=1)
    for change in (lambda: setattr(last.noted, "second", 2), lambda: delattr(last.noted, "second")):
        watch = Watch(block)
        change()
        assert not watch.unchanged()


def test_weights_elsewhere_and_what_stands_around_a_block_are_no_change() -> None:
    block = make_pipe().transformer.transformer_blocks[0]
    watch = Watch(block)
    block.ff.net[2].weight.data = block.ff.net[2].weight.data.clone()
    block.forward = lambda *args, **kwargs: None
    block.register_forward_hook(lambda *_: None)
    assert watch.unchanged()
    del block.forward
    assert watch.unchanged()
    block.ff.net[2].weight.data = block.ff.net[2].weight.data.half()
    assert not watch.unchanged()


def test_blocks_of_one_kind_and_other_values_are_one() -> None:
    """Weights are inputs: any checkpoint, any seed, any block of equal shapes."""
    one, other = (make_pipe(seed=seed, blocks=(3, 1)).transformer for seed in (0, 1))
    described = [describe(block, CPU) for model in (one, other) for block in model.transformer_blocks]
    assert all(description == described[0] for description in described)
    assert describe(one.single_transformer_blocks[0], CPU) != described[0]


class Slotted:
    __slots__ = ("secret",)


@pytest.mark.parametrize(
    "value", [Slotted(), object(), threading.Lock(), [].append], ids=lambda value: type(value).__name__
)
def test_what_cannot_be_described_is_unknown(value: Any) -> None:
    block = make_pipe().transformer.transformer_blocks[0]
    block.attn.secret = value
    with pytest.raises(Unknown, match=r"\.(secret|append) is a "):
        describe(block, CPU)


def test_states_of_torch_that_no_graph_was_made_for_take_the_traced_path() -> None:
    assert graphs.torch_state() == "gradients are enabled"
    with torch.no_grad():
        plain = graphs.torch_state()
        assert isinstance(plain, tuple)
        with torch.autocast("cpu"):
            assert graphs.torch_state() == "autocast is on"
        with torch.device("cpu"):
            assert "a mode of torch is on" in graphs.torch_state()
    with torch.inference_mode():
        assert graphs.torch_state() != plain


def test_inputs_that_graphs_tell_apart_are_told_apart() -> None:
    x, y = torch.zeros(1, 4, 8), torch.zeros(2, 4, 8)
    kinds = [graphs.kind(value, True, []) for value in (x, torch.zeros(1, 9, 8), y, torch.zeros(3, 4, 8), x.double())]
    assert kinds[0] == kinds[1] and kinds[2] == kinds[3]
    assert len({str(kind) for kind in kinds}) == 3
    assert graphs.kind(x, False, []) != graphs.kind(torch.zeros(1, 9, 8), False, [])
    assert graphs.kind(1.5, True, []) != graphs.kind(2.5, True, [])
    for pair in ([x, x], [x, y]):
        seen: list[int] = []
        [graphs.exact(value, seen) for value in pair]
        assert graphs.pattern(seen) == ((0, 0) if pair[0] is pair[1] else ())
    for value in (x.to_sparse(), torch.nn.Parameter(x), {1, 2}):
        with pytest.raises(Unknown):
            graphs.exact(value, [])


def test_rounding_is_told_from_other_numbers() -> None:
    x = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    out = x + 0.1 * torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(1))
    assert graphs.distance(out + 1e-6, out, [x]) < 1 < graphs.distance(out * 1.01, out, [x])
    assert graphs.distance(out[:, 1:], out, [x]) == graphs.distance(out * torch.nan, out, [x]) == float("inf")


def test_a_new_guard_of_torch_is_refused() -> None:
    @dataclass
    class Guard:
        guard_type: str

    assert graphs._keep_guards_on_sizes([Guard("SHAPE_ENV"), Guard("ID_MATCH")]) == [True, False]
    with pytest.raises(Unknown, match="FSDP_TRAINING_STATE"):
        graphs._keep_guards_on_sizes([Guard("FSDP_TRAINING_STATE")])


def test_sources_are_hashed_once() -> None:
    assert structure.source_of("fluxfire.run") == structure.source_of("fluxfire.run") != ""
    with pytest.raises(Unknown, match="in no file"):
        structure.source_of("a notebook")


@pytest.mark.slow
def test_batches_are_an_artifact_of_their_own(tmp_path: Path, flux_class: type) -> None:
    pipe = make_pipe(flux_class)
    baseline = {batch: run(pipe, batch=batch) for batch in (1, 2, 3)}
    fluxfire.apply_compile(pipe, megacache=tmp_path / "store")
    for batch in (1, 2, 3):
        assert relative(run(pipe, batch=batch), baseline[batch]) <= 1e-5
    found = artifacts(pipe)
    assert (found.misses, found.kept, found.traced) == (4, 4, 0)


def test_prefetch_lets_other_threads_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = sys.getswitchinterval(), []
    monkeypatch.setattr(MegaCache, "_prefetch", lambda _: seen.append(sys.getswitchinterval()))
    for _ in range(2):
        fluxfire.prefetch(tmp_path).join()
    assert seen == [pytest.approx(megacache.SWITCH_S)] * 2
    assert sys.getswitchinterval() == before
