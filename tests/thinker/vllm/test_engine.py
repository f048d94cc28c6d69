"""The vLLM engine against the exact one, on a CPU: `make test-vllm`."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import pytest
from torch import Tensor

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.engine.segments import Chain
from bagel.engine.text_scheduler import ChainExtended, ContextDone, ContextEvent, ContextRequest, TextWritten
from bagel.errors import BagelError, EngineDied, IncompleteContext, InvalidRequest, NotFinite, NotSupported
from bagel.images import ImageTransform
from bagel.prompts import ImagePart, Prompt, TextPart
from bagel.request import PosteriorMode, TextSettings
from bagel_thinker.engine import Engine
from bagel_thinker.torch_engine import TorchEngine
from tests.helpers import keep_in, sketch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own, and those of what it imports
]

LIMIT_S = 120
TOLERANCE = 1e-4
LARGEST = (66, 102)
"""Rows of the largest blocks of images that are resized to at most 128 and 140 pixels a side."""
STORE_BYTES = 2**26


@pytest.fixture(scope="module")
def small(checkpoint: Checkpoint) -> Checkpoint:
    """The tiny checkpoint with images of few tokens."""
    config = replace(
        checkpoint.config, vae_transform=ImageTransform(128, 64, 16), vit_transform=ImageTransform(140, 56, 14)
    )
    made = Checkpoint(checkpoint.folder)
    made.__dict__["config"] = config
    return made


@pytest.fixture(scope="module")
def exact(small: Checkpoint) -> Iterator[TorchEngine]:
    engine = TorchEngine.load("tiny", small, device="cpu", dtype="float32", kv_store_bytes=STORE_BYTES, max_num_seqs=64)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def vllm(small: Checkpoint) -> Iterator[Any]:
    """vLLM with so little room in a step and in its cache that prompts are split and requests preempted."""
    from bagel_thinker.vllm import model, settings
    from bagel_thinker.vllm.engine import VllmEngine

    with pytest.MonkeyPatch.context() as patch:
        for module in (model, settings):
            patch.setattr(module, "largest_blocks", lambda config: LARGEST)
        chosen = settings.VllmSettings(
            "cpu",
            "float32",
            max_num_seqs=32,
            max_model_len=600,
            max_num_batched_tokens=160,
            kv_cache_memory_bytes=2**21,
        )
        engine = VllmEngine(small, chosen, model_name="tiny", kv_store_bytes=STORE_BYTES)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def _leases(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test leaves held is no matter of the next one."""
    yield
    for name in {"vllm", "exact"} & set(request.fixturenames):
        store = request.getfixturevalue(name).store
        store.release(list(store._ledger.leases))


@dataclass
class Ask:
    """A reading to be: a prompt, what is written after it, and whether that is appended."""

    prompt: Prompt
    settings: TextSettings | None = None
    append: bool = False
    seed: int = 7
    mode: PosteriorMode = PosteriorMode.CONTENT


@dataclass
class Answer:
    """A reading under way, and what came of it: kv holds K and V of each segment."""

    engine: Engine
    chain: Chain
    lease: str
    over: threading.Event = field(default_factory=threading.Event)
    came: list[ContextDone | Exception] = field(default_factory=list)
    shown: str = ""
    reading: ContextRequest | None = None

    def emit(self, event: ContextEvent) -> None:
        match event:
            case ChainExtended():
                self.engine.store.extend(self.lease, lengths(event.chain))
            case TextWritten():
                self.shown += event.text
            case _:
                keep_in(self.came)(event)
                if self.came:
                    self.over.set()

    def wait(self) -> Answer:
        assert self.over.wait(LIMIT_S), "the reading never ended"
        return self

    @property
    def written(self) -> ContextDone:
        (came,) = self.wait().came
        if isinstance(came, Exception):
            raise came
        return came

    def kv(self) -> list[tuple[Tensor, Tensor]]:
        """A copy of all K and V from the store; the lease is given back."""
        kv = [self.engine.store.load(digest) for digest, _ in lengths(self.written.context.chain)]
        copies = [(k.clone(), v.clone()) for k, v in kv]
        self.engine.store.release([self.lease])
        return copies


def lengths(chain: Chain) -> list[tuple[bytes, int]]:
    return chain.lengths


