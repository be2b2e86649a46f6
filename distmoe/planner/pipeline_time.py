"""Seconds of one micro-batch through the layers of a job, in closed form.

A stage takes as long as the longer of what its ranks compute, the busiest rank's experts among it,
and of what travels beside that: the parameters of the stage that comes next, gradients of the one
that came before, and, where they share the link, rows of the exchange. Nothing hides the first
gather of a pass and the last reduction:

    forward   gather_0 + sum_i max(compute_i, gather_i+1 + rows_i)
    backward  gather_n + sum_i max(compute_i, gather_i-1 + reduce_i+1 + rows_i) + reduce_0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distmoe.planner.collective_time import Transfer
from distmoe.planner.expert_time import ExpertPass, ExpertTimes


@dataclass(frozen=True)
class Stage:
    """Some layers that are gathered together.

    ``forward_s``, ``backward_s``: all but the experts, alike on every rank. ``gather``,
    ``gather_again``: before forward and backward; ``reduce``: after the backward.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    has_experts: bool = False
    gather: Transfer = Transfer()
    gather_again: Transfer = Transfer()
    reduce: Transfer = Transfer()


def micro_batch_s(
    stages: Sequence[Stage],
    experts: ExpertTimes | None,
    *,
    recomputes_experts: bool = False,
    hides_reductions: bool = True,
) -> float:
    """Forward and backward through ``stages``; ``experts`` of each of their expert layers."""
    if not hides_reductions:
        bare = [replace(stage, reduce=Transfer()) for stage in stages]
        exposed_s = sum(stage.reduce.seconds for stage in stages)
        return exposed_s + micro_batch_s(bare, experts, recomputes_experts=recomputes_experts)
    forward, backward = experts.passes(recomputes_experts) if experts else ((), ())
    nothing = Stage()
    seconds = stages[0].gather.seconds + stages[-1].gather_again.seconds
    for stage, after in zip(stages, [*stages[1:], nothing], strict=True):
        passes = forward if stage.has_experts else ()
        seconds += _slower(stage.forward_s, passes, after.gather)
    for stage, before, after in zip(
        stages, [nothing, *stages[:-1]], [*stages[1:], nothing], strict=True
    ):
        passes = backward if stage.has_experts else ()
        seconds += _slower(stage.backward_s, passes, before.gather_again + after.reduce)
    return seconds + stages[0].reduce.seconds


def _slower(computed_s: float, passes: Sequence[ExpertPass], beside: Transfer) -> float:
    """Of what a stage computes, and of the collectives ``beside`` it."""
    computed_s += sum(one.busiest_s for one in passes)
    if not beside.seconds:
        return computed_s
    sent = sum((one.sent for one in passes), Transfer())
    # Over the link that limits the collectives.
    rows_s = sent.remote_s if beside.remote_s >= beside.node_s else sent.node_s
    return max(computed_s, beside.seconds + rows_s)
