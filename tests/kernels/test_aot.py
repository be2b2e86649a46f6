"""Every kernel and shipped configuration, compiled for GPUs that are not there.

In processes of their own, because kernels are interpreted in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distmoe.kernels.aot import TARGETS, AotCase, Report, all_cases, compile_case, problems
from distmoe.kernels.aot_sass import MainLoop, main_loop
from distmoe.kernels.moe_mlp.tiles import CANDIDATES, POINTER_CONFIGS

ROOT = Path(__file__).parents[2]
# The version of the GPU machines that are aimed at; `make test` installs it here.
TRITON_36 = ROOT / ".triton36"


def inspect(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    environment.pop("TRITON_INTERPRET", None)
    report = tmp_path / "report.json"
    command = [sys.executable, "tools/inspect_kernels.py", "--json", str(report), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done, json.loads(report.read_text()) if report.exists() else {}


SWIGLU = "H1536 I256 swiglu bf16"
# Every kernel, the products with their default tiles, by TMA and by pointers.
DEFAULTS = [
    f"{kernel} {SWIGLU} {config}"
    for kernel in CANDIDATES
    for config in (CANDIDATES[kernel][0], POINTER_CONFIGS[kernel])
]
DEFAULTS += [
    f"gluon {kernel}, 1536x256 swiglu bf16"
    for kernel in (
        "up 128x128x64 w8 s4 c2",
        "down 128x128x64 w4 s6 c2",
        "dgrad 64x128x64 w4 s7 c4",
        "wgrad_out 128x256x64 w8 s4 c4",
    )
]
DEFAULTS += ["row_sum H1044", "tile_list e4096", "dscore", "router_topk softmax E128"]
DEFAULTS += ["router_topk backward softmax E64", "balance_targets E64 runs 8 rooms 1"]
DEFAULTS += ["routing_index count E256", "routing_index place E256", "by_token E4096"]
DEFAULTS += ["arrange_pairs segment W2", "arrange_pairs move W2", "merge 64 of 127"]
DEFAULTS += ["round_select take T65536", "round_select best T65536", "round_select sort"]
DEFAULTS += ["round_select priority E256", "round_select flip E256"]
DEFAULTS += ["fp8_rows quantize H2048 bf16", "fp8_rows dequantize H2048 bf16 gathered"]
DEFAULTS += ["router_logits E8", "router_logits dx E8", "router_logits dw E8"]

# Beside these every tile configuration, other dtypes and shapes, and the defaults with one more
# activation with a gate and one without; tools/inspect_kernels.py has all of all.
VARIANTS = [*DEFAULTS, SWIGLU, "I256 swiglu fp16", "fp32", "H1048", "H2048", "H1044"]
VARIANTS += [
    f"I256 {activation} bf16 {CANDIDATES[kernel][0]}"
    for activation in ("geglu", "relu2")
    for kernel in ("up", "dgrad")
]
VARIANTS += ["row_sum", "router_logits", "round_select take", "round_select best"]
VARIANTS += ["router_topk sigmoid E128", "softmax E4096"]


@pytest.mark.parametrize(
    ("triton", "targets", "only"),
    [
        ("3.6", ["sm_90"], VARIANTS),
        ("3.9", ["sm_90", "sm_80", "sm_100", "gfx942"], DEFAULTS),
    ],
    ids=["3.6", "3.9"],
)
def test_no_kernel_has_a_problem(
    tmp_path: Path, triton: str, targets: list[str], only: list[str]
) -> None:
    """wgmma in every product on sm_90, nothing spilled, shared memory within the limit."""
    other = ["--no-loops", "--only", *only]
    if triton == "3.6":
        if not (TRITON_36 / ".installed").exists():
            pytest.skip("triton 3.6 is not in .triton36; `make test` installs it")
        other += ["--triton", str(TRITON_36)]
    done, facts = inspect(tmp_path, "--target", *targets, *other)
    found = {(r["target"], r["case"]): r["problems"] for r in facts["cases"] if r["problems"]}
    assert not found
    assert done.returncode == 0, done.stderr
    assert facts["triton"].startswith(triton)
    cases = [case for case in all_cases() if any(name in case.name for name in only)]
    assert {case.kernel for case in cases} == {case.kernel for case in all_cases()}
    want = {(t, case.name) for case in cases for t in targets if t in case.targets}
    assert {(r["target"], r["case"]) for r in facts["cases"]} == want


def test_cases_have_names_of_their_own() -> None:
    cases = list(all_cases())
    by_name = {case.name: case for case in cases}
    assert all(by_name[case.name] == case for case in cases)
    assert {target for case in cases for target in case.targets} == set(TARGETS)


BAD = """
import sys
from dataclasses import replace
import triton
import triton.language as tl
from distmoe.kernels.aot import TARGETS, AotCase, compile_case, problems

