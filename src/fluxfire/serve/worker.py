"""The worker: a process that owns one pipeline and makes one batch after the other.

It reads messages on its standard input ("load", "run", "cancel") and writes on its standard output ("held", "ready",
"step", "preview", "done", "failed", "idle"); whatever a library prints goes to standard error. When its input ends it
exits at once: no server, no reason to compute.

Out of memory, in this order: the pictures of the batch one by one; then with the decoder in tiles; then the picture is
given up and its client told, and the next request finds the memory freed.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, BinaryIO, Final

import torch

import fluxfire
from fluxfire.serve import generate, wire
from fluxfire.serve.generate import Cancelled, Sample, Watch
from fluxfire.serve.jobs import Facts, Pixels, Shape
from fluxfire.serve.model import Model, load
from fluxfire.serve.wire import Message
from fluxfire.warm import STEPS, scheduled_steps

HEADROOM: Final = 0.9  # of the GPU's memory, for the estimate of what fits: other processes and fragments take some


class Worker:
    """The pipeline and its two pipes."""

    def __init__(self, inbox: BinaryIO, outbox: BinaryIO, options: dict[str, Any]) -> None:
        self._inbox, self._outbox, self._options = inbox, outbox, options
        self._runs: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._cancelled: set[str] = set()

    def main(self) -> None:
        """Loads, warms up, then works until the input ends."""
        threading.Thread(target=self._listen, daemon=True).start()
        if self._options["hold"]:
            self._hold()
        try:
            self._model = self._load()
            facts = self._warm()
        except Exception as error:  # whatever keeps a model from loading is told to who started the server
            traceback.print_exc()
            self._send("refused", reason=f"{type(error).__name__}: {error}")
            return
        print(fluxfire.report(self._model.pipe), file=sys.stderr)
        self._send("ready", facts=dataclasses.asdict(facts), **self._counters())
        while True:
            self._run(self._runs.get())

    def _hold(self) -> None:
        """Imports what loading would, then waits to be told; the GPU need not be there yet."""
        from diffusers import AutoencoderKL, FluxKontextPipeline, FluxPipeline  # noqa: F401
        from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel  # noqa: F401

        self._send("held")
        self._runs.get()

    def _load(self) -> Model:
        options = self._options
        model = load(options["model"], options["device"], options["dtype"])
        try:
            fluxfire.report(model.pipe)  # optimized already, by a function that knows better
        except fluxfire.NotOptimizedError:
            dials = {name: options[name] for name in ("cache_threshold", "compile", "megacache", "share")}
            fluxfire.optimize_pipeline(model.pipe, **dials)
        return model

    def _warm(self) -> Facts:
        """Makes pictures of the sizes and batches that will be asked for, so that nothing is compiled later."""
        model, most, threshold = self._model, int(self._options["max_batch"]), self._threshold()
        scheduled = scheduled_steps(model.pipe)
        sizes = [tuple(size) for size in self._options["warm_sizes"]] or [(model.side, model.side)]
        bytes_per_pixel = seconds_per_cost = 0.0
        for width, height in sizes:
            for reference in (None, (width, height))[: 1 + model.takes_picture]:
                shape = Shape(width, height, scheduled or STEPS, model.guidance, threshold, reference)
                for batch in (most, 1, 1) if most > 1 else (1, 1):  # the second of 1 has nothing left to compile
                    before, begin = self._memory(reset=True), time.monotonic()
                    self._warm_up(shape, batch)
                    bytes_per_pixel = max(bytes_per_pixel, (self._memory() - before) / (shape.pixels * batch))
                    seconds_per_cost = (time.monotonic() - begin) / (shape.cost * batch)
        return Facts(
            name=self._options["name"] or model.name,
            side=model.side,
            steps=scheduled or model.steps,
            steps_only=scheduled,
            guidance=model.guidance,
            multiple=model.multiple,
            text_tokens=model.text_tokens,
            takes_picture=model.takes_picture,
            cache_threshold=threshold,
            device=str(model.pipe.device),
            pixels_at_once=self._fitting(bytes_per_pixel),
            seconds_per_cost=seconds_per_cost,
            styles=model.styles,
            examples=model.examples,
        )

    def _warm_up(self, shape: Shape, batch: int) -> None:
        size = shape.reference
        picture = Pixels(*size, bytes(3 * size[0] * size[1])) if size else None
        samples = [Sample(str(index), "a", index, picture) for index in range(batch)]
        try:
            generate.generate(self._model, shape, samples, Watch())
        except torch.OutOfMemoryError:
            if batch == 1:
                raise  # the size that was to be warmed does not fit at all; larger batches are split when they come

    def _threshold(self) -> float | None:
        report = fluxfire.report(self._model.pipe)
        return report.cache.threshold if report.cache else None

    def _memory(self, reset: bool = False) -> int:
        """Most bytes of GPU memory in use since the last reset; 0 on a CPU."""
        if self._model.pipe.device.type != "cuda":
            return 0
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()

    def _fitting(self, bytes_per_pixel: float) -> int | None:
        """Most pixels of one batch, from what the warm-up runs took over the weights."""
        if not bytes_per_pixel:
            return None
        total = torch.cuda.get_device_properties(self._model.pipe.device).total_memory
        return int((total * HEADROOM - torch.cuda.memory_allocated()) / bytes_per_pixel)

    def _listen(self) -> None:
        while (message := wire.read(self._inbox)) is not None:
            if message.kind == "cancel":
                self._cancelled.add(message.values["picture"])
            else:
                self._runs.put(message)
        os._exit(0)  # the server is gone; the main thread may be deep in a kernel

    def _run(self, message: Message) -> None:
        shape, samples = _read_run(message)
        watch = Watch(
            cancelled=self._cancelled.__contains__,
            step=lambda step, decisions: self._send(
                "step", step=step, decisions=[dataclasses.astuple(decision) for decision in decisions]
            ),
            preview=lambda name, number, pixels: self._send(
                "preview", pixels.rgb, picture=name, number=number, width=pixels.width, height=pixels.height
            ),
        )
        self._attempt(shape, samples, watch)
        self._cancelled.clear()  # all of it was for this batch: the server sends the next one after this
        self._send("idle", **self._counters())

    def _attempt(self, shape: Shape, samples: Sequence[Sample], watch: Watch, tiled: bool = False) -> None:
        """Makes the batch, or tells what went wrong; the ladder down when memory is short."""
        names = [sample.name for sample in samples]
        try:
            outputs, seconds = generate.generate(self._model, shape, samples, watch)
        except Cancelled:
            return
        except Exception as error:
            if not _out_of_memory(error):
                logging.getLogger("fluxfire.serve").exception("a batch failed")
                self._send("failed", pictures=names, error="failed")
                self._leave_if_broken()
                return
        else:
            pictures = [(output.name, output.hits, output.computed) for output in outputs]
            self._send("done", *(o.pixels.rgb for o in outputs), pictures=pictures, seconds=seconds, batch=len(samples))
            return
        gc.collect()  # out of the except clause: its traceback would keep the tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(samples) > 1:
            for sample in samples:
                self._attempt(shape, [sample], watch)
        elif not tiled and not self._model.pipe.vae.use_tiling:
            self._model.pipe.vae.enable_tiling()
            try:
                self._attempt(shape, samples, watch, tiled=True)
            finally:
                self._model.pipe.vae.disable_tiling()
        else:
            self._send("failed", pictures=names, error="out_of_memory")

    def _leave_if_broken(self) -> None:
        """Some errors of CUDA leave the process unable to compute anything: then a new worker is needed."""
        if self._model.pipe.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)

    def _counters(self) -> dict[str, int]:
        report = fluxfire.report(self._model.pipe)
        counters = {"recompilations": report.compile.recompilations if report.compile else 0}
        if self._model.pipe.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            counters |= {"gpu_used_bytes": total - free, "gpu_total_bytes": total}
        return counters

    def _send(self, kind: str, *blobs: bytes, **values: Any) -> None:
        self._outbox.write(Message(kind, values, blobs).pack())
        self._outbox.flush()


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _read_run(message: Message) -> tuple[Shape, list[Sample]]:
    shape = dict(message.values["shape"])
    size = shape["reference"] = tuple(shape["reference"]) if shape["reference"] else None
    references = [Pixels(size[0], size[1], rgb) for rgb in message.blobs] if size else []
    samples = [
        Sample(p["name"], p["prompt"], p["seed"], references[i] if size else None, tuple(p["previews"]))
        for i, p in enumerate(message.values["pictures"])
    ]
    return Shape(**shape), samples


def main() -> None:
    """`python -m fluxfire.serve.worker OPTIONS`, with the options as JSON; started by the server."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what libraries print must not stand between messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's, which ends this process by closing its input
    Worker(inbox, outbox, json.loads(sys.argv[1])).main()


if __name__ == "__main__":
    main()
