"""Write the trained parts as one `FluxKontextPipeline` folder, in fp16 files that load as float32.

fp16 rather than bf16: weights are small numbers, and its ten bits of mantissa keep eight times more of them.
transformers gives a model the dtype that its config names, diffusers float32: the text encoders' configs name
float32, so all parts agree."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, FluxKontextPipeline

from training import models

if TYPE_CHECKING:
    from training.bank import Prompts
    from training.train import Nets

SHARD = "13MB"


def save(nets: "Nets", prompts: "Prompts", vae: Path, folder: Path) -> None:
    pipe = FluxKontextPipeline(
        scheduler=models.scheduler(),
        vae=AutoencoderKL.from_pretrained(vae),
        text_encoder=nets.clip,
        tokenizer=prompts.clip_tokenizer,
        text_encoder_2=nets.t5,
        tokenizer_2=prompts.t5_tokenizer,
        transformer=nets.transformer,
    )
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer):
        state = {k: v.to(torch.float16) for k, v in part.state_dict().items()}
        part.to("cpu").load_state_dict(state)
        part.to(torch.float16)
    pipe.save_pretrained(folder, max_shard_size=SHARD)
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # a path of the machine that trained
        if file.parent.name.startswith("text_encoder"):
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
