"""One training step, from batches to updated weights."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.config import MoEConfig
from distmoe.data.batches import Batch
from distmoe.engines import Engine, StepResult
from distmoe.model.linear_cross_entropy import IGNORE
from distmoe.model.transformer import LossSums
from distmoe.moe.expert_bias import update_expert_bias
from distmoe.moe.host_copy import enqueued
from distmoe.moe.layer import MoE
from distmoe.moe.stats import MoEStats
from distmoe.named_range import named_range
from distmoe.train.culprit import Witness


@dataclass(frozen=True)
class StepOutcome:
    """What a step did, over all ranks. Losses are means over the valid tokens of the global batch.

    ``layers[m][l]``: statistics of MoE layer l in micro-batch m, of this rank.
    ``cpu_seconds``: CPU time of this rank's process in forward and backward.
    ``forward_backward_seconds``: wall time, up to the loss of all ranks; ``optimizer_seconds``: of
    clipping and updates.
    ``not_finite``: of a skipped step, what was not finite first, and on which ranks; else "".
    ``document_tokens``: mean length of what a token attends inside of, see `count_tokens`.
    """

    loss: float
    load_balance_loss: float
    z_loss: float
    grad_norm: float
    skipped: bool
    valid_tokens: int
    cpu_seconds: float
    layers: list[list[MoEStats]]
    not_finite: str = ""
    forward_backward_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    document_tokens: float | None = None


def train_step(
    engine: Engine,
    batches: list[Batch],
    *,
    lr: float,
    moe: MoEConfig,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> StepOutcome:
    """Forward and backward of every micro-batch, then one update of the weights and of the experts'
    biases; collective over ``group``.

    Each rank's loss is a sum over its tokens divided by the valid tokens of the global batch, and
    gradients are summed, so that the result does not depend on how the batch is cut.
    """
    valid_tokens, document_tokens = count_tokens(batches, device=device, group=group)
    moe_layers = _begin(engine)
    begun = time.perf_counter()
    own = _forward_backward(
        engine, batches, moe_layers, valid_tokens=valid_tokens, moe=moe, device=device
    )
    if group is not None:
        dist.all_reduce(own.sums, group=group)
    loss, load_balance_loss, z_loss = own.sums.tolist()
    ended = time.perf_counter()
    finite = math.isfinite(loss)
    result = _update(engine, moe_layers, finite=finite, lr=lr, device=device, group=group)
    return StepOutcome(
        loss=loss,
        load_balance_loss=load_balance_loss,
        z_loss=z_loss,
        grad_norm=result.grad_norm,
        skipped=result.skipped,
        valid_tokens=valid_tokens,
        cpu_seconds=own.cpu_seconds,
        layers=own.layers,
        not_finite=own.witness.accuse(group) if result.skipped else "",
        document_tokens=document_tokens,
        forward_backward_seconds=ended - begun,
        optimizer_seconds=time.perf_counter() - ended,
    )


@dataclass(frozen=True)
class _Own:
    """Of this rank's micro-batches: its shares of the token, load-balance and z-loss [3]; the CPU
    time of its process; statistics by micro-batch and layer; and who saw what was not finite."""

    sums: Tensor
    cpu_seconds: float
    layers: list[list[MoEStats]]
    witness: Witness


def _begin(engine: Engine) -> list[MoE]:
    engine.model.train()
    moe_layers = engine.model.moe_layers()
    for layer in moe_layers:
        # What a skipped step has counted is forgotten here.
        layer.begin_step()
    return moe_layers


def _forward_backward(
    engine: Engine,
    batches: list[Batch],
    moe_layers: list[MoE],
    *,
    valid_tokens: int,
    moe: MoEConfig,
    device: torch.device,
) -> _Own:
    started = time.process_time()
    sums = torch.zeros(3, device=device)
    layers: list[list[MoEStats]] = []
    witness = Witness(engine.model)
    with witness.watching():
        for number, batch in enumerate(batches, 1):
            with named_range("forward"):
                out = _forward(engine, batch, device)
            witness.forward(out)
            token_loss = out.token_loss / valid_tokens
            balance = _mean([losses.load_balance for losses in out.layers], len(batches), device)
            z = _mean([losses.z for losses in out.layers], len(batches), device)
            router_loss = moe.load_balance_coef * balance + moe.z_loss_coef * z
            with named_range("backward"):
                loss = token_loss + len(out.layers) * router_loss
                engine.backward(loss, last=number == len(batches))
            sums += torch.stack([token_loss.detach(), balance.detach(), z.detach()])
            layers.append([layer.stats for layer in moe_layers])
    return _Own(sums, time.process_time() - started, layers, witness)


def _update(
    engine: Engine,
    moe_layers: list[MoE],
    *,
    finite: bool,
    lr: float,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> StepResult:
    """Of the weights and of the experts' biases; of neither, if loss or gradient is not finite."""
    with named_range("optimizer"):
        if finite:
            result = engine.step(lr)
            if not result.skipped:
                update_expert_bias(moe_layers, group=group)
        else:
            engine.discard()
            result = StepResult(grad_norm=math.nan, skipped=True)
    if device.type == "cuda":
        # The figures of the step wait for the device in any case; here its time is the update's.
        torch.cuda.synchronize(device)
    return result


def _forward(engine: Engine, batch: Batch, device: torch.device) -> LossSums:
    start_BS = None if batch.start_BS is None else enqueued(batch.start_BS, device)
    tokens_BS, labels_BS = enqueued(batch.tokens_BS, device), enqueued(batch.labels_BS, device)
    out: LossSums = engine.model(tokens_BS, labels_BS, start_BS)
    return out


def count_tokens(
    batches: list[Batch], *, device: torch.device, group: dist.ProcessGroup | None
) -> tuple[int, float]:
    """Over all micro-batches and ranks: tokens with a label, and the mean length of the document
    that a token attends inside of, the sequence's where documents are not told apart."""
    counts = torch.tensor(
        [
            sum(int((batch.labels_BS != IGNORE).sum()) for batch in batches),
            sum(batch.sum_of_squares() for batch in batches),
            sum(batch.tokens_BS.numel() for batch in batches),
        ],
        device=device,
    )
    if group is not None:
        dist.all_reduce(counts, group=group)
    valid, squares, tokens = counts.tolist()
    return valid, squares / tokens


@torch.no_grad()
def validation_loss(
    engine: Engine,
    batches: list[list[Batch]],
    *,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> float:
    """Mean cross entropy per token, in nats, with plain top-k routing; collective."""
    engine.model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in (batch for micro_batches in batches for batch in micro_batches):
        valid = (batch.labels_BS != IGNORE).sum().to(device)
        sums += torch.stack([_forward(engine, batch, device).token_loss, valid]).double()
    if group is not None:
        dist.all_reduce(sums, group=group)
    engine.model.train()
    return float(sums[0] / sums[1])


def _mean(parts: list[Tensor], num_micro: int, device: torch.device) -> Tensor:
    """Mean over layers, as this micro-batch's share of the step."""
    if not parts:
        return torch.zeros((), device=device)
    return torch.stack(parts).mean() / num_micro
