"""The embedded model in a worker that can be made sick, as by a bad waking.

FLUXTEST_SICK names a file that says which process (its id) and how: "numb" has other weights from then on, "stuck" does
not come back.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from fluxfire import demo
from fluxfire.serve.model import Model


def make() -> Model:
    pipe = demo.load_pipeline()

    def fall_sick(module: Any, _: Any) -> None:
        sick = Path(os.environ["FLUXTEST_SICK"])
        if sick.exists() and sick.read_text() == f"{os.getpid()} numb":
            with torch.no_grad():
                module.proj_out.weight.zero_()
        if sick.exists() and sick.read_text() == f"{os.getpid()} stuck":
            time.sleep(3600)

    pipe.transformer.register_forward_pre_hook(fall_sick)
    call = demo.call_kwargs()
    return Model(pipe, "tested", 64, 4, call["guidance_scale"], call["max_sequence_length"])
