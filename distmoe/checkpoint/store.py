"""Checkpoints: written beside, renamed when complete, found again without help.

A folder ``step-00000120`` is complete by construction: ranks write into ``.tmp-step-00000120``, and
rank 0 renames it after all of them have finished. Tensors are saved by logical name and shape
through torch.distributed.checkpoint, so another world size, ep or engine can load them.
"""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

# The part of a state whose tensors must all find a place.
MODEL = "model"

COMPLETE = re.compile(r"step-(\d{8,})")


class CheckpointStore:
    """The checkpoints of one run. With ``asynchronous`` the write goes on during training, over a
    gloo group of its own, so that its messages never mix with those of the training."""

    def __init__(self, root: Path, *, keep_last: int, asynchronous: bool) -> None:
        self.root = root
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._is_first = not dist.is_initialized() or dist.get_rank() == 0
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write ``state``, a nested dict of tensors and plain values, as step ``step``; collective.

        The state is copied before this returns, and may change at once. A write still in flight
        is waited for first.
        """
        self.wait()
        held = _copied(state)
        self._writer = threading.Thread(target=self._write, args=(step, held), name="checkpoint")
        self._writer.start()
        if not self.asynchronous:
            self.wait()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        try:
            beside = self.root / f".tmp-step-{step:08d}"
            if self._is_first:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
            self._meet()
            dcp_save(
                state,
                storage_writer=FileSystemWriter(beside, sync_files=True),
                process_group=self._group,
                no_dist=self._group is None,
            )
            self._meet()
            if self._is_first:
                self._publish(beside, self.root / f"step-{step:08d}")
        except BaseException as error:  # noqa: BLE001
            self._error = error

    def _meet(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)

    def _publish(self, beside: Path, final: Path) -> None:
        if final.exists():
            shutil.rmtree(final)
        beside.rename(final)
        complete = self._complete()
        for old in complete[: -self.keep_last]:
            shutil.rmtree(old, ignore_errors=True)
        for left_over in self.root.glob(".tmp-step-*"):
            shutil.rmtree(left_over, ignore_errors=True)

    def wait(self) -> None:
        """Until nothing is in flight. RuntimeError if the last write failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise RuntimeError(f"the checkpoint could not be written: {error}") from error

    def last_complete(self) -> Path | None:
        """The newest checkpoint that can be loaded."""
        complete = self._complete()
        return complete[-1] if complete else None

    def _complete(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        return sorted(
            path
            for path in self.root.iterdir()
            if COMPLETE.fullmatch(path.name) and (path / ".metadata").is_file()
        )


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


def _copied(value: Any) -> Any:
    """The same nest with its tensors copied to host memory; DTensors keep their mesh."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, DTensor):
        return DTensor.from_local(
            _copied(value.to_local()),
            value.device_mesh,
            value.placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )
    if isinstance(value, Tensor):
        copy = torch.empty(value.shape, dtype=value.dtype, device="cpu")
        return copy.copy_(value.detach())
    return value
