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
from distmoe.model.transformer import IGNORE, LossSums
from distmoe.moe.expert_bias import update_expert_bias
from distmoe.moe.layer import MoE
from distmoe.moe.stats import MoEStats
from distmoe.named_range import named_range
from distmoe.train.culprit import Witness


@dataclass(frozen=True)
class StepOutcome:
    """What a step did, over all ranks. Losses are means over the valid tokens of the global batch.

    ``layers[m][l]``: statistics of MoE layer l in micro-batch m, of this rank.
    ``compute_seconds``: this rank's time in forward and backward; CPU time on a CPU.
    ``forward_backward_seconds``: wall time, up to the loss of all ranks; ``optimizer_seconds``: of
    clipping and updates.
    ``not_finite``: of a skipped step, what was not finite first, and on which ranks; else "".
    """

    loss: float
    load_balance_loss: float
    z_loss: float
    grad_norm: float
    skipped: bool
    valid_tokens: int
    compute_seconds: float
    layers: list[list[MoEStats]]
    not_finite: str = ""
    forward_backward_seconds: float = 0.0
    optimizer_seconds: float = 0.0


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
    valid_tokens = count_valid(batches, device=device, group=group)
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
        compute_seconds=own.compute_seconds,
        layers=own.layers,
        not_finite=own.witness.accuse(group) if result.skipped else "",
        forward_backward_seconds=ended - begun,
        optimizer_seconds=time.perf_counter() - ended,
    )


@dataclass(frozen=True)
class _Own:
    """Of this rank's micro-batches: its shares of the token, load-balance and z-loss [3]; the
    seconds that it worked; statistics by micro-batch and layer; and who saw what was not finite."""

    sums: Tensor
    compute_seconds: float
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
    # On a CPU the time that the rank worked, without its waits for peers.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    started = clock()
    sums = torch.zeros(3, device=device)
    layers: list[list[MoEStats]] = []
    witness = Witness(engine.model)
    with witness.watching():
        for batch in batches:
            with named_range("forward"):
                out: LossSums = engine.model(batch.tokens_BS.to(device), batch.labels_BS.to(device))
            witness.forward(out)
            token_loss = out.token_loss / valid_tokens
            balance = _mean([losses.load_balance for losses in out.layers], len(batches), device)
            z = _mean([losses.z for losses in out.layers], len(batches), device)
            router_loss = moe.load_balance_coef * balance + moe.z_loss_coef * z
            with named_range("backward"):
                engine.backward(token_loss + len(out.layers) * router_loss)
            sums += torch.stack([token_loss.detach(), balance.detach(), z.detach()])
            layers.append([layer.stats for layer in moe_layers])
    return _Own(sums, clock() - started, layers, witness)


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


def count_valid(
    batches: list[Batch], *, device: torch.device, group: dist.ProcessGroup | None
) -> int:
    """Tokens with a label, over all micro-batches and ranks."""
    valid = torch.tensor(
        sum(int((batch.labels_BS != IGNORE).sum()) for batch in batches), device=device
    )
    if group is not None:
        dist.all_reduce(valid, group=group)
    return int(valid)


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
        labels_BS = batch.labels_BS.to(device)
        out: LossSums = engine.model(batch.tokens_BS.to(device), labels_BS)
        sums += torch.stack([out.token_loss, (labels_BS != IGNORE).sum()]).double()
    if group is not None:
        dist.all_reduce(sums, group=group)
    engine.model.train()
    return float(sums[0] / sums[1])


def _mean(parts: list[Tensor], num_micro: int, device: torch.device) -> Tensor:
    """Mean over layers, as this micro-batch's share of the step."""
    if not parts:
        return torch.zeros((), device=device)
    return torch.stack(parts).mean() / num_micro
