"""What is measured: pipelines at FLUX.1's full size with random weights, the embedded model, and tiny ones.

At full size there are no weights to download: the denoiser (19 + 38 blocks, 12 B parameters), the VAE, CLIP-L and
T5-XXL get random values, made on the device. Times and memory are then real; pictures and hit rates are not, so hits
are forced where a cache is measured. The embedded model has real dynamics and is small enough for a CPU. The tiny
workloads only try a command out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from fluxfire.errors import ArgumentError

SEED: Final = 42
PROMPT: Final = {"embedded-t2i": "red apple, noto style", "embedded-edit": "in twemoji style"}
GUIDANCE: Final = 4.0  # the model sees 1000 times that: 4000 is a number of bfloat16, 3500 is rounded to 3504
REFERENCE: Final = "red-apple-noto"  # of the embedded model


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of call: which model, how large a picture, with a reference picture or without."""

    name: str
    model: Literal["full", "embedded", "tiny"]
    side_px: int
    edit: bool = False  # Kontext: the reference's tokens double the image tokens
    text_tokens: int = 512

    @property
    def what(self) -> str:
        """One line for tables."""
        of = {"full": "FLUX.1 at full size, random weights", "embedded": "the embedded model", "tiny": "a tiny model"}
        return f"{of[self.model]}, {'an edit' if self.edit else 'text to image'}, {self.side_px}x{self.side_px}"


WORKLOADS: Final = {
    workload.name: workload
    for workload in (
        Workload("t2i-1024", "full", 1024),
        Workload("kontext-1024", "full", 1024, edit=True),
        Workload("t2i-512", "full", 512),
        Workload("t2i-2048", "full", 2048),
        Workload("embedded-t2i", "embedded", 128, text_tokens=24),
        Workload("embedded-edit", "embedded", 128, edit=True, text_tokens=24),
        Workload("tiny-t2i", "tiny", 32, text_tokens=8),
        Workload("tiny-edit", "tiny", 32, edit=True, text_tokens=8),
    )
}

