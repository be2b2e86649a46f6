"""Packed rows: both backends give the same bytes, and what comes out is what e4m3 allows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distmoe.kernels.fp8_rows import dequantize_rows, packed_bytes, quantize_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half the distance of e4m3 numbers over the lower of the two, and half the smallest one.
MOST_RELATIVE, SMALLEST_HALF = 2**-4, 2**-10


def rows(hidden: int, dtype: torch.dtype, num_rows: int = 9) -> Tensor:
    """Of magnitudes that differ by block and by value; a row of zeros, and signs of zero."""
    g = torch.Generator().manual_seed(hidden)
    x_TH = torch.randn(num_rows, hidden, generator=g)
    x_TH *= torch.exp2(torch.randint(-12, 3, (num_rows, hidden), generator=g))
    x_TH[1::3] *= 2.0**-9
    x_TH[2] = 0.0
    x_TH[2, ::2] = -0.0
    x_TH[0, 0] = 448.0
    return x_TH.to(DEVICE, dtype)


def packed(x_TH: Tensor, backend: str) -> Tensor:
    """Without the bytes that nobody reads."""
    hidden = x_TH.shape[1]
    used = hidden + -(-hidden // 128)
    return quantize_rows(x_TH, backend=backend).view(torch.uint8)[:, :used]


def through(x_TH: Tensor, backend: str = "torch") -> Tensor:
    out_TH = torch.full_like(x_TH, float("nan"))
    dequantize_rows(quantize_rows(x_TH, backend=backend), out_TH, backend=backend)
    return out_TH


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [16, 128, 200, 1003])
def test_backends_give_the_same_bytes(hidden: int, dtype: torch.dtype) -> None:
    x_TH = rows(hidden, dtype)
    torch.testing.assert_close(packed(x_TH, "triton"), packed(x_TH, "torch"), atol=0, rtol=0)
    assert quantize_rows(x_TH).view(torch.uint8).shape == (9, packed_bytes(hidden))
    token_R = torch.tensor([8, 0, 0, 3, 2, 1], device=DEVICE)
    out_RH = {name: x_TH.new_full((6, hidden), float("nan")) for name in ("torch", "triton")}
    for name, out in out_RH.items():
        dequantize_rows(quantize_rows(x_TH, backend=name), out, token_R=token_R, backend=name)
    torch.testing.assert_close(out_RH["triton"], out_RH["torch"], atol=0, rtol=0)
    torch.testing.assert_close(out_RH["triton"], through(x_TH, "triton")[token_R], atol=0, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_is_rounded_once_by_the_scale_of_its_block(dtype: torch.dtype) -> None:
    x_TH = rows(640, dtype)
    got_TH, x_TH = through(x_TH).double(), x_TH.double()
    largest_TB1 = x_TH.view(9, 5, 128).abs().amax(2, keepdim=True).expand(9, 5, 128)
    scale_TH = torch.exp2(torch.ceil(torch.log2(largest_TB1 / 448).clamp(min=-126))).view(9, 640)
    allowed_TH = torch.maximum(x_TH.abs() * MOST_RELATIVE, scale_TH * SMALLEST_HALF)
    assert ((got_TH - x_TH).abs() <= allowed_TH).all()
    # By exact numbers: the nearest of e4m3, in units of a scale that is a power of two.
    nearest_TH = (x_TH / scale_TH).float().to(torch.float8_e4m3fn).double() * scale_TH
    torch.testing.assert_close(got_TH, nearest_TH, atol=0, rtol=0)
    assert torch.equal(torch.signbit(got_TH), torch.signbit(x_TH))


def test_to_pack_again_changes_nothing() -> None:
    for dtype in DTYPES:
        once_TH = through(rows(640, dtype))
        torch.testing.assert_close(through(once_TH), once_TH, atol=0, rtol=0)


def test_the_dtype_of_the_rows_changes_nothing() -> None:
    """bf16 values give the same rows in bf16 as in fp32: unpacking rounds no second time."""
    x_TH = rows(640, torch.bfloat16)
    torch.testing.assert_close(through(x_TH).float(), through(x_TH.float()), atol=0, rtol=0)


# In the interpreter.
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible(backend: str, value: float) -> None:
    x_TH = rows(256, torch.bfloat16)
    x_TH[4, 130] = value
    got_TH = through(x_TH, backend)
    assert got_TH[4, 128:].isnan().all()
    assert got_TH[4, :128].isfinite().all()
    assert got_TH[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_ends_of_the_range(backend: str) -> None:
    """No scale or inverse is subnormal or infinite, and nothing is divided by 0."""
    x_TH = torch.zeros(5, 128, device=DEVICE)
    ends = [2.0**-149, 2.0**-126, 448.0, torch.finfo(torch.float32).max / 2, 3.0e38]
    x_TH[:, 7] = torch.tensor(ends, device=DEVICE)
    got_TH = through(x_TH, backend)
    # e4m3 has no number that small in units of the smallest scale.
    assert (got_TH[0] == 0).all()
    relative = (got_TH[1:, 7] / x_TH[1:, 7] - 1).abs()
    assert (relative <= MOST_RELATIVE).all()
    assert (got_TH[:, :7] == 0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_rows(backend: str) -> None:
    assert through(torch.empty(0, 256, device=DEVICE), backend).shape == (0, 256)
