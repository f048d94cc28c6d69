"""Check the Thinker on vLLM on this GPU: compare bagel-nano's K/V and texts with the torch engine on the same device.

    python -m bench.vllm_check [--dtype float32]        float32: Triton's attention; bfloat16: FlashAttention

The cases are texts, images to look at and to edit, and think. In float32 all K/V must agree within 1e-3, since both
engines multiply in full float32, and greedy ids must be equal. In bfloat16 both engines round, each in its own order.
So vLLM's K/V may differ from the float32 engine's by twice the root mean square of the torch engine in bfloat16, which
is at 0.7 of the reference's own; ids and largest distances are only reported. With --causal vLLM attends causally
within images, and the check must fail.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from bagel.arguments import OnceParser
from bagel.checkpoint.files import Checkpoint
from bagel.engine.segments import Chain
from bagel.engine.text_scheduler import ChainExtended, ContextDone, ContextEvent, ContextFailed, ContextRequest
from bagel.kv.digests import SegmentKind
from bagel.prompts import ImagePart, Prompt, TextPart
from bagel.request import PosteriorMode, TextSettings
from bagel_thinker.engine import Engine
from bagel_thinker.torch_engine import TorchEngine
from bench.vllm_here import check

NANO = Path(__file__).parents[1] / "models" / "nano"
STORE_BYTES = 2**28
LIMIT_S = 300
TOLERANCE = 1e-3
ROUNDING = 2.0
"""The largest ratio of vLLM's distances to the torch engine's in bfloat16, as root mean squares."""
SEED = 7


@dataclass
class Case:
    """A prompt, the settings of a text after it, and whether that text is appended to the context."""

    name: str
    prompt: Prompt
    settings: TextSettings | None = None
    append: bool = False


@dataclass
class Answer:
    """An engine's result for a case."""

    chain: Chain
    over: threading.Event = field(default_factory=threading.Event)
    results: list[ContextDone | ContextFailed] = field(default_factory=list)


def cases() -> list[Case]:
    """Cases with segments of every kind, and images of several sizes, two of them not square."""
    colours = ("crimson", "navy", "seagreen")
    images = [Image.effect_noise(size, 90).convert("RGB") for size in ((128, 128), (96, 64), (128, 80))]
    for image, colour in zip(images, colours, strict=True):
        image.paste(colour, (8, 8, 56, 40))
    text, twelve = TextPart("make the circle green"), TextSettings(max_tokens=12)
    found = [Case("text", (text,), twelve), Case("think", (TextPart("think first"), text), twelve, append=True)]
    for i, image in enumerate(images):
        found.append(Case(f"describe {i}", (ImagePart(image, for_generation=False), text), twelve))
        found.append(Case(f"edit {i}", (ImagePart(image, for_generation=True), text), twelve))
    edits = [ImagePart(image, for_generation=True) for image in images[:2]]
    both = (edits[0], text, edits[1], TextPart("so"))
    return [*found, Case("two images", both)]


def submit(engine: Engine, case: Case) -> Answer:
    """Start a case."""
    images = engine.planner.prepare_images(case.prompt, PosteriorMode.CONTENT, SEED)
    chain = engine.planner.chain(case.prompt, images)
    lease = engine.store.lease(_lengths(chain), 600)  # the engine stores only K/V that a lease reserves
    answer = Answer(chain)

    def emit(event: ContextEvent) -> None:
        match event:
            case ChainExtended():
                engine.store.extend(lease, _lengths(event.chain))
            case ContextDone() | ContextFailed():
                answer.results.append(event)
                answer.over.set()

    engine.submit(ContextRequest(chain, SEED, emit, case.settings, append=case.append))
    return answer


def _lengths(chain: Chain) -> list[tuple[bytes, int]]:
    return chain.lengths


Found = tuple[tuple[int, ...], list[tuple[SegmentKind, Tensor]]]
"""The ids of a text, and each segment's kind with its K and V."""


def collect(engine: Engine, answer: Answer) -> Found:
    """Wait for a case and return its ids and K/V; raises the error that it ended with."""
    if not answer.over.wait(LIMIT_S):
        raise TimeoutError("a reading never ended")
    (result,) = answer.results
    if isinstance(result, ContextFailed):
        raise result.error
    rows = []
    for segment in result.context.chain.segments:
        k, v = engine.store.load(segment.digest)
        rows.append((segment.kind, torch.stack((k, v)).float().clone()))
    return result.token_ids, rows


