"""`Fsdp2Engine`: everything sharded in fp32; units gathered in the compute dtype when they are due.

Of torch's `fully_shard`: a unit is gathered into one flat buffer, from which its parameters are
copied; the flat buffer of a unit that is gathered ahead waits for its turn, and in the forward one
outlives it until the next unit comes. A unit's gradients are copied into one fp32 buffer, which
lives until the next unit is reduced. The head is gathered until its gradient is reduced, the first
of all; the embedding for its forward only. Where they are one they are the root's, which stays
gathered from its forward to its backward and is reduced last, so the head's gradient waits, whole,
for all others.
"""

from __future__ import annotations

from math import prod

from distmoe.config import Config
from distmoe.planner.engine_costs import FP32, EngineTraffic, Held, Job
from distmoe.planner.optimizer_costs import muon_buffers, muon_units
from distmoe.planner.parameter_shapes import elements
from distmoe.planner.shard_sizes import ShardedUnit, sharded_model
from distmoe.planner.step_moments import Moment, Stage


class Fsdp2Costs:
    """Shards are padded parameter by parameter, so every rank holds the same."""

    def __init__(self, job: Job) -> None:
        self.job, self.b = job, job.itemsize
        self.sharded = sharded_model(job.config, job.units)
        self.shard = self.sharded.shard(job.units)
        self.parameters = FP32 * self.shard
        self.muon = muon_units(job.config, job.units)
        self.muon_weights = sharded_model(job.config, self.muon.units)
        self.muon_shard = self.muon_weights.shard(self.muon.units)
        self.optimizer = FP32 * (2 * self.shard - self.muon_shard)
        self.reshards = job.config.parallel.reshard_after_forward
        # Until the last micro-batch: all that was gathered, and all gradients, whole.
        self.keeps_gathered = job.accumulates and not self.reshards
        self.whole_gradients = job.accumulates and job.config.parallel.reduce_gradients == "step"

    @staticmethod
    def traffic(config: Config) -> EngineTraffic:
        reshards = config.parallel.reshard_after_forward
        every = config.parallel.reduce_gradients == "micro_batch"
        return EngineTraffic(
            gathers_forward=True,
            gathers_backward=reshards,
            gathers_once=not reshards,
            reduces_every_backward=every,
            reduces_in_last=not every,
        )

    def held(self, moment: Moment) -> Held:
        return Held(self._gradients(moment), self._buffers(moment))

    def _block(self, block: int) -> ShardedUnit:
        has_experts = self.job.has_experts(block)
        return self.sharded.moe_block if has_experts else self.sharded.dense_block

    def _units(self, block: int) -> list[ShardedUnit]:
        """Of a block; none for a block that there is not."""
        if not 0 <= block < self.job.num_blocks:
            return []
        experts = [self.sharded.experts] if self.job.has_experts(block) else []
        return [self._block(block), *experts]

    def _gradients(self, moment: Moment) -> int:
        """fp32 shards of the head and the blocks that are reduced; the root's come last."""
        if self.whole_gradients and moment.stage is not Stage.STEP:
            return FP32 * (self.job.units.dense_elements + self.job.units.expert_elements)
        if self.job.accumulates or moment.stage is Stage.STEP:
            return FP32 * self.shard
        if moment.stage in (Stage.LOSS, Stage.REDUCE_HEAD):
            return 0
        units, done = self.job.units, self.sharded.head.shard
        done += max(units.num_dense - moment.block - 1, 0) * self.sharded.dense_block.shard
        moe = max(self.job.num_blocks - max(moment.block + 1, units.num_dense), 0)
        done += moe * (self.sharded.moe_block.shard + self.sharded.experts.shard)
        after_experts = moment.stage in (Stage.ATTENTION, Stage.REDUCE_BLOCK)
        if after_experts and self.job.has_experts(moment.block):
            done += self.sharded.experts.shard
        return FP32 * done

    def _buffers(self, moment: Moment) -> int:
        if moment.stage is Stage.STEP:
            return self._optimizer_step()
        if moment.stage is Stage.REDUCE_ROOT:
            return self._reduce_root()
        root, blocks = self.b * self.sharded.root.gathered, self.job.num_blocks
        if moment.stage is Stage.LOSS or self.keeps_gathered:
            root += self.b * self.sharded.head.gathered
        if moment.stage is Stage.LOSS:
            last = self._units(blocks - 1)
            lingering = self._flat(last[-1]) if last else 0
            return root + self._kept_gathered(blocks) + lingering
        root += self._ahead(moment.block) + self._waiting_head_gradient()
        if moment.stage is Stage.REDUCE_HEAD:
            return root + self._kept_gathered(blocks) + self._reduce(self.sharded.head)
        return root + self._of_block(moment)

    def _waiting_head_gradient(self) -> int:
        """The root's, where the head is the embedding."""
        return 0 if self.sharded.head.whole else self._embedding_gradient()

    def _embedding_gradient(self) -> int:
        return self.b * elements(self.job.units.root[:1])

    def _of_block(self, moment: Moment) -> int:
        block, stage = moment.block, moment.stage
        own, gathered = self._block(block), self._gathered(block, stage)
        if stage is Stage.REDUCE_BLOCK:
            return gathered + self._reduce(own)
        if stage is Stage.REDUCE_EXPERTS:
            return gathered + self._reduce(self.sharded.experts)
        if stage in (Stage.EXPERTS, Stage.EXPERT_WEIGHTS):
            if stage is Stage.EXPERT_WEIGHTS:
                gathered += self.b * self.sharded.experts.whole
            return gathered + self._last_reduced(block + 1)
        # The block's own gradients are whole until all are there.
        gathered += self.b * own.whole
        if self.job.has_experts(block):
            return gathered + FP32 * self.sharded.experts.gathered
        return gathered + self._last_reduced(block + 1)

    def _gathered(self, block: int, stage: Stage) -> int:
        """Blocks that were not freed, and of the block in its backward what it still needs."""
        if self.keeps_gathered:
            return self._kept_gathered(self.job.num_blocks)
        own = 0 if stage is Stage.REDUCE_BLOCK else self.b * self._block(block).gathered
        uses_experts = stage in (Stage.EXPERTS, Stage.EXPERT_WEIGHTS)
        return self._kept_gathered(block) + own + (self._experts_in_use() if uses_experts else 0)

    def _experts_in_use(self) -> int:
        """Of the block in its backward. Recomputed, they are gathered as in a forward, where the
        flat buffer lingers."""
        experts = self.sharded.experts
        recomputed = self.job.config.train.activation_checkpoint == "full" and self.reshards
        return self.b * experts.gathered + (self._flat(experts) if recomputed else 0)

    def _last_reduced(self, block: int) -> int:
        """The fp32 buffer of the block that was reduced before, or of the head."""
        unit = self._block(block) if block < self.job.num_blocks else self.sharded.head
        return FP32 * unit.gathered

    def _flat(self, unit: ShardedUnit) -> int:
        return self.b * unit.gathered if unit.ranks > 1 else 0

    def _ahead(self, block: int) -> int:
        """Gathered while this block's backward runs: the block before it; its experts, too, where
        the engine asks for that (`Fsdp2Engine._gather_ahead`)."""
        if not self.reshards:
            return 0
        units = self._units(block - 1)
        return sum(map(self._flat, units if self.job.config.parallel.ep > 1 else units[:1]))

    def _kept_gathered(self, blocks: int) -> int:
        """Of the blocks before this one that were not freed after their forward."""
        if self.reshards:
            return 0
        units = [unit for block in range(blocks) for unit in self._units(block)]
        return self.b * sum(unit.gathered for unit in units)

    def _reduce(self, unit: ShardedUnit) -> int:
        """Whole gradients are copied into the fp32 buffer and freed; then come the shards. Where
        there is nothing to sum, the buffer is divided by 1 into another one."""
        # Gradients that were added up are counted as such.
        counted = FP32 * unit.whole if self.whole_gradients else 0
        copied = self.b * unit.whole * (unit.by_rows + (not counted))
        divided = FP32 * unit.gathered if unit.ranks == 1 else 0
        return FP32 * unit.gathered + max(copied, FP32 * unit.shard + divided - counted)

    def _reduce_root(self) -> int:
        """The embedding's gradient is made and reduced, and then the root's."""
        root, embedding = self.sharded.root, self.sharded.embedding
        gathered = self.b * root.gathered
        made = gathered + self._waiting_head_gradient() + self._embedding_gradient()
        made += self._last_reduced(0)
        last = FP32 * embedding.gathered + self._reduce(root)
        return max(made, gathered + self._reduce(embedding), last)

    def _optimizer_step(self) -> int:
        """Of AdamW on a CPU the root of the second moment, and that divided by its correction,
        parameter by parameter; a GPU's fused update takes nothing."""
        sharded, roots = self.sharded, 0
        if not self.job.on_gpu:
            edges = (sharded.root, sharded.embedding, sharded.head)
            blocks = (sharded.dense_block, sharded.moe_block, sharded.experts)
            units = (*edges, *(() if self.muon_shard else blocks))
            roots = 2 * max(unit.largest for unit in units)
        return max(FP32 * roots, self._muon_buffers())

    def _muon_buffers(self) -> int:
        """Matrices are cut by rows, but for experts that are many enough."""
        weights, muon = self.muon_weights, self.muon
        parts = (
            (weights.dense_block, muon.units.num_dense, muon.dense),
            (weights.moe_block, muon.units.num_moe, muon.routed),
            (weights.experts, muon.units.num_moe, muon.experts),
        )
        whole = batch = cut = largest_cut = 0
        for unit, count, matrices in parts:
            if unit.ranks > 1 and (unit is not weights.experts or unit.by_rows):
                cut += count * unit.shard
                largest_cut = max(largest_cut, *(prod(shape[-2:]) for shape in matrices), 0)
            else:
                whole = max(whole, unit.largest)
                batch = max(batch, *(prod(shape) // unit.ranks for shape in matrices), 0)
        return muon_buffers(
            whole=whole, batch=batch, cut=cut, largest_cut=largest_cut, on_gpu=self.job.on_gpu
        )
