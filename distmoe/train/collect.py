"""From what every rank knows of a step to the record of the step."""

from __future__ import annotations

import statistics

import numpy as np
import torch
import torch.distributed as dist

from distmoe.config import Config
from distmoe.metrics.expert_load import ExpertLoad, IntArray, expert_load
from distmoe.metrics.memory import peak_memory_gib
from distmoe.metrics.record import StepRecord
from distmoe.metrics.throughput import slowest_over_mean, tokens_per_second_per_rank
from distmoe.runtime import Runtime
from distmoe.train.communication import StepCommunication
from distmoe.train.step import StepOutcome

MIB = 1 << 20

# x there, y back, dy there, dx back.
TRIPS = 4


def collect_step(
    outcome: StepOutcome,
    config: Config,
    runtime: Runtime,
    *,
    step: int,
    lr: float,
    step_seconds: float,
    data_seconds: float,
    communication: StepCommunication,
    bytes_per_value: int,
) -> tuple[StepRecord, IntArray]:
    """The record, and the top-k counts of the step over all ranks [L, E]; collective.

    Tiles are those of this rank's own ep group; pairs, rows and counts are over all ranks.
    """
    world = runtime.ranks.world
    freq_MLE, target_MLE, own = _layer_counts(outcome, config)
    load = (
        expert_load(
            freq_MLE.reshape(-1, config.moe.num_experts),
            target_MLE.reshape(-1, config.moe.num_experts),
            tile=config.moe.rounding.tile,
            num_ranks=config.parallel.ep,
        )
        if freq_MLE.size
        else ExpertLoad(1.0, 1.0, 0.0, 0.0, float("inf"), 0)
    )
    own = np.append(own, [communication.node_bytes, communication.remote_bytes])
    summed = _sum_over_ranks(np.concatenate([freq_MLE.sum(0).ravel(), own]), runtime)
    # Every rank of an ep group counts the whole group.
    freq_LE = (summed[: -len(own)] // config.parallel.ep).reshape(freq_MLE.shape[1:])
    dropped, added, without_expert, rows, copies, *sent = summed[-len(own) :].tolist()
    compute_seconds, exposed_seconds = _gather(
        [outcome.compute_seconds, communication.exposed_seconds], runtime
    )
    exposed = statistics.fmean(exposed_seconds)
    row_mib = config.model.hidden_size * bytes_per_value * TRIPS / MIB
    record = StepRecord(
        step=step,
        loss=outcome.loss,
        load_balance_loss=outcome.load_balance_loss,
        z_loss=outcome.z_loss,
        lr=lr,
        grad_norm=outcome.grad_norm,
        skipped=outcome.skipped,
        tokens=outcome.valid_tokens,
        step_seconds=step_seconds,
        data_seconds=data_seconds,
        tokens_per_second_per_rank=tokens_per_second_per_rank(
            outcome.valid_tokens, step_seconds, world
        ),
        slowest_over_mean=slowest_over_mean(compute_seconds),
        memory_gib=peak_memory_gib(runtime.device),
        pairs=int(freq_LE.sum()),
        pairs_dropped=dropped,
        pairs_added=added,
        tokens_without_expert=without_expert,
        rows_mib=rows * row_mib,
        rows_mib_with_copies=copies * row_mib,
        exposed_seconds=exposed,
        exposed_share=exposed / max(step_seconds, 1e-9),
        node_mib=sent[0] / MIB,
        remote_mib=sent[1] / MIB,
        load=load,
    )
    return record, freq_LE


def _layer_counts(outcome: StepOutcome, config: Config) -> tuple[IntArray, IntArray, IntArray]:
    """Top-k and rounded counts of this ep group [M, L, E], and this rank's own sums [5]."""
    stats = [layer for layers in outcome.layers for layer in layers]
    shape = (len(outcome.layers), -1, config.moe.num_experts)
    if not stats:
        empty = np.zeros((len(outcome.layers), 0, config.moe.num_experts), dtype=np.int64)
        return empty, empty, np.zeros(5, dtype=np.int64)
    freq = torch.stack([s.freq_E for s in stats]).cpu().numpy().reshape(shape)
    target = torch.stack([s.target_E for s in stats]).cpu().numpy().reshape(shape)
    own = torch.stack([s.own() for s in stats]).sum(0).cpu().numpy()
    return freq, target, own


def _sum_over_ranks(counts: IntArray, runtime: Runtime) -> IntArray:
    if runtime.group is None:
        return counts
    tensor = torch.from_numpy(counts).to(runtime.device)
    dist.all_reduce(tensor)
    summed: IntArray = tensor.cpu().numpy()
    return summed


def _gather(values: list[float], runtime: Runtime) -> list[list[float]]:
    """For each of ``values`` those of all ranks."""
    if runtime.group is None:
        return [[value] for value in values]
    own = torch.tensor(values, device=runtime.device)
    gathered = [torch.empty_like(own) for _ in range(runtime.ranks.world)]
    dist.all_gather(gathered, own)
    by_value: list[list[float]] = torch.stack(gathered, dim=1).tolist()
    return by_value
