"""How fast the rows of experts move: levels, overlap, steps in turn, and what the model predicts.

python tools/bench_dispatch.py                              # 2 ranks, loopback, the CPU computes
python tools/bench_dispatch.py --mbit 200 --device sleep    # 2 hosts, a slow link, needs root
python tools/bench_dispatch.py --ranks 4 --ranks-per-node 2 --mbit 200 --json out.json

Ranks are processes. With --mbit they live on two hosts (network namespaces of its own, removed at
the end) that are joined by a link of so many Mbit/s. --device sleep computes nothing: it sleeps for
as long as its products would take at --pairs-per-ms.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distmoe.comm import make_exchange
from distmoe.config import MoEConfig
from distmoe.planner.command_line import command_line
from distmoe.planner.cost_model import Prediction, predict
from distmoe.planner.dispatch_bench import (
    Layer,
    SleepingMlp,
    Timing,
    Way,
    default_ways,
    measure_ways,
    slowest,
)
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.machine_profile import Profile
from distmoe.planner.measure_device import measure_copy, measure_gemm, measure_launch
from distmoe.planner.measure_links import measure_links
from distmoe.planner.row_volumes import RankLayout

LINKS = str(Path(__file__).with_name("links.sh"))
CPU = torch.device("cpu")
SIZES = {
    "ranks": 2,
    "ranks-per-node": 0,
    "tokens": 1024,
    "hidden": 256,
    "inner": 256,
    "experts": 16,
    "top-k": 4,
    "tile": 32,
    "rounds": 7,
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.folder:
        _rank(arguments)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if not _start_ranks(arguments, list(sys.argv[1:] if argv is None else argv), folder):
            return 1
        found = [json.loads((Path(folder) / str(r)).read_text()) for r in range(arguments.ranks)]
    timings = slowest([[_timing(t) for t in rank["timings"]] for rank in found])
    predictions = [float(seconds) for seconds in found[0]["predictions"]]
    print_table(arguments, timings, predictions)
    if arguments.json:
        facts = {
            "command": command_line(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "profile": found[0]["profile"],
            "ways": [
                asdict(t) | {"predicted_s": p} for t, p in zip(timings, predictions, strict=True)
            ],
        }
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    if arguments.picture:
        draw(timings, predictions, arguments.picture)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=name)
    parser.add_argument("--steps", type=_steps, default=[2, 4], help="of order tokens")
    parser.add_argument("--mbit", type=int, default=0, help="rate of a link between two hosts")
    parser.add_argument("--device", choices=("cpu", "sleep"), default="cpu", help="what computes")
    parser.add_argument("--pairs-per-ms", type=float, default=50.0, help="of a sleeping device")
    parser.add_argument("--json", type=Path, help="file")
    parser.add_argument("--picture", type=Path, help="file")
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name in SIZES:
        value, least = getattr(arguments, name.replace("-", "_")), int(name != "ranks-per-node")
        if value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")
    ranks, per_node = arguments.ranks, arguments.ranks_per_node or arguments.ranks
    if ranks < 2:
        parser.error(f"--ranks is {ranks}; it must be at least 2")
    if arguments.experts % ranks:
        parser.error(f"--experts is {arguments.experts}; --ranks ({ranks}) must divide it")
    if ranks % per_node:
        parser.error(f"--ranks-per-node is {per_node}; it must divide --ranks ({ranks})")
    if arguments.top_k > arguments.experts:
        parser.error(f"--top-k is {arguments.top_k}; it must be at most {arguments.experts}")
    if arguments.mbit and os.geteuid() != 0:
        parser.error(f"--mbit is {arguments.mbit}; hosts of its own need root")
    if arguments.mbit and ranks % 2:
        parser.error(f"--ranks is {ranks}; two hosts (--mbit) need an even number")
    if arguments.mbit and arguments.ranks_per_node not in (0, ranks // 2):
        parser.error(f"--ranks-per-node is {per_node}; on two hosts (--mbit) it is {ranks // 2}")
    if arguments.mbit:
        arguments.ranks_per_node = ranks // 2
    return arguments


def _steps(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; it must be integers, at least 1, such as 2,4")
    return [int(part) for part in parts]


def _start_ranks(arguments: argparse.Namespace, argv: list[str], folder: str) -> bool:
    """Every rank a process; whether all of them ended well."""
    name = f"distmoe-bench-{os.getpid()}"
    ranks: list[subprocess.Popen[bytes]] = []
    # The hosts must go, however this ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if arguments.mbit and subprocess.run([LINKS, "up", name, str(arguments.mbit)]).returncode:
            return False
        for rank in range(arguments.ranks):
            command = [sys.executable, __file__, *argv, "--folder", folder]
            command += ["--ranks-per-node", str(arguments.ranks_per_node)]
            if arguments.mbit:
                host = rank * 2 // arguments.ranks
                command = [LINKS, "exec", name, str(host), *command]
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(arguments.ranks),
                "MASTER_ADDR": "10.77.0.1" if arguments.mbit else "127.0.0.1",
                "MASTER_PORT": str(20000 + os.getpid() % 20000),
            }
            ranks.append(subprocess.Popen(command, env=environment))
        return not any([process.wait() for process in ranks])
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        if arguments.mbit:
            subprocess.run([LINKS, "down", name], check=True)


def _rank(arguments: argparse.Namespace) -> None:
    """One rank; leaves its figures in the folder."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.ranks))
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    if group is None:
        raise AssertionError("init_process_group made no group")
    shape = LayerShape(
        num_tokens=arguments.tokens,
        hidden=arguments.hidden,
        intermediate=arguments.inner,
        num_experts=arguments.experts,
        top_k=arguments.top_k,
        tile=arguments.tile,
        dtype="fp32",
    )
    per_node = arguments.ranks_per_node or arguments.ranks
    pairs_per_s = 1000 * arguments.pairs_per_ms
    mlp = SleepingMlp(pairs_per_s) if arguments.device == "sleep" else None
    profile = _profile(arguments, shape, group, per_node, pairs_per_s)
    layer = Layer(shape, group, ranks_per_node=per_node, mlp=mlp)
    ways = default_ways(arguments.ranks, per_node, arguments.steps)
    timings = measure_ways(layer, ways, rounds=arguments.rounds)
    layout = RankLayout(arguments.ranks, per_node)
    predictions = [predict(shape, layout, profile, layer.schedule(way)) for way in ways]
    facts = {
        "timings": [asdict(timing) for timing in timings],
        "predictions": [_seconds(p, way) for p, way in zip(predictions, ways, strict=True)],
        "profile": asdict(profile),
    }
    (Path(arguments.folder) / str(rank)).write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


