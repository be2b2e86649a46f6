"""How fast the rows of experts move: levels, overlap, steps in turn, and what the model predicts.

python tools/bench_dispatch.py                              # 2 ranks, loopback, the CPU computes
python tools/bench_dispatch.py --mbit 200 --device sleep    # 2 hosts, a slow link, needs root
python tools/bench_dispatch.py --ranks 4 --ranks-per-node 2 --mbit 200 --json out.json

Ranks are processes. With --mbit they live on two hosts (network namespaces of its own, removed at
the end) that are joined by a link of so many Mbit/s. --device sleep computes nothing: it sleeps for
as long as its products would take at --pairs-per-ms. --peers adds other people's layers in the same
rounds, after a check that they compute what ours does; one that is not installed is a line with the
reason. --exposed also measures how much of the time is communication, by the clock and by our own
accounting. --row-dtypes adds ways whose rows travel in fewer bytes, with partial sums in bf16,
after a check that they are the same rows, rounded. Ends with 2 on a wrong argument, 1 if a rank
broke off, or if a peer or a rounded row is wrong, 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from two_hosts import INTERFACE, hosts

from distmoe.arguments import positive
from distmoe.bench.dispatch.layer import Device
from distmoe.bench.dispatch.peers import PEERS
from distmoe.bench.dispatch.report import (
    ExposedLine,
    Line,
    bytes_table,
    draw,
    exposed_table,
    hidden_table,
    show,
    times_table,
)
from distmoe.bench.dispatch.session import (
    RankResult,
    Settings,
    exposed_lines,
    lines,
    measure_rank,
    notes,
    something_is_wrong,
)
from distmoe.bench.dispatch.ways import default_ways
from distmoe.bench.tool import add_sizes, check_layer, circumstances
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.row_volumes import RankLayout
from distmoe.registry import ROW_FORMATS

SIZES = {
    "ranks": 2,
    "tokens": 1024,
    "hidden": 256,
    "inner": 256,
    "experts": 16,
    "top-k": 4,
    "tile": 32,
    "rounds": 7,
}

# DeepSpeed looks for a GPU otherwise, and says much.
VARIABLES = {"DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "error"}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.mbit and os.geteuid() != 0:
        problem = f"--mbit is {arguments.mbit}; hosts of its own need root"
        print(f"bench_dispatch: error: {problem}", file=sys.stderr)
        return 2
    settings = _settings(arguments)
    if arguments.folder:
        _rank(settings, Path(arguments.folder))
        return 0
    command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
    try:
        with hosts(arguments.mbit) as joined:
            figures = joined.figures_of_ranks(arguments.ranks, command, VARIABLES)
    except subprocess.CalledProcessError:
        return 1
    if figures is None:
        return 1
    ranks = [RankResult.read(of_rank) for of_rank in figures]
    found = lines(settings, ranks)
    exposed = exposed_lines(settings, ranks)
    _show(arguments, found, exposed, notes(ranks))
    if arguments.json:
        arguments.json.write_text(json.dumps(_record(found, exposed, ranks), indent=1) + "\n")
    if arguments.picture:
        draw(found, arguments.picture)
    return int(something_is_wrong(ranks))


def _show(
    arguments: argparse.Namespace,
    found: list[Line],
    exposed: list[ExposedLine],
    said: list[str],
) -> None:
    a = arguments
    link = f"two hosts, {a.mbit} Mbit/s" if a.mbit else "one host"
    title = (
        f"P={a.ranks} ({a.ranks_per_node or a.ranks} on a node) T={a.tokens} H={a.hidden} "
        f"I={a.inner} E={a.experts} K={a.top_k} M={a.tile}, {link}, device {a.device}, "
        f"{a.rounds} rounds"
    )
    tables = [times_table(title, found)]
    if any(line.counted for line in found):
        tables.append(bytes_table(found))
    if exposed:
        tables += [exposed_table(exposed), hidden_table(exposed)]
    show(*tables, notes=said)


def _record(
    found: list[Line], exposed: list[ExposedLine], ranks: list[RankResult]
) -> dict[str, object]:
    facts = circumstances()
    with suppress(PackageNotFoundError):
        facts["versions"]["deepspeed"] = version("deepspeed")
    return {
        **facts,
        "profile": ranks[0].profile,
        "lines": [asdict(line) for line in found],
        "exposed": [asdict(line) for line in exposed],
        "peer_errors": ranks[0].errors,
        "missing_peers": ranks[0].missing,
        "rounding_errors": ranks[0].rounding,
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_sizes(parser, SIZES)
    parser.add_argument("--ranks-per-node", type=positive, help="all of them if not given")
    parser.add_argument("--steps", type=_steps, default=[2, 4], help="of order tokens")
    parser.add_argument(
        "--row-dtypes", type=_row_dtypes, default=["bf16", "fp8"], help="of rows, beside fp32"
    )
    parser.add_argument("--mbit", type=int, default=0, help="rate of a link between two hosts")
    parser.add_argument("--device", choices=("cpu", "sleep"), default="cpu", help="what computes")
    parser.add_argument("--pairs-per-ms", type=float, default=50.0, help="of a sleeping device")
    parser.add_argument("--peers", type=_peers, default=list(PEERS), help="names, by comma")
    parser.add_argument("--exposed", action="store_true", help="measure exposed communication")
    parser.add_argument("--json", type=Path, help="file")
    parser.add_argument("--picture", type=Path, help="file")
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    ranks, per_node = arguments.ranks, arguments.ranks_per_node or arguments.ranks
    if ranks < 2:
        parser.error(f"--ranks is {ranks}; it must be at least 2")
    check_layer(parser, arguments)
    if ranks % per_node:
        parser.error(f"--ranks-per-node is {per_node}; it must divide --ranks ({ranks})")
    if arguments.mbit and os.geteuid() != 0:
        parser.error(f"--mbit is {arguments.mbit}; hosts of its own need root")
    if arguments.mbit and ranks % 2:
        parser.error(f"--ranks is {ranks}; two hosts (--mbit) need an even number")
    if arguments.mbit and arguments.ranks_per_node not in (None, ranks // 2):
        parser.error(f"--ranks-per-node is {per_node}; on two hosts (--mbit) it is {ranks // 2}")
    if arguments.device == "sleep" and arguments.pairs_per_ms <= 0:
        parser.error(f"--pairs-per-ms is {arguments.pairs_per_ms}; it must be above 0")
    if arguments.mbit:
        arguments.ranks_per_node = ranks // 2
    return arguments


def settings_of(argv: Sequence[str]) -> Settings:
    """What a run with these arguments measures."""
    return _settings(_arguments(argv))


def _settings(arguments: argparse.Namespace) -> Settings:
    a = arguments
    per_node = a.ranks_per_node or a.ranks
    return Settings(
        shape=LayerShape(
            num_tokens=a.tokens,
            hidden=a.hidden,
            intermediate=a.inner,
            num_experts=a.experts,
            top_k=a.top_k,
            tile=a.tile,
            dtype="fp32",
        ),
        layout=RankLayout(a.ranks, per_node),
        device=Device(1000 * a.pairs_per_ms if a.device == "sleep" else 0.0),
        ways=default_ways(a.ranks, per_node, a.steps, a.row_dtypes),
        peers=a.peers,
        rounds=a.rounds,
        interface=INTERFACE if a.mbit else "",
        exposed=a.exposed,
    )


def _steps(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; it must be integers, at least 1, such as 2,4")
    return [int(part) for part in parts]


def _row_dtypes(text: str) -> list[str]:
    names = text.split(",") if text else []
    known = [name for name in ROW_FORMATS if name != "computed"]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"unknown {name!r}; known: {', '.join(known)}")
    return names


def _peers(text: str) -> list[str]:
    names = text.split(",") if text else []
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"unknown {name!r}; known: {', '.join(PEERS)}")
    return names


def _rank(settings: Settings, folder: Path) -> None:
    """One rank; leaves its figures in the folder."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.layout.num_ranks))
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    if group is None:
        raise AssertionError("init_process_group made no group")
    (folder / str(rank)).write_text(json.dumps(asdict(measure_rank(settings, group))))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
