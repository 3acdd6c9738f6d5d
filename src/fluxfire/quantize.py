"""Quantization: the blocks' linear layers as 8-bit products. Half the weights' memory, and twice the arithmetic rate.

What is quantized: every linear layer in a transformer block with both sizes a multiple of 16: queries, keys, values,
outputs, MLPs, 8.8 of FLUX.1's 12 B parameters. Weights once, with a scale for each row; inputs in every call, with a
scale for each token (`linear.py` says how, and what `weights` may be). Errors do not depend on other samples or tokens.

What stays as it is:
- The modulation (AdaLayerNorm) layers: they see one vector a step, and an error of theirs is in all tokens at once.
  They are 3.2 B parameters: `apply_modulation_table` takes their time, and with weights="cpu" their memory.
- What stands around the blocks: embedders and the last norm and projection, 1 % of the parameters, where the picture
  comes in and goes out.
- LoRA layers, an IP-Adapter's, and sizes that the kernels do not take.

The originals wait in host memory (`keep_original="cpu"`), so that restoring is exact, or are freed layer by layer
(`None`): then there is no way back but loading. `save_quantized` and `load_quantized` are for the next start, which
then neither quantizes nor ever holds the originals.

Without compilation it is slower than bfloat16: finding scales and rounding are passes of their own then. How it differs
from torchao's `quantize_`: the same numbers for float8 with `PerRow`, from plain modules instead of tensor subclasses;
importing torchao changes what diffusers and transformers do, and its settings for inductor are the whole process's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch import nn

from fluxfire.blocks import FAMILIES, denoiser_of, family_of, offload_hook
from fluxfire.errors import ArgumentError, NotOptimizedError, StepError
from fluxfire.linear import DTYPES, KINDS, MULTIPLE, QuantizedLinear, obstacle
from fluxfire.patches import applying
from fluxfire.plan import Handle, Step

KEEP: Final = ("cpu", None)
FILE: Final = "quantized.safetensors"
FORMAT: Final = "fluxfire-quantized-1"

_DTYPES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

# Parts of a block, by what is in their name, that stay as they are.
STAY: Final = ("norm", "mod", "processor", "lora_")

FREED: Final = (
    "the weights before quantization were freed (keep_original=None): load the pipeline anew, or quantize with "
    'keep_original="cpu"'
)


@dataclass(frozen=True, slots=True)
class QuantizationStats:
    """What is quantized, and what it takes now.

    `weight_error` is the mean over the layers of |Q s - W| / |W|; what that does to outputs the bench measures.
    """

    weights: str
    layers: int
    gib: float
    gib_before: float
    weight_error: float
    originals: str


def check_quantization(pipe: Any, weights: str = "float8", *, keep_original: str | None = "cpu") -> str | None:
    """Why `apply_quantization` with these arguments would refuse this pipeline, or None.

    Raises:
        ArgumentError: an argument that no pipeline could take.
        NotFluxError: `pipe` is no FLUX pipeline.

    Examples:
        >>> fluxfire.check_quantization(pipe, "int8-weights")
    """
    if weights not in KINDS:
        raise ArgumentError(f"weights: found {weights!r}, needed one of {', '.join(map(repr, KINDS))}")
    if keep_original not in KEEP:
        raise ArgumentError(f'keep_original: found {keep_original!r}, needed "cpu" (host memory) or None (freed)')
    denoiser = denoiser_of(pipe)
    if any(isinstance(module, QuantizedLinear) for module in denoiser.modules()):
        return "found 8-bit layers of fluxfire in it already (load_quantized): leave quantization out"
    if hook := offload_hook(denoiser):
        return f"found the denoiser offloaded ({hook}): take that off, and use fluxfire.apply_offload afterwards"
    layers = list(_layers(pipe))
    for _, _, name, linear in layers:
        if reason := obstacle(linear):
            return f"found {name} {reason}"
    if not layers:
        return f"found no linear layer in the blocks of {type(denoiser).__name__} whose sizes are multiples of 16"
    return _missing_kernel(weights, layers[0][3].weight)


def _missing_kernel(weights: str, like: torch.Tensor) -> str | None:
    """Why this machine has no such product, or None: by trying one of 32 x 32 with 32 tokens."""
    layer = nn.Linear(32, 32, device="meta")
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 32, 32, generator=generator).to(like)
    layer.weight, layer.bias = nn.Parameter(values[0]), nn.Parameter(values[1, 0])
    try:
        with torch.no_grad():
            QuantizedLinear.of(layer, weights)(values[1])
    except Exception as error:  # kernels raise anything for what they do not take
        first = next(iter(str(error).splitlines()), "")
        other = 'weights="int8"' if weights.startswith("float8") else 'weights="int8-weights"'
        return (
            f'found no product for "{weights}" with {like.dtype} on this {like.device.type} device ({first}), needed a '
            f"GPU of compute capability 8.9 or more and bfloat16 for float8, 7.5 or more for int8: try {other}"
        )
    return None


def apply_quantization(pipe: Any, weights: str = "float8", *, keep_original: str | None = "cpu") -> Any:
    """The blocks' linear layers as 8-bit products. Approximate.

    Args:
        pipe: a FLUX pipeline, changed in place; best on the GPU in bfloat16, and compiled afterwards.
        weights: "float8"; "float8-after", whose scales are applied after the kernel; "int8" for GPUs without float8
            and for CPUs; "int8-weights", which saves memory alone.
        keep_original: "cpu": the weights wait in host memory for restoring; None: they are freed.

    Returns:
        The same pipe.

    Raises:
        ArgumentError, NotFluxError, StepError: nothing was changed.

    Examples:
        >>> image = fluxfire.apply_quantization(pipe, "int8-weights")(**prompt).images
        >>> dict(fluxfire.report(pipe).other)["quantization"].weight_error < 0.02
        True
    """
    reason = check_quantization(pipe, weights, keep_original=keep_original)
    settings = (("weights", weights), ("keep_original", keep_original))
    with applying(pipe, Step("quantization", "approximate", settings), reason) as handle:
        state = Quantization(handle, weights, keep_original)
        if keep_original is None:
            handle.patch.final(FREED)
            handle.patch.set(handle.denoiser, "save_pretrained", _no_checkpoint)
        else:
            handle.patch.on_undo(state.put_back)
        for parent, key, _, linear in list(_layers(pipe)):
            state.replace(parent, key, linear)
        handle.states["quantization"] = state
    return pipe


class Quantization:
    """The quantized layers of one pipeline, and the way back."""

    def __init__(self, handle: Handle, weights: str, keep_original: str | None) -> None:
        self._denoiser, self._weights, self._keep = handle.denoiser, weights, keep_original
        self._ours: set[QuantizedLinear] = set()
        self._errors: list[torch.Tensor] = []
        self._bytes = self._bytes_before = 0

    def stats(self) -> QuantizationStats:
        """A snapshot."""
        error = torch.stack(self._errors).mean().item()
        now, before = round(self._bytes / 2**30, 3), round(self._bytes_before / 2**30, 3)
        originals = "freed" if self._keep is None else "in host memory"
        return QuantizationStats(self._weights, len(self._errors), now, before, error, originals)

    def replace(self, parent: nn.Module, key: str, linear: nn.Linear) -> None:
        """Puts a quantized layer in the place of this one, whose weight leaves the device."""
        with torch.inference_mode(False), torch.no_grad():
            ours, weight = QuantizedLinear.of(linear, self._weights), linear.weight
            exact = weight.float()
            self._errors.append((ours.numbers.float() * ours.scale - exact).norm() / exact.norm().clamp_min(1e-30))
            self._bytes += ours.numbers.nbytes + ours.scale.nbytes
            self._bytes_before += weight.nbytes
            self._ours.add(ours)
            parent._modules[key] = ours
            weight.data = weight.data.new_empty(0) if self._keep is None else weight.data.to("cpu")
            if self._keep is None:
                ours.original.layer = None

    def put_back(self) -> None:
        """Each original in the place of its quantized layer, wherever that is now: an adapter may be around it."""
        with torch.inference_mode(False), torch.no_grad():
            for parent in self._denoiser.modules():
                for key, module in parent._modules.items():
                    if isinstance(module, QuantizedLinear) and module in self._ours:
                        original = module.original.layer
                        assert original is not None
                        original.weight.data = original.weight.data.to(module.numbers.device, module.dtype)
                        original.bias = module.bias
                        parent._modules[key] = original
        self._ours.clear()


def _layers(pipe: Any) -> Iterator[tuple[nn.Module, str, str, nn.Linear]]:
    """What is to be quantized: (parent, key in it, name, layer), in the order of the model."""
    denoiser, family = denoiser_of(pipe), family_of(pipe)
    blocks = dict.fromkeys(
        [*family.blocks(denoiser), *(b for blocks in family.static_blocks(denoiser) for b in blocks)]
    )
    names = {module: name for name, module in denoiser.named_modules()}
    for block in blocks:
        for path, parent in block.named_modules():
            for key, layer in parent._modules.items():
                name = f"{path}.{key}".lstrip(".")
                if isinstance(layer, nn.Linear) and not any(part in name for part in STAY):
                    if hasattr(layer, "base_layer") or layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
                        continue  # an adapter's own layer is beneath it
                    yield parent, key, f"{names[block]}.{name}", layer


def _no_checkpoint(*args: Any, **kwargs: Any) -> NoReturn:
    raise StepError(
        "a checkpoint of 8-bit layers is nothing that diffusers loads: use fluxfire.save_quantized(pipe, path)"
    )


def save_quantized(pipe: Any, folder: str | PathLike[str]) -> None:
    """Writes the quantized denoiser for `load_quantized`: its configuration and one file of safetensors.

    Args:
        pipe: a FLUX pipeline after `apply_quantization`.
        folder: made if there is none.

    Raises:
        NotFluxError: `pipe` is no FLUX pipeline.
        NotOptimizedError: nothing in it is quantized.
        StepError: an adapter is in it.

    Examples:
        >>> fluxfire.save_quantized(pipe, "quantized")
        Traceback (most recent call last):
            ...
        fluxfire.errors.NotOptimizedError: found nothing quantized in this pipeline: call ...
    """
    from safetensors.torch import save_file

    denoiser = denoiser_of(pipe)
    ours = {name: module for name, module in denoiser.named_modules() if isinstance(module, QuantizedLinear)}
    layers = {name: [module.kind, str(module.dtype).removeprefix("torch.")] for name, module in ours.items()}
    if not layers:
        raise NotOptimizedError(
            "found nothing quantized in this pipeline: call fluxfire.apply_quantization(pipe) first"
        )
    if any(hasattr(module, "base_layer") for module in denoiser.modules()):
        raise StepError("found a LoRA in the denoiser, needed the model alone: pipe.unload_lora_weights()")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in denoiser.named_parameters()}
    save_file(tensors, path / FILE, metadata={"format": FORMAT, "layers": json.dumps(layers)})
    denoiser.save_config(path)


def load_quantized(folder: str | PathLike[str], device: str | torch.device = "cpu") -> Any:
    """The denoiser that `save_quantized` wrote, straight onto the device; nothing else is ever in memory.

    `FluxKontextPipeline.from_pretrained(..., transformer=fluxfire.load_quantized("folder", "cuda"))`.

    Args:
        folder: that of `save_quantized`.
        device: where the weights go.

    Raises:
        ArgumentError: the folder does not hold what `save_quantized` writes.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fluxfire.save_quantized(fluxfire.apply_quantization(pipe, "int8-weights"), folder)
        ...     pipe.transformer = fluxfire.load_quantized(folder)
    """
    import diffusers
    from safetensors import safe_open

    path = Path(folder)
    if not (path / FILE).is_file() or not (path / "config.json").is_file():
        raise ArgumentError(f"found no {FILE} and config.json in {path}, needed what fluxfire.save_quantized wrote")
    config = json.loads((path / "config.json").read_text())
    known = [family.denoiser_class for family in FAMILIES]
    if config.get("_class_name") not in known:
        raise ArgumentError(f"config.json: found {config.get('_class_name')!r}, needed one of {', '.join(known)}")
    with safe_open(path / FILE, framework="pt", device=str(device)) as file:
        told = file.metadata() or {}
        if told.get("format") != FORMAT:
            raise ArgumentError(f"{FILE}: found format {told.get('format')!r}, needed {FORMAT!r}")
        with torch.device("meta"):
            denoiser = getattr(diffusers, config["_class_name"]).from_config(config)
        for name, (kind, dtype) in json.loads(told["layers"]).items():
            if kind not in KINDS or dtype not in _DTYPES:
                raise ArgumentError(f"{FILE}: found {name} of {kind!r} and {dtype!r}, needed what this version writes")
            parent, _, key = name.rpartition(".")
            layer = denoiser.get_submodule(name)
            ours = QuantizedLinear(layer.in_features, layer.out_features, kind, _DTYPES[dtype])
            ours.bias = layer.bias
            denoiser.get_submodule(parent)._modules[key] = ours
        expected = {name: tensor.shape for name, tensor in denoiser.named_parameters()}
        found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if expected != found:
            odd = sorted({name for name, _ in expected.items() ^ found.items()})
            raise ArgumentError(f"{FILE}: found other tensors than config.json tells of: {', '.join(odd[:3])}")
        for name in expected:
            parent, _, key = name.rpartition(".")
            parameter = nn.Parameter(file.get_tensor(name), requires_grad=False)
            denoiser.get_submodule(parent)._parameters[key] = parameter
    denoiser.save_pretrained = _no_checkpoint
    return denoiser.eval()
