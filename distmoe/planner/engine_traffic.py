"""When each engine gathers parameters and reduces gradients, as far as its time depends on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distmoe.config import Config


@dataclass(frozen=True)
class EngineTraffic:
    """``gathers_forward``, ``gathers_backward``: a block's parameters, in the compute dtype, for
    every pass. ``reduces_every_backward``: gradients, in fp32; else once a step. ``hidden``:
    reductions go on beside the backward; gathers of sharded parameters always do.
    ``gathers_update``: the new parameters, after the optimizer."""

    gathers_forward: bool = False
    gathers_backward: bool = False
    reduces_every_backward: bool = True
    hidden: bool = True
    gathers_update: bool = False


def _fsdp2(config: Config) -> EngineTraffic:
    return EngineTraffic(
        gathers_forward=True, gathers_backward=config.parallel.reshard_after_forward
    )


def _deepspeed(config: Config) -> EngineTraffic:
    stage = config.deepspeed.zero_stage
    return EngineTraffic(
        gathers_forward=stage == 3,
        gathers_backward=stage == 3,
        reduces_every_backward=stage > 1,
        hidden=config.deepspeed.overlap_comm,
        gathers_update=stage < 3,
    )


TRAFFIC: dict[str, Callable[[Config], EngineTraffic]] = {
    "single": lambda config: EngineTraffic(),
    "fsdp2": _fsdp2,
    "deepspeed": _deepspeed,
}
"""By parallel.engine, of a resolved config. Groups of one rank have nothing to send."""
