"""A tiny pipeline of every FLUX class of diffusers, with random weights, and a call that uses what makes the class.

`CASES` is the table: class name -> what its parts need, what it is called with, how many guidance branches a step has.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from conftest import CHANNELS, POOLED, TEXT_TOKENS, embeds
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

STEPS = 4
SIZES = {"FLUX.1": 32, "FLUX.2": 64, "FLUX.3": 64}  # pixels a side; the smallest picture that a family takes

Arguments = dict[str, Callable[[], Any]]  # made anew for each call


@dataclass(frozen=True)
class Case:
    family: str
    call: Arguments = field(default_factory=dict)
    denoiser: dict[str, Any] = field(default_factory=dict)  # settings of the class's denoiser
    branches: int = 1  # denoiser calls a step
    first_calls: int = 1  # calls of a branch that are computed however small the distances are
    steps: int = STEPS  # of the denoiser; fewer where `strength` leaves the first ones out
    controlnet: bool = False


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(seed: int = 3, size: int = 32) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def control() -> torch.Tensor:
    return picture(4)


def mask(size: int = 32) -> torch.Tensor:
    """(1, 1, H, W): the right half is to be painted."""
    return (torch.arange(size) >= size // 2).float().expand(1, 1, size, size).clone()


def photo(seed: int = 3) -> Image.Image:
    """FLUX.2 and FLUX.3 take no tensor, and at least 64 pixels a side."""
    return Image.fromarray(picture(seed, 64)[0].permute(1, 2, 0).mul(255).byte().numpy())


def photo_mask() -> Image.Image:
    return Image.fromarray(mask(64)[0, 0].mul(255).byte().numpy())


def negative() -> torch.Tensor:
    return noise(9, 1, TEXT_TOKENS, CHANNELS)


def negative_pooled() -> torch.Tensor:
    return noise(10, 1, POOLED)


def text() -> torch.Tensor:
    return noise(1, 1, TEXT_TOKENS, CHANNELS)


def _set(value: Any) -> Callable[[], Any]:
    return lambda: value


FROM_PICTURE: Arguments = {"image": picture, "strength": _set(0.7)}
PAINT: Arguments = {"image": picture, "mask_image": mask, "strength": _set(1.0)}
CFG: Arguments = {
    "negative_prompt_embeds": negative,
    "negative_pooled_prompt_embeds": negative_pooled,
    "true_cfg_scale": _set(3.0),
}
NO_RESIZE: Arguments = {"max_area": _set(32 * 32), "_auto_resize": _set(False)}

CASES = {
    "FluxPipeline": Case("FLUX.1", CFG, branches=2),
    "FluxImg2ImgPipeline": Case("FLUX.1", FROM_PICTURE, steps=3),
    "FluxInpaintPipeline": Case("FLUX.1", PAINT),
    # Latents (16), masked picture (16) and mask (2 x 2 of 2 x 2 pixels).
    "FluxFillPipeline": Case("FLUX.1", PAINT, {"in_channels": 48}),
    "FluxControlPipeline": Case("FLUX.1", {"control_image": control}, {"in_channels": 32}),
    "FluxControlImg2ImgPipeline": Case(
        "FLUX.1", FROM_PICTURE | {"control_image": control}, {"in_channels": 32}, steps=3
    ),
    "FluxControlInpaintPipeline": Case("FLUX.1", PAINT | {"control_image": control}, {"in_channels": 32}),
    "FluxControlNetPipeline": Case("FLUX.1", CFG | {"control_image": control}, branches=2, controlnet=True),
    "FluxControlNetImg2ImgPipeline": Case(
        "FLUX.1", FROM_PICTURE | {"control_image": control}, steps=3, controlnet=True
    ),
    "FluxControlNetInpaintPipeline": Case("FLUX.1", PAINT | {"control_image": control}, controlnet=True),
    "FluxKontextPipeline": Case("FLUX.1", CFG | NO_RESIZE | {"image": picture}, branches=2),
    "FluxKontextInpaintPipeline": Case("FLUX.1", PAINT | NO_RESIZE | {"image_reference": control}),
    "FluxPriorReduxPipeline": Case("none"),
    "FluxModularPipeline": Case("FLUX.1", FROM_PICTURE, steps=3),
    "FluxKontextModularPipeline": Case("FLUX.1", NO_RESIZE | {"image": photo}),
    "Flux2Pipeline": Case("FLUX.2", {"image": photo}, {"guidance_embeds": True}),
    "Flux2KleinPipeline": Case(
        "FLUX.2", {"image": photo, "negative_prompt_embeds": negative, "guidance_scale": _set(3.0)}, branches=2
    ),
    "Flux2KleinInpaintPipeline": Case(
        "FLUX.2",
        {"image": photo, "mask_image": photo_mask, "negative_prompt_embeds": negative, "guidance_scale": _set(3.0)},
        branches=2,
    ),
    # The first call only fills the key-value cache.
    "Flux2KleinKVPipeline": Case("FLUX.2", {"image": photo}, first_calls=2),
    "Flux2ModularPipeline": Case("FLUX.2", {"image": photo}, {"guidance_embeds": True}),
    "Flux2KleinModularPipeline": Case("FLUX.2", {"image": photo}),
    "Flux2KleinBaseModularPipeline": Case("FLUX.2", {"image": photo, "negative_prompt_embeds": negative}, branches=2),
    "Flux3ModularPipeline": Case("FLUX.3", {"image": photo, "negative_prompt_embeds": negative}, branches=2),
    "Flux3DistilledModularPipeline": Case("FLUX.3", {"image": photo}, {"flow_map": True}),
}


def make(name: str, *, encoders: bool = False) -> Any:
    """A seeded pipeline of the class of this name; without encoders, prompts are given as embeddings."""
    torch.manual_seed(0)
    cls: Any = getattr(diffusers, name)
    case = CASES[name]
    if case.family == "none":
        return _redux(cls)
    parts = PARTS[case.family](case)
    if case.family != "FLUX.3":  # whose pipelines come with their scheduler
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    if case.controlnet:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # diffusers uses its own old name
            parts["controlnet"] = _controlnet()
    if issubclass(cls, diffusers.ModularPipeline):
        blocks = getattr(diffusers, cls.default_blocks_name)()
        for block in ("prompt_upsampler", "text_encoder"):
            blocks.sub_blocks.pop(block, None)
        pipe = cls(blocks=blocks)
        pipe.update_components(**parts)
    else:
        texts = ("text_encoder", "tokenizer") + ("text_encoder_2", "tokenizer_2") * (case.family == "FLUX.1")
        pipe = cls(**parts, **(_encoders(name) if encoders else dict.fromkeys(texts)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any) -> torch.Tensor:
    """The picture of one call of `STEPS` denoising steps: (1, 3, H, W)."""
    case = CASES[type(pipe).__name__]
    size = SIZES[case.family]
    arguments = embeds() if case.family == "FLUX.1" else {"prompt_embeds": text()}
    arguments |= {"height": size, "width": size, "num_inference_steps": STEPS, "output_type": "pt"}
    arguments |= {name: value() for name, value in case.call.items()}
    if getattr(pipe, "text_encoder", None) is not None:
        arguments = {name: value for name, value in arguments.items() if not name.endswith("prompt_embeds")}
        arguments |= {"prompt": "a fox", "max_sequence_length": 16, "num_inference_steps": STEPS // 2}  # is enough
        arguments |= {"text_encoder_out_layers": (1, 2)} if case.family == "FLUX.2" else {}
        arguments |= {"negative_prompt": "a crow"} if "true_cfg_scale" in case.call else {}
    arguments["generator"] = torch.Generator().manual_seed(2)
    if isinstance(pipe, diffusers.ModularPipeline):
        return pipe(**arguments, output="images")
    return pipe(**arguments).images


def _encoders(name: str) -> dict[str, Any]:
    """Text encoders of the kinds that the class comes with, and tokenizers that have a token a byte."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    llm = sizes | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 257}
    if CASES[name].family == "FLUX.1":
        clip = CLIPTextConfig(**sizes | {"hidden_size": POOLED}, vocab_size=257, eos_token_id=0, bos_token_id=1)
        t5 = T5Config(d_model=CHANNELS, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=257)
        encoders = {"text_encoder": CLIPTextModel(clip), "text_encoder_2": T5EncoderModel(t5)}
    elif name == "Flux2Pipeline":
        sight = PixtralVisionConfig(**sizes, image_size=32, patch_size=16)
        mistral = Mistral3Config(text_config=MistralConfig(**llm), vision_config=sight)
        encoders = {"text_encoder": Mistral3ForConditionalGeneration(mistral)}
    else:
        encoders = {"text_encoder": Qwen3ForCausalLM(Qwen3Config(**llm))}
    words = {part.replace("text_encoder", "tokenizer"): _tokenizer() for part in encoders}
    return {part: encoder.eval() for part, encoder in encoders.items()} | words