@triton.jit
def product(x_ptr, w, y_ptr, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows, cols = tl.arange(0, BM), tl.arange(0, BN)
    x = x_ptr + rows[:, None] * 4096 + tl.arange(0, BK)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(tl.load(x), w.load([0, k]).T, acc)
        x += BK
    tl.store(y_ptr + rows[:, None] * BN + cols[None, :], acc.to(tl.bfloat16))

@triton.jit
def scale(x_ptr, y_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(y_ptr + place, tl.load(x_ptr + place) * 2)

DATA = "*bf16:16"
def wide(num_warps):
    signature = {"x_ptr": DATA, "w": "tensordesc<bf16[256, 64]>", "y_ptr": DATA, "K": "i32:16"}
    blocks = {"BM": 128, "BN": 256, "BK": 64}
    targets = ("sm_90",)
    return AotCase("wide", product, signature, blocks, num_warps, 3, gemm=True, targets=targets)
cases = {
    "spills": wide(4),
    "serialised": wide(8),
    "no tensor core": AotCase(
        "scale", scale, {"x_ptr": DATA, "y_ptr": DATA}, {"BLOCK": 1024}, 4, 3, gemm=True
    ),
}
case, target = cases[sys.argv[1]], TARGETS["sm_90"]
first, again = (replace(compile_case(case, target), seconds=0) for _ in range(2))
assert first == again
print("; ".join(problems(first, case, target)))
"""


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("spills", "bytes of registers spilled"),
        ("serialised", "wgmma serialised by ptxas"),
        ("no tensor core", "no tensor-core instruction; no wgmma"),
    ],
)
def test_bad_kernels_are_found(tmp_path: Path, kind: str, words: str) -> None:
    """Compiled twice, as the second could come from the cache, where nobody counts registers.

    The serialised one is triton 3.6's: a loop over a length that is not known.
    """
    if not (TRITON_36 / ".installed").exists():
        pytest.skip("triton 3.6 is not in .triton36; `make test` installs it")
    script = tmp_path / "bad.py"
    script.write_text(BAD)
    environment = dict(os.environ, PYTHONPATH=str(TRITON_36), TRITON_CACHE_DIR=str(tmp_path))
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(script), kind], env=environment, capture_output=True, text=True
    )
    assert words in done.stdout, done.stderr


GOOD = Report(
    case="x", target="sm_90", registers=100, spills=0, shared=1000, num_warps=4, programs_per_sm=2,
    tensor_core={"wgmma": 4}, wgmma_shapes=("m64n128k16",), async_copies=2, tma_loads=1,
    tma_stores=0, serialised=False, in_flight=1, loop=MainLoop(100, 4, 0), seconds=1.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"shared": 233_000}, ["233000 bytes of shared memory, limit 232448"]),
        ({"in_flight": 0}, ["the main loop waits for every wgmma"]),
        ({"async_copies": 0, "tma_loads": 0}, ["no asynchronous loads"]),
        ({"tensor_core": {"mma.sync": 4}}, ["no wgmma"]),
        ({"loop": MainLoop(100, 4, 2)}, ["local memory in the main loop"]),
    ],
)
def test_problems(change: dict, words: list[str]) -> None:
    case = AotCase("x", None, {}, {}, 4, 3, gemm=True)
    assert problems(replace(GOOD, **change), case, TARGETS["sm_90"]) == words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"setmaxnreg": (40, 232)}, []),
        ({}, ["no setmaxnreg"]),
        ({"setmaxnreg": (40, 232), "setmaxnreg_ignored": True}, ["setmaxnreg ignored by ptxas"]),
    ],
)
def test_problems_of_specialised_warps(change: dict, words: list[str]) -> None:
    case = AotCase("x", None, {}, {}, 4, 3, gemm=True, specialised=True)
    assert problems(replace(GOOD, **change), case, TARGETS["sm_90"]) == words


def test_the_loop_with_densest_products_is_the_main_loop() -> None:
    sass = """
.L_x_0:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/              @P0  BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0040*/                   STL [R1], R2 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
        /*0070*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*00b0*/                   BRA `(.L_x_1) ;
"""
    assert main_loop(sass) == MainLoop(instructions=4, tensor_core=2, local_memory=1)
    assert main_loop("") == MainLoop()


def test_every_op_with_triton_kernels_lists_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new_op").mkdir()
    monkeypatch.setattr("distmoe.kernels.aot.OPS", tmp_path)
    assert list(all_cases()) == []
    (tmp_path / "new_op" / "triton_new_op.py").touch()
    with pytest.raises(FileNotFoundError, match=r"new_op has Triton kernels and no aot_cases\.py"):
        list(all_cases())


def test_interpreted_kernels_cannot_be_compiled() -> None:
    case = next(all_cases())
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_case(case, TARGETS["sm_90"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "sm_20"], "invalid choice: 'sm_20'"),
        (["--only", "nothing has this name"], "no kernel has 'nothing has this name'"),
        (["--triton", "/nowhere"], "there is no triton in this folder"),
        (["--jobs", "0"], "--jobs: '0' must be an integer, at least 1"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: list[str], words: str) -> None:
    done, _ = inspect(tmp_path, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
