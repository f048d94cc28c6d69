"""Which services would load a checkpoint: its tensors against its configuration, role by role. Nothing is allocated."""

from __future__ import annotations

import torch

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.errors import CheckpointError
from bagel.model.tokenizer import BagelTokenizer
from bagel.model.weights import check_role, empty_model


def problems_of(checkpoint: Checkpoint) -> dict[str, str]:
    """For each role what keeps it from loading the checkpoint; empty if nothing does.

    Names, shapes and types of the tensors and the tokenizer are checked, as a service checks them when it starts.
    """
    try:
        BagelTokenizer(checkpoint.folder)
    except CheckpointError as error:
        return {role.value: str(error) for role in Role}
    return {role.value: _problem(checkpoint, role) for role in Role}


def _problem(checkpoint: Checkpoint, role: Role) -> str:
    try:
        check_role(checkpoint, empty_model(checkpoint.config, role, dtype=torch.bfloat16, device="meta"))
    except CheckpointError as error:
        return str(error)
    return ""
