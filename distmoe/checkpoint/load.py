"""Tensors of a checkpoint into a model on any number of ranks, by any engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

# The part of a state whose tensors must all find a place.
MODEL = "model"


def load(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fill the tensors of ``state`` in place and return it with its plain values replaced.

    Collective. ValueError if ``path`` lacks a key of ``state`` or has it in another shape, or has
    something of the model that ``state`` has no place for.
    """
    reader = FileSystemReader(path)
    try:
        dcp_load(
            state,
            storage_reader=reader,
            no_dist=not dist.is_initialized(),
        )
    except (KeyError, ValueError, RuntimeError, CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1][:300]
        raise ValueError(f"checkpoint {path} does not fit this model: {reason}") from error
    if MODEL in state:
        _refuse_what_is_left(path, list(reader.read_metadata().state_dict_metadata), state[MODEL])
    return state


def _refuse_what_is_left(path: Path, saved: list[str], model: dict[str, Any]) -> None:
    """ValueError for a tensor of the saved model that ``model`` lacks: learned, and then lost."""
    for key in sorted(saved):
        room, _, name = key.partition(".")
        if room == MODEL and name not in model:
            is_bias = name.rpartition(".")[2] == "bias_E"
            advice = "; it needs moe.bias_update_rate > 0" if is_bias else ""
            raise ValueError(
                f"checkpoint {path} does not fit this model, which has no {name}{advice}"
            )
