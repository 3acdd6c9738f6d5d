"""What limits the edits? The same denoiser on plain 32 x 32 pictures: no autoencoder, no latent space.

The scores by pixels (`training.score`) are taken of 32 x 32 means. Here the tokens are such pictures themselves, cut in
64 patches of 48 numbers, so nothing but the denoiser, the pairs and the time can be what is missing. `--wide` doubles
the denoiser's width (36 M parameters) and leaves out text to image. One step shows the mean that is predicted from
pure noise, which is the best guess by L2.

Run: ``python -m training.pixels --seconds 160 [--wide]`` (on a GPU).
"""

import argparse
import copy
import itertools
import json
import math
import time

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from training import bank, data, flow, lists, pictures, train
from training.augment import augment
from training.pictures import unit

MU = flow.LOGIT_MEAN  # the pipeline's shift at 64 tokens


def tokens(x: Tensor) -> Tensor:
    """(B, 3, 128, 128) -> (B, 64, 48)."""
    return flow.pack(F.pixel_unshuffle(F.avg_pool2d(x, 4), 2))


def forms_of(things: Tensor, forms: int) -> Tensor:
    """As `bank.latents`: (forms, N, S, 64, 48); form 0 is plain."""
    found = []
    for form in range(forms):
        for part in things.split(128):
            x = unit(part)
            x = augment(x) if form else x
            found.append(tokens(x.flatten(0, 1)).unflatten(0, x.shape[:2]).to(torch.bfloat16))
    return torch.cat(found).unflatten(0, (forms, len(things)))


def loss_of(nets: train.Nets, bank_: Tensor, prompts: bank.Prompts, batch: int, edit: bool) -> Tensor:
    clean, reference, row = train.draw(bank_, prompts, batch, edit, empty=0.0)
    x, t, target = flow.noised(clean)
    with torch.autocast(x.device.type, torch.bfloat16):
        made = nets(x, t, torch.ones_like(t), prompts.clip[row], prompts.t5[row], reference)
    return ((made.float() - target) ** 2).mean()


def fit(nets: train.Nets, known: Tensor, prompts: bank.Prompts, batch: int, rate: float, seconds: float) -> train.Nets:
    """Trains on both jobs (a wide one on edits alone); returns the averaged weights."""
    cuda = known.is_cuda
    average = copy.deepcopy(nets).requires_grad_(False)
    optimizer = torch.optim.AdamW(nets.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=cuda)
    if cuda:
        nets.compile_blocks()
    jobs = (True,) if nets.transformer.config.num_attention_heads > 3 else (False, True)
    step, start = 0, 0.0
    while step <= 3 or time.monotonic() - start < seconds:
        progress = (time.monotonic() - start) / seconds if step > 3 else 0.0
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 300) * min(1, max(0.01, (1.02 - progress) / 0.6))
        losses = torch.stack([loss_of(nets, known, prompts, batch, edit) for edit in jobs])
        losses.sum().backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        start = time.monotonic() if step == 3 else start  # the first steps compile: they are not counted
        torch._foreach_lerp_(
            list(average.parameters()), list(nets.parameters()), 1 - min(0.998, (step + 1) / (step + 10))
        )
        if step % 200 == 0:
            print(step, [round(x, 4) for x in losses.tolist()], flush=True)
    print("steps", step)
    return average


@torch.no_grad()
def sample(nets: train.Nets, prompts: bank.Prompts, row: Tensor, reference: Tensor, steps: int) -> Tensor:
    noise = [torch.randn(1, 64, 48, generator=torch.Generator().manual_seed(seed)) for seed in range(len(row))]
    x = torch.cat(noise).to(reference.device)
    sigmas = torch.linspace(1, 1 / steps, steps)
    sigmas = torch.cat([math.exp(MU) / (math.exp(MU) + (1 / sigmas - 1)), torch.zeros(1)]).to(x.device)
    for a, b in itertools.pairwise(sigmas):
        t, g = a.expand(len(x)), torch.ones(len(x), device=x.device)
        x = x + (b - a) * nets(x, t, g, prompts.clip[row], prompts.t5[row], reference).float()
    return x


def nearest(made: Tensor, pool: Tensor) -> int:
    return int(((pool - made) ** 2).sum((1, 2)).argmin())


def score(nets: train.Nets, prompts: bank.Prompts, unknown: Tensor, steps: int) -> dict[str, float]:
    """The 200 held-out edits, as `training.score` defines them, and the squared error as a share of the variance."""
    edit = lists.read()["edit"]
    style = {name: i for i, name in enumerate(data.STYLES)}
    thing = {name: i for i, name in enumerate(pictures.names(held_out=True))}
    where = [(thing[c["name"]], style[c["source"]], style[c["style"]]) for c in edit["cases"]]
    names, sources, targets = torch.tensor(where, device=unknown.device).T
    made = sample(nets, prompts, prompts.first_edit + targets, unknown[names, sources], steps)
    styles = things = 0
    for picture, case, (name, _, target) in zip(made, edit["cases"], where, strict=True):
        among = next(hundred for hundred in edit["candidates"] if case["name"] in hundred)
        styles += nearest(picture, unknown[name]) == target
        things += among[nearest(picture, unknown[[thing[n] for n in among], target])] == case["name"]
    error = ((made - unknown[names, targets]) ** 2).mean() / unknown.var()
    return {
        "steps": steps,
        "edit_style_pixels": 100 * styles / len(where),
        "edit_thing_pixels": 100 * things / len(where),
        "error_to_variance": round(error.item(), 3),
    }


def copying(unknown: Tensor) -> dict[str, float]:
    """Squared error of the picture in one style as a guess of that in another, over that of the other style's mean."""
    found = {}
    for (i, source), (j, target) in itertools.permutations(enumerate(data.STYLES), 2):
        a, b = unknown[:, i], unknown[:, j]
        found[f"{source} for {target}"] = round((((a - b) ** 2).mean() / ((b - b.mean(0)) ** 2).mean()).item(), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=160)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--forms", type=int, default=64)
    parser.add_argument("--wide", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = forms_of(pictures.pictures(False, device), args.forms)
    mean, deviation = known.float().mean(), known.float().std()
    known = known.sub_(mean).div_(deviation)
    unknown = (forms_of(pictures.pictures(True, device), 1)[0].float() - mean) / deviation
    print(json.dumps(copying(unknown)), flush=True)
    prompts = bank.Prompts(pictures.names(held_out=False), device, data.WORK / "tokenizers")
    changes = {"num_layers": 3, "num_single_layers": 10, "num_attention_heads": 6} if args.wide else {}
    nets = train.Nets(prompts, in_channels=48, **changes).to(device)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        average = fit(nets, known, prompts, args.batch, 5e-4 if args.wide else 1e-3, args.seconds)
        for steps in (28, 1):
            print(json.dumps(score(average, prompts, unknown, steps)), flush=True)


if __name__ == "__main__":
    main()
