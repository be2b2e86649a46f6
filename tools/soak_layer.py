"""Many steps of an expert-parallel layer under strongly skewed routing: does it stand still, does
its memory grow?

python tools/soak_layer.py                                        # 8 ranks, 500 steps, level rank
python tools/soak_layer.py --ranks-per-node 4 --level node        # as two nodes
python tools/soak_layer.py --steps 100 --json soak.json

Ranks are processes over gloo. Ends with 2 on a wrong argument; 1 if a rank broke off or stood
still, or if after a fifth of the steps any rank's live tensors grew at all, or what malloc has
handed out, or the resident set after malloc_trim, by more than --most-growth MiB; 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from two_hosts import hosts

from distmoe import MoE, MoEConfig
from distmoe.arguments import new_file
from distmoe.bench.soak import Growth, Reading, growth, soak
from distmoe.bench.tool import add_sizes, check_layer, circumstances, console_of, table_of
from distmoe.config import DispatchConfig, RoundingConfig
from distmoe.moe.schedule import LEVELS

SIZES = {"ranks": 8, "ranks-per-node": 8, "steps": 500, "every": 50, "tokens": 256}
SIZES |= {"hidden": 64, "inner": 32, "experts": 32, "top-k": 4, "tile": 16, "timeout-s": 60}

# The flight recorder of torch keeps the last 2,000 collectives: memory grows until it is full.
VARIABLES = {"OMP_NUM_THREADS": "1", "TORCH_FR_BUFFER_SIZE": "0"}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.folder:
        _rank(arguments)
        return 0
    command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
    with hosts(0) as here:
        figures = here.figures_of_ranks(arguments.ranks, command, VARIABLES)
    if figures is None:
        return 1
    ranks = [[Reading(**reading) for reading in of_rank] for of_rank in figures]
    grown = [growth(readings) for readings in ranks]
    _show(arguments, ranks, grown)
    if arguments.json:
        facts = {
            **circumstances(),
            "ranks": [[asdict(reading) for reading in readings] for readings in ranks],
        }
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    most = arguments.most_growth
    leaks = any(max(g.trimmed_mib, g.allocated_mib) > most or g.live_tensors > 0 for g in grown)
    return int(leaks)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_sizes(parser, SIZES)
    parser.add_argument("--level", choices=LEVELS, default="rank", help="how often a row crosses")
    parser.add_argument("--most-growth", type=float, default=2.0, help="MiB of a rank")
    parser.add_argument("--json", type=new_file, help="file")
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    ranks, per_node = arguments.ranks, arguments.ranks_per_node
    if ranks < 2:
        parser.error(f"--ranks is {ranks}; it must be at least 2")
    if ranks % per_node:
        parser.error(f"--ranks-per-node is {per_node}; it must divide --ranks ({ranks})")
    check_layer(parser, arguments)
    return arguments


def _rank(arguments: argparse.Namespace) -> None:
    """One rank; leaves its readings in the folder."""
    a = arguments
    torch.manual_seed(int(os.environ["RANK"]))
    dist.init_process_group("gloo", timeout=timedelta(seconds=a.timeout_s))
    config = MoEConfig(
        hidden_size=a.hidden,
        intermediate_size=a.inner,
        num_experts=a.experts,
        top_k=a.top_k,
        rounding=RoundingConfig(tile=a.tile),
        dispatch=DispatchConfig(level=a.level),
    )
    layer = MoE(config, dist.group.WORLD, ranks_per_node=a.ranks_per_node)
    for observer in layer.observers():
        observer.timeout_s = a.timeout_s
    # One router for all ranks, as in training.
    dist.broadcast(layer.router_EH.data, 0)
    readings = soak(layer, tokens=a.tokens, steps=a.steps, every=a.every)
    Path(a.folder, str(dist.get_rank())).write_text(json.dumps([asdict(r) for r in readings]))
    dist.barrier()
    dist.destroy_process_group()


def _show(arguments: argparse.Namespace, ranks: list[list[Reading]], grown: list[Growth]) -> None:
    a = arguments
    title = f"P={a.ranks} ({a.ranks_per_node} on a node), level {a.level}, up to {a.tokens} tokens"
    memory = ("resident MiB", "trimmed", "allocated", "live tensors", "MiB")
    figures = ("seconds", *memory, "busiest/mean")
    table = table_of(f"{title} a rank; the largest of all ranks", "step", figures)
    for at_step in zip(*ranks, strict=True):
        table.add_row(
            str(at_step[0].step),
            f"{max(r.seconds for r in at_step):.1f}",
            f"{max(r.resident_mib for r in at_step):.1f}",
            f"{max(r.trimmed_mib for r in at_step):.1f}",
            f"{max(r.allocated_mib for r in at_step):.2f}",
            str(max(r.live_tensors for r in at_step)),
            f"{max(r.live_mib for r in at_step):.2f}",
            f"{max(r.busiest for r in at_step):.2f}",
        )
    console = console_of(120)
    console.print(table)
    console.print(
        f"grown after a fifth of the steps, worst rank: "
        f"{max(g.trimmed_mib for g in grown):+.2f} MiB resident after trimming, "
        f"{max(g.allocated_mib for g in grown):+.2f} MiB allocated, "
        f"{max(g.live_tensors for g in grown):+d} live tensors",
    )


if __name__ == "__main__":
    sys.exit(main())
