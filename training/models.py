"""The five parts of the embedded model, untrained: the real classes, at the smallest size that does the job.

Budget: 12.5 M parameters are 24 MiB in 16 bits. A double block has 36 d^2 parameters, a single block 15 d^2; with d =
192 (three heads of 64, the rotary axes scaled from FLUX's (16, 56, 56)) two double and eleven single blocks make 8.7
M.

The autoencoder has FLUX's shape: factor 8, 16 channels, no quant convolutions (no attention in the middle, to save
weights); a picture is 16 x 16 x 16, packed to 64 tokens."""

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

TEXT_LENGTH = 24  # tokens a prompt, both tokenizers; the longest training prompt fits
TEXT_WIDTH = 128
LATENT_CHANNELS = 16


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 96, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=128,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def transformer(**changes: Any) -> FluxTransformer2DModel:
    """The denoiser, with zeroed modulation and output (as DiT's adaLN-Zero): each block starts as the identity."""
    config = {
        "in_channels": 4 * LATENT_CHANNELS,
        "num_layers": 2,
        "num_single_layers": 11,
        "attention_head_dim": 64,
        "num_attention_heads": 3,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": TEXT_WIDTH,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 24, 24),
    }
    model = FluxTransformer2DModel(**{**config, **changes})
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and ("norm" in name or name == "proj_out"):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    return model


def clip(vocab_size: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def t5(vocab_size: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's schedule; at 64 tokens its dynamic shift is exp(0.4675) = 1.6."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
