"""Router logits do not depend on how the rows are cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distmoe.kernels.router_logits import router_logits
from distmoe.kernels.testing import assert_as_good_as


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(96, 200, generator=generator).to(dtype)
    w_EH = torch.randn(24, 200, generator=generator).to(dtype)
    whole = router_logits(x_TH, w_EH)
    for rows in (1, 2, 3, 7, 16, 31, 64):
        parts = [router_logits(part, w_EH) for part in x_TH.split(rows)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(n, 20, generator=generator).to(dtype) for n in (30, 6)]
    dlogits = torch.randn(30, 6, generator=generator)

    def gradients(cast: torch.dtype, function: object) -> list[torch.Tensor]:
        x, w = (t.to(cast).requires_grad_() for t in inputs)
        out = function(x, w)  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out, (x, w), dlogits.to(out.dtype))]

    got = gradients(dtype, router_logits)
    same = gradients(dtype, lambda x, w: x @ w.T)
    want = gradients(torch.float64, lambda x, w: x @ w.T)
    for name, *three in zip(("logits", "dx", "dw"), got, same, want, strict=True):
        assert_as_good_as(three[0], three[1], three[2].float(), name)


@pytest.fixture
def _keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_keep_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_neighbours_change_no_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x_TH = torch.randn(257, 384, generator=generator).to(dtype)
    w_EH = torch.randn(40, 384, generator=generator).to(dtype)
    whole = router_logits(x_TH, w_EH)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(router_logits(x_TH.flip(0), w_EH).flip(0), whole)
        for rows in (1, 5, 64, 200):
            parts = [router_logits(part, w_EH) for part in x_TH.split(rows)]
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x_TH = torch.randn(64, 300, generator=generator).to(dtype)
    w_EH = torch.randn(12, 300, generator=generator).to(dtype)
    exact = x_TH.double() @ w_EH.double().T
    half_ulp = 2.0**-24 * exact.abs()
    assert ((router_logits(x_TH, w_EH).double() - exact).abs() <= half_ulp).all()


def test_saves_the_tokens_in_their_own_dtype() -> None:
    x_TH, w_EH = (torch.randn(n, 20).bfloat16().requires_grad_() for n in (30, 6))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype), lambda t: t):
        router_logits(x_TH, w_EH)
    assert saved == [torch.bfloat16] * 2


def test_no_tokens() -> None:
    x_TH, w_EH = torch.zeros(0, 20), torch.ones(6, 20, requires_grad=True)
    router_logits(x_TH, w_EH).sum().backward()
    assert torch.equal(w_EH.grad, torch.zeros(6, 20))
