"""The examples in the docstrings of the public names, run: each with a new tiny pipeline."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
from conftest import embeds, make_pipe

import fluxfire


@pytest.mark.parametrize("name", [name for name in fluxfire.__all__ if name != "__version__"])
def test_the_examples_of_a_public_name_do_what_they_say(name: str) -> None:
    call = {"height": 32, "width": 48, "num_inference_steps": 6, "output_type": "latent"}
    around = {"fluxfire": fluxfire, "torch": torch, "copy": copy, "pipe": make_pipe(), "prompt": embeds() | call}
    documented = getattr(fluxfire, name)
    example = doctest.DocTestParser().get_doctest(documented.__doc__, around, name, None, None)
    assert example.examples, f"{name} has no example"
    printed: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=printed.append)
    assert not printed, "".join(printed)
