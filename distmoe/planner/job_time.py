"""Seconds of one optimizer step of a job, and its throughput, from its config alone.

Layers as `layer_time` counts them, experts and their exchange by `cost_model`, collectives of
parameters and gradients by `collective_time`, put together by `pipeline_time`; then the optimizer.
What is left out is listed in docs/planning.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distmoe.config import Config
from distmoe.config.batch import micro_batches
from distmoe.metrics.flops import flops_per_token
from distmoe.metrics.tally import SECONDS_PER_DAY
from distmoe.planner.expert_time import ExpertTimes
from distmoe.planner.job_stages import JobStages
from distmoe.planner.pipeline_time import micro_batch_s
from distmoe.planner.step_parts import WAITS, StepPart


@dataclass(frozen=True)
class StepTime:
    """``parts_s``: the mean rank's seconds by what takes them; they add up to ``seconds``.
    ``model_flops``: of a token, forward and backward, by the model's own count. ``peak_flops`` of
    a device; None where it is not known."""

    seconds: float
    parts_s: Mapping[StepPart, float]
    tokens: int
    ranks: int
    model_flops: int
    peak_flops: float | None

    @property
    def tokens_per_s_per_rank(self) -> float:
        return self.tokens / (self.seconds * self.ranks)

    @property
    def tokens_per_day(self) -> float:
        return self.tokens / self.seconds * SECONDS_PER_DAY

    @property
    def flops_per_rank(self) -> float:
        """FLOP/s, as tflops_per_rank of a run's metrics."""
        return self.model_flops * self.tokens_per_s_per_rank

    @property
    def mfu(self) -> float | None:
        """As mfu of a run's metrics; None where the peak is not known."""
        return self.flops_per_rank / self.peak_flops if self.peak_flops else None

    @property
    def waiting_share(self) -> float:
        """Of the step."""
        return sum(self.parts_s[name] for name in WAITS) / self.seconds


def step_time(
    config: Config,
    world: int,
    stages: JobStages,
    experts: ExpertTimes | None,
    *,
    peak_flops: float | None,
) -> StepTime:
    """Of a resolved config on ``world`` ranks; ``experts``: None for a model without."""
    recomputes, n = config.train.activation_checkpoint == "full", micro_batches(config, world)
    parts = {name: n * seconds for name, seconds in stages.parts_s.items()}
    passes = [one for both in experts.passes(recomputes) for one in both] if experts else []
    runs = n * sum(stage.has_experts for stage in stages.stages)
    parts[StepPart.EXPERTS] = runs * sum(one.busy_s for one in passes)
    parts[StepPart.EXCHANGE] = runs * sum(one.mean_s - one.busy_s for one in passes)
    parts[StepPart.SLOWER_RANKS] = runs * sum(one.busiest_s - one.mean_s for one in passes)
    parts[StepPart.OPTIMIZER] = stages.update_s
    seconds = stages.once_s + stages.update_s
    for kind, count in stages.micro_batches.items():
        seconds += count * micro_batch_s(
            kind,
            experts,
            recomputes_experts=recomputes,
            hides_reductions=stages.hides_reductions,
        )
    # All that is left: nothing but collectives of parameters and gradients makes ranks wait.
    parts[StepPart.PARAMETERS] = max(0.0, seconds - sum(parts.values()))
    return StepTime(
        seconds=seconds,
        parts_s=parts,
        tokens=config.train.global_batch_size * config.data.seq_len,
        ranks=world,
        model_flops=flops_per_token(config).model,
        peak_flops=peak_flops,
    )
