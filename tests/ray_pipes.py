"""`serve_pipes` in a worker of a Ray replica: FLUXTEST_PIDS names a folder that gets an empty file for each worker that
computes, named `<pid of the replica>-<pid of the worker>`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import serve_pipes

from fluxfire.serve.model import Model


def make() -> Model:
    model = serve_pipes.make()

    def note(*_: Any) -> None:
        (Path(os.environ["FLUXTEST_PIDS"]) / f"{os.getppid()}-{os.getpid()}").touch()

    model.pipe.transformer.register_forward_pre_hook(note)
    return model
