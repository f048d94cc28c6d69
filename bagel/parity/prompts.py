"""Contexts of a recorded case, built segment by segment through the engine, each compared as it is built."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from bagel.checkpoint.roles import Role
from bagel.engine.context import Context, ContextBuilder
from bagel.engine.loading import LoadedModel
from bagel.engine.local import BagelEngine
from bagel.engine.segments import Chain, Segment
from bagel.images import ImageTransform, pixel_digest, prepare
from bagel.kv.digests import SegmentKind
from bagel.model.bagel import Bagel
from bagel.model.flow import latent_unpatchify
from bagel.parity.calls import Calls
from bagel.parity.golden import Case
from bagel.parity.record import Recorder
from bagel.parity.report import Comparison
from bagel.prompts import ImagePart, Prompt, TextPart
from bagel.request import PosteriorMode


class PromptRun:
    """One case's prompt: its parts, prepared images, and contexts built under observation."""

    def __init__(self, engine: BagelEngine, case: Case, report: Comparison) -> None:
        """engine: already under the case's transforms, see `with_transforms`."""
        self.case, self.report, self.engine = case, report, engine
        self.planner, self.calls = self.engine.planner, Calls()
        self.builder = ContextBuilder(self.engine.model)  # a cache of its own: every segment is computed
        self.prompt = case_prompt(case)
        self.seed = case.data.get("seed") or 0
        self.mean = str(case.data.get("posterior", "")).startswith("mean")
        # The reference draws all noise from the request's seed, in the order of mode seed.
        mode = PosteriorMode.MEAN if self.mean else PosteriorMode.SEED
        self.images = self.planner.prepare_images(self.prompt, mode, self.seed)
        self._compare_sizes()

    def build(self, chain: Chain, *, prompt: bool = False) -> Context:
        """The context of a chain; each new segment is compared with what the case recorded of it.

        prompt: the chain ends with the user's last text, which the case may have recorded as `prompt`.
        """
        context = Context()
        for end in range(1, len(chain.segments) + 1):
            segment = chain.segments[end - 1]
            with Recorder(self.builder.model) as record:
                context = self.builder.build(Chain(chain.segments[:end]))
            if not record.calls:
                continue  # another branch computed it before
            self.calls.add_segment(segment, context.length - segment.length, record)
            self._compare_block_sizes(segment)
            if segment.kind is SegmentKind.VIT:
                self._compare_vit(segment, record, context)
            elif segment.kind is SegmentKind.VAE:
                self._compare_vae(segment, record, context)
            elif prompt and end == len(chain.segments):
                compare_text_segment(self.report, "prompt", segment, record)
        return context

    def prefix(self, segment: Segment) -> str:
        """Names of the second and later images of a case begin with image<k>."""
        images = list(self.images.values())
        if len(images) < 2:
            return ""
        return f"image{[segment.image in (i.prepared.vae, i.prepared.vit) for i in images].index(True)}."

    def _compare_vit(self, segment: Segment, record: Recorder, context: Context) -> None:
        name, report = f"{self.prefix(segment)}vit", self.report
        pixel_tokens, position_ids = record.last("vit.in")
        report.tensor(f"{name}.pixel_tokens", pixel_tokens)
        report.tensor(f"{name}.position_ids", position_ids)
        report.tensor(f"{name}.embeddings", record.last("vit.embeddings.out"))
        for i in range(self.engine.model.config.vit.num_hidden_layers):
            report.tensor(f"{name}.layer{i}", record.last(f"vit.{i}.out"))
        report.tensor(f"{name}.output", record.last("vit.out"))
        report.tensor(f"{name}.connector", record.last("connector.out"))
        self._compare_block(name, record)
        compare_kv(report, "kv_after_vit", context, self.engine.model)

    def _compare_vae(self, segment: Segment, record: Recorder, context: Context) -> None:
        name, report = f"{self.prefix(segment)}vae", self.report
        assert segment.image is not None and segment.posterior is not None
        report.tensor(f"{name}.pixels", record.last("encoder.in"))
        mean, logvar = record.last("encoder.out").chunk(2, dim=1)
        report.tensor(f"{name}.posterior_mean", mean)
        report.tensor(f"{name}.posterior_logvar", logvar)
        report.tensor(f"{name}.posterior_noise", segment.posterior.draw(tuple(mean.shape), pixel_digest(segment.image)))
        tokens, patch = record.last("vae2llm.in")[0], self.engine.model.config.latent_patch_size
        report.tensor(f"{name}.latent", latent_unpatchify(tokens, *segment.grid, patch)[None])
        report.tensor(f"{name}.latent_position_ids", record.last("latent_pos_embed.in"))
        self._compare_block(name, record)
        compare_kv(report, "kv_after_vae", context, self.engine.model)

    def _compare_block(self, name: str, record: Recorder) -> None:
        self.report.tensor(f"{name}.llm_inputs", record.decoder_inputs)
        for i in range(self.engine.model.config.llm.num_hidden_layers):
            # A function, called only if the case has recorded this layer.
            self.report.tensor(f"{name}.llm_layer{i}", lambda i=i: record.decoder_layer(i))  # type: ignore[misc]
        self.report.tensor(f"{name}.llm_hidden", record.decoder_hidden)

    def _compare_block_sizes(self, segment: Segment) -> None:
        recorded = self.case.result.get("image") or self.case.data.get("image") or {}
        kind = segment.kind.name.lower()
        if segment.image is None or kind not in recorded:
            return
        rows, columns = segment.grid
        side = self.engine.model.config.vit_max_num_patch_per_side
        ours = {
            "n_query": segment.length,
            "rope": segment.rope,
            "n_patches": rows * columns,
            "token_grid_hw": [rows, columns],
            "pixel_shape": [1, 3, segment.image.height, segment.image.width],
            "position_id_min_max": [0, (rows - 1) * side + columns - 1],
        }
        for name, value in recorded[kind].items():
            self.report.equal(f"image.{kind}.{name}", ours.get(name), value)

    def _compare_sizes(self) -> None:
        recorded = self.case.data.get("sizes_wh") or []
        wanted = recorded if isinstance(recorded, list) else [recorded]
        parts = [part for part in self.prompt if isinstance(part, ImagePart)] if wanted else []
        config = self.engine.model.config
        for part, sizes in zip(parts, wanted, strict=True):
            ours = prepare(part.pixels, config.vae_transform, config.vit_transform, for_generation=True)
            assert ours.vae is not None and ours.vit is not None
            images = {"vae_input": ours.vae, "vit_input": ours.vit}
            found = {name: list(image.size) for name, image in images.items()}
            found |= {"input": list(part.pixels.size), "after_first_vae_resize": list(ours.size)}
            for name, size in sizes.items():
                self.report.equal(f"sizes_wh.{name}", found.get(name), size)
            for kind, path in self.case.pictures.items():
                if kind in images:
                    self.report.picture(kind, images[kind], path)


