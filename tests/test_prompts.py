"""Remembered prompts: the same numbers, from memory as long as nothing changed; encoders that wait in host memory."""

from __future__ import annotations

import functools
import gc
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import make_pipe
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

import fluxfire
from fluxfire import demo
from fluxfire.prompts import PromptStats, Waiting

TEAPOT, APPLE, BOOK = "teapot, noto style", "red apple, noto style", "book, twemoji style"


@pytest.fixture
def pipe() -> Any:
    return demo.load_pipeline()


def encode(pipe: Any, prompt: Any = TEAPOT, **more: Any) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        made: tuple[torch.Tensor, ...] = pipe.encode_prompt(prompt, **({"max_sequence_length": 24} | more))
    return made


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def stats(pipe: Any) -> PromptStats:
    found: PromptStats = dict(fluxfire.report(pipe).other)["prompts"]
    return found


def counts(pipe: Any) -> tuple[int, int, int]:
    found = stats(pipe)
    return found.remembered, found.encoded, found.kept


def test_the_second_picture_of_a_prompt_runs_no_encoder(pipe: Any) -> None:
    call = {"prompt": TEAPOT, "num_inference_steps": 2, "output_type": "latent"} | demo.call_kwargs()

    def latents() -> torch.Tensor:
        made: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(1)).images
        return made

    before = latents()
    fluxfire.apply_prompts(pipe)
    ran: list[str] = []
    for name in ("text_encoder", "text_encoder_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    assert torch.equal(latents(), before)
    assert sorted(ran) == ["text_encoder", "text_encoder_2"]
    assert torch.equal(latents(), before)
    assert len(ran) == 2
    assert counts(pipe) == (1, 1, 1)


def test_what_is_remembered_is_by_all_arguments(pipe: Any) -> None:
    calls: list[dict[str, Any]] = [
        {"prompt": TEAPOT},
        {"prompt": APPLE},
        {"prompt": [TEAPOT, APPLE]},
        {"prompt": TEAPOT, "prompt_2": APPLE},
        {"prompt": TEAPOT, "num_images_per_prompt": 2},
        {"prompt": TEAPOT, "max_sequence_length": 16},
    ]
    plain = [encode(pipe, **call) for call in calls]
    fluxfire.apply_prompts(pipe)
    for _ in range(2):
        assert all(same(encode(pipe, **call), made) for call, made in zip(calls, plain, strict=True))
    assert counts(pipe) == (6, 6, 6)
    assert stats(pipe).kept_bytes == sum(part.nbytes for made in plain for part in made)


def test_the_one_unused_for_longest_goes_first(pipe: Any) -> None:
    fluxfire.apply_prompts(pipe, entries=2)
    for prompt in (TEAPOT, APPLE, TEAPOT, BOOK, TEAPOT, APPLE):
        encode(pipe, prompt)
    assert counts(pipe) == (2, 4, 2)


def test_no_entries_remember_nothing(pipe: Any) -> None:
    fluxfire.apply_prompts(pipe, entries=0)
    assert same(encode(pipe), encode(pipe))
    assert counts(pipe) == (0, 0, 0)


def test_what_a_caller_does_to_its_tensors_stays_with_him(pipe: Any) -> None:
    fluxfire.apply_prompts(pipe)
    first = encode(pipe)
    kept = tuple(part.clone() for part in first)
    first[0].zero_()
    encode(pipe)[0].zero_()
    assert same(encode(pipe), kept)


def test_other_weights_or_encoders_forget(pipe: Any) -> None:
    fluxfire.apply_prompts(pipe)
    before = encode(pipe)
    with torch.no_grad():
        next(pipe.text_encoder_2.parameters()).mul_(2)
    changed = encode(pipe)
    assert not same(changed, before)
    pipe.text_encoder_2.to(torch.bfloat16)
    assert encode(pipe)[0].dtype == torch.bfloat16
    pipe.text_encoder_2 = demo.load_pipeline().text_encoder_2
    assert same(encode(pipe), before)
    assert counts(pipe) == (0, 4, 1)


def test_a_lora_in_an_encoder_is_never_missed(pipe: Any) -> None:
    fluxfire.apply_prompts(pipe)
    plain = encode(pipe)
    encoder = pipe.text_encoder
    encoder.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    first = encode(pipe)
    assert not same(first, plain)
    layers = [module for module in encoder.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.set_scale("default", 0.3)  # writes no tensor
    assert not same(encode(pipe), first)
    encoder.disable_adapters()
    assert same(encode(pipe), plain)
    encoder.enable_adapters()
    assert counts(pipe) == (0, 1, 0)


def test_a_lora_that_is_fused_between_two_prompts_forgets(pipe: Any) -> None:
    fluxfire.apply_prompts(pipe)
    plain, encoder = encode(pipe), pipe.text_encoder
    encoder.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    versions = [p._version for p in encoder.parameters()]
    for module in encoder.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    assert [p._version for p in encoder.parameters()] == versions  # which is why numbers are compared
    recurse_remove_peft_layers(encoder)
    assert not same(encode(pipe), plain)
    assert counts(pipe) == (0, 2, 1)


def test_gradients_training_and_tensors_pass_by(pipe: Any) -> None:
    fluxfire.apply_prompts(pipe)
    pipe.encode_prompt(TEAPOT, max_sequence_length=24)  # with gradients
    pipe.text_encoder.train()
    encode(pipe)
    pipe.text_encoder.eval()
    with torch.autocast("cpu", torch.bfloat16):
        encode(pipe)
    made = encode(pipe)
    encode(pipe, None, prompt_embeds=made[0], pooled_prompt_embeds=made[1])
    assert counts(pipe) == (0, 1, 1)


def test_threads_get_what_they_asked_for(pipe: Any) -> None:
    plain = {prompt: encode(pipe, prompt) for prompt in (TEAPOT, APPLE, BOOK)}
    fluxfire.apply_prompts(pipe, entries=2)
    asked = [TEAPOT, APPLE, BOOK] * 8
    with ThreadPoolExecutor(4) as pool:
        for prompt, made in zip(asked, pool.map(lambda prompt: encode(pipe, prompt), asked), strict=True):
            torch.testing.assert_close(made, plain[prompt])  # sums depend on the threads within torch
    remembered, encoded, _ = counts(pipe)
    assert remembered + encoded == len(asked)


@pytest.mark.parametrize("entries", [0, 2])
def test_one_thread_encodes_at_a_time(pipe: Any, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast tokenizers keep how they pad: threads at once got each other's lengths. Also where nothing is remembered."""
    inner, inside, most = pipe.encode_prompt, [], []

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.01)
        made = inner(*args, **kwargs)
        inside.pop()
        return made

    monkeypatch.setattr(pipe, "encode_prompt", functools.wraps(inner)(encode_prompt))
    fluxfire.apply_prompts(pipe, entries=entries)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda prompt: encode(pipe, prompt), [TEAPOT, APPLE, BOOK, TEAPOT] * 2))
    assert len(most) >= 3 and set(most) == {1}


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline seems to work on another device than the weights'."""
    monkeypatch.setattr(Waiting, "_device", lambda self: torch.device("cpu:0"))


