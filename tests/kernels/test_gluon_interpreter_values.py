"""The interpreter of Gluon kernels: types, numbers and memory of small pieces of kernels."""

from __future__ import annotations

from collections.abc import Callable

import gluon_kernels
import numpy as np
import pytest
import torch
from gluon_interpreter import KernelError
from gluon_interpreter.races import Region
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from distmoe.kernels.testing import assert_as_good_as

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")

LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
NAN, INF = float("nan"), float("inf")


@gluon.jit
def int_kernel(x_ptr, y_ptr, out_ptr, WHAT: gl.constexpr, BLOCK: gl.constexpr):
    place = gl.arange(0, BLOCK, LAYOUT)
    x, y = gl.load(x_ptr + place), gl.load(y_ptr + place)
    if WHAT == "+":
        out = x + y
    elif WHAT == "-":
        out = x - y
    elif WHAT == "*":
        out = x * y
    elif WHAT == "//":
        out = x // y
    elif WHAT == "%":
        out = x % y
    elif WHAT == ">>":
        out = x >> 1
    elif WHAT == "maximum":
        out = gl.maximum(x, y)
    elif WHAT == "sum":
        out = gl.sum(x, 0) + place
    else:
        out = gl.where((x < y) & (place != 1), x, y)
    gl.store(out_ptr + place, out)


def ints(what: str, x: list[int], y: list[int], dtype: torch.dtype = torch.int32) -> list[int]:
    out = torch.empty(len(x), dtype=dtype)
    given = torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype)
    int_kernel[(1,)](*given, out, WHAT=what, BLOCK=len(x))
    return out.tolist()


@pytest.mark.parametrize(
    ("what", "want"),
    [
        ("+", [9, -9, 5, 7]),
        ("-", [5, -5, 9, 9]),
        ("*", [14, 14, -14, -8]),
        # As in C: towards zero, and the remainder has the sign of the dividend.
        ("//", [3, 3, -3, -8]),
        ("%", [1, -1, 1, 0]),
        (">>", [3, -4, 3, 4]),
        ("maximum", [7, -2, 7, 8]),
        ("sum", [15, 16, 17, 18]),
        ("where", [2, -2, -2, -1]),
    ],
)
def test_integers(what: str, want: list[int]) -> None:
    assert ints(what, [7, -7, 7, 8], [2, -2, -2, -1]) == want


@pytest.mark.parametrize("what", ["+", "-", "*", "sum"])
def test_int32_overflow_is_found(what: str) -> None:
    most = 2**31 - 1
    x, y = ([most, most], [1, 1]) if what != "-" else ([-most, 0], [2, 0])
    with pytest.raises(KernelError, match=r"out = .* overflows int32"):
        ints(what, x, [2, 2] if what == "*" else y)
    assert ints(what, x, y, torch.int64)


def test_division_by_zero_is_found() -> None:
    with pytest.raises(KernelError, match="division by zero"):
        ints("%", [1, 2], [1, 0])


@gluon.jit
def scalar_kernel(out_ptr, a, b, C: gl.constexpr):
    total = 0
    for i in range(a, b, 2):
        total += i * (1 if i > 3 else -1)
    while total > 100:
        total -= 100
    gl.store(out_ptr, total)
    gl.store(out_ptr + 1, -a // 2)
    gl.store(out_ptr + 2, gl.program_id(0) + gl.num_programs(0) * gl.num_warps())
    gl.store(out_ptr + 4 - 1, min(a, b) % 2)
    gl.store(out_ptr + 4, C // 2)


@gluon.jit
def place_kernel(out_ptr, width: gl.constexpr):
    x, y = gl.program_id(0), gl.program_id(1)
    gl.store(out_ptr + y * gl.num_programs(0) + x, x * 10 + y + width)


def test_grids() -> None:
    out = torch.zeros(2, 3, dtype=torch.int32)
    place_kernel[(3, 2)](out, width=3)
    assert out.tolist() == [[3, 13, 23], [4, 14, 24]]


def test_scalars() -> None:
    """Run-time numbers divide as in C, constants as in Python."""
    out = torch.zeros(5, dtype=torch.int32)
    scalar_kernel[(1,)](out, 1, 30, C=-1, num_warps=8)
    assert out.tolist() == [sum(range(5, 30, 2)) - 4 - 200, 0, 8, 1, -1]


def test_an_address_in_int32_overflows() -> None:
    out = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(KernelError, match=r"total \+= i .* overflows int32"):
        scalar_kernel[(1,)](out, 2**30, 2**30 + 12, C=0)


@gluon.jit
def float_kernel(x_ptr, out_ptr, WHAT: gl.constexpr, BLOCK: gl.constexpr):
    place = gl.arange(0, BLOCK, LAYOUT)
    x = gl.load(x_ptr + place)
    if WHAT == "cast":
        out = x
    elif WHAT == "plus":
        out = x + 1.0
    elif WHAT == "ratio":
        out = 1 / x
    elif WHAT == "exp":
        out = gl.exp(x)
    elif WHAT == "erf":
        out = gl.erf(x)
    elif WHAT == "maximum":
        out = gl.maximum(x, 0.0)
    elif WHAT == "greater":
        out = gl.where(x > 1.0, x, -x)
    elif WHAT == "sum":
        out = gl.sum(x, 0) + gl.zeros([BLOCK], gl.float32, LAYOUT)
    else:
        out = gl.log(x)
    gl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty))


