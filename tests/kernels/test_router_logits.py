"""Router logits do not depend on how the rows are cut."""

from __future__ import annotations

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
