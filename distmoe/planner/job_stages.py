"""A job's layers as stages of the pipeline: what they compute, gather and reduce, in seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from distmoe.config import Config
from distmoe.config.batch import micro_batches, rank_tokens
from distmoe.model.attention import attention_sizes
from distmoe.planner.collective_time import Collectives, RankGroup, Transfer
from distmoe.planner.engine_costs import EngineTraffic
from distmoe.planner.hardware import Hardware
from distmoe.planner.layer_shape import ITEMSIZE
from distmoe.planner.layer_time import Passes, Rates, Work, model_passes
from distmoe.planner.optimizer_costs import ADAMW_BYTES, FUSED_ADAMW_BYTES, MUON_BYTES, muon_units
from distmoe.planner.parameter_shapes import elements, model_units
from distmoe.planner.pipeline_time import Stage
from distmoe.planner.shard_sizes import sharded_model
from distmoe.planner.step_parts import StepPart
from distmoe.registry import ENGINE_COSTS

GRADIENT_BYTES = 4
"""Of an element that is reduced: every engine is told to reduce in fp32."""
CLIP_BYTES = 12
"""Memory traffic of an element before it is updated: the norm of the gradients, 4, and their
clipping, 8."""


@dataclass(frozen=True)
class JobStages:
    """``stages`` of a step's only micro-batch in the order of the forward; ``micro_batches``: those
    of several, with how many there are of a kind, as the first may gather and the last reduce for
    all. ``parts_s``: what one computes, by what takes it. ``once_s``: collectives of a step that
    are in no micro-batch; ``update_s``: the optimizer."""

    stages: tuple[Stage, ...]
    micro_batches: Mapping[tuple[Stage, ...], int]
    parts_s: Mapping[StepPart, float]
    hides_reductions: bool
    once_s: float
    update_s: float


def job_stages(config: Config, hardware: Hardware, *, dtype: str) -> JobStages:
    """Of a resolved config."""
    return _Builder(config, hardware, dtype).build()


@dataclass(frozen=True)
class _Parameters:
    """Elements that a rank computes with: shared by all ranks of dp_shard, and of its experts."""

    dense: int = 0
    experts: int = 0


class _Builder:
    def __init__(self, config: Config, hardware: Hardware, dtype: str) -> None:
        parallel, per_node = config.parallel, hardware.ranks_per_node
        self._config = config
        self._itemsize = ITEMSIZE[dtype]
        self._traffic: EngineTraffic = ENGINE_COSTS.load(parallel.engine).traffic(config)
        self._rates = Rates(
            hardware.dense_flops(dtype), hardware.attention_flops(dtype), hardware.bytes_per_s
        )
        self._links = Collectives(hardware.profile, per_node)
        shard, ep = parallel.dp_shard, parallel.ep
        self._dense = RankGroup.strided(shard, stride=1, ranks_per_node=per_node)
        self._experts = RankGroup.strided(shard // ep, stride=ep, ranks_per_node=per_node)
        self._replicas = RankGroup.strided(
            parallel.dp_replicate, stride=shard, ranks_per_node=per_node
        )
        self._context = RankGroup.strided(parallel.cp, stride=1, ranks_per_node=per_node)
        self._parts: dict[StepPart, float] = {}

    def build(self) -> JobStages:
        passes = model_passes(self._config, self._itemsize)
        units = model_units(self._config)
        edges = _Parameters(elements(units.root))
        dense_block = _Parameters(elements(units.dense_block))
        moe_block = _Parameters(elements(units.moe_block), elements(units.experts))
        num_dense, num_moe = units.num_dense, units.num_moe
        dense = self._stage(passes.dense_block, dense_block, count=num_dense, is_block=True)
        moe = self._stage(
            passes.moe_block, moe_block, count=num_moe, is_block=True, has_experts=True
        )
        # Embedding and head count as one: gathered first, reduced last.
        root, head = self._stage(None, edges), self._stage(passes.edges, _Parameters())
        stages = (root, *[dense] * num_dense, *[moe] * num_moe, head)
        every = [edges] + [dense_block] * num_dense + [moe_block] * num_moe
        return JobStages(
            stages=stages,
            micro_batches=self._micro_batches(stages, [*every, _Parameters()]),
            parts_s=self._parts,
            hides_reductions=self._traffic.hidden,
            once_s=self._once_s(every),
            update_s=self._update_s(sum(map(self._held, every))),
        )

    def _stage(
        self,
        passes: Passes | None,
        size: _Parameters,
        *,
        count: int = 1,
        is_block: bool = False,
        has_experts: bool = False,
    ) -> Stage:
        """``count`` stages alike, whose work is added to the parts."""
        traffic, elements = self._traffic, size.dense + size.experts
        gather = self._gather(size)
        # Gathered parameters are copied into place; gradients are added to those in fp32.
        placed = Work(bytes=2 * self._itemsize * elements)
        added = Work(bytes=(self._itemsize + 8) * elements)
        context_s = self._context_s(count) if is_block else (0.0, 0.0)
        forward = passes.forward if passes else Work()
        backward = (passes.backward if passes else Work()) + added
        if traffic.gathers_forward:
            forward += placed
        if traffic.gathers_backward:
            backward += placed
        return Stage(
            forward_s=self._seconds(forward, count) + context_s[0],
            backward_s=self._seconds(backward, count) + context_s[1],
            has_experts=has_experts,
            gather=gather if traffic.gathers_forward else Transfer(),
            gather_again=gather if traffic.gathers_backward and passes else Transfer(),
            reduce=self._reduce(size) if self._reduces_in_backward else Transfer(),
        )

    def _micro_batches(
        self, stages: tuple[Stage, ...], sizes: list[_Parameters]
    ) -> Mapping[tuple[Stage, ...], int]:
        parallel = self._config.parallel
        number = micro_batches(self._config, parallel.dp_replicate * parallel.dp_shard)
        places = Counter((i == 0, i == number - 1) for i in range(number))
        kinds: Counter[tuple[Stage, ...]] = Counter()
        for (first, last), count in places.items():
            parts = zip(stages, sizes, strict=True)
            kinds[tuple(self._at(*part, first=first, last=last) for part in parts)] += count
        return kinds

    def _at(self, stage: Stage, size: _Parameters, *, first: bool, last: bool) -> Stage:
        """In the first or last micro-batch of a step, or between."""
        if self._traffic.gathers_once and not first:
            stage = replace(stage, gather=Transfer())
        if last:
            return stage
        again = self._traffic.reduces_every_backward
        return replace(stage, reduce=self._reduce_inside(size) if again else Transfer())

    def _seconds(self, work: Work, count: int) -> float:
        parts = work.parts_s(self._rates)
        for name, seconds in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + count * seconds
        return sum(parts.values())

    def _context_s(self, count: int) -> tuple[float, float]:
        """What attention waits for ranks that share its sequences, forward and backward; of
        ``count`` blocks it is added to the parts."""
        config = self._config
        tokens = rank_tokens(config) * config.parallel.cp
        num_bytes = self._itemsize * tokens * attention_sizes(config.model).gathered
        gather_s = self._links.gather(self._context, num_bytes).seconds
        backward_s = self._links.all_to_all(self._context, num_bytes).seconds
        if config.train.activation_checkpoint != "none":
            backward_s += gather_s
        waited = self._parts.get(StepPart.CONTEXT, 0.0) + count * (gather_s + backward_s)
        self._parts[StepPart.CONTEXT] = waited
        return gather_s, backward_s

    def _gather(self, size: _Parameters) -> Transfer:
        """In the compute dtype."""
        dense = self._links.gather(self._dense, size.dense * self._itemsize)
        return dense + self._links.gather(self._experts, size.experts * self._itemsize)

    @property
    def _reduces_in_backward(self) -> bool:
        return self._traffic.reduces_every_backward or self._traffic.reduces_in_last

    def _reduce(self, size: _Parameters) -> Transfer:
        replicas = self._links.all_reduce(self._replicas, self._held(size) * GRADIENT_BYTES)
        return self._reduce_inside(size) + replicas

    def _reduce_inside(self, size: _Parameters) -> Transfer:
        """Of a replica."""
        dense = self._links.reduce(self._dense, size.dense * GRADIENT_BYTES)
        return dense + self._links.reduce(self._experts, size.experts * GRADIENT_BYTES)

    def _held(self, size: _Parameters) -> float:
        """Elements of this rank's own shards."""
        return size.dense / self._dense.size + size.experts / self._experts.size

    def _update_s(self, held: float) -> float:
        """Of ``held`` elements. With Muon the owners of matrices that are cut get their rows, and
        send them back; the work is spread evenly."""
        config = self._config
        muon = muon_units(config, model_units(config))
        dense = muon.units.dense_elements / self._dense.size
        experts = muon.units.expert_elements / self._experts.size
        adamw = ADAMW_BYTES if config.run.device == "cpu" else FUSED_ADAMW_BYTES
        seconds = (CLIP_BYTES + adamw) * (held - dense - experts) / self._rates.bytes_per_s
        seconds += (CLIP_BYTES + MUON_BYTES) * (dense + experts) / self._rates.bytes_per_s
        flops = muon.dense_flops / self._dense.size + muon.expert_flops / self._experts.size
        seconds += flops / self._rates.dense_flops
        seconds += 2 * self._links.all_to_all(self._dense, dense * self._itemsize).seconds
        if sharded_model(config, muon.units).experts.by_rows:
            seconds += 2 * self._links.all_to_all(self._experts, experts * self._itemsize).seconds
        return seconds

    def _once_s(self, every: list[_Parameters]) -> float:
        """Reductions at the end of the step, and new parameters sent to all."""
        seconds = 0.0
        if not self._reduces_in_backward:
            seconds += sum(self._reduce(size).seconds for size in every)
        if self._traffic.gathers_update:
            seconds += sum(self._gather(size).seconds for size in every)
        return seconds
