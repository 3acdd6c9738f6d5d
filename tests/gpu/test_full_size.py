"""The core on a GPU at FLUX.1's full size: 19 + 38 blocks, 12 B random bfloat16 weights made on the GPU.

Random weights have no real hit rate, so hits are forced; asserted are counts, exactness and bytes, never a time.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel

import fluxfire

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("default"),
]


def full_size(device: str = "cuda") -> Any:
    """Kontext with the full-size transformer; the VAE is small, the text encoders are left out."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            transformer = FluxTransformer2DModel(guidance_embeds=True)
            vae = AutoencoderKL(
                block_out_channels=(8,) * 4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=16,
                norm_num_groups=4,
                shift_factor=0.1,
                scaling_factor=0.4,
            )
    finally:
        torch.set_default_dtype(torch.float32)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxKontextPipeline(
        transformer=transformer.eval().requires_grad_(False), vae=vae.eval(), scheduler=scheduler, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, size: tuple[int, int] = (1024, 1024), batch: int = 1, steps: int = 4) -> torch.Tensor:
    """Latents of a text-to-image call, (B, N, 64)."""
    generator = torch.Generator("cuda").manual_seed(1)
    make = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    latents: torch.Tensor = pipe(
        prompt_embeds=torch.randn(batch, 512, 4096, **make),
        pooled_prompt_embeds=torch.randn(batch, 768, **make),
        height=size[0],
        width=size[1],
        max_area=size[0] * size[1],
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
    ).images
    return latents


@pytest.fixture(scope="module")
def pipe() -> Any:
    return full_size()


def test_compiled_and_cached_at_full_size(pipe: Any) -> None:
    baseline = run(pipe)
    held = torch.cuda.memory_allocated()
    fluxfire.apply_compile(pipe)
    fluxfire.apply_cache(pipe, 0)
    compiled = run(pipe)
    assert (compiled - baseline).float().norm() / baseline.float().norm() < 0.05
    assert torch.equal(run(pipe), compiled)
    for size in ((512, 512), (832, 1216)):
        run(pipe, size, steps=2)
    graphs = fluxfire.report(pipe).compile
    assert graphs is not None and (graphs.graphs, graphs.graph_breaks) == (2, 0)
    run(pipe, (512, 512), batch=2, steps=2)
    graphs = fluxfire.report(pipe).compile
    assert graphs is not None and graphs.graphs == 4
    fluxfire.set_cache_threshold(pipe, math.inf)
    run(pipe, steps=4)
    assert fluxfire.cache_stats(pipe).marks() == "#..."
    fluxfire.restore_pipeline(pipe)
    assert torch.equal(run(pipe), baseline)
    assert torch.cuda.memory_allocated() - held < 2**27  # what inductor keeps is not the model's size