def _profile(
    arguments: argparse.Namespace,
    shape: LayerShape,
    group: dist.ProcessGroup,
    per_node: int,
    pairs_per_s: float,
) -> Profile:
    """Of these ranks, measured now."""
    exchange = make_exchange(group)
    moe = MoEConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
    )
    num_local = shape.num_experts // exchange.size
    pairs = shape.num_tokens * shape.top_k
    links = measure_links(exchange, ranks_per_node=per_node, device=CPU)
    if arguments.device == "sleep":
        rate, launch_s = pairs_per_s * shape.flops_per_pair, 0.0
    else:
        rate = measure_gemm(
            moe, num_experts=num_local, pairs=pairs, device=CPU, dtype=torch.float32
        )
        launch_s = measure_launch(moe, device=CPU, dtype=torch.float32)
    own = measure_copy(CPU)
    return Profile(
        links={"own": own} | {figures.name: figures.link(per_node) for figures in links},
        gemm_flops={"fp32": rate},
        host_latency_s=launch_s,
    )


def _seconds(prediction: Prediction, way: Way) -> float:
    passes = (prediction.forward, prediction.backward)
    return sum(p.overlapped_s if way.overlap else p.serial_s for p in passes)


def _timing(values: dict[str, Any]) -> Timing:
    return Timing(**{**values, "way": Way(**values["way"])})


def _total(timing: Timing) -> list[float]:
    return [f + b for f, b in zip(timing.forward_s, timing.backward_s, strict=True)]


def print_table(
    arguments: argparse.Namespace, timings: list[Timing], predictions: list[float]
) -> None:
    from rich.console import Console
    from rich.table import Table

    a = arguments
    link = f"two hosts, {a.mbit} Mbit/s" if a.mbit else "one host"
    title = (
        f"P={a.ranks} ({a.ranks_per_node or a.ranks} on a node) T={a.tokens} H={a.hidden} "
        f"I={a.inner} E={a.experts} K={a.top_k} M={a.tile}, {link}, device {a.device}: "
        f"forward and backward of the experts, {a.rounds} rounds"
    )
    table = Table(title=title, box=None, title_justify="left")
    table.add_column("way", no_wrap=True)
    for name in ("median ms", "min", "max", "of the first", "predicted ms", "error", "MiB sent"):
        table.add_column(name, justify="right")
    table.add_column("between nodes", justify="right")
    first = statistics.median(_total(timings[0]))
    for timing, predicted in zip(timings, predictions, strict=True):
        total = _total(timing)
        median = statistics.median(total)
        table.add_row(
            timing.way.name,
            f"{1000 * median:.1f}",
            f"{1000 * min(total):.1f}",
            f"{1000 * max(total):.1f}",
            f"{median / first:.2f}",
            f"{1000 * predicted:.1f}",
            f"{predicted / median - 1:+.0%}",
            f"{timing.row_bytes / 2**20:.2f}",
            f"{timing.remote_bytes / 2**20:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def draw(timings: list[Timing], predictions: list[float], path: Path) -> None:
    """Medians with the range of the rounds, and the prediction as a line on each bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    totals = [[1000 * value for value in _total(timing)] for timing in timings]
    medians = [statistics.median(total) for total in totals]
    below = [median - min(total) for median, total in zip(medians, totals, strict=True)]
    above = [max(total) - median for median, total in zip(medians, totals, strict=True)]
    figure, axis = pyplot.subplots(figsize=(9, 0.4 * len(timings) + 1.2), constrained_layout=True)
    places = list(range(len(timings)))
    axis.barh(places, medians, xerr=[below, above], capsize=3, label="measured, with its range")
    axis.scatter(
        [1000 * p for p in predictions], places, marker="|", s=200, color="black", label="predicted"
    )
    axis.set_yticks(places, [timing.way.name for timing in timings])
    axis.invert_yaxis()
    axis.set_xlabel("forward and backward of the experts, ms")
    axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
