"""The second stage: the whole model on all tasks at once, the autoencoder kept as it is."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel.model.bagel import Bagel
from training.nano.batches import IGNORED, LAYOUTS, Batch, unpack
from training.nano.forward import Inputs, LayerFn, forward, layer
from training.nano.images import VitInput, latent_tokens, moments
from training.nano.journal import Journal, Schedule
from training.nano.optim import FlatOptimizer
from training.nano.render import Renderer

Prepared = tuple[Batch, Inputs, Tensor | None]
TEXT_WEIGHT = {"plan": 0.15, "see": 0.25, "reason": 0.1}
"""Weight of a group's cross-entropy beside the flow's error, which is the mean over all pictures."""
SHIFT = 2.0


class Trainer:
    """Losses of batches on one device."""

    def __init__(self, model: Bagel, device: torch.device, *, compiled: bool) -> None:
        assert model.vae is not None
        self.model, self.device = model, device
        self.render, self.vit_input = Renderer(device), VitInput(device)
        self.fast = device.type == "cuda"
        self.encoder: Any = copy.deepcopy(model.vae.autoencoder.encoder).requires_grad_(False)
        if self.fast:
            self.encoder.to(device, torch.bfloat16, memory_format=torch.channels_last)
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.layer_fn: LayerFn = layer
        if compiled:
            self._compile()

    def _compile(self) -> None:
        config: Any = torch._dynamo.config
        for name in ("cache_size_limit", "recompile_limit"):
            if hasattr(config, name):
                setattr(config, name, 64)
        self.layer_fn = torch.compile(layer, dynamic=False)
        self.encoder = torch.compile(self.encoder, dynamic=False)

    def eager(self) -> None:
        """Do without the compiler."""
        self.layer_fn = layer
        self.encoder = getattr(self.encoder, "_orig_mod", self.encoder)

    def backward(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of one step's batches; their losses by name."""
        pictures = sum(len(each) for name, each in packed.items() if LAYOUTS[name].draws)
        losses: dict[str, Tensor] = {}
        for batch, inputs, velocity in self.prepare(packed):
            name = batch.group.name
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast):
                outputs = forward(self.model, batch, inputs, self.layer_fn)
            total = torch.zeros((), device=self.device)
            if outputs.velocity is not None and velocity is not None:
                losses[f"{name}_flow"] = F.mse_loss(outputs.velocity, velocity)
                total = total + losses[f"{name}_flow"] * (len(batch.ids) / pictures)
            if name in TEXT_WEIGHT:
                losses[f"{name}_text"] = cross_entropy(outputs.logits, batch.labels)
                total = total + losses[f"{name}_text"] * TEXT_WEIGHT[name]
            total.backward()
        return {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def prepare(self, packed: Mapping[str, Tensor]) -> list[Prepared]:
        """Batches with what their scenes become: patches, latents, and the velocity to learn.

        All pictures are encoded at once: one shape to compile.
        """
        made = [unpack(LAYOUTS[name], each, self.device) for name, each in packed.items()]
        read = [self.render(batch.source) if batch.group.vit else None for batch in made]
        pixels = [source for batch, source in zip(made, read, strict=True) if source is not None and batch.group.vae]
        pixels += [self.render(batch.target) for batch in made if batch.group.draws]
        tokens = list(self._encode(torch.cat(pixels)).split([len(each) for each in pixels])) if pixels else []
        clean = {batch.group.name: tokens.pop(0) for batch in made if batch.group.vae}
        prepared: list[Prepared] = []
        for batch, source in zip(made, read, strict=True):
            patches = None if source is None else self.vit_input(source)
            known = clean.get(batch.group.name)
            if not batch.group.draws:
                prepared.append((batch, Inputs(patches, known), None))
                continue
            data = tokens.pop(0)
            noise, times = torch.randn_like(data), sample_times(len(data), self.device)
            t = times[:, None, None]
            prepared.append((batch, Inputs(patches, known, (1 - t) * data + t * noise, times), noise - data))
        return prepared

    def _encode(self, pixels: Tensor) -> Tensor:
        """Latent tokens of posterior samples."""
        assert self.model.vae is not None
        if self.fast:
            pixels = pixels.to(torch.bfloat16, memory_format=torch.channels_last)
        mean, logvar = moments(self.encoder, pixels)
        return latent_tokens(mean, logvar, self.model.vae.config, torch.randn_like(mean))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over learned tokens; zero if there are none."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss / (labels != IGNORED).sum().clamp(min=1)


def sample_times(count: int, device: torch.device) -> Tensor:
    """Times of flow matching: logit-normal, some uniform, shifted towards noise as inference is."""
    t = torch.randn(count, device=device).sigmoid()
    t = torch.where(torch.rand(count, device=device) < 0.2, torch.rand(count, device=device), t)
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def train_joint(
    trainer: Trainer,
    optimizer: FlatOptimizer,
    stream: Any,
    schedule: Schedule,
    journal: Journal,
    save: Callable[[], None],
    *,
    save_every: float = 120.0,
) -> None:
    """Train until the schedule is over, saving now and then; falls back to eager if the compiler fails."""
    step, said, saved, waited = 0, time.monotonic(), time.monotonic(), 0.0
    while not schedule.over:
        before = time.monotonic()
        packed = next(stream)
        waited += time.monotonic() - before
        optimizer.zero_grad()
        try:
            losses = trainer.backward(packed)
        except Exception as error:
            if step > 0 or trainer.layer_fn is layer:
                raise
            journal.write(compiler=f"{type(error).__name__}: {error}"[:300])
            trainer.eager()
            optimizer.zero_grad()
            losses = trainer.backward(packed)
        optimizer.step(schedule.scale(step))
        if step == 0:
            _settle(trainer.device)
            journal.write(first_step=time.monotonic() - before)
            schedule.begin()
        step += 1
        now = time.monotonic()
        if now - said > 5 or schedule.over or step in (5, 50):
            numbers = {name: float(loss) for name, loss in losses.items()}
            journal.write(
                step=step,
                count=optimizer.count,
                rate=schedule.scale(step),
                norm=float(optimizer.norm),
                skipped=float(optimizer.skipped),
                waited=waited,
                progress=schedule.progress,
                **numbers,
            )
            said = now
        if now - saved > save_every:
            saved = now
            save()


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
