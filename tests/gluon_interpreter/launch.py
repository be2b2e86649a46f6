"""Kernels as Python functions whose globals are the emulation, and `kernel[grid](...)`."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.experimental.gluon.language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import ConstexprFunction

from gluon_interpreter import (
    barriers,
    cp_async,
    global_memory,
    partitions,
    products,
    shared_memory,
    tma,
)
from gluon_interpreter.language import LANGUAGE, run_time_range
from gluon_interpreter.partitions import Program
from gluon_interpreter.timing import current_timing
from gluon_interpreter.values import as_value, unwrap

# The last part of a module's name -> its functions, in the words of Triton 3.6 and 3.9.
MBARRIER = {
    "init": barriers.init,
    "invalidate": barriers.invalidate,
    "expect": barriers.expect,
    "arrive": barriers.arrive,
    "wait": barriers.wait,
}
ASYNC_COPY = {
    "async_copy_global_to_shared": cp_async.cp_async,
    "async_load": cp_async.cp_async,
    "mbarrier_arrive": cp_async.mbarrier_arrive,
}
TMA = {"async_copy_global_to_shared": tma.tma_load, "async_load": tma.tma_load}
FUNCTIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "mbarrier": MBARRIER,
    "async_copy": ASYNC_COPY,
    "tma": TMA,
}
OTHERS: dict[str, Callable[..., Any]] = LANGUAGE | {
    "load": global_memory.load,
    "store": global_memory.store,
    "allocate_shared_memory": shared_memory.allocate_shared_memory,
    "warp_specialize": partitions.warp_specialize,
    "fence_async_shared": lambda cluster=False: partitions.current().fence(),
    "warpgroup_mma": products.warpgroup_mma,
    "warpgroup_mma_wait": products.warpgroup_mma_wait,
}


class Module:
    """A module of Triton as interpreted code sees it."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = emulated(getattr(self._module, name), self._module.__name__, name)
        setattr(self, name, value)
        return value


def emulated(value: Any, module: str, name: str) -> Any:
    """What a global of a kernel, or an attribute of a module of Triton, becomes."""
    if isinstance(value, types.ModuleType):
        return Module(value) if value.__name__.startswith("triton.") else value
    if module.startswith("triton."):
        known = FUNCTIONS.get(module.rpartition(".")[2], OTHERS).get(name)
        if known is not None:
            return known
    if value is None or isinstance(value, gl.constexpr):
        return unwrap(value)
    if getattr(value, "__triton_builtin__", False):
        return functools.partial(_unknown, f"{module}.{name}")
    if isinstance(value, ConstexprFunction):
        return value
    if hasattr(value, "fn") and isinstance(value.fn, types.FunctionType):
        return interpreted(value.fn)
    return value


def _unknown(name: str, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(f"{name} is not emulated")


def emulated_globals(function: types.FunctionType) -> dict[str, Any]:
    found: dict[str, Any] = {"range": run_time_range, "__builtins__": __builtins__}
    for name, value in inspect.getclosurevars(function).globals.items():
        home = getattr(value, "__module__", None) or ""
        found[name] = emulated(value, home, getattr(value, "__name__", name))
    return found


_interpreted: dict[types.FunctionType, Callable[..., Any]] = {}


def interpreted(function: types.FunctionType) -> Callable[..., Any]:
    """The function with the emulation as its globals."""
    if function not in _interpreted:
        namespace: dict[str, Any] = {}
        copy = types.FunctionType(
            function.__code__, namespace, function.__name__, function.__defaults__
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        _interpreted[function] = copy
        # Afterwards, for functions that call themselves.
        namespace.update(emulated_globals(function))
    return _interpreted[function]


def argument(name: str, value: Any) -> Any:
    """A launch's argument as the kernel sees it."""
    if isinstance(value, torch.Tensor):
        return global_memory.pointer_to(global_memory.Memory(name, value))
    if isinstance(value, TensorDescriptor):
        return tma.Descriptor(name, value)
    if isinstance(value, bool | int | float):
        return as_value(value)
    if isinstance(value, tuple):
        return tuple(argument(f"{name}[{i}]", v) for i, v in enumerate(value))
    return unwrap(value)


def run(
    kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, num_stages: int = 1,
    maxnreg: int | None = None, **named: Any,
) -> None:  # fmt: skip
    """In place of `JITFunction.run`."""
    bound = inspect.signature(kernel.fn).bind(*args, **named)
    bound.apply_defaults()
    grid = (*grid, *(1,) * (3 - len(grid)))
    constant = {p.name for p in kernel.params if p.is_constexpr}
    values = {
        name: unwrap(value) if name in constant else argument(name, value)
        for name, value in bound.arguments.items()
    }
    body = interpreted(kernel.fn)
    with np.errstate(all="ignore"):
        for z, y, x in itertools.product(*(range(n) for n in reversed(grid))):
            program = Program((x, y, z), grid, num_warps, current_timing())
            program.run(lambda: body(**values))


def install() -> None:
    """Once per process, before the first launch."""
    GluonJITFunction.run = run
