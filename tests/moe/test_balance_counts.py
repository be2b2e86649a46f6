"""The load-balance loss in every scope against loops over tokens, on P ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distmoe import MoE, MoEConfig
from distmoe.comm import Transfer
from distmoe.config import ParallelConfig, RoundingConfig
from distmoe.kernels.testing import assert_as_good_as
from distmoe.mesh import build_mesh
from distmoe.moe.routing_tape import RoutingTape
from distmoe.routing.rounding.reference import top_k_reference

H, E, K, B, S, MICRO = 16, 8, 2, 2, 5, 3
SCOPES = get_args(get_type_hints(MoEConfig)["load_balance_scope"])
CONFIG = MoEConfig(
    hidden_size=H, intermediate_size=4, num_experts=E, top_k=K, rounding=RoundingConfig("none")
)
ROUTER_EH = torch.randn(E, H, generator=torch.Generator().manual_seed(0))


def inputs(num_ranks: int) -> Tensor:
    """[micro-batch, rank, B, S, H]"""
    shape = (MICRO, num_ranks, B, S, H)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.3


def make_layer(rank: int, scope: str, num_ranks: int, ep: int, **changes: Any) -> MoE:
    group = None
    if num_ranks > 1:
        group = build_mesh(ParallelConfig(dp_shard=num_ranks, ep=ep), device_type="cpu").ep_group
    layer = MoE(replace(CONFIG, load_balance_scope=scope, **changes), group)
    with torch.no_grad():
        layer.router_EH.copy_(ROUTER_EH)
    return layer


def run_layer(rank: int, scope: str, x: Tensor, ep: int) -> tuple[list[Tensor], Tensor]:
    """This rank's shares, a micro-batch each, and the gradient of their sum."""
    layer = make_layer(rank, scope, x.shape[1], ep)
    layer.begin_step()
    shares = []
    for x_BSH in x[:, rank]:
        _, losses = layer(x_BSH)
        losses.load_balance.backward()
        shares.append(losses.load_balance.detach())
    assert layer.router_EH.grad is not None
    return shares, layer.router_EH.grad


def parts_of(scope: str, micro: int, ranks: int, ep: int) -> list[tuple[list, list]]:
    """Sequences (micro-batch, rank, sequence) that are counted, and those that are averaged."""
    now = [(micro, r, b) for r in range(ranks) for b in range(B)]
    if scope == "global":
        return [([(m, r, b) for m in range(micro + 1) for _, r, b in now], now)]
    key = {
        "micro_batch": lambda at: 0,
        "ep": lambda at: at[1] // ep,
        "rank": lambda at: at[1],
        "sequence": lambda at: at[1:],
    }[scope]
    groups = [[at for at in now if key(at) == k] for k in sorted({key(at) for at in now})]
    return [(group, group) for group in groups]


def by_loops(scope: str, x: Tensor, ep: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """The losses of all tokens, and the gradient of their sum."""
    router_EH = ROUTER_EH.clone().to(dtype).requires_grad_()
    prob = (x.to(dtype) @ router_EH.T).softmax(-1)
    keys = ((x.double() @ ROUTER_EH.double().T).float().softmax(-1) * 2**24).floor().int()
    chosen = top_k_reference(keys.view(-1, E), K).view(*x.shape[:-1], E)
    losses = []
    for micro in range(MICRO):
        parts = []
        for counted, averaged in parts_of(scope, micro, x.shape[1], ep):
            freq_E = sum(chosen[at].sum(0) for at in counted)
            mean_E = sum(prob[at].sum(0) for at in averaged) / (len(averaged) * S)
            share_E = freq_E / (len(counted) * S * K)
            parts.append(E * sum(share_E[e] * mean_E[e] for e in range(E)))
        losses.append(sum(parts) / len(parts))
    sum(losses).backward()
    assert router_EH.grad is not None
    return [loss.detach() for loss in losses], router_EH.grad


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("num_ranks", "ep"), [(1, 1), (2, 2), (4, 2)])
def test_shares_add_up_to_the_loss_by_loops(scope: str, num_ranks: int, ep: int) -> None:
    x = inputs(num_ranks)
    results = run_ranks(run_layer, num_ranks, scope, x, ep)
    exact, exact_grad = by_loops(scope, x, ep, torch.float64)
    same, same_grad = by_loops(scope, x, ep, torch.float32)
    for micro in range(MICRO):
        total = torch.stack([shares[micro] for shares, _ in results]).sum()
        assert_as_good_as(total, same[micro], exact[micro].float(), f"micro-batch {micro}")
    grad = torch.stack([grad for _, grad in results]).sum(0)
    assert_as_good_as(grad, same_grad, exact_grad.float(), "gradient")


def test_the_scopes_differ() -> None:
    x = inputs(4)
    found = [float(by_loops(scope, x, 2, torch.float64)[0][-1]) for scope in SCOPES]
    assert len({round(loss, 5) for loss in found}) == len(SCOPES)


def test_without_begin_step_every_forward_is_by_itself() -> None:
    x = inputs(1)[:, 0]
    layer, other = make_layer(0, "global", 1, 1), make_layer(0, "micro_batch", 1, 1)
    for x_BSH in x:
        assert torch.equal(layer(x_BSH)[1].load_balance, other(x_BSH)[1].load_balance)


def test_a_step_forgets_the_one_before_and_never_counts_evaluation() -> None:
    x = inputs(1)[:, 0]
    layer = make_layer(0, "global", 1, 1)

    def step() -> list[float]:
        layer.begin_step()
        return [layer(x_BSH)[1].load_balance.item() for x_BSH in x]

    first = step()
    layer.eval()
    layer(x[0])
    layer.train()
    assert step() == first
    layer.begin_step()
    layer(x[0])
    layer.eval()
    layer(x[2])
    layer.train()
    assert layer(x[1])[1].load_balance.item() == first[1]


