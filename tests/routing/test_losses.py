"""Router losses: shares of the ranks add up to the loss of the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.kernels.router_topk.torch_backend import choose_top_k, integer_keys
from distmoe.kernels.testing import assert_as_good_as
from distmoe.routing.losses import load_balance_loss, z_loss

T, E, K = 37, 6, 2
CUTS = [20, 0, 17]


def make_logits() -> Tensor:
    return 2 * torch.randn(T, E, generator=torch.Generator().manual_seed(0))


def switch_loss(prob_TE: Tensor, freq_E: Tensor) -> Tensor:
    """E sum_e (share of the pairs) (mean probability)."""
    return E * (freq_E / freq_E.sum() * prob_TE.mean(0)).sum()


def test_load_balance_shares_add_up_with_their_gradients() -> None:
    whole_TE = make_logits().requires_grad_()
    exact_TE = make_logits().double().requires_grad_()
    parts_TE = make_logits().requires_grad_()
    freq_E = choose_top_k(integer_keys(whole_TE.softmax(1)), K).sum(0)
    sizes = {"freq_tokens": T, "num_tokens": T, "top_k": K}
    shares = [load_balance_loss(p.softmax(1), freq_E, **sizes) for p in parts_TE.split(CUTS)]
    total = torch.stack(shares).sum()
    total.backward()
    whole = switch_loss(whole_TE.softmax(1), freq_E)
    whole.backward()
    exact = switch_loss(exact_TE.softmax(1), freq_E)
    exact.backward()
    assert total.dtype == torch.float32
    assert_as_good_as(total, whole, exact.float())
    assert_as_good_as(parts_TE.grad, whole_TE.grad, exact_TE.grad.float())


def test_even_load_costs_one_and_uneven_load_more() -> None:
    even_TE = torch.full((T, E), 1 / E)
    sizes = {"freq_tokens": T, "num_tokens": T, "top_k": K}
    even = load_balance_loss(even_TE, torch.full((E,), T * K / E), **sizes)
    assert abs(float(even) - 1) < 1e-6
    uneven_TE = make_logits().softmax(1)
    freq_E = choose_top_k(integer_keys(uneven_TE), K).sum(0)
    assert float(load_balance_loss(uneven_TE, freq_E, **sizes)) > 1


def test_z_loss_shares_add_up() -> None:
    logits_TE = make_logits()
    total = sum(z_loss(part, num_tokens=T) for part in logits_TE.split(CUTS))
    whole = logits_TE.logsumexp(1).square().mean()
    exact = logits_TE.double().logsumexp(1).square().mean()
    assert_as_good_as(total, whole, exact.float())
    assert z_loss(logits_TE.bfloat16(), num_tokens=T).dtype == torch.float32
