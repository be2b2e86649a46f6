"""From what every rank knows of a step to the record of the step."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from distmoe.config import Config
from distmoe.metrics.expert_load import (
    IntArray,
    LoadCounts,
    load_of_all,
    load_of_layer,
    tiles_of,
)
from distmoe.metrics.flops import flops_per_token
from distmoe.metrics.memory import peak_memory_gib
from distmoe.metrics.record import (
    CorpusProgress,
    Energy,
    Learned,
    Slowest,
    Speed,
    StepRecord,
    StepTimes,
    Traffic,
)
from distmoe.metrics.throughput import (
    Lap,
    RunPart,
    model_flops_utilization,
    slowest_over_mean,
    tokens_per_second_per_rank,
)
from distmoe.moe.row_formats import TravelFormats
from distmoe.moe.stats import OWN_COUNTS
from distmoe.routing.routers import is_forced
from distmoe.runtime import Runtime
from distmoe.train.communication import StepCommunication
from distmoe.train.step import StepOutcome

MIB, TERA = 1 << 20, 1e12

# x there and y home, dy there and dx home.
PASSES = 2


def collect_step(
    outcome: StepOutcome,
    config: Config,
    runtime: Runtime,
    *,
    step: int,
    lr: float,
    lap: Lap,
    checkpoint_seconds: float,
    communication: StepCommunication,
    bytes_per_value: int,
    peak: float | None,
    samples_left_out: int = 0,
    next_sample: int = 0,
    corpora: tuple[CorpusProgress, ...] = (),
) -> tuple[StepRecord, IntArray]:
    """The record, and the top-k counts of the step over all ranks [L, E]; collective. ``peak``:
    FLOP/s of a rank's device, None if that is not known. ``samples_left_out``: by the step;
    ``next_sample``: behind its last; ``corpora``: what the steps so far have read."""
    counts, rows, copies = _count_over_ranks(outcome, config, runtime)
    by_rank = _gather(outcome, communication, runtime, lap)
    row_mib = row_bytes(config, bytes_per_value) / MIB
    first_moe_block = config.model.n_dense_layers
    record = StepRecord(
        step=step,
        ranks=runtime.ranks.world,
        warm_up=lap.warm_up,
        learned=_learned(outcome, lr),
        times=_times(outcome, lap, checkpoint_seconds),
        speed=_speed(outcome, config, lap, world=runtime.ranks.world, peak=peak),
        energy=_energy(by_rank.joules, outcome.valid_tokens, lap),
        slowest=_slowest(by_rank.own_seconds),
        memory_gib=max(by_rank.memory_gib),
        traffic=_traffic(by_rank, lap, rows_mib=rows * row_mib, copies_mib=copies * row_mib),
        load=load_of_all(counts),
        layers={
            first_moe_block + row: load_of_layer(counts, row) for row in range(len(counts.freq_LE))
        },
        routing="forced" if is_forced(config.moe.router) else "real",
        not_finite=outcome.not_finite,
        samples_left_out=samples_left_out,
        next_sample=next_sample,
        corpora=corpora,
    )
    return record, counts.freq_LE


def _learned(outcome: StepOutcome, lr: float) -> Learned:
    return Learned(
        loss=outcome.loss,
        load_balance_loss=outcome.load_balance_loss,
        z_loss=outcome.z_loss,
        lr=lr,
        grad_norm=outcome.grad_norm,
        skipped=outcome.skipped,
        tokens=outcome.valid_tokens,
    )


def _times(outcome: StepOutcome, lap: Lap, checkpoint_seconds: float) -> StepTimes:
    return StepTimes(
        step_seconds=lap.step,
        data_seconds=lap.parts.get(RunPart.DATA, 0.0),
        forward_backward_seconds=outcome.forward_backward_seconds,
        optimizer_seconds=outcome.optimizer_seconds,
        checkpoint_seconds=checkpoint_seconds,
        validation_seconds=lap.parts.get(RunPart.VALIDATION, 0.0),
    )


def _speed(
    outcome: StepOutcome, config: Config, lap: Lap, *, world: int, peak: float | None
) -> Speed:
    speed = tokens_per_second_per_rank(outcome.valid_tokens, lap.step, world)
    flops = flops_per_token(config, document_tokens=outcome.document_tokens)
    peak = math.nan if peak is None else peak
    return Speed(
        tokens_per_second_per_rank=speed,
        tflops_per_rank=speed * flops.model / TERA,
        palm_tflops_per_rank=speed * flops.palm / TERA,
        mfu=model_flops_utilization(speed, flops_per_token=flops.model, peak_flops=peak),
        palm_mfu=model_flops_utilization(speed, flops_per_token=flops.palm, peak_flops=peak),
    )


@dataclass(frozen=True)
class _ByRank:
    """What every rank knows of itself alone, a value for each rank: seconds, bytes, GiB, joules.
    Columns of one all-gather, in this order."""

    own_seconds: list[float]
    exposed_seconds: list[float]
    node_bytes: list[float]
    remote_bytes: list[float]
    memory_gib: list[float]
    joules: list[float]


def _energy(joules: list[float], tokens: int, lap: Lap) -> Energy:
    energy = sum(joules)
    return Energy(
        energy_joules=energy,
        watts_per_rank=energy / (max(lap.step, 1e-9) * len(joules)),
        tokens_per_joule=tokens / energy if energy > 0 else math.nan,
    )


def _slowest(own_seconds: list[float]) -> Slowest:
    slowest = slowest_over_mean(own_seconds)
    return Slowest(slowest, None if math.isnan(slowest) else int(np.argmax(own_seconds)))


def row_bytes(config: Config, bytes_per_value: int) -> int:
    """Of a row that travels, in one forward and backward; ``bytes_per_value``: as it is computed
    with."""
    travel, hidden = TravelFormats.of(config.moe.dispatch), config.model.hidden_size
    there, home = (f.row_bytes(hidden, bytes_per_value) for f in (travel.rows, travel.sums))
    return PASSES * (there + home)


def _traffic(by_rank: _ByRank, lap: Lap, *, rows_mib: float, copies_mib: float) -> Traffic:
    exposed = statistics.fmean(by_rank.exposed_seconds)
    return Traffic(
        rows_mib=rows_mib,
        rows_mib_with_copies=copies_mib,
        exposed_seconds=exposed,
        exposed_share=exposed / max(lap.step, 1e-9),
        node_mib=sum(by_rank.node_bytes) / MIB,
        remote_mib=sum(by_rank.remote_bytes) / MIB,
    )


def _own_seconds(
    outcome: StepOutcome, communication: StepCommunication, device: torch.device
) -> float:
    """Seconds in which this rank worked and waited for nobody, nan if they are not known: its
    expert kernels on a GPU, whose host does not see what the device waits for; on a CPU forward and
    backward."""
    if device.type == "cuda":
        return communication.kernel_seconds
    return outcome.cpu_seconds - communication.wait_cpu_seconds


def _count_over_ranks(
    outcome: StepOutcome, config: Config, runtime: Runtime
) -> tuple[LoadCounts, int, int]:
    """All counts of the step, rows sent, and rows that copies would have needed; one all-reduce."""
    ep, micro_batches = config.parallel.ep, len(outcome.layers)
    ranks_together = 1 if config.moe.rounding.scope == "rank" else ep
    group_LX = _group_counts(outcome, config)
    own_LX = _own_counts(outcome)
    summed_LX = _sum_over_ranks(np.concatenate([group_LX, own_LX], axis=1), runtime)
    # Every rank of an ep group has counted the whole group.
    group_LX = summed_LX[:, : group_LX.shape[1]] // ep
    own = dict(zip(OWN_COUNTS, summed_LX[:, group_LX.shape[1] :].T, strict=True))
    rows, copies = (int(own.pop(name).sum()) for name in ("rows_sent", "copies_sent"))
    counts = LoadCounts(
        freq_LE=group_LX[:, :-3],
        tiles_L=group_LX[:, -3],
        busiest_tiles_L=group_LX[:, -2],
        unrounded_tiles_L=group_LX[:, -1],
        **{f"{name}_L": counted_L for name, counted_L in own.items()},
        tile=config.moe.rounding.tile,
        ranks=ep,
        populations=micro_batches * runtime.ranks.world // ranks_together,
    )
    return counts, rows, copies


def _group_counts(outcome: StepOutcome, config: Config) -> IntArray:
    """[L, E + 3] of this ep group, over the micro-batches: top-k pairs of every expert, tiles that
    ran, those of the busiest rank, and those that top-k would have run."""
    tile, shape = config.moe.rounding.tile, (len(outcome.layers), -1, config.moe.num_experts)
    stats = [layer for layers in outcome.layers for layer in layers]
    if not stats:
        return np.zeros((0, config.moe.num_experts + 3), dtype=np.int64)
    freq_MLE = torch.stack([s.freq_E for s in stats]).cpu().numpy().reshape(shape)
    target_MLE = torch.stack([s.target_E for s in stats]).cpu().numpy().reshape(shape)
    tiles_MLE = tiles_of(target_MLE, tile)
    tiles_MLP = tiles_MLE.reshape(*tiles_MLE.shape[:2], config.parallel.ep, -1).sum(3)
    per_layer = [tiles_MLP.sum(2), tiles_MLP.max(2), tiles_of(freq_MLE, tile).sum(2)]
    counted_MLX = np.concatenate([freq_MLE, np.stack(per_layer, axis=2)], axis=2)
    counted_LX: IntArray = counted_MLX.sum(axis=0)
    return counted_LX


def _own_counts(outcome: StepOutcome) -> IntArray:
    """[L, len(OWN_COUNTS)] of this rank, over the micro-batches."""
    stats = [layer for layers in outcome.layers for layer in layers]
    if not stats:
        return np.zeros((0, len(OWN_COUNTS)), dtype=np.int64)
    counted_XC = torch.stack([s.own() for s in stats]).cpu().numpy()
    sent_XC = np.array([[s.rows_sent, s.copies_sent] for s in stats], dtype=np.int64)
    own_XC = np.concatenate([counted_XC, sent_XC], axis=1)
    summed: IntArray = own_XC.reshape(len(outcome.layers), -1, len(OWN_COUNTS)).sum(0)
    return summed


def _sum_over_ranks(counts: IntArray, runtime: Runtime) -> IntArray:
    # A model without experts has nothing to sum.
    if runtime.group is None or not counts.size:
        return counts
    tensor = torch.from_numpy(counts).to(runtime.device)
    dist.all_reduce(tensor)
    summed: IntArray = tensor.cpu().numpy()
    return summed


def _gather(
    outcome: StepOutcome, communication: StepCommunication, runtime: Runtime, lap: Lap
) -> _ByRank:
    values = [
        _own_seconds(outcome, communication, runtime.device),
        communication.exposed_seconds,
        communication.node_bytes,
        communication.remote_bytes,
        peak_memory_gib(runtime.device),
        lap.joules,
    ]
    if runtime.group is None:
        return _ByRank(*([value] for value in values))
    own = torch.tensor(values, dtype=torch.float64, device=runtime.device)
    gathered = [torch.empty_like(own) for _ in range(runtime.ranks.world)]
    dist.all_gather(gathered, own)
    return _ByRank(*torch.stack(gathered, dim=1).tolist())
