"""Train the denoiser and both text encoders together, by flow matching, on the latent bank.

A step takes one batch of each job and adds their losses:

- *text to image*: the plain picture, its prompt ``red apple, noto style``;
- *edit*: the picture in one style as reference tokens, the same form of the same thing in another style as target;
  the prompt is ``in twemoji style`` (one in ten: ``red apple, twemoji style``).

One prompt in ten is empty, which gives the unconditional velocity that guidance needs. Guidance: g is drawn from [1,
4] and fed to the guidance embedding. Up to `DISTIL_FROM` of the training it changes nothing; after that a frozen copy
of the averaged weights teaches the guided velocity, v_empty + g (v_prompt - v_empty) (guidance distillation, as
FLUX.1-dev has it).

The learning rate follows the clock (`rate`), so a run ends in time on any GPU. ``training/work/state.pt`` lets the
next command go on.

Run: ``python -m training.train --total 1000 --seconds 500 --distil``, again until the total is reached; on several GPUs
of one host ``torchrun --nproc-per-node 2 -m training.train ...``: each draws its own forms and batches, and the
gradients are averaged.
"""

import argparse
import copy
import json
import os
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxKontextPipeline
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from training import bank, data, export, flow, models, pictures
from training.vae import FOLDER as VAE_FOLDER

STATE = data.WORK / "state.pt"
RATE = 1e-3
WARMUP_STEPS = 300
DECAY_FROM = 0.45
DISTIL_FROM = 0.85
EMA = 0.999
EMPTY = 0.1  # share of prompts left out
PLAIN = 0.2  # share of edits on the plain picture; the rest take any form
NAMED = 0.1  # share of edits whose prompt has the name


class Nets(nn.Module):
    """The three parts that are trained, as one module."""

    def __init__(self, prompts: bank.Prompts, **changes: int) -> None:
        super().__init__()
        self.transformer = models.transformer(**changes)
        self.clip = models.clip(len(prompts.clip_tokenizer))
        self.t5 = models.t5(len(prompts.t5_tokenizer))

    def forward(self, x: Tensor, t: Tensor, g: Tensor, clip: Tensor, t5: Tensor, reference: Tensor | None) -> Tensor:
        text = self.t5(input_ids=t5).last_hidden_state, self.clip(input_ids=clip).pooler_output
        return flow.velocity(self.transformer, x, t, g, text, reference)

    def compile_blocks(self) -> None:
        for block in [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]:
            block.compile(fullgraph=True, dynamic=False)


