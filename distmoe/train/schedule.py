"""Learning rate over the peak, as a function of the step. Warm-up is linear and starts above 0."""

from __future__ import annotations

import math


def constant(
    step: int, *, steps: int, warmup_steps: int, decay_steps: int, min_lr_ratio: float
) -> float:
    """Warm-up, then 1."""
    return _warmup(step, warmup_steps)


def cosine(
    step: int, *, steps: int, warmup_steps: int, decay_steps: int, min_lr_ratio: float
) -> float:
    """Warm-up, then half a cosine down to ``min_lr_ratio`` at the last step."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(
    step: int, *, steps: int, warmup_steps: int, decay_steps: int, min_lr_ratio: float
) -> float:
    """Warm-up, then 1, then linear down to ``min_lr_ratio`` over the last ``decay_steps``."""
    decay_steps = decay_steps or max(1, steps // 10)
    left = min(1.0, (steps - 1 - step) / decay_steps)
    return min(_warmup(step, warmup_steps), min_lr_ratio + (1 - min_lr_ratio) * left)


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))
