"""Messages, bytes and CPU time that each way to round adds to a layer's forward, rank by rank.

python tools/measure_routing_cost.py
python tools/measure_routing_cost.py --ranks 2 --tokens 512 --experts 32 --hidden 64 --inner 32
python tools/measure_routing_cost.py --json docs/benchmarks/routing-cost.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distmoe.arguments import new_file
from distmoe.bench.routing_cost import Cost, measure_costs
from distmoe.bench.tool import add_sizes, check_layer, circumstances, console_of, table_of
from distmoe.config import MoEConfig, RoundingConfig

SIZES = {
    "ranks": 8,
    "tokens": 4096,
    "experts": 256,
    "top-k": 8,
    "hidden": 1024,
    "inner": 512,
    "tile": 128,
    "repeats": 3,
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.ranks == 1:
            _rank(0, arguments, folder)
        else:
            mp.spawn(_rank, (arguments, folder), nprocs=arguments.ranks)
        ranks = [json.loads((Path(folder) / str(r)).read_text()) for r in range(arguments.ranks)]
    costs = [[Cost(**cost) for cost in rank] for rank in ranks]
    print_table(arguments, costs)
    if arguments.json:
        facts = {
            **circumstances(),
            "sizes": {name: getattr(arguments, name.replace("-", "_")) for name in SIZES},
            "ranks": [[asdict(cost) | {"share": cost.share} for cost in rank] for rank in costs],
        }
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_sizes(parser, SIZES)
    parser.add_argument("--json", type=new_file)
    arguments = parser.parse_args(argv)
    check_layer(parser, arguments)
    return arguments


def _rank(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    """One rank, a process of its own where there are several; leaves its figures in ``folder``."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.ranks))
    group = None
    if arguments.ranks > 1:
        store = dist.FileStore(f"{folder}/store", arguments.ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=arguments.ranks)
        group = dist.group.WORLD
    config = MoEConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.inner,
        num_experts=arguments.experts,
        top_k=arguments.top_k,
        rounding=RoundingConfig("balance", tile=arguments.tile),
    )
    costs = measure_costs(
        config, num_tokens=arguments.tokens, repeats=arguments.repeats, group=group
    )
    (Path(folder) / str(rank)).write_text(json.dumps([asdict(cost) for cost in costs]))
    if group is not None:
        dist.destroy_process_group()


def print_table(arguments: argparse.Namespace, ranks: list[list[Cost]]) -> None:
    """Bytes of the first rank, which sends as many as any but for its pairs; the share is over all
    ranks."""
    a = arguments
    title = (
        f"P={a.ranks} E={a.experts} K={a.top_k} T={a.tokens} a rank, M={a.tile}, H={a.hidden}, "
        f"I={a.inner}: what rank 0 sends before the rows"
    )
    kinds = list(dict.fromkeys(kind for cost in ranks[0] for kind in cost.rounds))
    figures = ("rows\nMiB", "rounds", "CPU ms", "share of\nthe forward")
    table = table_of(title, "", [*(f"{kind}\nKiB" for kind in kinds), *figures])
    for place, first in enumerate(ranks[0]):
        rounding_s = sum(rank[place].rounding_s for rank in ranks)
        layer_s = sum(rank[place].layer_s for rank in ranks)
        sent = [first.bytes_sent.get(kind, 0) / 1024 for kind in kinds]
        table.add_row(
            first.name,
            *(f"{kib:,.1f}" if kib else "" for kib in sent),
            f"{first.row_bytes / 2**20:,.1f}",
            str(sum(first.rounds.values())),
            f"{1000 * rounding_s / len(ranks):.1f}",
            f"{rounding_s / layer_s:.1%}",
        )
    console_of(130).print(table)


if __name__ == "__main__":
    sys.exit(main())
