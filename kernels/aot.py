"""Compile kernels ahead of time, for hardware that is not there, and read what came out.

A kernel that spills, or whose tensor-core instructions the compiler had to serialise, still gives
right results: only its machine code tells. Needs no GPU: Triton carries the assembler and the
disassembler. Each op lists its kernels and configurations in `aot_cases.cases`.
"""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from distmoe.kernels.aot_sass import MainLoop, main_loop

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPS = Path(__file__).parent


@dataclass(frozen=True)
class Target:
    """Hardware to compile for, and what one program may use of it."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    shared_per_sm: int = 0


# Limits of shared memory of one program and of a multiprocessor: CUDA programming guide, table of
# compute capabilities; LDS of gfx942: CDNA 3 instruction set, section 1.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, 164 * 1024),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, 228 * 1024),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, 228 * 1024),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
    )
}


@dataclass(frozen=True)
class AotCase:
    """One kernel with one configuration that it ships with.

    ``signature``: argument -> Triton's type name, e.g. "i32", "*bf16:16", "tensordesc<bf16[64,
    64]>", with a shared layout behind the block in Gluon; ":16" says divisible by 16, as launches
    find aligned pointers to be. ``gemm``: has to use tensor cores. ``pipelined``: has to load
    asynchronously and keep products running, which takes more than one step and rows of whole 16
    bytes. ``specialised``: warps that load have to leave registers to those that multiply.
    ``targets``: names in `TARGETS`; descriptors need sm_90 or newer.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    gemm: bool
    targets: tuple[str, ...] = tuple(TARGETS)
    pipelined: bool = True
    specialised: bool = False


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case. Registers of a thread; ``spills`` and ``shared`` in bytes;
    ``tensor_core``: instructions in the code; ``serialised``: ptxas says that it made every wgmma
    wait; ``in_flight``: the most wgmma groups that a loop leaves running; ``seconds`` to compile;
    ``setmaxnreg``: numbers of registers that warps ask for as they run, and whether ptxas says that
    it ignored them.
    """

    case: str
    target: str
    registers: int
    spills: int
    shared: int
    num_warps: int
    programs_per_sm: int
    tensor_core: dict[str, int]
    wgmma_shapes: tuple[str, ...]
    async_copies: int
    tma_loads: int
    tma_stores: int
    serialised: bool
    in_flight: int
    loop: MainLoop
    seconds: float
    setmaxnreg: tuple[int, ...] = ()
    setmaxnreg_ignored: bool = False

    @property
    def num_tensor_core(self) -> int:
        return sum(self.tensor_core.values())


def all_cases() -> Iterator[AotCase]:
    """Of every op: each folder with Triton kernels has a module `aot_cases`."""
    for folder in sorted(OPS.iterdir()):
        if not list(folder.glob("triton_*.py")):
            continue
        if not (folder / "aot_cases.py").exists():
            raise FileNotFoundError(f"{folder.name} has Triton kernels and no aot_cases.py")
        yield from import_module(f"distmoe.kernels.{folder.name}.aot_cases").cases()


def compile_case(case: AotCase, target: Target, *, loops: bool = True) -> Report:
    """RuntimeError with the compiler's words where it fails, or if kernels are interpreted.

    ``loops``: report every main loop, which takes a disassembly, and not only one of a kernel with
    local memory, where something can be wrong with it.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET")
    start = time.perf_counter()
    compiled, log = _compile(case, target)
    seconds = round(time.perf_counter() - start, 2)
    if target.backend == "hip":
        return _amd_report(case, target, compiled, seconds)
    return _nvidia_report(case, target, compiled, log, seconds, loops=loops)


def problems(report: Report, case: AotCase, target: Target) -> list[str]:
    """What the author of a kernel has to mend; empty if nothing."""
    loop = report.loop
    found = [
        (case.gemm and not report.num_tensor_core, "no tensor-core instruction"),
        (report.spills > 0, f"{report.spills} bytes of registers spilled"),
        (report.serialised, "wgmma serialised by ptxas"),
        (
            report.shared > target.shared_limit,
            f"{report.shared} bytes of shared memory, limit {target.shared_limit}",
        ),
        (loop.local_memory > 0, "local memory in the main loop"),
    ]
    if case.gemm and target.name == "sm_90":
        found += [("wgmma" not in report.tensor_core, "no wgmma")]
    if case.gemm and case.pipelined and target.name == "sm_90":
        found += [
            (report.in_flight < 1, "the main loop waits for every wgmma"),
            (not report.async_copies + report.tma_loads, "no asynchronous loads"),
        ]
    if case.specialised:
        found += [
            (not report.setmaxnreg, "no setmaxnreg"),
            (report.setmaxnreg_ignored, "setmaxnreg ignored by ptxas"),
        ]
    return [words for wrong, words in found if wrong]