def _tokenizer() -> Any:
    letters = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_ = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    last = "{% set said = messages[-1]['content'] %}{{ said if said is string else said[0]['text'] }}"
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, pad_token="<pad>", model_max_length=16, chat_template=last)


def _flux1(case: Case) -> dict[str, Any]:
    transformer = diffusers.FluxTransformer2DModel(
        **FLUX1 | {"out_channels": 16, "num_layers": 2, "num_single_layers": 2} | case.denoiser
    )
    factors: dict[str, Any] = {
        "shift_factor": 0.1,
        "scaling_factor": 0.5,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    factors["sample_size"] = 64  # a tile: no picture of these tests is larger
    return {"transformer": transformer.eval(), "vae": _vae(diffusers.AutoencoderKL, **factors)}


FLUX1: dict[str, Any] = {
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": CHANNELS,
    "pooled_projection_dim": POOLED,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
FLUX2: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": CHANNELS,
    "axes_dims_rope": (4, 4, 4, 4),
}


def _flux2(case: Case) -> dict[str, Any]:
    settings = FLUX2 | {"timestep_guidance_channels": 32, "guidance_embeds": False} | case.denoiser
    transformer = diffusers.Flux2Transformer2DModel(**settings)
    return {"transformer": transformer.eval(), "vae": _vae(diffusers.AutoencoderKLFlux2)}


def _flux3(case: Case) -> dict[str, Any]:
    settings = FLUX2 | {"cond_in_channels": 16, "timestep_channels": 32} | case.denoiser
    transformer = diffusers.Flux3Transformer2DModel(**settings)
    return {"transformer": transformer.eval(), "vae": _vae(diffusers.AutoencoderKLFlux2)}


PARTS: dict[str, Callable[[Case], dict[str, Any]]] = {"FLUX.1": _flux1, "FLUX.2": _flux2, "FLUX.3": _flux3}


def _vae(cls: type, **more: Any) -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1}
    return cls(**blocks, **sizes, **more).eval()


def _controlnet() -> Any:
    controlnet = diffusers.FluxControlNetModel(**FLUX1 | {"num_layers": 1, "num_single_layers": 1})
    for parameter in controlnet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # its outputs begin at zero
    return controlnet.eval()


def _redux(cls: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=16))
    embedder = ReduxImageEncoder(redux_dim=16, txt_in_features=CHANNELS)
    return cls(image_encoder=encoder, feature_extractor=None, image_embedder=embedder)
