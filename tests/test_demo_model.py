"""The embedded model is a real Kontext pipeline, and was trained on what the pipeline does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fluxfire import demo

ROOT = Path(__file__).parents[1]
MIB = 2**20


@pytest.fixture(scope="module")
def pipe():
    loaded = demo.load_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def flow(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from training import flow

    return flow


def test_weights_fit_their_budget():
    sizes = [file.stat().st_size for file in demo.model_path().rglob("*") if file.is_file()]
    assert sum(sizes) <= 24 * MIB
    assert max(sizes) <= 15 * MIB


def test_weights_are_safetensors_only():
    assert not [f for f in demo.model_path().rglob("*") if f.is_file() and f.suffix not in {".safetensors", ".json"}]


def test_parts_are_the_real_classes(pipe):
    assert {name: type(part).__name__ for name, part in pipe.components.items() if part is not None} == {
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer_2": "T5Tokenizer",
        "transformer": "FluxTransformer2DModel",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    config = pipe.transformer.config
    assert config.guidance_embeds
    assert config.num_layers >= 2
    assert config.num_layers + config.num_single_layers >= 12
    assert pipe.vae.config.latent_channels == 16


def test_every_weight_is_one_of_the_files(pipe):
    """transformers before 5.6 names CLIP's otherwise, and draws what it does not find at random."""
    for name in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        files = [load_file(file) for file in (demo.model_path() / name).glob("*.safetensors")]
        kept = {(tensor.shape, tensor.double().sum().item()) for file in files for tensor in file.values()}
        loaded = getattr(pipe, name).state_dict().values()
        assert {(tensor.shape, tensor.double().sum().item()) for tensor in loaded} == kept


def test_default_load_is_float32_throughout():
    from diffusers import FluxKontextPipeline

    pipe = FluxKontextPipeline.from_pretrained(str(demo.model_path()))
    assert {part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)} == {torch.float32}


def test_every_prompt_fits_and_has_no_unknown_token(pipe):
    for case in (*demo.prompts("t2i"), *demo.prompts("edit")):
        ids = pipe.tokenizer_2(case.prompt).input_ids
        assert len(ids) <= demo.call_kwargs()["max_sequence_length"]
        assert pipe.tokenizer_2.unk_token_id not in ids
        assert len(pipe.tokenizer(case.prompt).input_ids) <= pipe.tokenizer.model_max_length


def test_held_out_names_are_not_among_the_training_names():
    lists = json.loads((ROOT / "src" / "fluxfire" / "demo" / "prompts.json").read_text())
    held_out = set(lists["held_out"])
    assert held_out.isdisjoint(lists["t2i"]["candidates"])
    assert held_out.issuperset(name for hundred in lists["edit"]["candidates"] for name in hundred)
    assert [len(h) for h in lists["edit"]["candidates"]] == [100, 100]
    assert len(lists["t2i"]["candidates"]) == 500


def test_packing_in_training_equals_the_pipelines(pipe, flow):
    latents = torch.randn(2, 16, 16, 16)
    assert torch.equal(flow.pack(latents), pipe._pack_latents(latents, 2, 16, 16, 16))


def test_reference_tokens_in_training_equal_the_pipelines(pipe, flow):
    picture = torch.rand(1, 3, 128, 128) * 2 - 1
    _, tokens, ids, marked = pipe.prepare_latents(
        picture, 1, 16, 128, 128, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0)
    )
    assert torch.equal(flow.encode(pipe.vae, picture), tokens)
    assert torch.equal(flow.image_ids(8, 8, reference=True), torch.cat([ids, marked]))
    assert torch.equal(flow.image_ids(8, 8, reference=False), ids)


def test_denoiser_call_in_training_equals_the_pipelines(pipe, flow):
    """One step from noise, made by hand with training's `velocity`, is the pipeline's one-step result."""
    case = demo.prompts("t2i")[0]
    noise = flow.pack(torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0)))
    call = demo.call_kwargs()
    made = pipe(
        prompt=case.prompt, latents=noise, num_inference_steps=1, sigmas=[1.0], output_type="latent", **call
    ).images
    with torch.no_grad():
        states, pooled, _ = pipe.encode_prompt(case.prompt, max_sequence_length=call["max_sequence_length"])
        guidance = torch.full((1,), call["guidance_scale"])
        v = flow.velocity(pipe.transformer, noise, torch.ones(1), guidance, (states, pooled))
    torch.testing.assert_close(noise - v, made, rtol=1e-4, atol=1e-4)


def test_both_jobs_make_a_picture_on_white(pipe):
    call = {**demo.call_kwargs(), "num_inference_steps": 8, "output_type": "np"}
    drawn = pipe(prompt="red apple, noto style", generator=torch.Generator().manual_seed(0), **call).images[0]
    name = demo.references()[0]
    edited = pipe(
        prompt="in fluent style", image=demo.reference(name), generator=torch.Generator().manual_seed(0), **call
    ).images[0]
    for picture in (drawn, edited):
        assert picture.shape == (128, 128, 3)
        assert np.isfinite(picture).all()
        assert picture[0, 0].min() > 0.8
        assert picture.std() > 0.05


def test_reference_pictures_are_rgb_of_the_models_size():
    assert demo.references()
    for name in demo.references():
        image = demo.reference(name)
        assert (image.mode, image.size) == ("RGB", (128, 128))


def test_unknown_reference_is_told_with_what_there_is():
    with pytest.raises(KeyError, match=demo.references()[0]):
        demo.reference("no-such-thing")


def test_no_path_of_a_machine_is_in_the_model() -> None:
    for file in demo.model_path().rglob("*.json"):
        assert '"/' not in file.read_text(encoding="utf-8") or "tokenizer" in file.parent.name, file