@pytest.mark.parametrize("scope", SCOPES)
def test_only_scopes_that_need_it_communicate(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    run_ranks(run_layer, 2, scope, inputs(2), 2)
    assert len(calls) == (2 * MICRO if scope in ("global", "micro_batch") else 0)


@pytest.mark.parametrize("scope", ["global", "micro_batch", "ep"])
def test_no_row_waits_for_a_rank_of_another_ep_group(scope: str) -> None:
    """Rank 3 comes when rank 0 has sent its rows; where the loss needs nobody else, when rank 0 has
    its loss."""
    gone = threading.Event()

    def run(rank: int) -> bool:
        layer = make_layer(rank, scope, 4, 2)
        came = gone.wait(5.0) if rank == 3 else True
        post_send = layer.exchange.post_send

        def posted(transfer: Transfer, send: Mapping[int, Tensor]) -> None:
            post_send(transfer, send)
            if rank == 0 and transfer.kind == "rows" and scope != "ep":
                gone.set()

        layer.exchange.post_send = posted
        layer(inputs(4)[0, rank])
        if rank == 0:
            gone.set()
        return came

    assert all(run_ranks(run, 4, backend="gloo"))


def test_the_wait_for_late_ranks_is_seen() -> None:
    def run(rank: int) -> list[float]:
        layer = make_layer(rank, "global", 4, 2)
        dist.barrier()
        if rank == 3:
            time.sleep(0.2)
        layer(inputs(4)[0, rank])
        return [observer.wait_seconds for observer in layer.observers()]

    of_rows, of_loss = run_ranks(run, 4, backend="gloo")[0]
    assert of_rows < 0.1 < of_loss


def test_a_recomputed_forward_sums_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *a, **k: (calls.append(1), real(*a, **k))[1])

    def run(rank: int, checkpointed: bool) -> Tensor:
        layer = make_layer(rank, "global", 2, 2)
        x_BSH = inputs(2)[0, rank]
        if checkpointed:
            contexts = RoutingTape.contexts
            _, losses = checkpoint(layer, x_BSH, use_reentrant=False, context_fn=contexts)
        else:
            _, losses = layer(x_BSH)
        losses.load_balance.backward()
        return layer.router_EH.grad

    plain = run_ranks(run, 2, False, backend="gloo")
    posted = len(calls)
    again = run_ranks(run, 2, True, backend="gloo")
    assert posted == 2
    assert len(calls) == 2 * posted
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_every_ep_group_has_the_same_weight_in_scope_ep() -> None:
    """Here one of them has twice the tokens, of the same kind."""
    x_BSH = inputs(1)[0, 0]
    few, many = x_BSH[:1], x_BSH[:1].repeat(2, 1, 1)

    def run(rank: int) -> float:
        layer = make_layer(rank, "ep", 4, 2)
        return layer(many if rank > 1 else few)[1].load_balance.item()

    shares = run_ranks(run, 4)
    assert shares[0] == pytest.approx(shares[2], rel=1e-6)
    alone = make_layer(0, "rank", 1, 1)(few)[1].load_balance.item()
    assert sum(shares) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_without_any_token_losses_and_gradients_are_zero(scope: str, num_ranks: int) -> None:
    def run(rank: int) -> list[float]:
        layer = make_layer(rank, scope, num_ranks, num_ranks)
        _, losses = layer(torch.zeros(0, H))
        (losses.load_balance + losses.z).backward()
        gradient = layer.router_EH.grad.abs().max().item()
        return [losses.load_balance.item(), losses.z.item(), gradient]

    assert run_ranks(run, num_ranks) == [[0.0, 0.0, 0.0]] * num_ranks


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", [(0, H), (0, S, H), (B, 0, H)])
def test_a_rank_without_tokens_has_loss_zero(scope: str, shape: tuple[int, ...]) -> None:
    def run(rank: int) -> tuple[float, float]:
        layer = make_layer(rank, scope, 2, 2)
        _, losses = layer(inputs(2)[0, rank] if rank else torch.zeros(shape))
        return losses.load_balance.item(), losses.z.item()

    (empty, empty_z), (full, full_z) = run_ranks(run, 2)
    assert (empty, empty_z) == (0, 0)
    assert min(full, full_z) > 0


def test_two_dimensions_are_one_sequence() -> None:
    x_BSH = inputs(1)[0, 0]
    sequence, rank = make_layer(0, "sequence", 1, 1), make_layer(0, "rank", 1, 1)
    flat = x_BSH.flatten(0, 1)
    assert torch.equal(sequence(flat)[1].load_balance, rank(flat)[1].load_balance)
    assert not torch.equal(sequence(x_BSH)[1].load_balance, rank(x_BSH)[1].load_balance)


def test_scores_of_a_sigmoid_are_divided_by_their_sum() -> None:
    x_TH = inputs(1)[0, 0].flatten(0, 1)
    layer = make_layer(0, "rank", 1, 1, router="sigmoid_topk")
    score_TE = (x_TH.double() @ ROUTER_EH.double().T).sigmoid()
    prob_TE = score_TE / score_TE.sum(1, keepdim=True)
    chosen_TE = top_k_reference((score_TE.float() * 2**24).floor().int(), K)
    want = sum(chosen_TE[:, e].sum() / (B * S * K) * prob_TE[:, e].mean() for e in range(E)) * E
    assert layer(x_TH)[1].load_balance.item() == pytest.approx(float(want), rel=1e-6)