def _compile(case: AotCase, target: Target) -> tuple[Any, str]:
    """The compiled kernel, and what the assembler said while it made it."""
    types: dict[str, str] = {}
    constexprs = dict(case.constexprs)
    attributes = {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in constexprs:
            types[name] = "constexpr"
            continue
        types[name], _, divisor = case.signature[name].partition(":")
        if divisor:
            attributes[(i,)] = [["tt.divisibility", int(divisor)]]
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    language = GluonASTSource if case.kernel.is_gluon() else ASTSource
    source = language(case.kernel, types, constexprs, attributes)
    hardware = GPUTarget(target.backend, target.arch, target.warp_size)
    words = io.StringIO()
    try:
        with _assembler_heard(), redirect_stdout(words), redirect_stderr(words):
            return triton.compile(source, target=hardware, options=options), words.getvalue()
    except Exception as error:
        raise RuntimeError(f"{case.name} for {target.name}: {error}") from error


@contextmanager
def _assembler_heard() -> Iterator[None]:
    """Registers and spills depend on the assembler's options, which differ between versions of
    Triton: only the log of the run that made the code tells its own. A cached kernel has none."""
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        yield


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def _nvidia_report(
    case: AotCase, target: Target, compiled: Any, log: str, seconds: float, *, loops: bool
) -> Report:
    # Without it there would be no spills to see.
    if "Used" not in log:
        raise RuntimeError(f"{case.name} for {target.name}: the assembler said nothing")
    ptx, ttgir = compiled.asm["ptx"], str(compiled.asm["ttgir"])
    registers, shared = _number(r"Used (\d+) registers", log), compiled.metadata.shared
    counts = {
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma.sync": len(re.findall(r"\bmma\.sync", ptx)),
        "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
    }
    waits = [int(n) for n in re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", ttgir)]
    return Report(
        case=case.name,
        target=target.name,
        registers=registers,
        spills=_number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        shared=shared,
        num_warps=compiled.metadata.num_warps,
        programs_per_sm=_programs_per_sm(target, registers, shared, compiled.metadata.num_warps),
        tensor_core={name: count for name, count in counts.items() if count},
        wgmma_shapes=tuple(sorted(set(re.findall(r"wgmma\.mma_async.*?\.(m\d+n\d+k\d+)", ptx)))),
        async_copies=len(re.findall(r"cp\.async\.c[ag]\.shared", ptx)),
        tma_loads=len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
        tma_stores=len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.global", ptx)),
        serialised="wgmma" in log and "serializ" in log,
        in_flight=max(waits, default=0),
        # It is found by its tensor-core instructions, and disassembling takes long.
        loop=main_loop(_disassemble(compiled.asm["cubin"]))
        if any(counts.values()) and (loops or _has_local_memory(log))
        else MainLoop(),
        seconds=seconds,
        setmaxnreg=tuple(sorted({int(n) for n in re.findall(r"setmaxnreg\.\S+\s+(\d+)", ptx)})),
        setmaxnreg_ignored="setmaxnreg" in log and "ignored" in log,
    )


def _has_local_memory(log: str) -> bool:
    """Spills lie in the stack frame, too."""
    return _number(r"(\d+) bytes stack frame", log) > 0


def _programs_per_sm(target: Target, registers: int, shared: int, num_warps: int) -> int:
    """64 K registers, given out in eights, and 64 warps; 1 KiB of shared memory is the system's."""
    by_registers = 65536 // ((max(registers, 1) + 7) // 8 * 8 * num_warps * 32)
    by_shared = target.shared_per_sm // (shared + 1024)
    return min(by_registers, by_shared, 64 // num_warps, 32)


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # Code alone, and no analysis of its data flow.
        command = [str(TOOLS / "nvdisasm"), "-c", "-ndf", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd_report(case: AotCase, target: Target, compiled: Any, seconds: float) -> Report:
    code = compiled.asm["amdgcn"]
    mfma = len(re.findall(r"\bv_mfma", code))
    return Report(
        case=case.name,
        target=target.name,
        registers=_number(r"\.vgpr_count:\s+(\d+)", code),
        spills=4 * _number(r"\.vgpr_spill_count:\s+(\d+)", code),
        shared=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        programs_per_sm=0,
        tensor_core={"mfma": mfma} if mfma else {},
        wgmma_shapes=(),
        async_copies=0,
        tma_loads=0,
        tma_stores=0,
        serialised=False,
        in_flight=0,
        loop=MainLoop(),
        seconds=seconds,
    )
