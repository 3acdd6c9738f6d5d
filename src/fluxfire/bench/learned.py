"""Scores by trained networks, whose weights the Hugging Face Hub has: CLIP score, PickScore, LPIPS.

- CLIP score, about 15 to 35: 100 times the cosine of picture and prompt in CLIP's space (https://arxiv.org/abs/2104.08718).
  Whether the picture still shows what the prompt says; blind to detail.
- PickScore, about 17 to 24: the same by a CLIP that was trained on people's choices (https://arxiv.org/abs/2305.01569).
  Which of two pictures people would pick. It stands in for ImageReward, whose package is for transformers 4.
- LPIPS, 0 (equal) to 1 and more: how differently a network sees two pictures (https://arxiv.org/abs/1801.03924). By
  torchmetrics and torchvision, whose weights come from download.pytorch.org.

What is loaded from the Hub is safetensors. DreamSim and ImageReward are not here: their packages unpickle what they
download.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
import torch

from fluxfire.bench.quality import Picture, as_bytes, check_pair
from fluxfire.errors import FluxfireError

TextScore = Literal["clip_score", "pick_score"]
# (weights, processor, the factor of the cosine; None: the model's own scale)
_ON_THE_HUB: Final[dict[TextScore, tuple[str, str, float | None]]] = {
    "clip_score": ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14", 100.0),
    "pick_score": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", None),
}


def text_score(name: TextScore, *, weights: str | None = None) -> Callable[[Picture, str], float]:
    """Loads a score of (picture, prompt).

    Args:
        name: which.
        weights: a folder with weights and processor, instead of the Hub's.

    Raises:
        FluxfireError: the weights are neither in the local cache nor to be had from the Hub.
    """
    from transformers import AutoProcessor, CLIPModel

    hub_weights, hub_processor, factor = _ON_THE_HUB[name]
    try:
        model: Any = CLIPModel.from_pretrained(weights or hub_weights, use_safetensors=True).eval()
        processor: Any = AutoProcessor.from_pretrained(weights or hub_processor)
    except OSError as error:  # what transformers raises for a missing file, a missing network and HF_HUB_OFFLINE
        raise FluxfireError(
            f"{name} needs {weights or hub_weights}, which is not in the local cache and could not be loaded: where "
            f"there is a network, type: hf download {hub_weights} && hf download {hub_processor}"
        ) from error

    @torch.no_grad()
    def score(picture: Picture, prompt: str) -> float:
        given = processor(text=[prompt], images=[as_bytes(picture)], return_tensors="pt", padding=True, truncation=True)
        out = model(**given)
        cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).item()
        return float(cosine * (model.logit_scale.exp().item() if factor is None else factor))

    return score


def lpips() -> Callable[[Picture, Picture], float]:
    """Loads LPIPS (AlexNet) of (reference, picture).

    Raises:
        ModuleNotFoundError: torchvision or torchmetrics is not installed.
        FluxfireError: the network's weights could not be downloaded.
    """
    from urllib.error import URLError

    try:
        import torchvision  # noqa: F401
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    except ModuleNotFoundError as error:
        message = f"LPIPS needs {error.name}: pip install torchvision 'fluxfire[quality]'"
        raise ModuleNotFoundError(message, name=error.name) from None
    try:
        network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()
    except URLError as error:
        raise FluxfireError(
            f"LPIPS needs AlexNet's weights from download.pytorch.org, which could not be reached ({error.reason}): "
            "run it once where there is a network; torch keeps them under ~/.cache/torch/hub"
        ) from error

    @torch.no_grad()
    def distance(a: Picture, b: Picture) -> float:
        value_range = check_pair(a, b)
        x, y = (torch.from_numpy(np.asarray(p / value_range, np.float32)).permute(2, 0, 1)[None] for p in (a, b))
        return float(network(y, x))

    return distance
