"""What one MoE layer keeps for its backward, and holds at the most: the formula and a measurement.

    python tools/measure_memory.py [--json FILE]

Runs the fused kernels, in Triton's interpreter where there is no GPU: allocations are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    # Before a kernel is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from distmoe.arguments import new_file  # noqa: E402
from distmoe.bench.layer_memory import shape_and_measured  # noqa: E402
from distmoe.bench.tool import circumstances, console_of, table_of  # noqa: E402
from distmoe.config import MoEConfig, RoundingConfig  # noqa: E402
from distmoe.planner.activation_memory import keeps, transient  # noqa: E402
from distmoe.planner.environment import environment  # noqa: E402

# T, H, I, E, K, rounding rule: top-k alone, rounded, finer experts of the same width together.
SHAPES = (
    (1024, 256, 128, 8, 2, "none"),
    (1024, 256, 128, 8, 2, "balance"),
    (1024, 256, 64, 16, 4, "balance"),
    (1024, 256, 32, 32, 8, "balance"),
)
MIB = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=new_file, help="file for every number")
    arguments = parser.parse_args(argv)
    rows = [measure_shape(*shape) for shape in SHAPES]
    print_table(rows)
    if arguments.json:
        facts = {**circumstances(), **environment(DEVICE), "layers": rows}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


def measure_shape(T: int, H: int, I: int, E: int, K: int, rule: str) -> dict[str, Any]:
    """Formula and measurement in bytes, for fp16."""
    torch.manual_seed(0)
    config = MoEConfig(
        hidden_size=H,
        intermediate_size=I,
        num_experts=E,
        top_k=K,
        rounding=RoundingConfig(rule, tile=64),
    )
    shape, measured = shape_and_measured(config, num_tokens=T, device=DEVICE)
    saved = {f"{dtype} {list(size)}": held for (dtype, size), held in measured.saved.items()}
    return {
        "shape": {"T": T, "H": H, "I": I, "E": E, "K": K, "rounding": rule},
        "formula": {"kept": keeps(shape), **transient(shape)},
        "expert_weights": 2 * E * 3 * I * H,
        "measured": {**vars(measured), "saved": saved},
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    title = "MiB of one layer: formula / measured"
    figures = ("kept, x apart", "with x", "+ expert weights", "forward adds", "backward adds")
    table = table_of(title, "T H I E K rounding", figures)
    for row in rows:
        formula, measured = row["formula"], row["measured"]
        x = formula["kept"]["x"]
        kept = sum(formula["kept"].values()) - x
        with_x = (kept + x, measured["kept"] + x)
        table.add_row(
            " ".join(map(str, row["shape"].values())),
            _pair(kept, measured["kept"]),
            _pair(*with_x),
            _pair(*(value + row["expert_weights"] for value in with_x)),
            _pair(formula["forward"], measured["forward"]),
            _pair(formula["backward"], measured["backward"]),
        )
    console_of(130).print(table)


def _pair(formula: int, measured: int) -> str:
    return f"{formula / MIB:.2f} / {measured / MIB:.2f}"


if __name__ == "__main__":
    sys.exit(main())
