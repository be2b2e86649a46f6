"""What the compiler makes of every kernel and configuration: registers, spills, tensor cores.

    python tools/inspect_kernels.py
    python tools/inspect_kernels.py --triton .triton36 --target sm_80 --only dgrad --json out.json

Needs no GPU. Ends with 1 if a case has a problem, with 2 for a wrong argument.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from distmoe.arguments import new_file, positive

TARGET_NAMES = ("sm_80", "sm_90", "sm_100", "gfx942")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.triton:
        _take_triton_from(arguments.triton)
    os.environ.pop("TRITON_INTERPRET", None)
    start = time.perf_counter()
    jobs = _jobs(arguments.target, arguments.only)
    if not jobs:
        print(f"no kernel has {' or '.join(arguments.only)!r} in its name", file=sys.stderr)
        return 2
    context = get_context("forkserver")
    # Imported once, for all processes.
    context.set_forkserver_preload(["distmoe.kernels.aot"])
    inspect = partial(_inspect, loops=arguments.loops)
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        results = list(pool.map(inspect, jobs, chunksize=4))
    for target in arguments.target:
        _print_table([r for r in results if r["target"] == target], target)
    bad = [result for result in results if result["problems"]]
    seconds = time.perf_counter() - start
    print(f"{len(results)} cases, {len(bad)} with problems, {seconds:.0f} s")
    if arguments.json:
        facts = {"triton": _triton_version(), "cases": results}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if bad else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGET_NAMES, default=["sm_90"])
    parser.add_argument("--triton", type=Path, help="folder with another triton to use")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="cases whose name contains one of these"
    )
    parser.add_argument("--json", type=new_file, help="file for the whole report")
    parser.add_argument(
        "--no-loops",
        dest="loops",
        action="store_false",
        help="disassemble kernels with local memory only: quicker, same verdicts, no loop column",
    )
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="processes")
    arguments = parser.parse_args(argv)
    if arguments.triton and not (arguments.triton / "triton").is_dir():
        parser.error(f"--triton {arguments.triton}: there is no triton in this folder")
    return arguments


def _take_triton_from(folder: Path) -> None:
    """For this process, and through the environment for those that it starts."""
    path = str(folder.resolve())
    sys.path.insert(0, path)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))


def _triton_version() -> str:
    import triton

    version: str = triton.__version__
    return version


def _jobs(targets: list[str], only: list[str]) -> list[tuple[str, str]]:
    """(target, name of a case); a name stands for the same case wherever it comes again."""
    from distmoe.kernels.aot import all_cases

    cases = {case.name: case for case in all_cases() if any(o in case.name for o in only)}
    return [(t, name) for t in targets for name, case in cases.items() if t in case.targets]


def _inspect(job: tuple[str, str], *, loops: bool) -> dict[str, Any]:
    from distmoe.kernels.aot import TARGETS, all_cases, compile_case, problems

    target, name = TARGETS[job[0]], job[1]
    case = next(case for case in all_cases() if case.name == name)
    try:
        report = compile_case(case, target, loops=loops)
    except RuntimeError as error:
        return {"case": name, "target": target.name, "problems": [str(error)]}
    return {**asdict(report), "problems": problems(report, case, target)}


def _print_table(results: list[dict[str, Any]], target: str) -> None:
    from distmoe.bench.tool import console_of, table_of

    figures = ("registers", "spills", "shared KiB", "per SM", "tensor core", "async", "loop")
    table = table_of(f"kernels for {target}, triton {_triton_version()}", "case", figures)
    table.add_column("verdict")
    for result in results:
        table.add_row(result["case"], *_cells(result), _verdict(result["problems"]))
    console_of(200).print(table)


def _verdict(problems: list[str]) -> str:
    """One line; the whole words are in the JSON."""
    return "; ".join(problem.splitlines()[0][:100] for problem in problems) or "ok"


def _cells(result: dict[str, Any]) -> list[str]:
    if "registers" not in result:
        return ["-"] * 7
    cores = " ".join(f"{count} {name}" for name, count in result["tensor_core"].items())
    loads = [(result["async_copies"], "cp"), (result["tma_loads"], "tma")]
    return [
        str(result["registers"]),
        str(result["spills"]),
        f"{result['shared'] / 1024:.1f}",
        str(result["programs_per_sm"] or "-"),
        cores or "-",
        " ".join(f"{count} {name}" for count, name in loads if count) or "-",
        str(result["loop"]["instructions"] or "-"),
    ]


if __name__ == "__main__":
    sys.exit(main())
