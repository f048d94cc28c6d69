"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bagel.request import TextSettings


def choose(logits: Tensor, settings: TextSettings, seen: Sequence[int], uniform: float) -> Tensor:
    """The next token's id (0-d) from logits [vocab]; greedy unless settings.do_sample with a temperature above 0.

    Logits that are finite lead to an allowed token, whatever the settings; from others the caller does not go on.
    seen: ids of the prompt and the text so far, which the repetition penalty (Keskar et al. 2019) divides down;
    uniform in [0, 1) picks from the cumulative distribution, so that a seed gives the same text on any device.
    """
    logits = _penalise(logits.float(), seen, settings.repetition_penalty)
    if not settings.do_sample or settings.temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(-1)
    # Differences from the largest logit, so that the smallest temperature leaves it at 0 and the rest at -inf. In
    # float64, and summed up from the least likely on: beside 1 the rounding of a sum is as large as rare tokens'
    # probabilities, and whatever else is in the batch would choose among them, or cut them off.
    scaled = ((logits - logits.max()) / settings.temperature).double()
    probabilities, ids = scaled.softmax(-1).sort(descending=True, stable=True)
    keep = probabilities.cumsum(-1) - probabilities < settings.top_p
    keep[0] = True  # for the smallest top_p
    if settings.top_k:
        keep[settings.top_k :] = False
    at_least = (probabilities * keep).flip(-1).cumsum(-1).flip(-1)
    return ids[(at_least[1:] >= (1.0 - uniform) * at_least[0]).sum()]


def is_greedy(settings: TextSettings) -> bool:
    """Whether `choose` takes the largest of the logits as they are."""
    samples = settings.do_sample and settings.temperature >= torch.finfo(torch.float32).tiny
    return not samples and settings.repetition_penalty == 1.0


def _penalise(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    if penalty == 1.0 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    values = logits[ids]
    # Finite logits stay finite, however large the penalty.
    limit = torch.finfo(values.dtype).max
    return logits.index_copy(0, ids, torch.where(values > 0, values / penalty, values * penalty).clamp(-limit, limit))
