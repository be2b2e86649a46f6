"""Seconds and bytes of every subject, in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from distmoe.bench.dispatch.layer import Layer
from distmoe.bench.dispatch.subjects import Subject
from distmoe.bench.dispatch.wire import Interface


@dataclass(frozen=True)
class Timing:
    """Of one subject on one rank: wall seconds of every forward and backward; bytes of rows that it
    sent in one of each, relayed ones too, in all and between nodes. ``interface_bytes``: what the
    network interface of its host sent in the same time, of all its ranks; None without one."""

    name: str
    level: str
    note: str
    row_bytes: int
    remote_bytes: int
    interface_bytes: int | None = None
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)

    @property
    def total_s(self) -> list[float]:
        return [f + b for f, b in zip(self.forward_s, self.backward_s, strict=True)]


def run(layer: Layer, subject: Subject) -> tuple[float, float]:
    """Wall seconds of one forward and of one backward; all ranks begin together."""
    dist.barrier(layer.group)
    begun = time.perf_counter()
    out_TH = subject.forward()
    middle = time.perf_counter()
    torch.autograd.grad(out_TH, list(subject.leaves), layer.dout_TH)
    return middle - begun, time.perf_counter() - middle


def measure(
    layer: Layer, subjects: Sequence[Subject], *, rounds: int, interface: Interface | None = None
) -> list[Timing]:
    """Every subject in turn, ``rounds`` times after one round that is not timed; collective."""
    timings = [_first_round(layer, subject, interface) for subject in subjects]
    for _ in range(rounds):
        for timing, subject in zip(timings, subjects, strict=True):
            forward_s, backward_s = run(layer, subject)
            timing.forward_s.append(forward_s)
            timing.backward_s.append(backward_s)
    return timings


def _first_round(layer: Layer, subject: Subject, interface: Interface | None) -> Timing:
    """The bytes of a round whose time is not counted."""
    dist.barrier(layer.group)
    before = interface.sent() if interface else 0
    run(layer, subject)
    dist.barrier(layer.group)
    sent = subject.row_bytes()
    return Timing(
        name=subject.name,
        level=subject.level,
        note=subject.note,
        row_bytes=sent.total(),
        remote_bytes=sent["remote"],
        interface_bytes=interface.sent() - before if interface else None,
    )


def slowest(timings: list[list[Timing]]) -> list[Timing]:
    """Of every subject, round by round, the rank that took longest; bytes are those of the busiest
    rank."""
    worst = []
    for of_subject in zip(*timings, strict=True):
        forward = [max(values) for values in zip(*(t.forward_s for t in of_subject), strict=True)]
        total = [max(values) for values in zip(*(t.total_s for t in of_subject), strict=True)]
        worst.append(
            replace(
                of_subject[0],
                forward_s=forward,
                backward_s=[t - f for t, f in zip(total, forward, strict=True)],
                row_bytes=max(t.row_bytes for t in of_subject),
                remote_bytes=max(t.remote_bytes for t in of_subject),
            )
        )
    return worst
