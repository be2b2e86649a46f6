"""The warp-specialised kernels with every configuration, to compile ahead of time for Hopper."""

from __future__ import annotations

from collections.abc import Iterator

from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16

from distmoe.kernels.aot import AotCase
from distmoe.kernels.moe_mlp.activations import ACTIVATIONS
from distmoe.kernels.moe_mlp.aot_shapes import NARROW, RAGGED, SHAPE_7B, SHAPE_README, Shape
from distmoe.kernels.moe_mlp.gluon_dgrad import dgrad_kernel
from distmoe.kernels.moe_mlp.gluon_rows import rows_kernel
from distmoe.kernels.moe_mlp.gluon_tiles import CANDIDATES, UNGATED_CONFIGS, constants
from distmoe.kernels.moe_mlp.gluon_up import up_kernel
from distmoe.kernels.moe_mlp.gluon_wgrad import wgrad_kernel
from distmoe.kernels.moe_mlp.tiles import TileConfig, columns_of

DTYPES = {"bf16": bfloat16, "fp16": float16}
INT32, FP32 = "*i32:16", "*fp32:16"
Parts = tuple[object, dict[str, str], dict[str, object]]


def cases() -> Iterator[AotCase]:
    """Every candidate, and the first of each kernel with other sizes, dtypes and activations."""
    for kernel, candidates in CANDIDATES.items():
        for config in candidates:
            yield _case(kernel, SHAPE_7B, config)
        for shape in (Shape(dtype="fp16"), RAGGED, NARROW, SHAPE_README):
            yield _case(kernel, shape, candidates[0])
    for kernel in ("up", "dgrad"):
        for name, activation in ACTIVATIONS.items():
            config = CANDIDATES[kernel][0]
            if not activation.gated:
                config = UNGATED_CONFIGS.get(kernel, config)
            if name != SHAPE_7B.activation:
                yield _case(kernel, Shape(activation=name), config)


def _case(kernel: str, shape: Shape, config: TileConfig) -> AotCase:
    config = config.fit(columns_of(kernel, shape.experts))
    make = {
        "up": _up,
        "down": _rows,
        "dgrad": _dgrad,
        "dx": _rows,
        "wgrad_in": _wgrad,
        "wgrad_out": _wgrad,
    }[kernel]
    function, signature, constexprs = make(kernel, shape, config)
    size = f"{shape.H}x{shape.I} {shape.activation} {DTYPES[shape.dtype]}"
    return AotCase(
        name=f"gluon {kernel} {config}, {size}",
        kernel=function,
        signature=signature,
        constexprs={**constexprs, **constants(config)},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        gemm=True,
        targets=("sm_90",),
        specialised=True,
    )


def _pointer(shape: Shape) -> str:
    return f"*{shape.dtype}:16"


def _descriptor(shape: Shape, *block: int) -> str:
    layout = NVMMASharedLayout.get_default_for(list(block), DTYPES[shape.dtype])
    return f"tensordesc<{shape.dtype}[{', '.join(map(str, block))}],{layout!r}>"


def _up(kernel: str, shape: Shape, config: TileConfig) -> Parts:
    data = _pointer(shape)
    signature = {
        "x_ptr": data,
        "row_ptr": INT32,
        "w": _descriptor(shape, 1, config.n, config.k),
        "z_ptr": data,
        "a_ptr": data,
        "tile_ptr": INT32,
        "num_tiles": "i32",
    }
    return up_kernel, signature, {**_epilogue(shape), "BM": config.m, "BN": config.n}


def _dgrad(kernel: str, shape: Shape, config: TileConfig) -> Parts:
    data = _pointer(shape)
    signature = {
        "dy_ptr": data,
        "row_ptr": INT32,
        "w": _descriptor(shape, 1, config.k, config.n),
        "score_ptr": FP32,
        "z_ptr": data,
        "dz_ptr": data,
        "a_ptr": data,
        "partial_ptr": FP32,
        "tile_ptr": INT32,
        "num_tiles": "i32",
        "num_pairs": "i32",
    }
    return dgrad_kernel, signature, {**_epilogue(shape), "BM": config.m, "BN": config.n}


def _rows(kernel: str, shape: Shape, config: TileConfig) -> Parts:
    transposed = kernel == "down"
    weight = (config.n, config.k) if transposed else (config.k, config.n)
    signature = {
        "v": _descriptor(shape, 1, 1, config.m, config.k),
        "w": _descriptor(shape, 1, *weight),
        "out_ptr": _pointer(shape),
        "tile_ptr": INT32,
        "num_tiles": "i32",
    }
    K = shape.I if transposed else shape.experts.G
    sizes: dict[str, object] = {"K": K, "N": shape.H, "TRANSPOSED": transposed}
    return rows_kernel, signature, {**sizes, "BM": config.m, "BN": config.n}


def _wgrad(kernel: str, shape: Shape, config: TileConfig) -> Parts:
    first = kernel == "wgrad_out"
    bh, bw = (config.m, config.n) if first else (config.n, config.m)
    signature = {
        "gathered_ptr": _pointer(shape),
        "row_ptr": INT32,
        "v": _descriptor(shape, 1, 1, config.k, bw),
        "offset_ptr": INT32,
        "dw_ptr": _pointer(shape),
        "num_experts": "i32",
    }
    W = shape.I if first else shape.experts.G
    sizes: dict[str, object] = {"H": shape.H, "W": W, "GATHERED_FIRST": first}
    return wgrad_kernel, signature, {**sizes, "BH": bh, "BW": bw}


def _epilogue(shape: Shape) -> dict[str, object]:
    gated = shape.experts.gated
    return {"H": shape.H, "I": shape.I, "GATED": gated, "ACTIVATION": shape.activation}
