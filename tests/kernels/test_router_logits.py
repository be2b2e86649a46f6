"""Router logits do not depend on how the rows are cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distmoe.kernels.router_logits import router_logits
from distmoe.kernels.testing import assert_as_good_as, poisoned_empty
from distmoe.registry import ROUTER_LOGITS_BACKENDS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
def test_the_reference_rounds_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x_TH = torch.randn(64, 300, generator=generator).to(dtype)
    w_EH = torch.randn(12, 300, generator=generator).to(dtype)
    exact = x_TH.double() @ w_EH.double().T
    half_ulp = 2.0**-24 * exact.abs()
    assert ((router_logits(x_TH, w_EH).double() - exact).abs() <= half_ulp).all()


@pytest.mark.parametrize("backend", list(ROUTER_LOGITS_BACKENDS))
def test_saves_the_tokens_in_their_own_dtype(backend: str) -> None:
    x_TH, w_EH = (torch.randn(n, 20, device=DEVICE).bfloat16().requires_grad_() for n in (30, 6))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype), lambda t: t):
        router_logits(x_TH, w_EH, backend=backend)
    assert saved == [torch.bfloat16] * 2


@pytest.mark.parametrize("backend", list(ROUTER_LOGITS_BACKENDS))
def test_no_tokens(backend: str) -> None:
    x_TH = torch.zeros(0, 20, device=DEVICE).bfloat16()
    w_EH = torch.ones(6, 20, device=DEVICE).bfloat16().requires_grad_()
    router_logits(x_TH, w_EH, backend=backend).sum().backward()
    assert torch.equal(w_EH.grad, torch.zeros_like(w_EH))


# Tokens, H, E: more than a tile of each and no multiple of one, more than a slice of tokens.
SHAPES = [(30, 20, 6), (150, 136, 70), (1100, 64, 64), (1, 200, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", list(ROUTER_LOGITS_BACKENDS))
def test_bf16_logits_and_gradients(backend: str, shape: tuple[int, int, int]) -> None:
    num_tokens, H, E = shape
    generator = torch.Generator().manual_seed(sum(shape))
    inputs = [torch.randn(n, H, generator=generator).bfloat16().to(DEVICE) for n in (num_tokens, E)]
    dlogits = torch.randn(num_tokens, E, generator=generator).to(DEVICE)

    def results(dtype: torch.dtype, function: object) -> list[torch.Tensor]:
        x, w = (t.to(dtype).requires_grad_() for t in inputs)
        out = function(x, w)  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out, (x, w), dlogits.to(out.dtype))]

    with poisoned_empty():
        got = results(torch.bfloat16, lambda x, w: router_logits(x, w, backend=backend))
    same = results(torch.bfloat16, lambda x, w: x @ w.T)
    want = results(torch.float64, lambda x, w: x @ w.T)
    for name, *three in zip(("logits", "dx", "dw"), got, same, want, strict=True):
        assert_as_good_as(three[0], three[1], three[2].float(), name)
    # Far better than bf16 logits: as good as an fp32 product of the same numbers.
    in_fp32 = inputs[0].float() @ inputs[1].float().T
    assert_as_good_as(got[0], in_fp32, want[0].float(), "logits against fp32")


@pytest.mark.gpu
def test_the_kernel_is_batch_invariant() -> None:
    """On tensor cores; the interpreter multiplies by a BLAS, which treats rows by their place."""
    generator = torch.Generator().manual_seed(5)
    x_TH = torch.randn(150, 136, generator=generator).bfloat16().cuda()
    w_EH = torch.randn(70, 136, generator=generator).bfloat16().cuda()
    whole = router_logits(x_TH, w_EH, backend="triton")
    for rows in (1, 33, 64, 100):
        parts = [router_logits(part, w_EH, backend="triton") for part in x_TH.split(rows)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("backend", list(ROUTER_LOGITS_BACKENDS))
def test_small_differences_of_the_gradient_survive(backend: str) -> None:
    """1 + 2^-10 is 1 in bf16: what is left of it after a subtraction is not."""
    x_TH, w_EH = (torch.ones(2, 8, device=DEVICE).bfloat16().requires_grad_() for _ in range(2))
    dlogits_TE = torch.tensor([[1 + 2**-10, -1.0], [-1.0, 1.0]], device=DEVICE)
    router_logits(x_TH, w_EH, backend=backend).backward(dlogits_TE)
    assert x_TH.grad.tolist() == [[2**-10] * 8, [0.0] * 8]
    assert w_EH.grad.tolist() == [[2**-10] * 8, [0.0] * 8]
