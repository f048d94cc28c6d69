"""Choosing the next tokens from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bagel.request import TextSettings

_AT_ONCE = 16
"""Texts whose tokens are sampled in one go: 20 MB of float64 a tensor with a vocabulary of 152,064."""
_BLOCK = 512
"""Probabilities that are summed up one after the other."""


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
    penalised = torch.stack([_penalised(row, each) for row, each in zip(logits.float(), choices, strict=True)])
    if not any(each.samples for each in choices):
        return penalised.argmax(-1)
    return draw(penalised, numbers(choices, logits.shape[-1]).to(logits.device))


def numbers(choices: Sequence[Choice], vocabulary: int) -> Tensor:
    """What `draw` needs of choices without a repetition penalty, [5, texts] float64 on the host."""
    values = [
        (
            each.samples,
            each.settings.temperature if each.samples else 1.0,
            each.settings.top_p,
            each.settings.top_k or vocabulary,
            1.0 - each.uniform,
        )
        for each in choices
    ]
    return torch.tensor(values, dtype=torch.float64).T.contiguous()


def draw(logits: Tensor, values: Tensor) -> Tensor:
    """As `choose`, by `numbers` as values on the logits' device, where nothing makes the host wait."""
    if len(logits) <= _AT_ONCE:
        return _drawn(logits, values)
    parts = [_drawn(*part) for part in zip(logits.split(_AT_ONCE), values.split(_AT_ONCE, dim=1), strict=True)]
    return torch.cat(parts)


def is_greedy(settings: TextSettings) -> bool:
    """Whether `choose` takes the largest of the logits as they are."""
    return not Choice(settings, (), 0.0).samples and settings.repetition_penalty == 1.0


def _drawn(logits: Tensor, values: Tensor) -> Tensor:
    """As `draw`, of a few texts."""
    samples, temperature, top_p, top_k, above = values[..., None]
    # Differences from the largest logit, so that the smallest temperature leaves it at 0 and the rest at -inf.
    scaled = (logits.float() - logits.amax(-1, keepdim=True)) / temperature.float()
    ids = _falling(scaled)
    # In float64, and summed up from the least likely on: beside 1 the rounding of a sum is as large as rare tokens'
    # probabilities, and whatever else is in the batch would choose among them, or cut them off.
    probabilities = scaled.gather(-1, ids).softmax(-1, dtype=torch.float64)
    keep = _running_sum(probabilities) - probabilities < top_p
    keep &= torch.arange(logits.shape[-1], device=logits.device) < top_k
    keep[:, 0] = True  # for the smallest top_p
    at_least = _running_sum((probabilities * keep).flip(-1)).flip(-1)
    found = (at_least[:, 1:] >= above * at_least[:, :1]).sum(-1, keepdim=True)
    return torch.where(samples > 0, ids.gather(-1, found), logits.argmax(-1, keepdim=True))[:, 0]


def _falling(x: Tensor) -> Tensor:
    """Indices [rows, n] that sort each row of x, which has nothing above 0, from its largest value on; stable."""
    if not x.is_cuda:
        return x.sort(descending=True, stable=True).indices
    # All rows as one sort, as PyTorch sorts few long rows on a GPU one after the other. The bits of numbers of one sign
    # are in the order of their magnitudes.
    rows = torch.arange(len(x), device=x.device)[:, None]
    keys = (rows << 32) | x.abs().view(torch.int32)
    found = keys.flatten().sort(stable=True).indices.view(x.shape)
    return found - rows * x.shape[-1]


def _running_sum(x: Tensor) -> Tensor:
    """Each row's sums from its first value to each [rows, n]."""
    if not x.is_cuda:
        return x.cumsum(-1)
    # Of blocks, which a GPU computes at once, and of the blocks before: a row as a whole has one multiprocessor.
    length = x.shape[-1]
    blocks = F.pad(x, (0, -length % _BLOCK)).unflatten(-1, (-1, _BLOCK)).cumsum(-1)
    before = F.pad(blocks[..., :-1, -1].cumsum(-1), (1, 0))
    sums: Tensor = (blocks + before[..., None]).flatten(-2)[..., :length]
    return sums


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
