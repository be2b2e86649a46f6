"""Routing of a real run on disk: a file per rank and step, and the reader that joins ranks.

`<run.dir>/routing/step-00000012-rank-0003.npz` holds, int32:

    key [layers, micro-batches, T, E]    floor(score * 2^24), plus the balance bias if there is one;
                                         NOTHING of kernels/round_select for a pair in a group of
                                         experts that the token may not choose
    mass [the same]                      floor(score * 2^24), only where it differs from key

and the numbers of `TraceFacts`. With ep innermost, ranks g * ep to g * ep + ep - 1 are ep group g.
"""

from __future__ import annotations

import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1
FILE_NAME = re.compile(r"step-(\d+)-rank-(\d+)\.npz")

IntArray = NDArray[np.int32]


class TraceError(ValueError):
    """A folder or file that is no complete routing trace; the message names it."""


@dataclass(frozen=True)
class TraceFacts:
    """``layers``: block index of every MoE layer. ``tile``: M. ``ep``: P, ranks of a group."""

    step: int
    rank: int
    world: int
    ep: int
    top_k: int
    tile: int
    layers: tuple[int, ...]


FACTS = tuple(field.name for field in fields(TraceFacts))


@dataclass(frozen=True)
class RankTrace:
    """What one rank recorded in one step; ``mass_LMTE`` is ``key_LMTE`` without a balance bias."""

    facts: TraceFacts
    key_LMTE: IntArray
    mass_LMTE: IntArray


@dataclass(frozen=True)
class GroupRouting:
    """One layer and micro-batch of one ep group: int32 [P T, E], one rank after the other."""

    step: int
    layer: int
    group: int
    micro_batch: int
    top_k: int
    tile: int
    ranks: int
    key_TE: IntArray
    mass_TE: IntArray


def trace_path(folder: Path, step: int, rank: int) -> Path:
    """The file of a step and a rank."""
    return folder / f"step-{step:08d}-rank-{rank:04d}.npz"


def write_trace(folder: Path, trace: RankTrace) -> None:
    """One file, which appears under its name when it is complete."""
    arrays = {name: np.asarray(getattr(trace.facts, name)) for name in FACTS}
    arrays |= {"version": np.asarray(FORMAT_VERSION), "key": trace.key_LMTE}
    if not np.array_equal(trace.key_LMTE, trace.mass_LMTE):
        arrays["mass"] = trace.mass_LMTE
    path = trace_path(folder, trace.facts.step, trace.facts.rank)
    beside = path.with_name(path.name + ".part")
    with beside.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    beside.replace(path)


def forget_traces(folder: Path, *, after_step: int) -> None:
    """Remove the files of later steps, which a start from ``after_step`` makes again."""
    for path in folder.glob("step-*"):
        named = FILE_NAME.match(path.name)
        if named and int(named[1]) > after_step:
            path.unlink()


def trace_folder(path: Path) -> Path:
    """The folder with traces: ``path`` or ``path/routing``. TraceError if there are none."""
    for folder in (path / "routing", path):
        if _files(folder):
            return folder
    raise TraceError(f"{path} has no routing trace (step-*-rank-*.npz), nor has {path / 'routing'}")


def read_traces(path: Path) -> Iterator[GroupRouting]:
    """Of `trace_folder`: every step, group, layer and micro-batch; one group's files are in memory
    at a time.

    TraceError, which names the file, if one is missing, is no trace or does not fit the others.
    """
    folder = trace_folder(path)
    for step, ranks in _files(folder).items():
        yield from _step_groups(folder, step, ranks)


def _files(folder: Path) -> dict[int, list[int]]:
    """The ranks of every step, both ascending."""
    ranks_by_step: dict[int, list[int]] = defaultdict(list)
    for path in sorted(folder.glob("step-*.npz")):
        if named := FILE_NAME.fullmatch(path.name):
            ranks_by_step[int(named[1])].append(int(named[2]))
    return dict(sorted(ranks_by_step.items()))