def floats(what: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(x), dtype=dtype)
    float_kernel[(1,)](x, out, WHAT=what, BLOCK=len(x))
    return out


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_round_as_torch_does(source: torch.dtype, target: torch.dtype) -> None:
    """To nearest, ties to even; to integers towards zero."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(512, generator=generator) * 100).to(source)
    # Ties of bf16, and what is no number.
    x[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 2.5, -2.5]).to(source)
    if target != torch.int32:
        x[4:7] = torch.tensor([NAN, INF, -INF]).to(source)
    got = floats("cast", x, target)
    torch.testing.assert_close(got, x.to(target), rtol=0, atol=0, equal_nan=True)


X = [0.0, 2.0, -2.0, 0.5]


@pytest.mark.parametrize(
    ("what", "want"),
    [
        ("plus", [1.0, 3.0, -1.0, 1.5]),
        ("ratio", [INF, 0.5, -0.5, 2.0]),
        ("maximum", [0.0, 2.0, 0.0, 0.5]),
        ("greater", [0.0, 2.0, 2.0, -0.5]),
        ("sum", [0.5] * 4),
    ],
)
def test_floats(what: str, want: list[float]) -> None:
    assert floats(what, torch.tensor(X), torch.float32).tolist() == want


@pytest.mark.parametrize("function", [torch.exp, torch.erf])
def test_functions(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor(X)
    got = floats(function.__name__, x, torch.float32)
    assert_as_good_as(got, function(x), function(x.double()).float())


@pytest.mark.parametrize("what", ["plus", "ratio", "exp", "sum"])
def test_arithmetic_in_bfloat16_is_refused(what: str) -> None:
    with pytest.raises(KernelError, match="float32"):
        floats(what, torch.ones(4, dtype=torch.bfloat16), torch.float32)
    assert floats("greater", torch.ones(4).bfloat16(), torch.float32).tolist() == [-1.0] * 4


def test_what_is_not_emulated_says_so() -> None:
    with pytest.raises(NotImplementedError, match="log is not emulated"):
        floats("log", torch.ones(4), torch.float32)


@gluon.jit
def halves_kernel(x_ptr, out_ptr):
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 4, gl.SliceLayout(1, layout))[:, None]
    cols = gl.arange(0, 8, gl.SliceLayout(0, layout))[None, :]
    x = gl.load(x_ptr + rows * 8 + cols)
    left, right = gl.split(gl.permute(gl.reshape(x, (4, 2, 4)), (0, 2, 1)))
    half: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    place = rows * 8 + gl.arange(0, 4, gl.SliceLayout(0, half))[None, :]
    gl.store(out_ptr + place, right)
    gl.store(out_ptr + 4 + place, left)


def test_shapes() -> None:
    x, out = torch.arange(32.0).reshape(4, 8), torch.empty(4, 8)
    halves_kernel[(1,)](x, out)
    assert torch.equal(out, x.roll(4, 1))


def test_a_masked_load_without_other_is_nan() -> None:
    """`gated_kernel` multiplies such elements, and stores none of them."""
    x, out = torch.ones(2, 100), torch.zeros(128)
    gluon_kernels.gated_kernel[(1,)](x, out, 100, 1.0, BLOCK=128, FAULT="store of the tail")
    assert out.isnan().tolist() == [False] * 100 + [True] * 28


def test_regions_overlap_in_bytes() -> None:
    """Also where one is no whole range of bytes, such as some columns of a matrix."""
    whole = np.zeros((4, 8), np.uint16)
    left, right = Region("", whole[:, :4]), Region("", whole[:, 4:])
    top, bottom = Region("", whole[:2]), Region("", whole[2:])
    turned = Region("", whole[:2].T)
    assert not left.overlaps(right)
    assert not top.overlaps(bottom)
    assert left.overlaps(top)
    assert right.overlaps(bottom)
    assert turned.overlaps(top)
    assert turned.covers(top)
    assert Region("", whole).covers(right)
    assert left.covers(left)
    assert not left.covers(right)
    assert not left.covers(top)
    assert not top.covers(left)
