"""What a training run needs on one GPU, from its config alone: arithmetic, no process group.

Memory is at its peak at one of a few moments of a step: in the loss, in the backward of the last or
the first block, when gradients are reduced, or in the optimizer. Each moment's bytes are added up,
and the largest sum is the answer. Blocks of a kind are alike, so the first and the last of each
kind stand for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from distmoe.config import Config
from distmoe.config.dtype import with_dtype
from distmoe.planner.block_activations import BlockActivations, block_activations
from distmoe.planner.engine_costs import EngineCosts, Job
from distmoe.planner.engine_costs.deepspeed import DeepSpeedCosts
from distmoe.planner.layer_shape import ITEMSIZE
from distmoe.planner.loss_activations import LossActivations, loss_activations
from distmoe.planner.parameter_shapes import model_units
from distmoe.planner.step_moments import Moment, Stage
from distmoe.registry import ENGINE_COSTS

# Assumed, not measured: the CUDA context with its kernels, and NCCL's channels.
CUDA_CONTEXT = 1_500 << 20
# Assumed, not measured: of what tensors take, what the caching allocator cannot use.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class JobMemory:
    """Bytes on one GPU, the rank that needs most, at the moment when it needs most.

    ``parameters``: every copy of the weights that is there all the time, fp32 masters among them.
    ``gradients``: those that wait for the optimizer. ``optimizer``: moments. ``buffers``:
    gathered parameters, gradients on their way, and what the optimizer makes in between.
    ``activations``: kept for the backward, and what the moment adds, rows on their way among them.
    ``margin``: not tensors: the CUDA context, NCCL, fragmentation. ``moment``: which it is.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    margin: int
    moment: str = ""

    @property
    def tensors(self) -> int:
        """What torch's allocator would report as allocated at the most."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers

    @property
    def total(self) -> int:
        return self.tensors + self.margin


def predict_memory(
    config: Config, world: int, *, skew: float = 1.0, device_context: int = CUDA_CONTEXT
) -> JobMemory:
    """Of a resolved and checked ``config`` on ``world`` ranks.

    ``skew``: rows on the busiest rank over the mean. ``device_context``: bytes that CUDA and NCCL
    take beside tensors. run.device "cpu" is a CPU, which has neither; anything else is a GPU.
    """
    on_gpu = config.run.device != "cpu"
    itemsize = _itemsize(config)
    job = Job(config, world, model_units(config), itemsize, on_gpu)
    engine: EngineCosts = ENGINE_COSTS.load(config.parallel.engine)(job)
    blocks = block_activations(config, itemsize=itemsize, skew=skew)
    loss = loss_activations(config, itemsize=itemsize)
    found = []
    for moment in _moments(job):
        held = engine.held(moment)
        found.append(
            JobMemory(
                parameters=engine.parameters,
                gradients=held.gradients,
                optimizer=engine.optimizer,
                activations=_activations(job, moment, blocks, loss),
                buffers=held.buffers,
                margin=0,
                moment=_name(moment),
            )
        )
    peak = max(found, key=lambda memory: memory.tensors)
    margin = device_context + int(FRAGMENTATION * peak.tensors) if on_gpu else 0
    return replace(peak, margin=margin)


def zero3_host_memory(config: Config, world: int) -> int:
    """Bytes of host memory that a rank needs for what ZeRO 3 offloads, of a resolved config."""
    job = Job(config, world, model_units(config), _itemsize(config), config.run.device != "cpu")
    return DeepSpeedCosts(job).zero3_host_bytes


def _itemsize(config: Config) -> int:
    """Bytes of the compute dtype."""
    device_type = "cpu" if config.run.device == "cpu" else "cuda"
    return ITEMSIZE[with_dtype(config, device_type).train.dtype]


def _moments(job: Job) -> Iterator[Moment]:
    dense, blocks = job.units.num_dense, job.num_blocks
    yield Moment(Stage.LOSS, blocks)
    yield Moment(Stage.REDUCE_HEAD, blocks)
    ends = {0, dense - 1, dense, blocks - 1}
    for block in sorted(i for i in ends if 0 <= i < blocks):
        if job.has_experts(block):
            yield Moment(Stage.EXPERTS, block)
            yield Moment(Stage.EXPERT_WEIGHTS, block)
            yield Moment(Stage.REDUCE_EXPERTS, block)
        else:
            yield Moment(Stage.MLP, block)
        yield Moment(Stage.ATTENTION, block)
        yield Moment(Stage.REDUCE_BLOCK, block)
    yield Moment(Stage.REDUCE_ROOT, -1)
    yield Moment(Stage.STEP, -1)


def _activations(
    job: Job, moment: Moment, blocks: dict[str, BlockActivations], loss: LossActivations
) -> int:
    """Bytes that are there at that moment: of the blocks before, and of the block in its
    backward."""
    if moment.stage is Stage.STEP:
        return 0
    before = _kept(job, moment.block, blocks)
    if moment.stage in (Stage.LOSS, Stage.REDUCE_HEAD):
        return before + loss.kept + (loss.widest if moment.stage is Stage.LOSS else 0)
    if moment.block < 0:
        return blocks["dense"].x
    kind = blocks["moe" if job.has_experts(moment.block) else "dense"]
    return before + kind.at(moment.stage)


def _kept(job: Job, block: int, blocks: dict[str, BlockActivations]) -> int:
    """Of all blocks before ``block``."""
    dense = min(max(block, 0), job.units.num_dense)
    return dense * blocks["dense"].kept + (max(block, 0) - dense) * blocks["moe"].kept


def _name(moment: Moment) -> str:
    what = str(moment.stage.value)
    if moment.stage in (Stage.LOSS, Stage.REDUCE_HEAD, Stage.REDUCE_ROOT, Stage.STEP):
        return what
    return f"block {moment.block}: {what}"