def _step_groups(folder: Path, step: int, ranks: list[int]) -> Iterator[GroupRouting]:
    first = read_rank_trace(folder, step, ranks[0])
    world, ep = first.facts.world, first.facts.ep
    for rank in sorted(set(range(world)) ^ set(ranks)):
        what = "is missing" if rank < world else "is too many"
        raise TraceError(
            f"{trace_path(folder, step, rank)} {what}: rank {ranks[0]} of step {step} was one of "
            f"{world}. If the run was stopped while it wrote this step, remove the step's files"
        )
    for group in range(world // ep):
        members = [
            read_rank_trace(folder, step, rank) for rank in range(group * ep, (group + 1) * ep)
        ]
        for member in members:
            _check_alike(first, member, folder)
        yield from _joined(members, group)


def _check_alike(first: RankTrace, other: RankTrace, folder: Path) -> None:
    path = trace_path(folder, other.facts.step, other.facts.rank)
    for name in ("world", "ep", "top_k", "tile", "layers"):
        got, want = getattr(other.facts, name), getattr(first.facts, name)
        if got != want:
            raise TraceError(f"{path}: {name} is {got}; rank {first.facts.rank} has {want}")
    if other.key_LMTE.shape != first.key_LMTE.shape:
        raise TraceError(
            f"{path}: keys are {list(other.key_LMTE.shape)} [layers, micro-batches, T, E]; rank "
            f"{first.facts.rank} has {list(first.key_LMTE.shape)}"
        )


def _joined(members: list[RankTrace], group: int) -> Iterator[GroupRouting]:
    key_LMTE = np.concatenate([member.key_LMTE for member in members], axis=2)
    mass_LMTE = np.concatenate([member.mass_LMTE for member in members], axis=2)
    facts = members[0].facts
    for row, layer in enumerate(facts.layers):
        for micro_batch in range(key_LMTE.shape[1]):
            yield GroupRouting(
                step=facts.step,
                layer=layer,
                group=group,
                micro_batch=micro_batch,
                top_k=facts.top_k,
                tile=facts.tile,
                ranks=facts.ep,
                key_TE=key_LMTE[row, micro_batch],
                mass_TE=mass_LMTE[row, micro_batch],
            )


def read_rank_trace(folder: Path, step: int, rank: int) -> RankTrace:
    """One file; TraceError if it is missing, broken or not what its name says."""
    path = trace_path(folder, step, rank)
    try:
        with np.load(path, allow_pickle=False) as file:
            values = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise TraceError(f"{path} is not a routing trace: {error}") from error
    missing = {"version", "key", *FACTS} - values.keys()
    if missing:
        raise TraceError(f"{path} is not a routing trace: no {', '.join(sorted(missing))}")
    if values["version"] != FORMAT_VERSION:
        raise TraceError(f"{path} has format {values['version']}; known: {FORMAT_VERSION}")
    trace = RankTrace(_facts(values), values["key"], values.get("mass", values["key"]))
    _check_itself(trace, step=step, rank=rank, path=path)
    return trace


def _facts(values: dict[str, NDArray[np.generic]]) -> TraceFacts:
    numbers = {name: int(values[name]) for name in FACTS if name != "layers"}
    return TraceFacts(**numbers, layers=tuple(int(layer) for layer in values["layers"]))


def _check_itself(trace: RankTrace, *, step: int, rank: int, path: Path) -> None:
    facts, shape = trace.facts, trace.key_LMTE.shape
    problems = [
        ((facts.step, facts.rank) != (step, rank), f"is of step {facts.step}, rank {facts.rank}"),
        (len(shape) != 4, f"has keys of shape {list(shape)}, not [layers, micro-batches, T, E]"),
        (trace.key_LMTE.dtype != np.int32, f"has keys of type {trace.key_LMTE.dtype}, not int32"),
        (trace.mass_LMTE.shape != shape, "has other shapes for scores than for keys"),
        (shape[:1] != (len(facts.layers),), f"has keys of {shape[:1]} layers, not {facts.layers}"),
        (facts.ep < 1 or facts.world % facts.ep, f"has ep {facts.ep} in {facts.world} ranks"),
        (shape[-1] % max(facts.ep, 1) != 0, f"has {shape[-1]} experts on {facts.ep} ranks"),
    ]
    for wrong, what in problems:
        if wrong:
            raise TraceError(f"{path} {what}")
