"""Choosing the next tokens from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bagel.request import TextSettings

_AT_ONCE = 16
"""Texts whose tokens are sampled in one go: 20 MB of float64 a tensor with a vocabulary of 152,064."""


@dataclass(frozen=True)
class Choice:
    """How a text's next token is chosen: greedily unless settings.do_sample with a temperature above 0.

    seen: ids of the prompt and the text so far, which the repetition penalty (Keskar et al. 2019) divides down; uniform
    in [0, 1) picks from the cumulative distribution, so that a seed gives the same text on any device.
    """

    settings: TextSettings
    seen: Sequence[int]
    uniform: float

    @property
    def samples(self) -> bool:
        """Whether a number chooses, not the largest logit."""
        return self.settings.do_sample and self.settings.temperature >= torch.finfo(torch.float32).tiny


def choose(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """The next tokens' ids [texts] int64 from logits [texts, vocab], for each text by its own choice.

    Logits that are finite lead to an allowed token, whatever the settings; from others the caller does not go on.
    """
    rows = [_penalised(row, each) for row, each in zip(logits.float(), choices, strict=True)]
    ids = {number: rows[number].argmax(-1) for number, each in enumerate(choices) if not each.samples}
    sampled = [number for number, each in enumerate(choices) if each.samples]
    for begin in range(0, len(sampled), _AT_ONCE):
        some = sampled[begin : begin + _AT_ONCE]
        drawn = _sampled(torch.stack([rows[number] for number in some]), [choices[number] for number in some])
        ids.update(zip(some, drawn, strict=True))
    return torch.stack([ids[number] for number in range(len(choices))])


def is_greedy(settings: TextSettings) -> bool:
    """Whether `choose` takes the largest of the logits as they are."""
    return not Choice(settings, (), 0.0).samples and settings.repetition_penalty == 1.0


def _sampled(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Ids [texts] that the numbers choose from logits [texts, vocab] float32."""
    vocabulary = logits.shape[-1]
    values = [
        (each.settings.temperature, each.settings.top_p, each.settings.top_k or vocabulary, 1.0 - each.uniform)
        for each in choices
    ]
    on_host = torch.tensor(values, dtype=torch.float64)
    # Pinned, so that the host does not wait for the device.
    on_host = on_host.pin_memory() if logits.is_cuda else on_host
    temperature, top_p, top_k, above = on_host.to(logits.device, non_blocking=True).T[..., None]
    # Differences from the largest logit, so that the smallest temperature leaves it at 0 and the rest at -inf.
    scaled, ids = ((logits - logits.amax(-1, keepdim=True)) / temperature.float()).sort(descending=True, stable=True)
    # In float64, and summed up from the least likely on: beside 1 the rounding of a sum is as large as rare tokens'
    # probabilities, and whatever else is in the batch would choose among them, or cut them off.
    probabilities = scaled.double().softmax(-1)
    keep = probabilities.cumsum(-1) - probabilities < top_p
    keep &= torch.arange(vocabulary, device=logits.device) < top_k
    keep[:, 0] = True  # for the smallest top_p
    at_least = (probabilities * keep).flip(-1).cumsum(-1).flip(-1)
    found = (at_least[:, 1:] >= above * at_least[:, :1]).sum(-1, keepdim=True)
    drawn: Tensor = ids.gather(-1, found)[:, 0]
    return drawn


def _penalised(logits: Tensor, choice: Choice) -> Tensor:
    """Logits [vocab] float32 after the repetition penalty."""
    penalty, seen = choice.settings.repetition_penalty, choice.seen
    if penalty == 1.0 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    values = logits[ids]
    # Finite logits stay finite, however large the penalty.
    limit = torch.finfo(values.dtype).max
    return logits.index_copy(0, ids, torch.where(values > 0, values / penalty, values * penalty).clamp(-limit, limit))