def ask(engine: Engine, what: Ask, *, submit: bool = True) -> Answer:
    images = engine.planner.prepare_images(what.prompt, what.mode, what.seed)
    chain = engine.planner.chain(what.prompt, images)
    answer = Answer(engine, chain, engine.store.lease(lengths(chain), 600))
    answer.reading = ContextRequest(chain, what.seed, answer.emit, what.settings, append=what.append)
    if submit:
        engine.submit(answer.reading)
    return answer


def distance(one: Sequence[tuple[Tensor, Tensor]], other: Sequence[tuple[Tensor, Tensor]]) -> float:
    pairs = [pair for mine, theirs in zip(one, other, strict=True) for pair in zip(mine, theirs, strict=True)]
    return max((float((mine - theirs).abs().max()) for mine, theirs in pairs), default=0.0)


def agrees(vllm: Engine, exact: Engine, asked: Sequence[Ask]) -> None:
    """All of them at once on vLLM come to what each alone comes to on the exact engine."""
    answers = [ask(vllm, what) for what in asked]
    for what, answer in zip(asked, answers, strict=True):
        alone = ask(exact, what)
        assert (answer.written.text, answer.written.token_ids) == (alone.written.text, alone.written.token_ids)
        assert answer.shown == alone.shown
        assert distance(answer.kv(), alone.kv()) < TOLERANCE


def settled(vllm: Any) -> bool:
    """Whether nothing is held of anything, at once or soon."""
    core = vllm._core._client.engine_core.scheduler
    pool = core.kv_cache_manager.block_pool
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stats = vllm.store.stats()
        blocks = pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        if blocks and not (vllm._requests or vllm._claims or vllm._waiting or stats.leases or stats.held_bytes):
            segments = vllm.store._ledger.segments.values()
            return not any(segment.pins or segment.claimed for segment in segments)
        time.sleep(0.05)
    return False


def image(side: int, *, edit: bool, colour: str = "crimson") -> ImagePart:
    return ImagePart(sketch(side, 80, colour), for_generation=edit)


def mixed(count: int) -> list[Ask]:
    """Readings of all kinds; images of several sizes, some in two of them, some prompts longer than a step."""
    asked = []
    for i in range(count):
        words = TextPart(f"thing number {i} " + "and another one " * (i % 5 * 12))
        text = TextSettings(max_tokens=4 + i % 7)
        match i % 6:
            case 0:
                asked.append(Ask((words,), text))
            case 1:
                asked.append(Ask((image(64 + 8 * i, edit=False), words), text))
            case 2:
                asked.append(Ask((image(64 + 8 * i, edit=True), words)))
            case 3:
                asked.append(
                    Ask((TextPart("think first"), image(64 + 8 * (i - 1), edit=True), words), text, append=True)
                )
            case 4:
                asked.append(Ask((TextPart("think first"), words), text, append=True))
            case 5:
                asked.append(Ask((image(120, edit=True), words, image(96, edit=True, colour="navy"), TextPart("so"))))
    return asked


def test_mixed_readings_at_once_come_to_what_each_comes_to_alone(vllm: Any, exact: TorchEngine) -> None:
    agrees(vllm, exact, mixed(32))
    assert settled(vllm)


def test_long_texts_that_are_preempted_come_to_the_same(vllm: Any, exact: TorchEngine) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, before = [], Scheduler._preempt_request
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "_preempt_request", lambda *args, **more: preempted.append(before(*args, **more)))
        edits = [(image(88, edit=True), TextPart(f"number {i}")) for i in range(12)]
        agrees(vllm, exact, [Ask(prompt, TextSettings(max_tokens=200)) for prompt in edits])
    assert preempted
    assert settled(vllm)


def test_what_is_cached_is_right_wherever_the_cache_ends(vllm: Any, exact: TorchEngine) -> None:
    """A second prompt finds whole blocks of the first, which end in texts and within images."""
    for words in range(0, 40, 3):
        first = TextPart("a " * words)
        agrees(vllm, exact, [Ask((first, image(112, edit=True), TextPart("one")))])
        agrees(vllm, exact, [Ask((first, image(112, edit=True), TextPart("two")), TextSettings(max_tokens=2))])


def test_another_posterior_seed_is_another_image(vllm: Any, exact: TorchEngine) -> None:
    prompt = (image(112, edit=True), TextPart("snow"))
    asked = [Ask(prompt, seed=seed, mode=mode) for seed in (1, 2) for mode in (PosteriorMode.SEED, PosteriorMode.MEAN)]
    agrees(vllm, exact, asked)
    answers = [ask(vllm, what) for what in asked]
    one, mean, other, same = [answer.kv() for answer in answers]
    assert distance(one, other) > 0.01 and distance(one, mean) > 0.01
    assert distance(mean, same) == 0