def exact(checkpoint: Checkpoint, device: str, dtype: str, some: Sequence[Case]) -> list[Found]:
    """The torch engine's results, one case after the other."""
    engine = TorchEngine.load(
        "nano", checkpoint, device=device, dtype=dtype, kv_store_bytes=STORE_BYTES, max_num_seqs=16
    )
    found = [collect(engine, submit(engine, case)) for case in some]
    engine.close()
    return found


def on_vllm(checkpoint: Checkpoint, options: argparse.Namespace, some: Sequence[Case]) -> list[Found]:
    """vLLM's results, with all cases at once."""
    from bagel_thinker.vllm import settings
    from bagel_thinker.vllm.engine import VllmEngine

    if options.causal:
        make = settings.hf_config
        settings.hf_config = lambda *given: {**make(*given), "is_mm_prefix_lm": False}
    chosen = settings.VllmSettings(
        options.device,
        options.dtype,
        max_num_seqs=16,
        max_model_len=2048,
        kv_cache_memory_bytes=2**30,
        enforce_eager=options.eager,
        tensor_parallel_size=options.tensor_parallel_size,
    )
    engine = VllmEngine(checkpoint, chosen, model_name="checked", kv_store_bytes=STORE_BYTES)
    answers = [submit(engine, case) for case in some]
    return [collect(engine, answer) for answer in answers]


@dataclass(frozen=True)
class Distance:
    """The distance of K and V in one kind of segment: root mean square, the largest, and its layer and row."""

    rms: float
    largest: float
    layer: int
    row: int


def distances(one: Found, other: Found) -> dict[str, Distance]:
    """The largest distance for each kind of segment."""
    worst: dict[str, Distance] = {}
    for (kind, mine), (_, theirs) in zip(one[1], other[1], strict=True):
        if mine.shape == theirs.shape:  # think texts of different lengths cannot be compared
            found = _distance(mine - theirs)
            if kind.value not in worst or found.rms > worst[kind.value].rms:
                worst[kind.value] = found
    return worst


def _distance(apart: Tensor) -> Distance:
    """The distance from differences [2, layers, rows, kv heads, head_dim]."""
    by_row = apart.abs().amax(dim=(0, 3, 4))
    layer, row = divmod(int(by_row.argmax()), by_row.shape[1])
    return Distance(float(apart.square().mean().sqrt()), float(by_row.max()), layer, row)


def fits(far: Mapping[str, Distance], near: Mapping[str, Distance], dtype: str) -> bool:
    """Whether vLLM is as close to the truth as the dtype allows; near: the torch engine's distances in that dtype."""
    if dtype == "float32":
        return all(distance.largest <= TOLERANCE for distance in far.values())
    return all(kind in near and distance.rms <= ROUNDING * near[kind].rms for kind, distance in far.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Compare case by case; returns 1 if one is wrong."""
    parser = OnceParser(prog="python -m bench.vllm_check", description="Is the Thinker's vLLM right here?")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--eager", action="store_true", help="no compilation, no CUDA graphs: starts in seconds")
    parser.add_argument("--model", type=Path, default=NANO, metavar="DIR", help="another checkpoint than bagel-nano's")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs of vLLM (nano: 1 or 3)")
    parser.add_argument("--causal", action="store_true", help="break it: images are not bidirectional")
    options = parser.parse_args(argv)
    check(parser, gpu=options.device == "cuda", without="--device cpu")
    # TF32 would hide errors of 1e-3.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    checkpoint, some, begin = Checkpoint(options.model), cases(), time.monotonic()
    truth = exact(checkpoint, options.device, "float32", some)
    same = truth if options.dtype == "float32" else exact(checkpoint, options.device, options.dtype, some)
    ours = on_vllm(checkpoint, options, some)
    bad = 0
    for case, right, near, mine in zip(some, truth, same, ours, strict=True):
        far, rounded = distances(mine, right), distances(near, right)
        ids = mine[0] == right[0]
        good = fits(far, rounded, options.dtype) and (ids or options.dtype != "float32")
        report = {"vllm": {kind: asdict(each) for kind, each in far.items()}}
        if options.dtype != "float32":
            report["exact"] = {kind: asdict(each) for kind, each in rounded.items()}
        bad += not good
        print(json.dumps({"case": case.name, "right": good, "ids": ids, **report}), flush=True)
    print(json.dumps({"wrong": bad, "cases": len(some), "seconds": round(time.monotonic() - begin, 1)}), flush=True)
    os._exit(1 if bad else 0)  # vLLM's own shutdown would take long


if __name__ == "__main__":
    sys.exit(main())
