"""Whose expert kernels are slow, although all ranks of a layer end together."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from slow_mlp import SlowMlp

from distmoe import MoE, MoEConfig
from distmoe.comm import Message
from distmoe.comm.kernel_clock import KernelClock
from distmoe.comm.observer import Observer
from distmoe.config import Config, MetricsConfig, RankInfo, RoundingConfig, TrainConfig
from distmoe.metrics.throughput import slowest_over_mean
from distmoe.runtime import Runtime
from distmoe.train.communication import Communication

CONFIG = MoEConfig(
    hidden_size=16,
    intermediate_size=8,
    num_experts=4,
    top_k=2,
    rounding=RoundingConfig("none", tile=1),
)
FAST_S, SLOW_S = 0.01, 0.04


class FakeEvent:
    """An event of a device whose stream is never behind the host."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end._at - self._at)


def layer_seconds(kernel_s: tuple[float, float]) -> tuple[list[float], list[float]]:
    """Of each of two ranks: by the kernel clock, and until its backward is done."""
    x = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))

    def run(rank: int) -> tuple[float, float]:
        layer, clock = MoE(CONFIG, dist.group.WORLD), KernelClock()
        layer._mlp = SlowMlp(layer.mlp, kernel_s[rank])
        layer.exchange.observer.kernel_clock = clock
        layer(x[rank])
        clock.begin()
        begun = time.perf_counter()
        out, _ = layer(x[rank].clone().requires_grad_())
        out.sum().backward()
        return clock.end(), time.perf_counter() - begun

    own, wall = zip(*run_ranks(run, 2), strict=True)
    return list(own), list(wall)


def test_the_slow_rank_is_seen_and_waits_for_it_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distmoe.comm.kernel_clock._recorded_event", FakeEvent)
    own, wall = layer_seconds((FAST_S, SLOW_S))
    assert slowest_over_mean(own) > 1.3
    assert own[1] > own[0]
    # Until the backward is done, both have waited for rank 1.
    assert slowest_over_mean(wall) < 1.2
    even, _ = layer_seconds((FAST_S, FAST_S))
    assert slowest_over_mean(even) < 1.2


def test_nothing_is_timed_but_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distmoe.comm.kernel_clock._recorded_event", FakeEvent)
    clock, observer = KernelClock(), Observer(0, [0])
    observer.kernel_clock = clock
    with observer.kernels():
        pass
    assert not observer.is_timing
    clock.begin()
    assert observer.is_timing
    assert math.isnan(clock.end())
    assert math.isnan(slowest_over_mean([1.0, math.nan]))


def test_the_steps_that_the_console_shows_are_timed_on_a_gpu() -> None:
    config = Config(metrics=MetricsConfig(log_every=4), train=TrainConfig(steps=6))
    model: Any = torch.nn.Module()
    timed = {}
    for kind in ("cpu", "cuda"):
        runtime = Runtime(RankInfo(rank=0, world=1), torch.device(kind), None)
        communication = Communication.open(config, runtime, model)
        timed[kind] = []
        for step in range(1, 7):
            communication.begin(step)
            if communication._kernel_clock.on:
                timed[kind].append(step)
            used, _ = communication.end(step)
            assert math.isnan(used.kernel_seconds)
            assert not communication._kernel_clock.on
    assert timed == {"cpu": [], "cuda": [1, 4, 6]}


def test_cpu_time_of_a_wait_that_asks_again_and_again() -> None:
    observer = Observer(0, [0, 1])

    def ask() -> None:
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass

    observer.wait("rows", [Message("receive", 1, 8, ask)])
    assert 0.05 <= observer.wait_cpu_seconds < 0.2
