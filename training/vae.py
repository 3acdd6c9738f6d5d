"""Train the autoencoder: FLUX's shape at 2.3 M parameters, on augmented training pictures.

Loss: L1 on the picture, L1 on its differences between neighbours at three scales (edges are what an emoji is made
of), and a small KL term. `--noise` adds noise to the latents before they are decoded, of up to that share of their
spread: the KL term alone leaves them noise of 0.5 %, and the decoder then makes smears of the denoiser's small
errors. Weights are averaged over steps (EMA). Afterwards shift and scale are measured over the training pictures, so
that latents have mean 0 and standard deviation 1, and written into the config as FLUX has them.

Run: ``python -m training.vae --seconds 180``, then ``--resume --noise 0.35 --seconds 140`` (goes on from
``training/work/vae``).
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training import data, models
from training.augment import augment
from training.pictures import pictures as pictures_of
from training.pictures import unit

FOLDER = data.WORK / "vae"
KL_WEIGHT = 1e-4
RATE = 1e-3
EMA = 0.998


def edge_loss(made: Tensor, true: Tensor) -> Tensor:
    loss = made.new_zeros(())
    for scale in range(3):
        if scale:
            made, true = torch.nn.functional.avg_pool2d(made, 2), torch.nn.functional.avg_pool2d(true, 2)
        loss = (
            loss
            + (made.diff(dim=-1) - true.diff(dim=-1)).abs().mean()
            + (made.diff(dim=-2) - true.diff(dim=-2)).abs().mean()
        )
    return loss


def step_loss(encoder: torch.nn.Module, decoder: torch.nn.Module, x: Tensor, noise: float) -> Tensor:
    mean, logvar = encoder(x).float().chunk(2, dim=1)
    logvar = logvar.clamp(-12, 5)
    extra = noise * torch.rand(len(x), 1, 1, 1, device=x.device) * mean.detach().std()  # no gain in a larger spread
    z = mean + (logvar.exp() + extra**2).sqrt() * torch.randn_like(mean)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    made = decoder(z).float()
    return (made - x).abs().mean() + 0.5 * edge_loss(made, x) + KL_WEIGHT * kl


@torch.no_grad()
def measure(vae: AutoencoderKL, pictures: Tensor) -> dict[str, float]:
    """Mean and standard deviation of the training pictures' latents; PSNR in dB of the held-out pictures, from their
    latents and from latents with noise of a fifth of that deviation."""
    flat = pictures[::4].flatten(0, 1)
    latents = torch.cat([vae.encode(unit(part)).latent_dist.mode() for part in flat.split(64)])
    found = {"mean": float(latents.mean()), "std": float(latents.std())}
    x = unit(pictures_of(held_out=True, device=str(pictures.device)).flatten(0, 1))
    for noise in (0.0, 0.2):
        made = []
        for part in x.split(64):
            z = vae.encode(part).latent_dist.mode()
            made.append(vae.decode(z + noise * found["std"] * torch.randn_like(z)).sample.clamp(-1, 1))
        psnr = -10 * torch.log10((((torch.cat(made) - x) / 2) ** 2).mean((1, 2, 3)).clamp(min=1e-8))
        found[f"psnr_held_out_db_noise_{noise:g}"] = float(psnr.mean())
    return found


def train(seconds: float, batch: int, resume: bool, noise: float, out: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    pictures = pictures_of(held_out=False, device=device)
    vae = AutoencoderKL.from_pretrained(FOLDER) if resume else models.autoencoder()
    vae = vae.to(device, memory_format=torch.channels_last)
    average = {k: v.clone() for k, v in vae.state_dict().items()}
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-4, fused=device == "cuda"
    )
    loss_of = torch.compile(step_loss) if device == "cuda" else step_loss
    log, start, step = [], 0.0, 0
    while True:
        progress = (
            (time.monotonic() - start) / seconds if step > 3 else 0.0
        )  # the first steps compile: they are not counted
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 200) * max(0.01, math.cos(math.pi / 2 * progress) ** 2)
        chosen = torch.randint(len(pictures), (batch,), device=device)
        x = augment(unit(pictures[chosen, torch.randint(3, (batch,), device=device)])[:, None])[:, 0]
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(vae.encoder, vae.decoder, x.contiguous(memory_format=torch.channels_last), noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step == 3:
            start = time.monotonic()
        weight = 1 - min(EMA, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), list(vae.state_dict().values()), weight)
        if step % 100 == 0:
            log.append({"step": step, "seconds": time.monotonic() - start, "loss": loss.item()})
            if step % 500 == 0:
                print(log[-1], flush=True)
    vae.load_state_dict(average)
    found = measure(vae, pictures)
    vae.register_to_config(shift_factor=found["mean"], scaling_factor=1 / found["std"])
    vae.save_pretrained(FOLDER)
    print("steps", step, found, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "vae.json").write_text(json.dumps({"steps": step, "batch": batch, "seconds": seconds, **found, "log": log}))
    np.save(out / "vae_sample.npy", sample_grid(vae, device))


@torch.no_grad()
def sample_grid(vae: AutoencoderKL, device: str) -> np.ndarray:
    """Twelve held-out pictures over their reconstructions: uint8, (256, 12 * 128, 3)."""
    held_out = pictures_of(held_out=True, device=device)[::18][:12]
    true = torch.stack([thing[i % 3] for i, thing in enumerate(held_out)])
    made = ((vae(unit(true)).sample.clamp(-1, 1) + 1) * 127.5).round().byte()
    rows: np.ndarray = torch.cat([torch.cat(list(true), 2), torch.cat(list(made), 2)], 1).permute(1, 2, 0).cpu().numpy()
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=190)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=data.WORK / "out")
    args = parser.parse_args()
    train(args.seconds, args.batch, args.resume, args.noise, args.out)