def test_sampled_and_penalised_texts_are_the_exact_engines(vllm: Any, exact: TorchEngine) -> None:
    ways: list[dict[str, Any]] = [
        {"do_sample": True, "temperature": 1.0},
        {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.8},
        {"repetition_penalty": 1.5},
        {"do_sample": True, "repetition_penalty": 1.2, "temperature": 2.0},
        {},
    ]
    prompts: list[Prompt] = [(TextPart("a red cup"),), (image(96, edit=False), TextPart("what is it"))]
    asked = [
        Ask(prompt, TextSettings(max_tokens=12 + i, **way), seed=i)
        for prompt in prompts
        for i, way in enumerate(ways * 2)
    ]
    agrees(vllm, exact, asked)


def test_a_text_ends_where_it_is_told_to(vllm: Any, exact: TorchEngine) -> None:
    prompt = (TextPart("a red cup"),)
    whole = ask(vllm, Ask(prompt, TextSettings(max_tokens=6))).written.token_ids
    stop = whole[3]
    agrees(vllm, exact, [Ask(prompt, TextSettings(max_tokens=6, stop_token_ids=(stop,)))])
    assert ask(vllm, Ask(prompt, TextSettings(max_tokens=6, stop_token_ids=(stop,)))).written.token_ids == whole[:3]
    agrees(vllm, exact, [Ask((), TextSettings(max_tokens=3)), Ask(())])


def test_a_context_that_is_there_is_not_computed_again(vllm: Any) -> None:
    prompt = (TextPart("only once"), image(104, edit=True), TextPart("please"))
    first = ask(vllm, Ask(prompt))
    assert first.written and first.reading is not None
    assert sum(first.reading.computed.values()) == first.chain.length
    assert [len(times) for times in first.reading.layer_times.values()] == [4] * len(first.chain.segments)
    before = vllm.store.stats()
    again = ask(vllm, Ask(prompt))
    assert again.written and again.reading is not None
    assert not again.reading.computed
    assert vllm.store.stats().computed_pages == before.computed_pages
    # Out of the store, but still in vLLM's cache: written again, not computed again.
    vllm.store.release([first.lease, again.lease])
    everything = ask(vllm, Ask((TextPart("room"),)))
    for digest, _ in lengths(first.chain):
        vllm.store._ledger.discard(vllm.store._ledger.segments[digest], None)
    third = ask(vllm, Ask(prompt))
    assert third.written and third.reading is not None
    assert not third.reading.computed
    assert len(third.kv()) == len(first.chain.segments)
    everything.kv()


def test_equal_prompts_at_once_are_computed_once(vllm: Any) -> None:
    prompt = (image(100, edit=True), TextPart("all the same"))
    answers = [ask(vllm, Ask(prompt)) for _ in range(6)]
    assert all(answer.written for answer in answers)
    computed = [sum(answer.reading.computed.values()) for answer in answers if answer.reading is not None]
    assert sorted(computed) == [0] * 5 + [answers[0].chain.length]
    for answer in answers:
        answer.kv()
    assert settled(vllm)