def case_prompt(case: Case) -> Prompt:
    """A case's inputs as a prompt."""
    understands = bool(case.settings.get("understanding_output")) or "image" not in case.pictures
    return tuple(
        TextPart(item)
        if isinstance(item, str)
        else ImagePart(case.input_image(item["image"]), for_generation=not understands)
        for item in case.data.get("inputs", ())
    )


def with_transforms(engine: BagelEngine, case: Case, fingerprint: bytes) -> BagelEngine:
    """The engine under the case's image transforms; the network and its weights are shared."""
    transforms = case.data["transforms"]
    model = copy(engine.model)
    model.config = replace(
        engine.model.config,
        vae_transform=ImageTransform.from_list(transforms["vae"]),
        vit_transform=ImageTransform.from_list(transforms["vit"]),
    )
    return BagelEngine(LoadedModel.of(model, engine.tokenizer, Role.FULL, fingerprint))


def compare_text_segment(report: Comparison, name: str, segment: Segment, record: Recorder) -> None:
    """Ids, positions and hidden states of a text segment."""
    report.tensor(f"{name}.token_ids", torch.tensor(segment.token_ids))
    report.tensor(f"{name}.position_ids", record.last("rotary.in")[0])
    report.tensor(f"{name}.inputs_embeds", record.decoder_inputs)
    for i in range(len(record.model.language_model.layers)):
        report.tensor(f"{name}.layer{i}", lambda i=i: record.decoder_layer(i))  # type: ignore[misc]
    report.tensor(f"{name}.final_hidden", record.decoder_hidden)
    und, _ = record.last("decoder.out")
    report.tensor(f"{name}.logits", lambda: record.model.language_model.logits(und[0]))


def compare_kv(report: Comparison, name: str, context: Context, model: Bagel) -> None:
    """All layers of a context that the case recorded under a name."""
    for layer in range(context.kv[0].k.shape[0] if context.kv else 0):
        for which in ("k", "v"):
            report.tensor(
                f"{name}.{layer}.{which}",
                lambda layer=layer, which=which: all_heads(_joined(context, layer, which), model),  # type: ignore[misc]
            )


def _joined(context: Context, layer: int, which: str) -> Tensor:
    return torch.cat([getattr(segment, which)[layer] for segment in context.kv])


def all_heads(kv: Tensor, model: Bagel) -> Tensor:
    """K or V [tokens, heads, head_dim] of this rank's heads -> of all heads, gathered from the ranks."""
    groups, llm = model.groups, model.config.llm
    gathered = groups.tp.gather(kv.contiguous())
    whole = kv.new_empty(len(kv), llm.num_key_value_heads, kv.shape[2])
    for tp, heads in enumerate(gathered):
        share = replace(groups.rank, tp=tp).decoder(llm).kv_heads
        whole[:, share.start : share.stop] = heads
    return whole
