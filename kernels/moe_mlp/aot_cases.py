"""Every kernel of moe_mlp with every configuration that it ships with, to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from distmoe.kernels.aot import AotCase
from distmoe.kernels.moe_mlp import gluon_aot_cases
from distmoe.kernels.moe_mlp.activations import ACTIVATIONS
from distmoe.kernels.moe_mlp.aot_shapes import (
    NARROW,
    RAGGED,
    SHAPE_7B,
    SHAPE_README,
    UNALIGNED,
    Shape,
)
from distmoe.kernels.moe_mlp.tiles import (
    CANDIDATES,
    FP32_CONFIG,
    POINTER_CONFIGS,
    TileConfig,
    columns_of,
    reduction_of,
)
from distmoe.kernels.moe_mlp.triton_backend import (
    ROW_SUM_COLUMNS_OF_A_WARP,
    row_sum_columns,
    tile_list_slots,
)
from distmoe.kernels.moe_mlp.triton_dgrad import dgrad_kernel, dscore_kernel
from distmoe.kernels.moe_mlp.triton_row_sum import row_sum_kernel
from distmoe.kernels.moe_mlp.triton_rows import rows_kernel
from distmoe.kernels.moe_mlp.triton_tile_list import tile_list_kernel
from distmoe.kernels.moe_mlp.triton_up import up_kernel
from distmoe.kernels.moe_mlp.triton_wgrad import wgrad_kernel

TMA_TARGETS = ("sm_90", "sm_100")
ALL_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
INT32, FP32 = "*i32:16", "*fp32:16"


def cases() -> Iterator[AotCase]:
    """Candidates for TMA hardware, the pointer configurations, fp32, and what is no GEMM."""
    for kernel, candidates in CANDIDATES.items():
        for config in candidates:
            yield _gemm(kernel, SHAPE_7B, config)
        for shape in (Shape(dtype="fp16"), RAGGED, NARROW, SHAPE_README):
            yield _gemm(kernel, shape, candidates[0])
        yield _gemm(kernel, SHAPE_7B, POINTER_CONFIGS[kernel])
        yield _gemm(kernel, UNALIGNED, POINTER_CONFIGS[kernel])
        yield _gemm(kernel, Shape(dtype="fp32"), FP32_CONFIG)
    for kernel in ("up", "dgrad"):
        for activation in ACTIVATIONS:
            for config in (*CANDIDATES[kernel], POINTER_CONFIGS[kernel]):
                yield _gemm(kernel, Shape(activation=activation), config)
    yield from _others()
    yield from gluon_aot_cases.cases()


def _gemm(kernel: str, shape: Shape, config: TileConfig) -> AotCase:
    config = config.fit(columns_of(kernel, shape.experts))
    make = {
        "up": _up,
        "down": _down,
        "dgrad": _dgrad,
        "dx": _dx,
        "wgrad_in": _wgrad_in,
        "wgrad_out": _wgrad_out,
    }[kernel]
    function, signature, constexprs = make(shape, config)
    return AotCase(
        name=f"{kernel} {shape} {config}",
        kernel=function,
        signature=signature,
        constexprs={**constexprs, "TMA": config.tma},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        gemm=shape.dtype != "fp32",
        targets=TMA_TARGETS if config.tma else ALL_TARGETS,
        pipelined=shape.aligned and reduction_of(kernel, shape.experts) > config.k,
    )


def _pointer(shape: Shape) -> str:
    return f"*{shape.dtype}:16"


def _operand(shape: Shape, config: TileConfig, *block: int) -> str:
    if not config.tma:
        return _pointer(shape)
    return f"tensordesc<{shape.dtype}[{', '.join(map(str, block))}]>"


Parts = tuple[object, dict[str, str], dict[str, object]]


def _up(shape: Shape, config: TileConfig) -> Parts:
    data = _pointer(shape)
    signature = {
        "x_ptr": data,
        "row_ptr": INT32,
        "w": _operand(shape, config, 1, shape.experts.G // shape.I, config.n, config.k),
        "z_ptr": data,
        "a_ptr": data,
        "tile_ptr": INT32,
        "num_tiles": "i32",
    }
    return up_kernel, signature, {**_epilogue(shape), **_blocks(config)}


def _dgrad(shape: Shape, config: TileConfig) -> Parts:
    data = _pointer(shape)
    signature = {
        "dy_ptr": data,
        "row_ptr": INT32,
        "w": _operand(shape, config, 1, config.k, config.n),
        "score_ptr": FP32,
        "z_ptr": data,
        "dz_ptr": data,
        "a_ptr": data,
        "partial_ptr": FP32,
        "tile_ptr": INT32,
        "num_tiles": "i32",
        "num_pairs": "i32",
    }
    constexprs = {**_epilogue(shape), **_blocks(config), "CHUNKS": config.chunks}
    return dgrad_kernel, signature, constexprs


def _down(shape: Shape, config: TileConfig) -> Parts:
    return _rows(shape, config, K=shape.I, transposed=True)


def _dx(shape: Shape, config: TileConfig) -> Parts:
    return _rows(shape, config, K=shape.experts.G, transposed=False)


def _rows(shape: Shape, config: TileConfig, *, K: int, transposed: bool) -> Parts:
    weight = (config.n, config.k) if transposed else (config.k, config.n)
    signature = {
        "v": _operand(shape, config, 1, 1, config.m, config.k),
        "w": _operand(shape, config, 1, *weight),
        "out": _operand(shape, config, 1, 1, config.m, config.n),
        "tile_ptr": INT32,
        "num_tiles": "i32",
    }
    constexprs = {"K": K, "N": shape.H, "TRANSPOSED": transposed, **_blocks(config)}
    return rows_kernel, signature, constexprs


def _wgrad_in(shape: Shape, config: TileConfig) -> Parts:
    return _wgrad(shape, config, W=shape.experts.G, bh=config.n, bw=config.m, gathered_first=False)


def _wgrad_out(shape: Shape, config: TileConfig) -> Parts:
    return _wgrad(shape, config, W=shape.I, bh=config.m, bw=config.n, gathered_first=True)


def _wgrad(
    shape: Shape, config: TileConfig, *, W: int, bh: int, bw: int, gathered_first: bool
) -> Parts:
    signature = {
        "gathered_ptr": _pointer(shape),
        "row_ptr": INT32,
        "v": _operand(shape, config, 1, 1, config.k, bw),
        "offset_ptr": INT32,
        "dw_ptr": _pointer(shape),
    }
    constexprs: dict[str, object] = {
        "H": shape.H,
        "W": W,
        "GATHERED_FIRST": gathered_first,
        "BH": bh,
        "BW": bw,
        "BK": config.k,
        "STAGES": config.num_stages,
    }
    return wgrad_kernel, signature, constexprs


def _epilogue(shape: Shape) -> dict[str, object]:
    gated = shape.experts.gated
    return {"H": shape.H, "I": shape.I, "GATED": gated, "ACTIVATION": shape.activation}


def _blocks(config: TileConfig) -> dict[str, object]:
    return {"BM": config.m, "BN": config.n, "BK": config.k}


def _others() -> Iterator[AotCase]:
    for scored in (True, False):
        for H in (1536, 768, 4096, 1044):
            for unroll in (1, 8):
                block = row_sum_columns(H)
                yield _plain(
                    f"row_sum H{H} scored={scored} u{unroll}",
                    row_sum_kernel,
                    {
                        "v_ptr": "*bf16:16",
                        "score_ptr": FP32,
                        "by_row_ptr": INT32,
                        "row_offset_ptr": INT32,
                        "out_ptr": "*bf16:16",
                        "first_row": "i32",
                    },
                    {"H": H, "SCORED": scored, "UNROLL": unroll, "BH": block},
                    num_warps=max(1, block // ROW_SUM_COLUMNS_OF_A_WARP),
                )
    yield _plain(
        "dscore 2 blocks",
        dscore_kernel,
        {
            "partial_ptr": FP32,
            "dscore_ptr": FP32,
            "tile_ptr": INT32,
            "num_tiles": "i32",
            "num_pairs": "i32",
        },
        {"BLOCKS": 2, "BM": 128},
    )
    for experts, exact in product((8, 128, 256, 4096), (False, True)):
        yield _plain(
            f"tile_list e{experts}" + (" blocks" if exact else ""),
            tile_list_kernel,
            {"bounds_ptr": INT32, "tile_ptr": INT32, "num_tiles": "i32", "stride": "i32"},
            {
                "EXACT": exact,
                "E": experts,
                "E_POW2": experts,
                "BM": 128,
                "SLOTS": tile_list_slots(experts),
            },
        )


def _plain(
    name: str,
    kernel: object,
    signature: dict[str, str],
    constexprs: dict[str, object],
    *,
    num_warps: int = 4,
) -> AotCase:
    return AotCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=3,
        gemm=False,
        targets=ALL_TARGETS,
    )
