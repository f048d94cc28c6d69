"""Reading and writing on a GPU: prefill of texts and images, an image to edit, and text decoding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bagel.checkpoint.roles import Role
from bagel.engine.memory import kv_space_of
from bagel.engine.text import TextBatch, TextRun, text_kv_tokens
from bagel.kv.digests import SegmentKind
from bagel.model.bagel import Bagel
from bagel.model.mot import MoTLayer
from bagel.model.pixels import to_pixels
from bagel.model.tokenizer import BagelTokenizer
from bagel.request import TextSettings
from bench import cases, flops
from bench.lab import Lab
from bench.meter import Work
from bench.report import Table


class NoTokenizer(BagelTokenizer):
    """Provides the two ids that decoding needs, without a checkpoint. No token ends the text."""

    def __init__(self) -> None:
        self.bos, self.eos = 0, -1


def understand(lab: Lab) -> Iterator[Table]:
    """Role understand: prefill of texts and of an image, then decoding."""
    side, config = lab.sizes.sides[-1], lab.sizes.config
    with lab.model(Role.UNDERSTAND) as model:
        table = Table("gpu prefill", "the first segment of a context")
        for tokens in lab.sizes.prefills:
            flop = flops.text_segment(config, 0, tokens)
            _prefill(lab, table, f"text of {tokens}", tokens, flop, cases.build(model, cases.text_chain(tokens)))
        chain = cases.image_chain(config, side, SegmentKind.VIT)
        patches = chain.length - 2
        flop = flops.vit_block(config, 0, patches)
        _prefill(lab, table, f"ViT block of {side}", patches, flop, cases.build(model, chain))
        yield table
        table = Table("gpu decode", f"{lab.sizes.reply} tokens of greedy text after {lab.sizes.past}; wall time")
        for batch in (1, lab.sizes.batch):
            _decode(lab, table, model, batch)
        yield table


def context(lab: Lab) -> Iterator[Table]:
    """Role context: an image to edit, as VAE and ViT tokens."""
    side = lab.sizes.sides[-1]
    chain = cases.image_chain(lab.sizes.config, side, SegmentKind.VAE, SegmentKind.VIT)
    with lab.model(Role.CONTEXT) as model:
        with lab.track(Role.CONTEXT, f"an image to edit of {side}, {chain.length} tokens"):
            whole = lab.meter.median_ms(cases.build(model, chain), warmup=2, repeats=5)
        pixels = to_pixels(cases.noise_image(side), model.device)[None]
        encoder = lab.meter.median_ms(lambda: _encode(model, pixels), warmup=2, repeats=5)
        table = Table("gpu edit context", "VAE encoder (float32), VAE block, ViT and its block")
        table.add(image=f"{side}x{side}", tokens=chain.length, ms=whole, vae_encoder_ms=encoder)
        lab.headline(f"context of an image to edit of {side}", whole, "ms")
        yield table


def _prefill(lab: Lab, table: Table, name: str, tokens: int, flop: int, work: Work) -> None:
    with lab.track(Role.UNDERSTAND, f"prefill, {name}"):
        ms = lab.meter.median_ms(work, warmup=2, repeats=5)
    per_second = None if ms is None else 1e3 * tokens / ms
    table.add(segment=name, ms=ms, tokens_per_s=per_second, tflop=flop / 1e12, **lab.rate(flop, ms))
    lab.headline(f"prefill, {name}", per_second, "tokens/s")


def _decode(lab: Lab, table: Table, model: Bagel, batch: int) -> None:
    """Decode a batch, and compare its reading of weights with the speed of a plain copy."""
    # Each step reads the understanding expert's and the head's weights once, whatever the batch.
    sizes = lab.sizes
    context = cases.text_context(model, sizes.past)
    settings = TextSettings(max_tokens=sizes.reply)
    room = text_kv_tokens(TextRun(context, settings, 0))
    texts = TextBatch(model, NoTokenizer(), kv_space_of(model, [room] * batch))

    def work() -> None:
        for seed in range(batch):
            texts.add(TextRun(context, settings, seed))
        while len(texts):
            texts.step()

    with lab.track(Role.UNDERSTAND, f"decode, {batch} texts"):
        work()
        seconds = lab.meter.seconds(work)
    per_second = None if seconds is None else batch * sizes.reply / seconds
    step_ms = None if seconds is None else 1e3 * seconds / sizes.reply
    read = None if step_ms is None else _weights_read(model) / step_ms / 1e6
    share = None if read is None or lab.copy_gb_s is None else 100 * read / lab.copy_gb_s
    table.add(texts=batch, tokens_per_s=per_second, step_ms=step_ms, weights_gb_s=read, percent_of_copy=share)
    lab.headline(f"decode, {batch} texts", per_second, "tokens/s")


def _weights_read(model: Bagel) -> int:
    """Bytes of the weights that a decoding step reads."""
    language = model.language_model
    assert language.lm_head is not None
    layers = [layer for layer in language.layers if isinstance(layer, MoTLayer)]
    halves = [half for layer in layers for half in (layer.und_input, layer.und_output)]
    experts = sum(parameter.nbytes for half in halves for parameter in half.parameters())
    return experts + language.lm_head.weight.nbytes


@torch.inference_mode()
def _encode(model: Bagel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    return model.autoencoder().encode(pixels)
