"""Everything that can be benched, by name; a missing package is a reason, not an error."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from distmoe.bench.kernels.problem import Problem
from distmoe.bench.kernels.subjects import ContractSubject, Subject, Workspace
from distmoe.kernels.moe_mlp import load_backend
from distmoe.kernels.moe_mlp.find_tiles import find_tiles
from distmoe.registry import MOE_MLP_BACKENDS

_PEERS_AT = "distmoe.bench.kernels.peers"
# Name -> module; bound comes first in tables, because the others are compared with it.
BOUND = "bound"
PEERS = {
    BOUND: f"{_PEERS_AT}.bound",
    "grouped_mm": f"{_PEERS_AT}.grouped_mm",
    "liger": f"{_PEERS_AT}.liger",
    "scattermoe": f"{_PEERS_AT}.scattermoe",
    "sonicmoe-layer": f"{_PEERS_AT}.sonicmoe_layer",
}
_ON_CPU = (BOUND, "torch", "reference", "grouped_mm")
_ONLY_CPU = ("reference",)
# What has no kernels for a CPU, unless Triton interprets them.
_TRITON = ("triton", "liger")
# Not timed unless asked for: it has not run on a GPU yet, and a wrong barrier would hang the bench.
_ON_REQUEST = ("gluon",)
_ONLY_GPU = ("gluon", "scattermoe", "sonicmoe", "sonicmoe-layer")


@dataclass(frozen=True)
class Candidate:
    """``build`` makes it for a problem; ValueError says why it cannot compute one. ``checked``: it
    computes the problem, and can be wrong."""

    name: str
    build: Callable[[Problem, Workspace], Subject]
    checked: bool = True


class MissingError(Exception):
    """A backend is not installed or cannot run here; one line says why."""


def names() -> list[str]:
    """Every backend and peer."""
    return [*PEERS, *MOE_MLP_BACKENDS]


def default_names(device: torch.device) -> list[str]:
    """All that are timed on ``device`` if nobody says which."""
    if device.type == "cpu":
        return list(_ON_CPU)
    return [name for name in names() if name not in (*_ONLY_CPU, *_ON_REQUEST)]


def find(name: str, device: torch.device, *, tiles: str = "default") -> Candidate:
    """The candidate called ``name`` for ``device``, with ``tiles`` as in `find_tiles`. ValueError
    if there is none; `MissingError` if it cannot be used here."""
    if name not in names():
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(names())}")
    if device.type == "cpu":
        _refuse_cpu(name)
    try:
        if name in PEERS:
            make = importlib.import_module(PEERS[name]).subject
            return Candidate(name, lambda problem, _: make(problem), checked=name != BOUND)
        backend = load_backend(name, tiles=find_tiles(tiles, name, device))
    # A package that is installed but broken fails in its own way.
    except Exception as error:
        raise MissingError(first_line(error)) from error
    return Candidate(name, lambda problem, space: ContractSubject(backend, problem, space))


def _refuse_cpu(name: str) -> None:
    if name in _ONLY_GPU:
        raise MissingError("runs on a GPU only")
    if name in _TRITON and not triton.knobs.runtime.interpret:
        raise MissingError("runs on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter")


def is_fault(error: Exception) -> bool:
    """Whether an error means that a backend is broken: not that it refuses a problem, and not that
    memory is short."""
    return not isinstance(error, ValueError | torch.OutOfMemoryError)


def first_line(error: BaseException) -> str:
    """One line about an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