@pytest.mark.usefixtures("elsewhere")
def test_encoders_wait_in_host_memory_and_come_when_they_run(pipe: Any) -> None:
    plain = encode(pipe)
    fluxfire.apply_prompts(pipe, encoders="cpu")
    weight = next(pipe.text_encoder_2.parameters())
    host, places = weight.data_ptr(), []
    inner = pipe.text_encoder_2.encoder.embed_tokens  # within the wrapped forward
    inner.register_forward_pre_hook(lambda module, _: places.append(module.weight.data_ptr()))
    assert same(encode(pipe), plain)
    assert stats(pipe).brought == 2
    assert weight.data_ptr() == host
    assert same(encode(pipe), plain)
    assert stats(pipe).brought == 2  # remembered
    assert len(places) == 1


@pytest.mark.usefixtures("elsewhere")
def test_what_an_adapter_brings_travels_with_the_weights(pipe: Any) -> None:
    fluxfire.apply_prompts(pipe, encoders="cpu")
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    seen: list[set[int]] = []
    layer = next(module for module in pipe.text_encoder.modules() if hasattr(module, "base_layer"))
    layer.register_forward_pre_hook(lambda *_: seen.append({p.data_ptr() for p in layer.parameters()}))
    host = {p.data_ptr() for p in layer.parameters()}
    with_adapter = encode(pipe)
    assert len(seen) == 1 and {p.data_ptr() for p in layer.parameters()} == host
    fluxfire.restore_pipeline(pipe)
    assert same(encode(pipe), with_adapter)


def test_encoders_wait_for_one_pipeline(pipe: Any) -> None:
    other = type(pipe)(**pipe.components)
    fluxfire.apply_prompts(pipe, encoders="cpu")
    other.transformer = make_pipe().transformer
    assert "waits already" in str(fluxfire.check_prompts(other, encoders="cpu"))
    assert fluxfire.check_prompts(other) is None


@pytest.mark.usefixtures("elsewhere")
def test_weights_written_while_they_wait_are_used(pipe: Any) -> None:
    fluxfire.apply_prompts(pipe, encoders="cpu")
    with torch.no_grad():
        next(pipe.text_encoder_2.parameters()).mul_(2)
    changed = encode(pipe)
    fluxfire.restore_pipeline(pipe)
    assert same(encode(pipe), changed)