def draw(
    latents: Tensor, prompts: bank.Prompts, batch: int, edit: bool, empty: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A batch: clean tokens, reference tokens or None, prompt rows."""
    forms, things, styles = latents.shape[:3]
    device = latents.device
    thing = torch.randint(things, (batch,), device=device)
    style = torch.randint(styles, (batch,), device=device)
    form = torch.zeros_like(thing)
    row = thing * styles + style
    reference = None
    if edit:
        form = torch.randint(forms, (batch,), device=device) * (torch.rand(batch, device=device) > PLAIN)
        source = (style + torch.randint(1, styles, (batch,), device=device)) % styles
        reference = latents[form, thing, source].float()
        row = torch.where(torch.rand(batch, device=device) < NAMED, row, prompts.first_edit + style)
    row = torch.where(torch.rand(batch, device=device) < empty, torch.full_like(row, prompts.empty), row)
    return latents[form, thing, style].float(), reference, row


def rate(progress: float, distilling: bool) -> float:
    """The learning rate's factor: constant, linear decay, and a second, lower decay for the distillation."""
    if distilling:
        return max(0.25 * (1 - progress) / (1 - DISTIL_FROM), 0.002)
    return min(1.0, max((DISTIL_FROM + 0.03 - progress) / (DISTIL_FROM + 0.03 - DECAY_FROM), 0.002))


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """The mean over all GPUs, in one transfer."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    distributed.all_reduce(flat, distributed.ReduceOp.AVG if flat.is_cuda else distributed.ReduceOp.SUM)
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


class Trainer:
    def __init__(self, forms: int, batch: int, warm_start: Path | None = None, **changes: int) -> None:
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = f"cuda:{self.rank}" if torch.cuda.is_available() else "cpu"
        self.cuda = self.device != "cpu"
        torch.manual_seed(self.rank)  # of the forms, batches and noise; the weights are rank 0's
        self.batch = batch
        if self.rank:
            distributed.barrier()  # rank 0 trains the tokenizers
        self.prompts = bank.Prompts(pictures.names(held_out=False), self.device, warm_start or data.WORK / "tokenizers")
        if self.ranks > 1 and not self.rank:
            distributed.barrier()
        vae = AutoencoderKL.from_pretrained(VAE_FOLDER).to(self.device, memory_format=torch.channels_last)
        self.latents = bank.latents(vae, pictures.pictures(False, self.device)[: 64 if forms == 1 else None], forms)
        self.held_out = bank.latents(vae, pictures.pictures(True, self.device)[: 64 if forms == 1 else None], 1)
        self.nets = Nets(self.prompts, **changes).to(self.device)
        if self.ranks > 1:
            for tensor in self.nets.state_dict().values():
                distributed.broadcast(tensor, 0)
        self.optimizer = torch.optim.AdamW(
            self.nets.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=self.cuda
        )
        self.average = copy.deepcopy(self.nets).requires_grad_(False)
        self.teacher: Nets | None = None
        self.compiled = False
        self.step, self.seconds, self.log = 0, 0.0, []

    def loss(self, latents: Tensor, edit: bool) -> Tensor:
        empty = 0.0 if self.teacher else EMPTY
        clean, reference, row = draw(latents, self.prompts, self.batch, edit, empty)
        x, t, target = flow.noised(clean)
        g = torch.empty_like(t).uniform_(*flow.GUIDANCE)
        clip, t5 = self.prompts.clip[row], self.prompts.t5[row]
        with torch.autocast("cuda" if self.cuda else "cpu", torch.bfloat16):
            if self.teacher:
                with torch.no_grad():
                    row.fill_(self.prompts.empty)
                    prompted = self.teacher(x, t, g, clip, t5, reference).float()
                    plain = self.teacher(x, t, g, self.prompts.clip[row], self.prompts.t5[row], reference).float()
                    target = plain + g[:, None, None] * (prompted - plain)
            made = self.nets(x, t, g, clip, t5, reference)
        return ((made.float() - target) ** 2).mean()

    def train_step(self, progress: float) -> Tensor:
        """One step; returns the two losses, (2,)."""
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (self.step + 1) / WARMUP_STEPS) * rate(progress, self.teacher is not None)
        losses = []
        for edit in (False, True):
            loss = self.loss(self.latents, edit)
            loss.backward()
            losses.append(loss.detach())
        if self.ranks > 1:
            average_gradients(list(self.nets.parameters()))
        nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        weight = 1 - min(EMA, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.nets.parameters()), weight)
        return torch.stack(losses)

    def distil(self) -> None:
        """From here on the averaged weights, frozen, teach the guided velocity; the student goes on from them."""
        self.teacher = copy.deepcopy(self.average)
        self.nets.load_state_dict(self.average.state_dict())
        if self.compiled:
            self.teacher.compile_blocks()

    def train(self, total: float, seconds: float, distil: bool) -> None:
        begun, since, first, counted = self.seconds, time.monotonic(), self.step, 0
        recent = torch.zeros(2, device=self.device)
        while self.seconds < min(total, begun + seconds):
            progress = self.seconds / total
            if distil and progress >= DISTIL_FROM and self.teacher is None:
                self.distil()
            recent += self.train_step(progress)
            counted += 1
            if self.step == first + 3:
                since = time.monotonic()  # the first steps compile: they are not counted
            if self.step % 20 == 0 or not self.cuda:
                recent_now = (recent / counted).tolist()  # waits for the GPU, so that the clock is true
                self.seconds = self.agreed(begun + time.monotonic() - since)
                if self.step % 200 == 0 or not self.cuda:
                    self.note(recent_now)
                    recent.zero_()
                    counted = 0

    def agreed(self, seconds: float) -> float:
        """Rank 0's clock, so that all stop at the same step."""
        if self.ranks == 1:
            return seconds
        clock = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        distributed.broadcast(clock, 0)
        return clock.item()

    def note(self, recent: list[float]) -> None:
        with torch.enable_grad() if self.cuda else torch.no_grad():
            held = self.loss(self.held_out, True).item()  # with grad on, so that it runs the same compiled graphs
        row = {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "t2i": recent[0],
            "edit": recent[1],
            "edit_held_out": held,
        }
        self.log.append(row)
        if self.step % 1000 == 0 and self.rank == 0:
            print(row, flush=True)

    def save(self) -> None:
        parts = {"nets": self.nets, "average": self.average, "optimizer": self.optimizer}
        state = {k: v.state_dict() for k, v in parts.items()}
        state["teacher"] = self.teacher.state_dict() if self.teacher else None
        torch.save({**state, "step": self.step, "seconds": self.seconds, "log": self.log}, STATE)

    def warm_start(self, folder: Path, done: float) -> None:
        """Go on from saved averaged weights alone, where the state was lost."""
        pipe = FluxKontextPipeline.from_pretrained(folder)
        for nets in (self.nets, self.average):
            for part, saved in (
                (nets.transformer, pipe.transformer),
                (nets.clip, pipe.text_encoder),
                (nets.t5, pipe.text_encoder_2),
            ):
                part.load_state_dict(saved.state_dict())
        self.seconds = done

    def resume(self) -> None:
        state = torch.load(STATE, map_location=self.device, weights_only=True)
        if state["teacher"]:
            self.distil()
            self.teacher.load_state_dict(state["teacher"])
        for k, v in {"nets": self.nets, "average": self.average, "optimizer": self.optimizer}.items():
            v.load_state_dict(state[k])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--total", type=float, required=True, help="planned seconds of training, all commands together")
    parser.add_argument("--seconds", type=float, required=True, help="seconds of this command")
    parser.add_argument("--batch", type=int, default=1024, help="of each job, on each GPU")
    parser.add_argument("--forms", type=int, default=64)
    parser.add_argument("--attention", choices=("FLASH_ATTENTION", "MATH"), default="FLASH_ATTENTION")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--distil", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="do not go on from a kept state")
    parser.add_argument("--warm-start", type=Path, help="a pipeline folder to go on from, where no state is kept")
    parser.add_argument("--done", type=float, default=0, help="seconds of training behind --warm-start")
    parser.add_argument("--out", type=Path, default=data.WORK / "out")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64
    begun = time.monotonic()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["RANK"]))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    toy = {} if args.forms > 1 or args.warm_start else {"num_layers": 1, "num_single_layers": 1}
    trainer = Trainer(args.forms, args.batch, args.warm_start, **toy)
    print("prepared in s", round(time.monotonic() - begun, 1), tuple(trainer.latents.shape), flush=True)
    if STATE.exists() and not args.fresh:
        trainer.resume()
    elif args.warm_start:
        trainer.warm_start(args.warm_start, args.done)
    if not args.eager:
        trainer.compiled = True
        trainer.nets.compile_blocks()
    # With cuDNN's attention, an H100's default, the compiled backward ended in an illegal memory access (torch 2.11).
    with sdpa_kernel([getattr(SDPBackend, args.attention), SDPBackend.MATH]):  # T5's position bias needs MATH
        trainer.train(args.total, args.seconds, args.distil)
    if trainer.ranks > 1:
        distributed.destroy_process_group()
    if trainer.rank:
        return
    trainer.save()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "train.json").write_text(json.dumps(trainer.log))
    export.save(trainer.average, trainer.prompts, VAE_FOLDER, data.WORK / "model")
    print("step", trainer.step, "seconds", trainer.seconds, "wall s", round(time.monotonic() - begun, 1), flush=True)


if __name__ == "__main__":
    main()
