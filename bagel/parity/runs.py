"""Recorded runs, repeated through the engine: text prefill, text answers, pictures."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch

from bagel.checkpoint.limits import padded_latents
from bagel.engine.context import Context
from bagel.engine.decoding import decode_picture
from bagel.engine.local import BagelEngine
from bagel.engine.memory import kv_space_of
from bagel.engine.noise import initial_noise
from bagel.engine.picture import Picture
from bagel.engine.sampler import Canvas, Drawing, Velocities
from bagel.engine.segments import Chain
from bagel.engine.step_graphs import StepGraphs
from bagel.engine.text import TextBatch, TextRun, text_kv_tokens
from bagel.model.attention import KvSlab
from bagel.model.flow import latent_unpatchify
from bagel.model.pixels import to_image
from bagel.parity.golden import Case
from bagel.parity.prompts import PromptRun, all_heads, compare_kv, compare_text_segment
from bagel.parity.record import Recorder
from bagel.parity.report import Comparison
from bagel.prompts import (
    BranchName,
    ImagePart,
    Prompt,
    TextPart,
    expand_cfg_prompts,
    expand_cfg_prompts_think,
    text_prompt,
)
from bagel.request import ImageSettings, Modality, PosteriorMode, RenormType, TextSettings, resolve

_RECORDED = {
    BranchName.GEN: ("v_cond", "cond"),
    BranchName.CFG_TEXT: ("v_cfg_text", "cfg_text"),
    BranchName.CFG_IMG: ("v_cfg_img", "cfg_img"),
}


def compare_prefill(engine: BagelEngine, case: Case, report: Comparison) -> None:
    """Texts added one after the other to one context."""
    run = PromptRun(engine, case, report)
    chain = Chain()
    for i, turn in enumerate(case.data["turns"]):
        chain = run.planner.append_text(chain, turn["text"])
        with Recorder(engine.model) as record:
            context = run.builder.build(chain)
        segment = chain.segments[-1]
        run.calls.add_segment(segment, context.length - segment.length, record)
        report.equal(f"turn{i}.ids", list(segment.token_ids), turn["token_ids"])
        report.equal(f"turn{i}.contexts", _lengths(context), {"kv_lens": turn["kv_lens"], "ropes": turn["ropes"]})
        compare_text_segment(report, f"turn{i}", segment, record)
        compare_kv(report, f"turn{i}.kv", context, engine.model)
    run.calls.compare(case.data["call_order"], report)


def compare_text(engine: BagelEngine, case: Case, report: Comparison) -> None:
    """A text answer, with or without think."""
    run = PromptRun(engine, case, report)
    think = bool(case.settings.get("think"))
    parts = text_prompt(run.prompt, think=think)
    context = run.build(run.planner.chain(parts, run.images), prompt=True)
    compare_kv(report, "kv_after_prompt", context, engine.model)
    compare_kv(report, "kv_prompt_part", Context(context.chain, context.kv[-1:]), engine.model)
    for name in ("context_after_prompt", "context_at_generation"):
        recorded = case.data.get(name) or case.result.get(name)
        if recorded is not None:
            report.equal(name, _lengths(context), recorded)
    text = _decode(run, context, case.result)
    # The reference builds the context without images too, though a text answer has no use for it.
    run.build(run.planner.chain(tuple(part for part in parts if isinstance(part, TextPart)), run.images))
    run.calls.compare(case.data["call_order"], report)
    if "end_token_id" not in case.settings:  # a stop id is an argument of Bagel.generate_text, no user's option
        request = resolve(case_modality(run.prompt, picture=False), run.prompt, {}, case_options(case))
        reply = engine.generate([request])[0].text
        report.equal("generate().text", reply, text)


def compare_picture(engine: BagelEngine, case: Case, report: Comparison) -> None:
    """A picture: contexts of all three branches, every step, and the whole through `generate`."""
    run = PromptRun(engine, case, report)
    settings = _image_settings(case)
    contexts = _contexts(run)
    for name, context in contexts.items():
        report.equal(f"contexts.{name}", _lengths(context), case.result["contexts"][name.value])
    compare_kv(report, "kv_gen", contexts[BranchName.GEN], engine.model)
    compare_kv(report, "kv_cfg_img", contexts[BranchName.CFG_IMG], engine.model)
    pixels = _denoise(run, settings, contexts)
    if not divided(engine):
        run.calls.compare(case.data["call_order"], report)
    if run.mean:
        # The recording zeroes the posterior noise but draws it, so only these parts have that order of draws.
        report.picture("image", to_image(pixels), case.pictures["image"])
        return
    request = resolve(case_modality(run.prompt, picture=True), run.prompt, {}, case_options(case))
    result = engine.generate([request])[0]
    if result.image is not None:  # of several ranks the first alone has it
        report.picture("image", result.image, case.pictures["image"])
    if case.settings.get("think"):
        report.equal("generate().text", result.text, case.result["think"]["text"])


def _contexts(run: PromptRun) -> dict[BranchName, Context]:
    """All three contexts, the think text included, whatever the scales."""
    if not run.case.settings.get("think"):
        branches = expand_cfg_prompts(run.prompt)
        return {
            branch.name: run.build(run.planner.chain(branch.parts, run.images), prompt=branch.name is BranchName.GEN)
            for branch in branches
        }
    branches = expand_cfg_prompts_think(run.prompt)
    contexts = {branch.name: run.build(run.planner.chain(branch.parts, run.images)) for branch in branches}
    text = _decode(run, contexts[BranchName.GEN], run.case.result["think"])
    chain = run.planner.append_text(contexts[BranchName.GEN].chain, text)
    contexts[BranchName.GEN] = run.build(chain)
    recorded = run.case.result["encoded_texts_in_call_order"]
    run.report.equal("think segment ids", list(chain.segments[-1].token_ids), recorded[-1])
    return contexts


def _decode(run: PromptRun, context: Context, wanted: dict[str, Any]) -> str:
    """Greedy text after a context, its ids, logits and positions compared; the text.

    max_length n of the reference is n forwards, whose last prediction it drops, so n tokens are decoded here.
    """
    report, settings, engine = run.report, run.case.settings, run.engine
    forwards = settings.get("max_length") or settings["max_think_token_n"]
    stops = (settings["end_token_id"],) if "end_token_id" in settings else ()
    text_run = TextRun(context, TextSettings(max_tokens=forwards, stop_token_ids=stops), run.seed)
    batch = TextBatch(engine.model, engine.tokenizer, kv_space_of(engine.model, [text_kv_tokens(text_run)]))
    with Recorder(engine.model) as record:
        batch.add(text_run)
        while len(batch):
            batch.step()
    predicted = [int(logits.argmax()) for logits in record.all("lm_head.out")]
    ids = [engine.tokenizer.bos, *predicted[: forwards - 1]][: len(predicted)]
    run.calls.add_forwards(range(context.length, context.length + len(predicted)), record)
    # Required by name, as `tensor` passes over what a case has not recorded.
    report.require("gen.ids", "gen.logits")
    report.tensor("gen.ids", torch.tensor(ids))
    report.tensor("gen.logits", torch.cat(record.all("lm_head.out")))
    report.tensor("gen.final_hidden", torch.cat(record.all("lm_head.in")))
    report.tensor("gen.position_ids", torch.cat(record.all("rotary.in"))[:, 0])
    slab: KvSlab = record.last("decoder.in")[3]
    for layer in range(slab.k.shape[0]):
        for which, kv in (("k", slab.k), ("v", slab.v)):
            tokens = kv[layer, : context.length + len(predicted)]
            report.tensor(f"kv_after_generation.{layer}.{which}", all_heads(tokens, engine.model))
    text = engine.tokenizer.reply(ids)
    ours = {
        "ids_with_bos": ids,
        "visible_ids": ids[1:],
        "predicted_after_each_step": predicted,
        "text": text,
        "steps_run": len(predicted),
    }
    called = ("ids_with_bos", "steps_run")
    asked = ("ids_with_bos", "visible_ids", "predicted_after_each_step", "text")
    # A direct call of generate_text has recorded less.
    for name in called if stops else asked:
        report.equal(name, ours[name], wanted[name])
    return text


def _denoise(run: PromptRun, settings: ImageSettings, contexts: dict[BranchName, Context]) -> torch.Tensor:
    """Every step of a picture; returns the decoder's output [3, H, W]."""
    case, report, config = run.case, run.report, run.engine.model.config
    height, width = _size(run, settings)
    grid = (height // config.latent_stride, width // config.latent_stride)
    tokens = grid[0] * grid[1]
    shapes = [run.planner.latent_shape(image.prepared.vae) for image in run.images.values() if image.prepared.vae]
    picture = Picture(settings, grid, initial_noise(run.seed, tokens, config.latent_features, shapes), contexts)
    report.equal("n_latent_tokens", tokens, case.result["n_latent_tokens"])
    report.equal("steps_run", picture.steps, case.result["steps_run"])
    report.equal("timesteps", picture.times, case.result["timesteps"])
    # A GPU's bucket on every device, so that padded steps are compared too.
    model = run.engine.model
    bucket = padded_latents(tokens, "cuda", model.groups.context.size)
    space = kv_space_of(model, picture.kv_tokens(bucket))
    canvas = Canvas(model, bucket, space, StepGraphs.over(model, space.slab), model.groups)
    drawing = canvas.add(picture)
    forwards = {name: case.result[f"steps_with_{name}_forward"] for name in ("cfg_text", "cfg_img")}
    if not divided(run.engine):
        _first_step(canvas, drawing, run, forwards)
    report.tensor("timesteps", torch.tensor(picture.times))
    # Copies, as a step changes the latents in place.
    recorded: dict[str, list[torch.Tensor]] = {"x": [drawing.latents.clone()]}
    while not drawing.finished:
        _step(canvas, drawing, recorded, forwards)
    report.require(*recorded, "timesteps", "decoded")
    for name, series in recorded.items():
        report.tensor(name, torch.stack(series))
    pixels = decode_picture(run.engine.model, drawing.latents, grid)
    saved = report.tensors["decoded"].shape  # of large pictures only the top-left corner
    report.tensor("decoded", pixels[:, : saved[1], : saved[2]])
    report.equal("decoded size", list(pixels.shape[1:]), [height, width])
    if model.groups.vae_decode.size > 1:
        _tile(run, drawing.latents, grid, pixels)
    return pixels


@torch.inference_mode()
def _tile(run: PromptRun, latents: torch.Tensor, grid: tuple[int, int], pixels: torch.Tensor) -> None:
    """Decode and encode a picture in tiles of several ranks: to the bit as of one, which no recording has."""
    model = run.engine.model
    alone, together = copy(model.autoencoder()), copy(model.autoencoder())
    alone.use_tiling()
    together.use_tiling(model.groups.vae_decode, model.groups.vae_encode)
    latent = latent_unpatchify(latents, *grid, model.config.latent_patch_size)[None]
    decoded = wanted = alone.decode(latent)
    if model.groups.vae_decode.index == 0:
        decoded = together.decode(latent)
    else:
        together.help_decode(latent)
    run.report.equal("decoded in patches", torch.equal(decoded, wanted), True)
    moments = zip(together.encode(pixels[None]), alone.encode(pixels[None]), strict=True)
    run.report.equal("encoded in patches", all(torch.equal(ours, one) for ours, one in moments), True)


def _step(
    canvas: Canvas, drawing: Drawing, recorded: dict[str, list[torch.Tensor]], forwards: dict[str, list[int]]
) -> None:
    """One step. A branch that the reference ran and the engine skips is evaluated beside it."""
    extra = {name for name in (BranchName.CFG_TEXT, BranchName.CFG_IMG) if drawing.step in forwards[name.value]}
    beside = canvas.velocities({drawing: frozenset(extra)})[drawing] if extra else {}

    def keep(_drawing: Drawing, velocities: Velocities, guided: torch.Tensor) -> None:
        for name, v in {**beside, **velocities}.items():
            if name is BranchName.GEN or name in extra:
                recorded.setdefault(_RECORDED[name][0], []).append(v.clone())
        recorded.setdefault("v_guided", []).append(guided.clone())

    canvas.step([drawing], keep)
    recorded["x"].append(drawing.latents.clone())


def _first_step(canvas: Canvas, drawing: Drawing, run: PromptRun, forwards: dict[str, list[int]]) -> None:
    """The inside of the first step, one branch at a time."""
    report, picture = run.report, drawing.picture
    tokens = picture.tokens
    for branch, (_, name) in _RECORDED.items():
        with Recorder(canvas.model) as record:
            canvas.velocities({drawing: frozenset({branch})})
        # equal branches share a row, whose positions were made before
        if "rotary.in" in record.calls and (branch is BranchName.GEN or forwards[branch.value]):
            run.calls.add_forwards([picture.contexts[branch].length], record)
        visible = [0, *range(1, tokens + 1), -1]  # without the bucket's padding
        if branch is BranchName.GEN:
            report.tensor("latent_position_ids", record.last("latent_pos_embed.in")[0, :tokens])
            report.tensor("step0.time_embed", record.last("time_embedder.out"))
            report.tensor("step0.llm_inputs", record.decoder_inputs()[visible])
        for i in range(canvas.model.config.llm.num_hidden_layers):
            report.tensor(f"step0.{name}.llm_layer{i}", record.decoder_layer(i)[visible])
        report.tensor(f"step0.{name}.llm_hidden", record.decoder_hidden()[visible])


def divided(engine: BagelEngine) -> bool:
    """Whether ranks divide the rows or the latents of a step, so that none computes what the recording saw inside."""
    return engine.model.groups.rows.size > 1 or engine.model.groups.context.size > 1


def _size(run: PromptRun, settings: ImageSettings) -> tuple[int, int]:
    if run.images:
        # An edit is as large as its last image after resizing.
        width, height = list(run.images.values())[-1].prepared.size
        return height, width
    assert settings.height is not None and settings.width is not None
    stride = run.engine.model.config.latent_stride
    return settings.height // stride * stride, settings.width // stride * stride


def case_modality(prompt: Prompt, *, picture: bool) -> Modality:
    """What goes in and what comes out of a case."""
    if any(isinstance(part, ImagePart) for part in prompt):
        return Modality.IMG2IMG if picture else Modality.IMG2TEXT
    return Modality.TEXT2IMG if picture else Modality.TEXT2TEXT


def _image_options(case: Case) -> dict[str, Any]:
    names = ("timestep_shift", "cfg_text_scale", "cfg_img_scale", "cfg_interval", "cfg_renorm_type", "cfg_renorm_min")
    options = {name: case.settings[name] for name in names}
    height, width = case.settings.get("image_shapes") or (None, None)
    return {**options, "steps": case.settings["num_timesteps"], "height": height, "width": width}


def _image_settings(case: Case) -> ImageSettings:
    options = _image_options(case)
    options["cfg_interval"] = tuple(options["cfg_interval"])
    options["cfg_renorm_type"] = RenormType(options["cfg_renorm_type"])
    return ImageSettings(**options)


def case_options(case: Case) -> dict[str, Any]:
    """The case as a user's options. Limits count visible tokens, one less than max_length."""
    options: dict[str, Any] = {"seed": case.data.get("seed") or 0, "posterior": PosteriorMode.SEED}
    options["think"] = bool(case.settings.get("think"))
    if "num_timesteps" in case.settings:
        options |= _image_options(case)
    if "max_think_token_n" in case.settings:
        options["max_think_tokens"] = case.settings["max_think_token_n"] - 1
    return options


def _lengths(context: Context) -> dict[str, list[int]]:
    return {"kv_lens": [context.length], "ropes": [context.rope]}
