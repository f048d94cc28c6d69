"""Drawing on a GPU: single steps, a whole picture whose steps never make the host wait, and whole requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

from PIL.Image import Image

from bagel.checkpoint.roles import Role
from bagel.engine.context import ContextBuilder
from bagel.engine.decoding import decode_picture
from bagel.engine.sampler import Canvas, StepGate
from bagel.engine.segments import Chain
from bagel.kv.digests import SegmentKind
from bagel.model.bagel import Bagel
from bagel.model.pixels import to_image
from bagel.prompts import BranchName
from bench import cases, flops
from bench.lab import Lab
from bench.meter import Meter, top_kernels
from bench.report import Table

FEW_TIMESTEPS = 4
TOP_KERNELS = 12


def denoise(lab: Lab) -> Iterator[Table]:
    """Role denoise: single steps, then a whole picture."""
    with lab.model(Role.DENOISE) as model:
        table = Table("gpu steps", "one step of one picture; host_ms: until the call returns, the device idle before")
        for side in lab.sizes.sides:
            with lab.track(Role.DENOISE, f"steps of {side}, up to 3 branches, {lab.sizes.contexts[-1]} tokens"):
                for tokens in lab.sizes.contexts:
                    for branches in cases.SETTINGS:
                        _step(lab, table, model, side, tokens, branches)
        yield table
        yield _picture(lab, model)


def profile(lab: Lab) -> Iterator[Table]:
    """Role denoise: the kernels that take most of a step, for the largest and the smallest picture."""
    with lab.model(Role.DENOISE) as model:
        for side, branches in ((lab.sizes.sides[-1], 2), (lab.sizes.sides[0], 1)):
            canvas = cases.draw(model, side, cases.branch_contexts(model, cases.PROMPT, branches))
            table = Table("gpu profile", f"kernels of one step of {side}, {branches} branches, longest first")
            for name, launches, ms in top_kernels(lab.meter, cases.first_step(canvas), TOP_KERNELS):
                table.add(kernel=name[:70], launches=launches, ms=ms)
            yield table


def full(lab: Lab) -> Iterator[Table]:
    """Role full: a short picture from a text and a short edit, from their prompts to pixels."""
    side, config = lab.sizes.sides[-1], lab.sizes.config
    text = cases.text_chain(cases.PROMPT)
    image = cases.image_chain(config, side, SegmentKind.VAE, SegmentKind.VIT)
    requests = {
        "text-to-image": (text, Chain()),
        "edit": (cases.text_chain(cases.PROMPT, after=image), image, text),
    }
    note = f"{side}x{side}: contexts, {FEW_TIMESTEPS} timesteps and VAE decode on one model; wall time, second run"
    table = Table("gpu full", note)
    with lab.model(Role.FULL) as model:
        for name, chains in requests.items():
            work = _request(lab.meter, model, side, chains)
            with lab.track(Role.FULL, f"{name} {side}, {len(chains)} branches"):
                work()  # warm-up
            table.add(request=name, branches=len(chains), seconds=lab.meter.seconds(work))
    yield table


def _step(lab: Lab, table: Table, model: Bagel, side: int, tokens: int, branches: int) -> None:
    lengths = cases.branch_lengths(tokens, branches)
    contexts = "+".join(map(str, lengths))
    canvas = cases.draw(model, side, cases.branch_contexts(model, tokens, branches))
    work = cases.first_step(canvas)
    ms, host = lab.meter.median_ms(work), lab.meter.host_ms(work)
    flop = flops.denoise_step(lab.sizes.config, lengths, canvas.drawings[0].picture.tokens)
    rate = lab.rate(flop, ms)
    table.add(size=side, branches=branches, contexts=contexts, ms=ms, host_ms=host, tflop=flop / 1e12, **rate)
    if side == lab.sizes.sides[-1]:
        lab.headline(f"step {side}, contexts {contexts}", ms, "ms")
        lab.headline("  of the matrix peak", rate["percent_of_peak"], "%")


def _picture(lab: Lab, model: Bagel) -> Table:
    """A whole text-to-image picture, none of whose steps may make the host wait."""
    side, steps, meter = lab.sizes.sides[-1], lab.sizes.steps, lab.meter
    _decode(model, _draw(meter, _canvas(model, side, FEW_TIMESTEPS), guarded=False))  # warm-up
    with lab.track(Role.DENOISE, f"drawing {side}, {steps} timesteps, 2 branches"):
        canvas = _canvas(model, side, steps)
        waits = _host_waits(meter, canvas)
        seconds = meter.seconds(lambda: _draw(meter, canvas, guarded=not waits))
    with lab.track(Role.DENOISE, f"VAE decode {side}, float32"):
        decode = meter.seconds(lambda: _decode(model, canvas))
    total = None if seconds is None or decode is None else seconds + decode
    table = Table("gpu picture", f"text-to-image {side}x{side}, {steps} timesteps, guided for 0.4 < t <= 1; wall time")
    guided = sum(canvas.drawings[0].picture.guided)
    times = {"denoise_s": seconds, "vae_decode_s": decode, "total_s": total}
    host = {"host_waits_in_a_step": (waits or "none") if meter.cuda else None}
    table.add(steps=canvas.drawings[0].picture.steps, guided=guided, **times, **host)
    lab.headline(f"picture {side}, {steps} timesteps, VAE decode included", total, "s")
    return table


def _canvas(model: Bagel, side: int, steps: int) -> Canvas:
    contexts = cases.branch_contexts(model, cases.PROMPT, branches=2)
    return cases.draw(model, side, contexts, replace(cases.GUIDED, steps=steps))


def _host_waits(meter: Meter, canvas: Canvas) -> str:
    """PyTorch's name for the first operation in a drawing that makes the host wait; empty if there is none."""
    try:
        _draw(meter, canvas, guarded=True)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return str(error).splitlines()[0]
    return ""


def _draw(meter: Meter, canvas: Canvas, *, guarded: bool) -> Canvas:
    """Run all steps as the engine does; guarded: raise if an operation within a step makes the host wait."""
    gate, drawing = StepGate(meter.device), canvas.drawings[0]
    drawing.step = 0
    while not drawing.finished:
        with gate.step(1), meter.no_host_wait() if guarded else nullcontext():
            canvas.step([drawing])
    return canvas


def _decode(model: Bagel, canvas: Canvas) -> Image:
    drawing = canvas.drawings[0]
    return to_image(decode_picture(model, drawing.latents, drawing.picture.grid))


def _request(meter: Meter, model: Bagel, side: int, chains: tuple[Chain, ...]) -> Callable[[], Image]:
    """A function that serves a request, from the chains of its branches to the picture."""

    def work() -> Image:
        builder = ContextBuilder(model)
        contexts = {name: builder.build(chain) for name, chain in zip(BranchName, chains, strict=False)}
        settings = replace(cases.SETTINGS[len(chains)], steps=FEW_TIMESTEPS)
        return _decode(model, _draw(meter, cases.draw(model, side, contexts, settings), guarded=False))

    return work
