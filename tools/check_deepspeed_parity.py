"""ZeRO 1, 2 and 3 for every line of the parity law, against one rank, as a table.

python tools/check_deepspeed_parity.py [--json FILE]

fp32 on the CPU, 10 steps, clipping active in each. A figure is the largest difference over all
tensors and ranks, relative to the largest value of its tensor; gradients are those of the first
step. Ends with 1 if a figure is above 1e-5.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "engines")]

from deepspeed_start import run_all  # noqa: E402
from parity_runs import LAW, STEPS, relative, run  # noqa: E402

BOUND = 1e-5
FIGURES = ("losses", "norms", "gradients", "parameters")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    oracle = run(1, 1, LAW[1, 1], engine="single")[0]
    cases = [case(world, ep, stage) for world, ep in LAW for stage in (1, 2, 3)]
    with tempfile.TemporaryDirectory() as folder:
        results = run_all(cases, Path(folder), timeout_s=1800)
        lines = [line(case, results.of(case["name"]), oracle) for case in cases]
    print(f"| world, ep | ZeRO | {' | '.join(FIGURES)} |\n|{'---|' * (2 + len(FIGURES))}")
    for found in lines:
        figures = " | ".join(f"{found[figure]:.1e}" for figure in FIGURES)
        print(f"| {found['world']}, {found['ep']} | {found['stage']} | {figures} |")
    if arguments.json:
        report = {"steps": STEPS, "bound": BOUND, "lines": lines}
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")
    return int(any(found[figure] > BOUND for found in lines for figure in FIGURES))


def case(world: int, ep: int, stage: int) -> dict[str, Any]:
    return {
        "name": f"world{world}-ep{ep}-zero{stage}",
        "job": "parity",
        "engine": "deepspeed",
        "world": world,
        "ep": ep,
        "deepspeed": {"zero_stage": stage},
    }


def line(
    case: dict[str, Any], results: list[dict[str, Any]], oracle: dict[str, Any]
) -> dict[str, Any]:
    def worst(part: str) -> float:
        return max(
            relative(result[part][name], want)
            for result in results
            for name, want in oracle[part].items()
        )

    return {
        "world": case["world"],
        "ep": case["ep"],
        "stage": case["deepspeed"]["zero_stage"],
        "losses": max(relative(result["losses"], oracle["losses"]) for result in results),
        "norms": max(relative(result["norms"], oracle["norms"]) for result in results),
        "gradients": worst("gradients"),
        "parameters": worst("final"),
    }


if __name__ == "__main__":
    sys.exit(main())
