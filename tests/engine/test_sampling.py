"""Choosing tokens: what is greedy, what the settings allow, and that a seed's numbers give the right distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from bagel.engine.sampling import Choice, choose
from bagel.request import MAX_FIELD, MAX_TEMPERATURE, PENALTIES, TextSettings

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.5, 0.0, -3.0])
BEST = 1
EVEN = [(i + 0.5) / 1000 for i in range(1000)]
ANY = [0.0, 0.3, 0.7, 0.99999994]


def sampling(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> TextSettings:
    return TextSettings(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k)


def chosen(logits: Tensor, settings: TextSettings, seen: Sequence[int], uniform: float) -> Tensor:
    """The next token of one text, from logits [vocab]."""
    return choose(logits[None], [Choice(settings, seen, uniform)])[0]


def shares(settings: TextSettings, logits: torch.Tensor = LOGITS) -> dict[int, float]:
    """How often each id is chosen over numbers that fill [0, 1) evenly."""
    counts = Counter(int(chosen(logits, settings, (), uniform)) for uniform in EVEN)
    return {token: count / len(EVEN) for token, count in counts.items()}


@pytest.mark.parametrize(
    "settings",
    [
        TextSettings(),
        TextSettings(do_sample=False, temperature=5.0, top_k=3, top_p=0.5),
        sampling(temperature=0),
        sampling(temperature=1e-6),
        sampling(top_k=1),
        sampling(top_p=1e-6),
        sampling(temperature=50.0, top_k=1),
    ],
)
@pytest.mark.parametrize("uniform", ANY)
def test_greedy(settings: TextSettings, uniform: float) -> None:
    assert chosen(LOGITS, settings, (), uniform) == BEST
    assert chosen(LOGITS.bfloat16(), settings, (), uniform) == BEST


@pytest.mark.parametrize("temperature", [1e-40, 1e-60])
def test_the_smallest_temperatures_are_greedy_too(temperature: float) -> None:
    assert chosen(LOGITS, sampling(temperature), (), 0.5) == BEST


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_samples_are_distributed_as_softmax(temperature: float) -> None:
    found = shares(sampling(temperature))
    for token, probability in enumerate((LOGITS / temperature).softmax(-1).tolist()):
        assert found.get(token, 0.0) == pytest.approx(probability, abs=1.5 / len(EVEN))


@pytest.mark.parametrize("rare", [60, 20_000])
def test_rare_tokens_are_chosen_as_exactly_as_likely_ones(rare: int) -> None:
    """Next to a probability of nearly 1, where float32 has steps of a fifteenth of theirs, and sums reach 1 early."""
    logits = torch.cat((torch.zeros(1), torch.linspace(-13.8, -20.0, rare)))
    exact = logits.double().softmax(-1)
    for token in (0, 1, 2, rare // 2, rare - 1, rare):
        for inside in (0.02, 0.5, 0.98):
            rarer, own = exact[token + 1 :].sum(), exact[token]
            uniform = 1.0 - float(rarer + own * inside)
            assert int(chosen(logits, sampling(), (), uniform)) == token


@pytest.mark.parametrize("top_k", [2, 3])
def test_top_k_keeps_the_likeliest(top_k: int) -> None:
    allowed = LOGITS.topk(top_k)
    found = shares(sampling(top_k=top_k))
    assert found == pytest.approx(
        dict(zip(allowed.indices.tolist(), allowed.values.softmax(-1).tolist(), strict=True)), abs=1.5 / len(EVEN)
    )


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, {0}), (0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([0.5001, 0.3, 0.15, 0.0499]).log()
    assert set(shares(sampling(top_p=top_p), logits)) == kept


@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20), uniform=st.floats(0, 1, exclude_max=True)
)
@example(logits=[0.0, 1.0, 2.0], uniform=1 - 2**-53)
def test_a_choice_is_always_an_allowed_one(logits: list[float], uniform: float) -> None:
    values = torch.tensor(logits)
    probabilities = values.softmax(-1)
    token = chosen(values, sampling(top_k=2), (), uniform)
    assert probabilities[token] >= probabilities.topk(min(2, len(logits))).values[-1]


LARGEST = torch.finfo(torch.float32).max
EXTREMES = st.sampled_from([0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 80.0, -80.0, 1e30, -1e30, LARGEST, -LARGEST])


@given(
    logits=st.lists(EXTREMES | st.floats(-50, 50, width=32), min_size=1, max_size=12),
    uniform=st.floats(0, 1, exclude_max=True),
    settings=st.builds(
        TextSettings,
        do_sample=st.booleans(),
        temperature=st.floats(0, MAX_TEMPERATURE) | st.sampled_from([1e-320, 1e-45, 2e-38, 1e-30]),
        top_p=st.floats(0, 1, exclude_min=True) | st.sampled_from([5e-324, 1e-46, 1e-38, 1e-9]),
        top_k=st.integers(0, MAX_FIELD),
        repetition_penalty=st.floats(*PENALTIES),
    ),
    seen=st.booleans(),
)
@example([2.0, 1.0, -1.0], 0.5, sampling(top_p=5e-324), False)
@example([-7.4e-26, 0.0], 0.0, sampling(top_p=5e-324), False)
@example([1.0, LARGEST, -LARGEST], 0.5, TextSettings(do_sample=True, repetition_penalty=0.01), True)
def test_whatever_the_settings_a_likely_token_is_chosen(
    logits: list[float], uniform: float, settings: TextSettings, seen: bool
) -> None:
    """Of all that may be asked for nothing leaves float32: the last id, say, is not chosen for want of a number."""
    values = torch.tensor(logits)
    ids = range(len(logits)) if seen else ()
    token = int(chosen(values, settings, ids, uniform))
    penalty = settings.repetition_penalty if seen else 1.0
    penalised = torch.where(values > 0, values.double() / penalty, values.double() * penalty).clamp(-LARGEST, LARGEST)
    best = float(penalised.max())
    if not settings.do_sample or settings.temperature < 1e-30:
        assert float(penalised[token]) == pytest.approx(best, rel=1e-6, abs=1e-37)
    elif settings.top_p < 1e-40 or settings.top_k == 1:  # equally likely, as far as float32 can tell
        assert float(penalised[token]) == pytest.approx(best, rel=1e-6, abs=1e-6 * max(settings.temperature, 1.0))
    else:  # softmax gives nothing to what lies further down
        assert float(penalised[token]) >= best - 110 * settings.temperature - 1e-5 * abs(best)


@pytest.mark.parametrize(
    ("logits", "seen", "penalty", "best"),
    [
        # Above 0 a logit is divided, below it multiplied: both make it smaller.
        ([2.0, 1.1], [0], 1.8, 0),
        ([2.0, 1.1], [0], 2.0, 1),
        ([-1.0, -1.9], [0], 1.8, 0),
        ([-1.0, -1.9], [0], 2.0, 1),
        # How often a token was seen does not matter.
        ([2.0, 1.1], [0, 0, 0], 1.5, 0),
        ([2.0, 1.1], [], 2.0, 0),
        ([2.0, 1.1], [0], 1.0, 0),
        # Below 1 it encourages.
        ([1.1, 2.0], [0], 0.5, 0),
    ],
)
def test_repetition_penalty(logits: list[float], seen: list[int], penalty: float, best: int) -> None:
    values = torch.tensor(logits)
    assert chosen(values, TextSettings(repetition_penalty=penalty), seen, 0.5) == best
    assert values.tolist() == pytest.approx(logits)


def test_the_penalty_applies_to_sampling_too() -> None:
    settings = TextSettings(do_sample=True, temperature=0.01, repetition_penalty=2.0)
    assert chosen(torch.tensor([2.0, 1.1]), settings, [0], 0.5) == 1


def test_several_texts_are_chosen_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    settings = [
        TextSettings(),
        *(
            sampling(temperature, top_p, top_k)
            for temperature in (0.3, 2.0)
            for top_p in (0.6, 1.0)
            for top_k in (0, 5)
        ),
        TextSettings(repetition_penalty=1.3),
        TextSettings(do_sample=True, temperature=1.0, repetition_penalty=1.3),
    ]
    choices = [Choice(each, (1, 7), number / 40) for number, each in enumerate(settings * 3)]
    logits = torch.randn(len(choices), 50, generator=generator)
    alone = [
        int(chosen(row, each.settings, each.seen, each.uniform)) for row, each in zip(logits, choices, strict=True)
    ]
    assert choose(logits, choices).tolist() == alone