_FULL: Final[dict[str, dict[str, Any]]] = {
    "transformer": {"guidance_embeds": True},
    "vae": {"block_out_channels": (128, 256, 512, 512), "latent_channels": 16, "norm_num_groups": 32},
    "clip": {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    | {"num_hidden_layers": 12, "projection_dim": 768, "eos_token_id": 2},
    "t5": {"vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24},
}
_TINY: Final[dict[str, dict[str, Any]]] = {
    "transformer": {"in_channels": 16, "attention_head_dim": 16, "num_attention_heads": 2, "guidance_embeds": True}
    | {"joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)}
    | {"num_layers": 2, "num_single_layers": 2},
    "vae": {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4},
    "clip": {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    | {"num_hidden_layers": 1, "projection_dim": 16, "eos_token_id": 2},
    "t5": {"vocab_size": 99, "d_model": 32, "d_ff": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1},
}
DEPTH: Final = (2, 4)  # double and single blocks of full width, where a float32 copy has to fit beside


def transformer_config(workload: Workload, depth: tuple[int, int] | None = None) -> dict[str, Any]:
    """Arguments of `FluxTransformer2DModel` for a workload with random weights."""
    config = (_FULL if workload.model == "full" else _TINY)["transformer"]
    return config if depth is None else config | {"num_layers": depth[0], "num_single_layers": depth[1]}


def build(workload: Workload, device: torch.device, dtype: torch.dtype, *, depth: tuple[int, int] | None = None) -> Any:
    """A new pipeline of the workload, always with the same weights; without text encoders unless embedded.

    Args:
        workload: which.
        device: where the weights are made.
        dtype: of all its weights.
        depth: double and single blocks instead of the model's own, where weights are random.
    """
    import diffusers

    cls: Any = diffusers.FluxKontextPipeline if workload.edit else diffusers.FluxPipeline
    if workload.model == "embedded":
        from fluxfire import demo

        loaded: Any = demo.load_pipeline(dtype)
        parts = ("scheduler", "vae", "transformer", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        pipe = cls(**{name: loaded.components[name] for name in parts}).to(device)
    else:
        sizes = (_FULL if workload.model == "full" else _TINY)["vae"]
        levels = len(sizes["block_out_channels"])
        with _random_weights(device, dtype):
            transformer: Any = diffusers.FluxTransformer2DModel(**transformer_config(workload, depth))
            vae: Any = diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                layers_per_block=2,
                use_quant_conv=False,
                use_post_quant_conv=False,
                shift_factor=0.1159,
                scaling_factor=0.3611,
                **sizes,
            )
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        pipe = cls(scheduler=scheduler, vae=vae.eval(), transformer=transformer.eval(), **none)
    for part in (pipe.transformer, pipe.vae):
        part.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_text_encoders(workload: Workload, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """CLIP and T5 with random weights; None where the pipeline brings its own."""
    if workload.model == "embedded":
        return None
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    sizes = _FULL if workload.model == "full" else _TINY
    with _random_weights(device, dtype):
        clip = CLIPTextModel(CLIPTextConfig(**sizes["clip"]))
        t5 = T5EncoderModel(T5Config(**sizes["t5"], feed_forward_proj="gated-gelu"))
    return clip.eval().requires_grad_(False), t5.eval().requires_grad_(False)


@contextmanager
def _random_weights(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New modules get random values of this kind, the same each time."""
    before = torch.get_default_dtype()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(SEED)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


class Picture:
    """The stages of making one picture (or a batch), each a call of its own, so that each can be timed.

    Args:
        workload: which.
        pipe: of `build`, optimized or not; what it says of device and type holds for the inputs.
        text_encoders: of `build_text_encoders`.
        batch: pictures at once.
        rounded: all of the denoiser's inputs are random and have been of this data type, so that pipelines of
            different data types get the same; None: inputs are what the stages before give, where they are trained.
    """

    def __init__(
        self,
        workload: Workload,
        pipe: Any,
        text_encoders: tuple[Any, Any] | None,
        batch: int,
        rounded: torch.dtype | None = None,
    ) -> None:
        self.workload, self.pipe, self.batch = workload, pipe, batch
        self._text_encoders = text_encoders
        weight = next(pipe.vae.parameters())
        self._at: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self._rounded = rounded or weight.dtype
        self._embeds = self._random_embeds() if rounded or workload.model != "embedded" else self.encode_text()
        self._reference = self._reference_picture() if workload.edit else None
        side = workload.side_px // pipe.vae_scale_factor
        self._noise = self._random((batch, pipe.vae.config.latent_channels, side, side))  # before packing

    def _random_embeds(self) -> dict[str, Any]:
        config = self.pipe.transformer.config
        shapes = {
            "prompt_embeds": (self.batch, self.workload.text_tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (self.batch, config.pooled_projection_dim),
        }
        return {name: self._random(shape) for name, shape in shapes.items()}

    def _reference_picture(self) -> torch.Tensor:
        """The reference picture as the VAE wants it, (B, 3, H, W) in -1..1."""
        if self.workload.model == "embedded":
            from fluxfire import demo

            one: torch.Tensor = self.pipe.image_processor.preprocess(demo.reference(REFERENCE)).to(**self._at)
            return one.repeat(self.batch, 1, 1, 1)
        side = self.workload.side_px
        return self._random((self.batch, 3, side, side)).clamp(-1, 1)

    def _random(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(self._rounded).to(**self._at)

    @torch.no_grad()
    def encode_text(self) -> dict[str, Any]:
        """Prompt embeddings: of the prompt, or, with random encoders, of random tokens."""
        if self._text_encoders is None:
            prompt = [PROMPT[self.workload.name]] * self.batch
            tokens = self.workload.text_tokens
            embeds, pooled, _ = self.pipe.encode_prompt(prompt, None, max_sequence_length=tokens)
            return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        clip, t5 = self._text_encoders
        ids = torch.ones((self.batch, self.workload.text_tokens), dtype=torch.long, device=self._at["device"])
        clip_ids = ids[:, :1].expand(-1, clip.config.max_position_embeddings)
        return {"prompt_embeds": t5(ids)[0], "pooled_prompt_embeds": clip(clip_ids).pooler_output}

    @torch.no_grad()
    def encode_reference(self) -> torch.Tensor | None:
        """Latents of the reference picture; None without one."""
        if self._reference is None:
            return None
        latents: torch.Tensor = self.pipe._encode_vae_image(self._reference, torch.Generator().manual_seed(SEED))
        return latents

    def random_reference(self) -> torch.Tensor | None:
        """In the place of a reference's latents; None without one."""
        return None if self._reference is None else self._noise.flip(0, 2)

    def denoise(self, steps: int, reference: torch.Tensor | None, on_step: Callable[[], None] | None = None) -> Any:
        """The pipeline's own loop with its own scheduler; packed latents (B, N, C)."""
        side = self.workload.side_px
        more: dict[str, Any] = {}
        if self.workload.edit:  # else Kontext makes it 1024x1024
            more = {"image": reference, "max_area": side * side, "_auto_resize": False}
        if on_step is not None:

            def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
                on_step()
                return values

            more["callback_on_step_end"] = callback
        channels, width = self._noise.shape[1], self._noise.shape[3]
        noise = self.pipe._pack_latents(self._noise, self.batch, channels, width, width)
        call = {"height": side, "width": side, "latents": noise, "num_inference_steps": steps}
        call["guidance_scale"] = GUIDANCE
        return self.pipe(**call, **self._embeds, **more, output_type="latent").images

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in -1..1."""
        pipe, side = self.pipe, self.workload.side_px
        unpacked = pipe._unpack_latents(latents, side, side, pipe.vae_scale_factor)
        config = pipe.vae.config
        pictures: torch.Tensor = pipe.vae.decode(
            unpacked / config.scaling_factor + config.shift_factor, return_dict=False
        )[0]
        return pictures


def named(names: str) -> list[str]:
    """Workloads by name, comma-separated.

    Raises:
        ArgumentError: a name that there is not.
    """
    found = [name.strip() for name in names.split(",")]
    for name in found:
        if name not in WORKLOADS:
            raise ArgumentError(f"workload: found {name!r}, needed some of {', '.join(WORKLOADS)}")
    return list(dict.fromkeys(found))


def batches(numbers: str) -> list[int]:
    """Batch sizes, comma-separated.

    Raises:
        ArgumentError: not a number, or less than 1.
    """
    try:
        found = [int(number) for number in numbers.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ArgumentError(f"batch: found {numbers!r}, needed numbers of 1 or more, such as 1,4")
    return found


def tokens(workload: Workload, pipe: Any) -> tuple[int, int]:
    """Text tokens and image tokens, a reference's included, of one sample."""
    side = workload.side_px // (2 * pipe.vae_scale_factor)
    return workload.text_tokens, side * side * (1 + workload.edit)