def test_inputs_in_host_memory_follow_the_weights_and_outputs_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers gives them: it sends inputs to where an encoder's weights are."""
    layer, places = torch.nn.Linear(4, 4), []
    waiting = Waiting(layer, make_pipe())
    monkeypatch.setattr(Waiting, "_device", lambda self: torch.device("cpu:0"))
    given, out = torch.ones(1, 4), {"made": (torch.ones(2), None)}
    moved = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: (places.append((x.shape, a[0])), moved(x, *a, **k))[1])
    made = waiting.around_forward(lambda x, mask, more: out, given, mask=torch.ones(1, 3), more="text")
    assert made["made"][1] is None and torch.equal(made["made"][0], out["made"][0])
    expected = [((1, 4), "cpu:0"), ((1, 3), "cpu:0"), ((4, 4), "cpu:0"), ((4,), "cpu:0"), ((2,), "cpu")]
    assert [(tuple(shape), str(device)) for shape, device in places] == expected


def test_the_device_is_the_pipelines_also_when_it_is_gone() -> None:
    pipe = make_pipe()
    waiting = Waiting(torch.nn.Linear(4, 4), pipe)
    pipe.transformer.to("meta")
    pipe.vae.to("meta")
    assert waiting._device() == torch.device("meta")
    del pipe
    gc.collect()
    assert waiting._device() == torch.device("cpu")


def test_a_failure_lets_go_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, pipe = torch.nn.Linear(4, 4), make_pipe()
    waiting = Waiting(layer, pipe)
    waiting.leave()
    host = layer.weight.data_ptr()
    for place in ("cpu:0", "meta"):  # it fails while it runs, and while weights are brought
        monkeypatch.setattr(Waiting, "_device", lambda self, place=place: torch.device(place))
        with pytest.raises(RuntimeError):
            waiting.around_forward(layer.forward, torch.ones(3))
        assert layer.weight.data_ptr() == host
    assert waiting.brought == 1


@pytest.mark.usefixtures("elsewhere")
def test_restored_it_is_as_before(pipe: Any) -> None:
    parts = (pipe.text_encoder, pipe.text_encoder_2)
    tensors = [(id(p), p.device, p.clone()) for part in parts for p in part.parameters()]
    own = [set(vars(part)) for part in (pipe, *parts)]
    fluxfire.apply_prompts(pipe, encoders="cpu")
    encode(pipe)
    fluxfire.restore_pipeline(pipe)
    assert [set(vars(part)) for part in (pipe, *parts)] == own
    now = [p for part in parts for p in part.parameters()]
    assert [(id(p), p.device) for p in now] == [(key, device) for key, device, _ in tensors]
    assert all(torch.equal(p, before) for p, (_, _, before) in zip(now, tensors, strict=True))


@pytest.mark.parametrize("given", [{"entries": -1}, {"entries": True}, {"entries": 1.5}, {"encoders": "gpu"}])
def test_arguments_that_are_none_are_refused(pipe: Any, given: dict[str, Any]) -> None:
    with pytest.raises(fluxfire.ArgumentError, match="found"):
        fluxfire.apply_prompts(pipe, **given)


def test_what_cannot_wait_is_refused_with_the_reason(pipe: Any) -> None:
    assert "no text encoder" in str(fluxfire.check_prompts(make_pipe()))
    fluxfire.apply_offload(pipe, "model", device="cpu")
    assert "CpuOffload" in str(fluxfire.check_prompts(pipe, encoders="cpu"))
    plan = fluxfire.plan_pipeline(demo.load_pipeline(), prompts="cpu", offload="model", compile=False)
    assert [skip.name for skip in plan.skips] == ["offload"]


def test_one_call_switches_it_on(pipe: Any) -> None:
    fluxfire.optimize_pipeline(pipe, prompts="cpu", compile=False)
    assert "prompts" in dict(fluxfire.report(pipe).other)
    assert "entries=16" in str(fluxfire.report(pipe))


class Quantized(torch.nn.Parameter):
    """As torchao's tensors: no slices."""

    def detach(self) -> Any:
        raise NotImplementedError


def test_quantized_weights_are_told_by_identity(pipe: Any) -> None:
    plain = encode(pipe)
    layer = pipe.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q
    layer.weight = Quantized(layer.weight.data)
    fluxfire.apply_prompts(pipe)
    assert same(encode(pipe), plain) and same(encode(pipe), plain) and counts(pipe)[0] == 1
    layer.weight = Quantized(2 * layer.weight.data)
    assert not same(encode(pipe), plain)
