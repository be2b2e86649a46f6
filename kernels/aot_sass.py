"""Reads the machine code of a kernel: the main loop is where its tensor-core instructions are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

TENSOR_CORE = ("HGMMA", "HMMA", "UTCHMMA")
LOCAL_MEMORY = ("LDL", "STL")


@dataclass(frozen=True)
class MainLoop:
    """Instructions of the loop, how many of them use tensor cores, and local memory (spills)."""

    instructions: int = 0
    tensor_core: int = 0
    local_memory: int = 0

    @property
    def density(self) -> float:
        return self.tensor_core / max(self.instructions, 1)


def main_loop(sass: str) -> MainLoop:
    """The backward branch over the densest tensor-core instructions; nothing if there is none, as
    where a loop of few steps is unrolled.

    Not the one over most: waits that are retried at the end of the code jump back over nearly all.
    """
    loops = (
        MainLoop(len(body), _count(body, TENSOR_CORE), _count(body, LOCAL_MEMORY))
        for body in _loops(sass)
    )
    best = max(loops, key=lambda loop: loop.density, default=MainLoop())
    return best if best.tensor_core else MainLoop()


def _loops(sass: str) -> Iterator[list[str]]:
    """From where a branch goes back to, to the branch."""
    instructions, labels = _parse(sass)
    for end, text in enumerate(instructions):
        target = re.search(r"BRA(?:\.\w+)*\s+.*?`\((\.L\w+)\)", text)
        if target and labels.get(target.group(1), end + 1) <= end:
            yield instructions[labels[target.group(1)] : end + 1]


def _parse(sass: str) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, and the index that each label stands before."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"^\s*(\.L\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif instruction := re.match(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*)$", line):
            instructions.append(instruction.group(1))
    return instructions, labels


def _count(body: list[str], names: tuple[str, ...]) -> int:
    counts = Counter(
        found.group(1)
        for text in body
        if (found := re.match(r"(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", text))
    )
    return sum(counts[name] for name in names)
