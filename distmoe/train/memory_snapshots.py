"""What lies in the memory of a GPU, for pytorch.org/memory_viz: on request, and when it is full.

The functions of torch.cuda.memory that are used here begin with an underscore, and are the ones
that PyTorch documents for this.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import distmoe

PACKAGE = f"{Path(distmoe.__file__).parent}/"
GIB = 1 << 30
# Allocations and frees that are kept, the last ones.
MAX_ENTRIES = 1_000_000
BIGGEST = 5


class MemorySnapshots:
    """Records the allocations of ``steps`` of this rank, with the code that made them, and writes
    them into ``folder`` when the last one is done."""

    def __init__(self, steps: range, folder: Path, *, rank: int) -> None:
        self._steps, self._folder, self._rank = steps, folder, rank
        self._first = 0

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the work of ``step``; RuntimeError, in one line, if the memory of the device does
        not suffice."""
        if step in self._steps and not self._first:
            torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES)
            self._first = step
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise RuntimeError(self._explain(step, error)) from error

    def is_complete(self, step: int) -> bool:
        """Whether ``step`` was the last one to record, and nothing is written yet."""
        return bool(self._first) and step >= self._steps[-1]

    def write(self, step: int) -> list[str]:
        """The file of what was recorded up to ``step``, in a line; nothing if nothing was. OSError
        if it cannot be written."""
        if not self._first:
            return []
        name = f"memory-steps-{self._first}-{step}-rank-{self._rank}.pickle"
        try:
            return [f"memory snapshot: {self._dump(name)}"]
        finally:
            # It forgets what was recorded, so it comes after the file.
            self.close()

    def close(self) -> str:
        """End without a file. What is lost, in words; nothing if nothing was recorded."""
        first, self._first = self._first, 0
        if not first:
            return ""
        torch.cuda.memory._record_memory_history(enabled=None)
        return f"the memory snapshot that began at step {first}"

    def _dump(self, name: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / name
        beside = path.with_name(path.name + ".part")
        torch.cuda.memory._dump_snapshot(str(beside))  # type: ignore[no-untyped-call]
        return beside.replace(path)

    def _explain(self, step: int, error: torch.OutOfMemoryError) -> str:
        segments = torch.cuda.memory._snapshot()["segments"]
        try:
            file = str(self._dump(f"out-of-memory-step-{step}-rank-{self._rank}.pickle"))
        except OSError as disk:
            file = f"not written ({disk})"
        used, held = torch.cuda.memory_allocated() / GIB, torch.cuda.memory_reserved() / GIB
        _, there_is = torch.cuda.mem_get_info()
        hint = "" if self._first else " (train.memory_snapshot would name the code)"
        self.close()
        said = " ".join(str(error).split())
        return (
            f"out of memory in step {step}: {used:.2f} GiB in tensors, {held:.2f} held by the "
            f"allocator, {there_is / GIB:.2f} on the device; biggest: "
            f"{', '.join(biggest_consumers(segments))}; memory snapshot: {file}{hint}; {said}"
        )


def biggest_consumers(segments: list[dict[str, Any]], most: int = BIGGEST) -> list[str]:
    """Who holds most of the memory in use, by the innermost line of distmoe that allocated it, or
    else by the size of the blocks. ``segments``: of a snapshot of torch.cuda.memory."""
    held: Counter[str] = Counter()
    for segment in segments:
        for block in segment["blocks"]:
            if block["state"].startswith("active"):
                held[_owner(block)] += block["size"]
    return [f"{size / GIB:.2f} GiB {owner}" for owner, size in held.most_common(most)]


def _owner(block: dict[str, Any]) -> str:
    frames = block.get("frames") or []
    own = [frame for frame in frames if frame["filename"].startswith(PACKAGE)]
    for frame in own or frames:
        file = frame["filename"].removeprefix(PACKAGE)
        return f"by {frame['name']} ({file}:{frame['line']})"
    return f"in blocks of {block['size'] / (1 << 20):,.1f} MiB"
