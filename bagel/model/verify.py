"""Which roles can load a checkpoint. Its tensors are compared with its configuration; nothing is allocated."""

from __future__ import annotations

import torch

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.errors import CheckpointError
from bagel.model.tokenizer import BagelTokenizer
from bagel.model.weights import check_role, empty_model


def problems_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What keeps each role from loading the checkpoint; an empty text if nothing does.

    A service makes the same checks when it starts: of the tokenizer, and of the tensors' names, shapes and types.
    """
    try:
        BagelTokenizer(checkpoint.folder)
    except CheckpointError as error:
        return {role.value: str(error) for role in Role}
    return {role.value: _problem(checkpoint, role) for role in Role}


def _problem(checkpoint: Checkpoint, role: Role) -> str:
    try:
        # Names and shapes do not depend on the dtype.
        check_role(checkpoint, empty_model(checkpoint.config, role, dtype=torch.bfloat16, device="meta"))
    except CheckpointError as error:
        return str(error)
    return ""
