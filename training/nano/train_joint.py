"""The second stage: train the whole model on all tasks at once, except the autoencoder."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel.model.bagel import Bagel
from training.nano.batches import IGNORED, LAYOUTS, Batch, unpack
from training.nano.forward import Inputs, LayerFn, forward, layer
from training.nano.images import VitInput, latent_tokens, moments, patchify
from training.nano.journal import Journal, Schedule
from training.nano.optim import FlatOptimizer
from training.nano.pool import Pool
from training.nano.render import Renderer
from training.nano.steps import Losses, Steps

Prepared = tuple[Batch, Inputs, Tensor | None]
TEXT_WEIGHT = {"plan": 0.15, "see": 0.25, "reason": 0.1}
"""The weight of a group's cross-entropy beside the flow's error, which is a mean over all pictures."""
SHIFT = 3.0
"""The shift of times towards noise, as in inference: the layout of a picture is decided near t = 1."""
REUSE, KEPT = 4, 256
"""How often an encoded picture is used on average, and for how many steps' worth of pictures there is room."""


class Trainer:
    """Computes the losses of batches on one device."""

    def __init__(self, model: Bagel, device: torch.device, *, compiled: bool) -> None:
        assert model.vae is not None
        self.model, self.device = model, device
        self.render: Any = Renderer(device)
        self.vit_input = VitInput(device)
        self.fast = device.type == "cuda"
        self.encoder: Any = copy.deepcopy(model.vae.autoencoder.encoder).requires_grad_(False)
        if self.fast:
            self.encoder.to(device, torch.bfloat16, memory_format=torch.channels_last)
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.pools: dict[str, Pool] = {}
        self.layer_fn: LayerFn = layer
        if compiled:
            self.layer_fn = torch.compile(layer, dynamic=False)
            self.encoder = torch.compile(self.encoder, dynamic=False)
            self.render = torch.compile(self.render.__call__, dynamic=False)

    def backward(self, packed: Mapping[str, Tensor]) -> Losses:
        """Compute the gradients of one step's batches; returns the losses by name."""
        prepared = self.prepare(packed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast, cache_enabled=False):
            outputs = forward(self.model, [(batch, inputs) for batch, inputs, _ in prepared], self.layer_fn)
        losses: Losses = {}
        # So that each picture weighs the same, whatever its group's size.
        pictures = sum(len(batch.ids) for batch, _, _ in prepared if batch.group.draws)
        total = torch.zeros((), device=self.device)
        for (batch, _, velocity), output in zip(prepared, outputs, strict=True):
            name = batch.group.name
            if output.velocity is not None and velocity is not None:
                losses[f"{name}_flow"] = F.mse_loss(output.velocity, velocity)
                total = total + losses[f"{name}_flow"] * (len(batch.ids) / pictures)
            if output.logits is not None:
                losses[f"{name}_text"] = cross_entropy(output.logits, batch.labels)
                total = total + losses[f"{name}_text"] * TEXT_WEIGHT[name]
        total.backward()
        return {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def prepare(self, packed: Mapping[str, Tensor]) -> list[Prepared]:
        """Make the tensors of each batch from its scenes: patches, latents, and the velocity to learn.

        The new examples of a group that draws are encoded and put into its pool, from which the batch takes REUSE times
        as many.
        """
        self._encode({name: each for name, each in packed.items() if LAYOUTS[name].draws})
        taken = {
            name: self.pools[name].take(REUSE * len(rows)) if LAYOUTS[name].draws else {"packed": rows}
            for name, rows in packed.items()
        }
        batches = [unpack(LAYOUTS[name], rows["packed"], self.device) for name, rows in taken.items()]
        patches = iter(self._patches([batch.source for batch in batches if batch.group.vit]))
        prepared: list[Prepared] = []
        for batch in batches:
            latents = taken[batch.group.name]
            clean = velocity = noisy = times = None
            if batch.group.vae:  # a sample of the posterior, as in serving; the target is the posterior's mean
                clean = latents["source"] + latents["spread"] * torch.randn_like(latents["source"])
            if batch.group.draws:
                data = latents["target"]
                noise, times = torch.randn_like(data), sample_times(len(data), self.device)
                t = times[:, None, None]  # rectified flow: data at t = 0, noise at t = 1
                noisy, velocity = (1 - t) * data + t * noise, noise - data
            inputs = Inputs(next(patches) if batch.group.vit else None, clean, noisy, times)
            prepared.append((batch, inputs, velocity))
        return prepared

    def _patches(self, codes: list[Tensor]) -> Sequence[Tensor]:
        """The ViT patches of several batches of scenes."""
        if not codes:
            return ()
        parts: Sequence[Tensor] = self.vit_input(self.render(torch.cat(codes))).split([len(each) for each in codes])
        return parts

    def _encode(self, packed: Mapping[str, Tensor]) -> None:
        """Put new examples into the pools of their groups; all pictures are drawn and encoded at once."""
        codes: dict[tuple[str, str], Tensor] = {}
        for name, rows in packed.items():
            batch = unpack(LAYOUTS[name], rows, self.device)
            codes |= {(name, "source"): batch.source} if batch.group.vae else {}
            codes[name, "target"] = batch.target
        if not codes:
            return
        assert self.model.vae is not None
        config, pixels = self.model.vae.config, self.render(torch.cat(list(codes.values())))
        if self.fast:
            pixels = pixels.to(torch.bfloat16, memory_format=torch.channels_last)
        mean, logvar = moments(self.encoder, pixels)
        counts = [len(each) for each in codes.values()]
        means = dict(zip(codes, latent_tokens(mean, logvar, config, None).split(counts), strict=True))
        spreads = dict(zip(codes, patchify(config.scale_factor * torch.exp(0.5 * logvar)).split(counts), strict=True))
        for name, rows in packed.items():
            fields = {"packed": rows, "target": means[name, "target"]}
            if LAYOUTS[name].vae:
                fields |= {"source": means[name, "source"], "spread": spreads[name, "source"]}
            self._pool(name, fields).put(**fields)

    def _pool(self, name: str, fields: Mapping[str, Tensor]) -> Pool:
        if name not in self.pools:
            shapes = {field: (tuple(rows.shape[1:]), rows.dtype) for field, rows in fields.items()}
            self.pools[name] = Pool(KEPT * len(fields["packed"]), shapes, self.device)
        return self.pools[name]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over learned tokens; zero if there are none."""
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss / (labels != IGNORED).sum().clamp(min=1)


def sample_times(count: int, device: torch.device) -> Tensor:
    """Random times for flow matching: logit-normal, a part uniform, all shifted towards noise as in inference."""
    t = torch.randn(count, device=device).sigmoid()
    t = torch.where(torch.rand(count, device=device) < 0.3, torch.rand(count, device=device), t)
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
    """Train until the schedule is over, and save regularly."""

    def step_once(packed: Mapping[str, Tensor]) -> Losses:
        optimizer.zero_grad()
        losses = trainer.backward(packed)
        optimizer.step()
        return losses

    steps = Steps(step_once, trainer.device)
    step, logged, saved, waited = 0, time.monotonic(), time.monotonic(), 0.0
    optimizer.scale.fill_(0.01)  # for the runs before the graph's capture, which change the weights too
    while not schedule.over:
        before = time.monotonic()
        packed = next(stream)
        waited += time.monotonic() - before
        if step > 0:
            optimizer.scale.fill_(schedule.scale(step))
        losses = steps(packed)
        if step == 0:
            journal.write(first_step=time.monotonic() - before)
            schedule.begin()
        step += 1
        now = time.monotonic()
        if now - logged > 5 or schedule.over or step in (5, 50):  # seldom: reading the losses waits for the device
            numbers = {name: float(loss) for name, loss in losses.items()}
            journal.write(
                step=step,
                count=int(optimizer.count),
                rate=schedule.scale(step),
                norm=float(optimizer.norm),
                skipped=float(optimizer.skipped),
                waited=waited,
                progress=schedule.progress,
                **numbers,
            )
            logged = now
        if now - saved > save_every:
            saved = now
            save()
