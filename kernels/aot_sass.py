"""Reads the machine code of a kernel: the main loop is where its tensor-core instructions are."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

TENSOR_CORE = ("HGMMA", "HMMA", "UTCHMMA")
LOCAL_MEMORY = ("LDL", "STL")


@dataclass(frozen=True)
class MainLoop:
    """Instructions of the loop, how many of them use tensor cores, and local memory (spills)."""

    instructions: int = 0
    tensor_core: int = 0
    local_memory: int = 0


def main_loop(sass: str) -> MainLoop:
    """The backward branch over most tensor-core instructions, the shortest of equals; nothing if
    there is none."""
    instructions, labels = _parse(sass)
    best: list[str] = []
    for end, text in enumerate(instructions):
        target = re.search(r"BRA(?:\.\w+)*\s+.*?`\((\.L\w+)\)", text)
        begin = labels.get(target.group(1), end + 1) if target else end + 1
        body = instructions[begin : end + 1]
        rank = (_count(body, TENSOR_CORE), -len(body))
        if (
            begin <= end
            and rank[0]
            and (not best or rank > (_count(best, TENSOR_CORE), -len(best)))
        ):
            best = body
    return MainLoop(len(best), _count(best, TENSOR_CORE), _count(best, LOCAL_MEMORY))


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