def test_cancelled_readings_leave_nothing(vllm: Any, exact: TorchEngine) -> None:
    chance = random.Random(5)
    kept = mixed(8)
    answers = []
    for i in range(60):
        gone = ask(
            vllm, Ask((image(64 + 8 * (i % 9), edit=bool(i % 2)), TextPart(f"{i}")), TextSettings(max_tokens=90))
        )
        if i % 8 == 0:
            answers.append(ask(vllm, kept[i // 8]))
        time.sleep(chance.random() * 0.02)
        assert gone.reading is not None
        vllm.cancel(gone.reading)
        vllm.store.release([gone.lease])
    for what, answer in zip(kept, answers, strict=True):
        alone = ask(exact, what)
        assert answer.written.text == alone.written.text
        assert distance(answer.kv(), alone.kv()) < TOLERANCE
    assert settled(vllm)


def test_a_cancelled_reading_is_taken_over_by_who_waits_for_the_same(vllm: Any, exact: TorchEngine) -> None:
    what = Ask((image(112, edit=True, colour="gold"), TextPart("taken over")))
    first, second = ask(vllm, what), ask(vllm, what)
    assert first.reading is not None
    vllm.cancel(first.reading)
    vllm.store.release([first.lease])
    assert distance(second.kv(), ask(exact, what).kv()) < TOLERANCE
    assert settled(vllm)


def test_a_lease_that_lapses_fails_its_reading_alone(vllm: Any, exact: TorchEngine) -> None:
    what = Ask((image(112, edit=True, colour="olive"), TextPart("lapsed")))
    gone = ask(vllm, what, submit=False)
    assert gone.reading is not None
    other = ask(vllm, Ask((TextPart("meanwhile"),), TextSettings(max_tokens=5)))
    vllm.submit(gone.reading)
    vllm.store.release([gone.lease])
    gone.wait()
    assert other.written.text
    other.kv()
    assert distance(ask(vllm, what).kv(), ask(exact, what).kv()) < TOLERANCE
    assert settled(vllm)


def test_a_copy_that_fails_fails_its_request_alone(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bagel_thinker.vllm import connector

    right = connector.read_rows

    def breaks(cache: Tensor, wanted: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        if end - begin == lost.chain.segments[-1].length:
            raise RuntimeError("no luck")
        return right(cache, wanted, begin, end)

    lost = ask(vllm, Ask((TextPart("this one is lost, and is longer than the other"),)), submit=False)
    assert lost.reading is not None
    monkeypatch.setattr(connector, "read_rows", breaks)
    vllm.submit(lost.reading)
    kept = ask(vllm, Ask((TextPart("kept"),), TextSettings(max_tokens=5)))
    with pytest.raises(IncompleteContext, match=r"its K/V could not be copied: no luck; send the request again"):
        lost.written  # noqa: B018
    assert kept.written.text
    monkeypatch.undo()
    assert ask(vllm, Ask((TextPart("this one is lost, and is longer than the other"),))).kv()
    kept.kv()
    vllm.store.release([lost.lease])


def test_a_step_that_fails_fails_what_runs_and_the_next_is_right(
    vllm: Any, exact: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bagel_thinker.vllm import model

    what = Ask((image(72, edit=True, colour="teal"), TextPart("the step fails")), TextSettings(max_tokens=4))
    with monkeypatch.context() as patch:
        patch.setattr(model, "run_both", lambda *args: 1 / 0)
        lost = ask(vllm, what)
        with pytest.raises(BagelError, match="internal error of the engine: ZeroDivisionError"):
            lost.written  # noqa: B018
    vllm.store.release([lost.lease])
    assert settled(vllm) and not vllm.failed.done()
    agrees(vllm, exact, [what])


def test_a_text_that_overflows_is_told(vllm: Any, exact: TorchEngine) -> None:
    model = vllm._core._client.engine_core.model_executor.driver_worker.worker.model_runner.model
    norm = model.language_model.model.norm.weight
    was, way = norm.detach().clone(), TextSettings(max_tokens=1)
    norm.data.fill_(float("inf"))
    lost = [ask(vllm, Ask((TextPart(f"too much {i}"),), replace(way, do_sample=bool(i)))) for i in range(2)]
    for answer in lost:
        with pytest.raises(NotFinite, match="its logits are not finite"):
            answer.written  # noqa: B018
        vllm.store.release([answer.lease])
    norm.data.copy_(was)
    assert settled(vllm)
    agrees(vllm, exact, [Ask((TextPart("too much 0"),), way)])


def test_prompts_that_do_not_fit_are_refused(vllm: Any) -> None:
    refused = ask(vllm, Ask((image(128, edit=True),) * 20))
    with pytest.raises(InvalidRequest, match=r"the prompt has \d+ tokens, those of its images included, and up to 0"):
        refused.written  # noqa: B018
    vllm.store.release([refused.lease])
    assert settled(vllm)


def test_a_thinker_without_the_generation_expert_refuses_edits(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "_settings", replace(vllm._settings, role=Role.UNDERSTAND))
    edit = ask(vllm, Ask((image(64, edit=True), TextPart("snow"))))
    with pytest.raises(NotSupported, match="role understand and reads no images to edit"):
        edit.written  # noqa: B018
    vllm.store.release([edit.lease])


def test_an_engine_whose_steps_all_fail_says_so(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last test: the engine does not come back."""
    monkeypatch.setattr(vllm._core, "step", lambda: 1 / 0)
    for _ in range(4):
        answer = ask(vllm, Ask((TextPart("in vain"),)))
        with pytest.raises(BagelError):
            answer.written  # noqa: B018
        vllm.store.release([answer.lease])
    with pytest.raises(EngineDied):
        vllm.failed.result(LIMIT_S)
