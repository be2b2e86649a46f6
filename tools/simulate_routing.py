"""What each rounding rule does to the tiles of every rank, on synthetic routing or on a run's own.

python tools/simulate_routing.py
python tools/simulate_routing.py --ranks 16,64 --experts 512 --tokens 8192 --skew 0,0.5,1
python tools/simulate_routing.py --rules balance --capacity 1,1.25,1.5,2
python tools/simulate_routing.py --json out.json --picture out.png
python tools/simulate_routing.py --trace runs/quickstart --tile 16,32,64

A trace is what `distmoe train FILE --train.record_routing N` leaves in the run's folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from distmoe.arguments import names_of, new_file, positive, several
from distmoe.bench.routing_picture import draw
from distmoe.bench.routing_report import Result, as_json, print_result, print_summary
from distmoe.bench.routing_simulation import (
    Outcome,
    Setting,
    mean_outcomes,
    simulate,
    synthetic_scores,
    traced_scores,
)
from distmoe.bench.tool import command_line
from distmoe.metrics.routing_trace import GroupRouting, TraceError, read_traces, trace_folder
from distmoe.registry import ROUNDING_RULES
from distmoe.routing.routers import Scores

# Of synthetic routing. A trace has these sizes, all but the tile fixed.
DEFAULTS = {
    "ranks": [8],
    "experts": [256],
    "top_k": [8],
    "tokens": [2048],
    "tile": [128],
    "skew": [0.0, 0.3, 1.0],
    "seed": 0,
}

# More settings than this get a table of all beside their own.
MANY_SETTINGS = 6


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    results: list[Result] = []
    try:
        for result in _traced(arguments) if arguments.trace else _synthetic(arguments):
            print_result(result)
            results.append(result)
    except TraceError as error:
        print(f"simulate_routing: error: {error}", file=sys.stderr)
        return 1
    if len(results) > MANY_SETTINGS:
        print_summary(results)
    if arguments.json:
        command = command_line()
        arguments.json.write_text(json.dumps(as_json(results, command=command), indent=1) + "\n")
    if arguments.picture:
        draw(results, arguments.picture)
    return 0


def _synthetic(arguments: argparse.Namespace) -> Iterator[Result]:
    for setting in _settings(arguments):
        scores = synthetic_scores(setting, seed=arguments.seed)
        yield setting, _outcomes(scores, arguments, ranks=setting.ranks, tile=setting.tile)


def _outcomes(
    scores: Scores, arguments: argparse.Namespace, *, ranks: int, tile: int
) -> list[Outcome]:
    return simulate(scores, arguments.rules, ranks=ranks, tile=tile, capacities=arguments.capacity)


def _settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    a = arguments
    for sizes in itertools.product(a.tokens, a.experts, a.top_k, a.ranks, a.tile, a.skew):
        yield Setting(*sizes)


def _traced(arguments: argparse.Namespace) -> Iterator[Result]:
    """A result per layer and tile: means over steps, ep groups and micro-batches."""
    samples: dict[Setting, list[list[Outcome]]] = defaultdict(list)
    for routing in read_traces(arguments.trace):
        scores = traced_scores(routing)
        for tile in arguments.tile or [routing.tile]:
            outcomes = _outcomes(scores, arguments, ranks=routing.ranks, tile=tile)
            samples[_setting_of(routing, tile)].append(outcomes)
    for setting in sorted(samples, key=lambda setting: (setting.layer, setting.tile)):
        yield setting, mean_outcomes(samples[setting])


def _setting_of(routing: GroupRouting, tile: int) -> Setting:
    tokens, num_experts = routing.key_TE.shape
    return Setting(
        tokens=tokens // routing.ranks,
        num_experts=num_experts,
        top_k=routing.top_k,
        ranks=routing.ranks,
        tile=tile,
        layer=routing.layer,
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = {"tokens": "tokens of one rank", "tile": "M; with --trace, instead of the run's own"}
    for name in ("ranks", "experts", "top_k", "tokens", "tile"):
        shown = f"{what.get(name, name.replace('_', '-'))} ({DEFAULTS[name]}); several: 16,32"
        parser.add_argument(f"--{name}", type=several(positive), help=shown)
    parser.add_argument("--skew", type=several(float), help=f"of the experts {DEFAULTS['skew']}")
    parser.add_argument("--seed", type=int, help="of synthetic scores (0)")
    parser.add_argument("--trace", type=Path, help="a run's folder, or its folder routing")
    rules = [name for name in ROUNDING_RULES if name != "none"]
    parser.add_argument("--rules", type=names_of(ROUNDING_RULES), default=rules)
    factors = "factors of a capacity under balance: 1,1.25,1.5,2"
    parser.add_argument("--capacity", type=several(float), default=[], help=factors)
    parser.add_argument("--json", type=new_file)
    parser.add_argument("--picture", type=new_file)
    arguments = parser.parse_args(argv)
    if not arguments.trace:
        left_out = {name: n for name, n in DEFAULTS.items() if getattr(arguments, name) is None}
        vars(arguments).update(left_out)
    if problem := next(_problems(arguments), None):
        parser.error(problem)
    return arguments


def _problems(arguments: argparse.Namespace) -> Iterator[str]:
    """What is wrong, the first of which is said."""
    for factor in arguments.capacity:
        if not 1 <= factor < math.inf:
            yield f"--capacity is {factor}; it must be at least 1"
    yield from _trace_problems(arguments) if arguments.trace else _size_problems(arguments)


def _trace_problems(arguments: argparse.Namespace) -> Iterator[str]:
    for name in DEFAULTS:
        if name != "tile" and getattr(arguments, name) is not None:
            yield f"--{name} and --trace: a trace has its own; only --tile can be changed"
    try:
        trace_folder(arguments.trace)
    except TraceError as error:
        yield f"--trace: {error}"


def _size_problems(arguments: argparse.Namespace) -> Iterator[str]:
    for experts, ranks in itertools.product(arguments.experts, arguments.ranks):
        if experts % ranks:
            yield f"--experts is {experts}; --ranks ({ranks}) must divide it"
    for experts, top_k in itertools.product(arguments.experts, arguments.top_k):
        if top_k > experts:
            yield f"--top_k is {top_k}; it must be at most {experts}"


if __name__ == "__main__":
    sys.exit(main())
