"""Checkpoints: written beside, renamed when complete, found again without help.

A folder ``step-00000120`` is complete by construction: ranks write into ``.tmp-step-00000120``, and
rank 0 renames it after all of them have finished and the manifest names every file with its hash.
Everything is on the disk before its new name is. Tensors are saved by logical name and shape
through torch.distributed.checkpoint, so another world size, ep or engine can load them.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from distmoe.checkpoint.disk import Disk, FileMark
from distmoe.checkpoint.manifest import NAME, Manifest, damage
from distmoe.checkpoint.state_copy import StateCopy

COMPLETE = re.compile(r"step-(\d{8,})")

# What is being written, and what is being deleted.
BESIDE, OLD = ".tmp-", ".old-"

# That a rank may write longer than another, without anything being wrong.
SLOWEST_WRITE_S = 1800.0


@dataclass(frozen=True)
class SaveReport:
    """How a save ended. ``seconds``: of the write. ``error``: of the disk, with its rank; empty if
    the checkpoint is complete."""

    step: int
    seconds: float
    bytes: int = 0
    error: str = ""


@dataclass(frozen=True)
class _Save:
    """What `CheckpointStore.save` was asked for."""

    step: int
    about: Mapping[str, Any]
    expire: bool
    planner: SavePlanner | None


def checkpoint_group(*, timeout_s: float) -> dist.ProcessGroup | None:
    """All ranks in a gloo group of its own, so that messages of a write that goes on never mix with
    those of the training; collective. None without a process group. ``timeout_s``: how long a peer
    may be waited for, but never less than a slow disk is allowed."""
    if not dist.is_initialized():
        return None
    timeout = timedelta(seconds=max(timeout_s, SLOWEST_WRITE_S))
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group


class CheckpointStore:
    """The checkpoints of one run.

    ``keep_last``: how many are kept; those of a multiple of ``keep_every`` steps always are.
    ``asynchronous``: the write goes on during training. ``group``: of `checkpoint_group`, None for
    one rank alone. ``about``: see `Manifest`.
    """

    def __init__(
        self,
        root: Path,
        *,
        group: dist.ProcessGroup | None,
        keep_last: int,
        asynchronous: bool,
        keep_every: int = 0,
        about: Mapping[str, Any] | None = None,
        disk: Disk | None = None,
    ) -> None:
        self.root = root
        self.keep_last, self.keep_every = keep_last, keep_every
        self.about = dict(about or {})
        # The newest step that is known to be complete.
        self.saved_step = -1
        self._disk = disk or Disk()
        self._state_copy = StateCopy() if asynchronous else None
        self._group = group
        self._rank = dist.get_rank(group) if group is not None else 0
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        # Filled by the writer while the training loop looks.
        self._reports: deque[SaveReport] = deque()

    def save(
        self,
        step: int,
        state: dict[str, Any],
        *,
        about: Mapping[str, Any] | None = None,
        expire: bool = True,
        planner: SavePlanner | None = None,
    ) -> None:
        """Write ``state``, a nested dict of tensors and plain values, as step ``step``; collective.

        The state may change as soon as this returns. A write still in flight is waited for first.
        Errors of the disk are in `reports`; any other is raised by the next `wait`. ``about``: what
        the manifest says beside what it always does. ``expire``: delete older ones. ``planner``, in
        a save that is not asynchronous: gives each tensor when its turn comes.
        """
        self.wait()
        save = _Save(step, {**self.about, **(about or {})}, expire, planner)
        if self._state_copy is None:
            self._write(save, state)
            self.wait()
            return
        held = self._state_copy.copy(state)
        self._writer = threading.Thread(target=self._write, args=(save, held), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Until nothing is in flight. RuntimeError if the last write failed, but for the disk."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            failure, self._error = self._error, None
            errors = (f"rank {rank}: {one!r}" for rank, one in _errors(failure).items())
            raise RuntimeError(
                f"the checkpoint could not be written: {'; '.join(errors)}"
            ) from failure

    def reports(self) -> list[SaveReport]:
        """Saves that have ended since the last call; the same on all ranks after a `wait`."""
        return [self._reports.popleft() for _ in range(len(self._reports))]

    def complete(self) -> list[Path]:
        """The checkpoints that have got their name, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted((p for p in self.root.iterdir() if COMPLETE.fullmatch(p.name)), key=step_of)

    def newest_sound(
        self, complete: Sequence[Path] | None = None
    ) -> tuple[Path | None, dict[Path, list[str]]]:
        """The newest checkpoint whose files are as they were written, and what is wrong with those
        after it; collective. ``complete``: those to choose from, on all ranks the same. ValueError
        if there are such, but no sound one."""
        damaged: dict[Path, list[str]] = {}
        for path in reversed(self.from_first(self.complete) if complete is None else complete):
            lines = self.damage(path)
            if not lines:
                return path, damaged
            damaged[path] = lines
        if damaged:
            path, lines = next(iter(damaged.items()))
            raise ValueError(f"no sound checkpoint is left in {self.root}: {path.name}: {lines[0]}")
        return None, {}

    def damage(self, path: Path) -> list[str]:
        """What is wrong with a checkpoint; collective: every rank hashes its share of the files."""
        if self._group is None:
            return damage(path)
        world = dist.get_world_size(self._group)
        by_rank: list[list[str]] = [[]] * world
        own = damage(path, part=self._rank, parts=world)
        dist.all_gather_object(by_rank, own, group=self._group)
        return sorted({line for lines in by_rank for line in lines})

    def _write(self, save: _Save, state: dict[str, Any]) -> None:
        begun = time.perf_counter()
        size, error = 0, ""
        beside = self.root / f"{BESIDE}step-{save.step:08d}"
        try:
            self.from_first(lambda: self._prepare(beside))
            files = self._write_tensors(beside, state, save.planner)
            manifest = Manifest(save.step, files, save.about)
            self.from_first(lambda: self._publish(beside, manifest, expire=save.expire))
            size, self.saved_step = manifest.bytes, save.step
        except (Exception, CheckpointException) as failure:
            if self._rank == 0:
                self._disk.remove_folder(beside)
            errors = _errors(failure)
            if not all(map(_is_of_disk, errors.values())):
                self._error = failure
                return
            error = "; ".join(f"rank {rank}: {one}" for rank, one in errors.items())
        self._reports.append(SaveReport(save.step, time.perf_counter() - begun, size, error))

    def from_first(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives on rank 0, and its error, for all ranks; collective."""
        outcome: list[Any] = [None, None]
        if self._rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        if self._group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _prepare(self, beside: Path) -> None:
        """An empty folder. What a kill or a full disk has left makes room first."""
        for left_over in (*self.root.glob(f"{BESIDE}*"), *self.root.glob(f"{OLD}*")):
            self._disk.remove_folder(left_over)
        is_new = not self.root.exists()
        self._disk.mkdir(beside)
        if is_new:
            self._disk.sync_folder(self.root.parent)

    def _write_tensors(
        self, beside: Path, state: dict[str, Any], planner: SavePlanner | None
    ) -> dict[str, FileMark]:
        """Every rank's part, in a file of its own, or with a planner every tensor; the marks of all
        files."""
        self._disk.begin()
        # The disk syncs by itself: torch syncs before it flushes.
        # torch holds the tensors of a file until it is closed.
        one_file = planner is None
        writer = _Writer(beside, single_file_per_rank=one_file, sync_files=False)
        writer.fs = self._disk
        if self._state_copy is not None or planner is not None:
            # No stream of a device, which a thread would open on the first one, and no tensor ahead
            # of its turn.
            writer.per_thread_copy_ahead = 0
        dcp_save(
            state,
            storage_writer=writer,
            planner=planner,
            process_group=self._group,
            no_dist=self._group is None,
        )
        if self._group is None:
            return dict(self._disk.marks)
        by_rank: list[dict[str, FileMark]] = [{}] * dist.get_world_size(self._group)
        dist.all_gather_object(by_rank, self._disk.marks, group=self._group)
        return {name: mark for marks in by_rank for name, mark in marks.items()}

    def _publish(self, beside: Path, manifest: Manifest, *, expire: bool) -> None:
        final = self.root / f"step-{manifest.step:08d}"
        with self._disk.create_stream(beside / NAME, "wb") as stream:
            stream.write(manifest.to_json().encode())
        self._disk.sync_folder(beside)
        # There is one only if it was damaged, or if the run went back to an older one.
        if final.exists():
            self._remove(final)
        self._disk.rename(beside, final)
        self._disk.sync_folder(self.root)
        for old in self._expired(manifest.step) if expire else ():
            with contextlib.suppress(OSError):
                self._remove(old)

    def _expired(self, step: int) -> list[Path]:
        """Later ones than ``step`` are of a run that this one has left; they are not counted."""
        own = [path for path in self.complete() if step_of(path) <= step]
        every = self.keep_every
        return [p for p in own[: -self.keep_last] if not every or step_of(p) % every]

    def _remove(self, path: Path) -> None:
        """Delete a checkpoint that, half deleted, must not look like one."""
        doomed = path.with_name(f"{OLD}{path.name}")
        self._disk.rename(path, doomed)
        self._disk.sync_folder(self.root)
        self._disk.remove_folder(doomed)


class _Writer(FileSystemWriter):
    """torch.save hides an error of its stream behind one of its own."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError:
            if isinstance(self.fs, Disk) and self.fs.error is not None:
                raise self.fs.error from None
            raise


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder. ValueError if its name is another."""
    name = COMPLETE.fullmatch(path.name)
    if name is None:
        raise ValueError(f"{path} is no checkpoint; its name must be step- and 8 digits")
    return int(name[1])


def _errors(failure: BaseException) -> dict[int, BaseException]:
    """The error of every rank that had one."""
    if isinstance(failure, CheckpointException):
        return {rank: error for rank, (error, _) in sorted(failure.failures.items())}
    return {0: failure}


def _is_of_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and not isinstance(error, ConnectionError)
