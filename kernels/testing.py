"""What tests and benches of kernels share: the tolerance rule, and memory that shows misuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def assert_as_good_as(
    result: Tensor, same_dtype_reference: Tensor, fp32_reference: Tensor, name: str = "result"
) -> None:
    """The error against fp32 is at most twice that of the same-dtype PyTorch reference, plus 1e-6.

    Both errors are the largest absolute difference, relative to the largest reference value.
    """
    if result.shape != fp32_reference.shape:
        raise AssertionError(
            f"{name}: shape {tuple(result.shape)}, expected {tuple(fp32_reference.shape)}"
        )
    if not fp32_reference.numel():
        return
    scale = fp32_reference.abs().max().clamp(min=1e-30)
    error = (result.float() - fp32_reference).abs().max() / scale
    allowed = 2 * (same_dtype_reference.float() - fp32_reference).abs().max() / scale + 1e-6
    # Written so that a NaN fails.
    if not error <= allowed:
        raise AssertionError(f"{name}: relative error {error:.3e}, allowed {allowed:.3e}")


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty, empty_like and new_empty give NaN: an output that nobody wrote is seen."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    def poisoned_new_empty(self: Tensor, *size: Any, **options: Any) -> Tensor:
        return poison(new_empty(self, *size, **options))

    torch.empty = lambda *a, **k: poison(empty(*a, **k))
    torch.empty_like = lambda *a, **k: poison(empty_like(*a, **k))
    Tensor.new_empty = poisoned_new_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like
        Tensor.new_empty = new_empty  # type: ignore[method-assign]


# Operators whose result has a size, or a value, that the host has to ask the device for.
HOST_SYNCS = (
    "aten._local_scalar_dense",
    "aten.nonzero.",
    "aten.masked_select",
    "aten.bincount",
    "aten._unique2",
    "aten.unique_dim",
    "aten.unique_consecutive",
    "aten.repeat_interleave.Tensor",
    "aten.equal",
    "aten.is_nonzero",
    "aten.one_hot",
)


class NoHostSync(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises at an operator that would make the host wait for a GPU. Works on a CPU, too, where
    nothing waits: copies to the host are the one thing that it cannot see there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        indices = args[1] if str(func).startswith("aten.index") and len(args) > 1 else ()
        by_mask = any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (indices if isinstance(indices, list | tuple) else ())
        )
        # Of repeat_interleave, which asks for nothing then.
        is_told = (kwargs or {}).get("output_size") is not None
        if by_mask or (str(func).startswith(HOST_SYNCS) and not is_told):
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))
