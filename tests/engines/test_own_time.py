"""What of a step on a CPU counts as a rank's own time."""

from __future__ import annotations

import time
from collections.abc import Callable

from parity_runs import CPU, LAW, config_for, own_batches

from distmoe.engines import make_engine
from distmoe.train.step import StepOutcome, train_step

BUSY_S = 0.2


def burn() -> None:
    until = time.thread_time() + BUSY_S
    while time.thread_time() < until:
        pass


def step_with(in_a_layer: Callable[[], None]) -> StepOutcome:
    config = config_for(1, 1, LAW[1, 1], engine="single")
    engine = make_engine(config, None, CPU)
    engine.model.blocks[-1].mlp.register_forward_pre_hook(lambda *_: in_a_layer())
    batches = own_batches(0, 0, 1, config.train.micro_batch_size)[:1]
    return train_step(engine, batches, lr=1e-3, moe=config.moe, device=CPU, group=None)


def test_a_busy_loop_counts_and_a_wait_does_not() -> None:
    plain = step_with(lambda: None).cpu_seconds
    busy, waiting = step_with(burn), step_with(lambda: time.sleep(BUSY_S))
    assert busy.cpu_seconds > BUSY_S
    assert waiting.forward_backward_seconds > BUSY_S
    assert waiting.cpu_seconds < max(0.5 * BUSY_S, 5 * plain)
