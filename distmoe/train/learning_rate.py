"""The learning rate of every step of a run, and whether it jumps where the run goes on."""

from __future__ import annotations

import math

from distmoe.config import Config
from distmoe.registry import SCHEDULES
from distmoe.train.progress import Progress


def learning_rate(config: Config, step: int) -> float:
    """Of a step, counted from 0."""
    optim = config.optim
    factor: float = SCHEDULES.load(optim.schedule)(
        step,
        steps=config.train.steps,
        warmup_steps=optim.warmup_steps,
        decay_steps=optim.decay_steps,
        min_lr_ratio=optim.min_lr_ratio,
    )
    return optim.lr * factor


def jump_of_lr(config: Config, saved: Progress) -> list[str]:
    """A warning if the step that was done last would have another learning rate now."""
    if saved.lr is None:
        return []
    now = learning_rate(config, saved.done - 1)
    if math.isclose(now, saved.lr, rel_tol=1e-6, abs_tol=1e-15):
        return []
    return [f"warning: lr jumps: that of step {saved.done} is {now:.2e} now, was {saved.lr:.2e}"]
