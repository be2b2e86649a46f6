"""A run of the bench: for every shape and rounding rule, check, then time, who was asked for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from distmoe.bench.kernels.catalog import Candidate, MissingError, find, first_line, is_fault
from distmoe.bench.kernels.check import Expected, expect, faults
from distmoe.bench.kernels.clock import Clock, make_clock
from distmoe.bench.kernels.measure import Outcome, measure
from distmoe.bench.kernels.pieces import Trial, check_trials, time_pieces, time_trials
from distmoe.bench.kernels.problem import Problem, make_problem
from distmoe.bench.kernels.profiling import KernelTime, profile_subject
from distmoe.bench.kernels.router_cost import RouterCost, router_cost
from distmoe.bench.kernels.shapes import Shape
from distmoe.bench.kernels.subjects import ContractSubject, Subject, Workspace
from distmoe.planner.roofline import LayerSize
from distmoe.registry import MOE_MLP_TILES


@dataclass(frozen=True)
class Request:
    """``rules``: rounding rules, ``none`` for top-k. ``tiles``: as moe.kernel_tiles of a run.
    ``time_wrong``: time what fails the check too, marked as wrong."""

    shapes: list[Shape]
    rules: list[str]
    backends: list[str]
    modes: list[str]
    rounds: int
    device: torch.device
    dtype: torch.dtype
    tiles: str = "auto"
    tune: bool = False
    profile: bool = False
    time_wrong: bool = False


@dataclass
class Result:
    """Of one shape and rule. ``padded_pairs``: pairs with every expert filled up to whole tiles.
    ``checked_tokens``: T of the correctness test. ``trials``: tile configurations by backend."""

    shape: Shape
    rule: str
    size: LayerSize
    padded_pairs: int
    checked_tokens: int
    router: RouterCost
    outcomes: list[Outcome]
    pieces: dict[str, dict[str, float]] = field(default_factory=dict)
    trials: dict[str, list[Trial]] = field(default_factory=dict)
    profiles: dict[str, list[KernelTime]] = field(default_factory=dict)


def run(request: Request, say: Callable[[str], None]) -> Iterator[Result]:
    """Results as they are ready; ``say`` takes a line about what happens now."""
    candidates, missing = _find_all(request)
    clock = make_clock(request.device)
    for shape in request.shapes:
        for rule in request.rules:
            yield _run_one(request, shape, rule, candidates, missing, clock, say)


def _find_all(request: Request) -> tuple[list[Candidate], dict[str, str]]:
    candidates, missing = [], {}
    for name in request.backends:
        try:
            candidates.append(find(name, request.device, tiles=request.tiles))
        except MissingError as reason:
            missing[name] = str(reason)
    return candidates, missing


def _run_one(
    request: Request,
    shape: Shape,
    rule: str,
    candidates: list[Candidate],
    missing: dict[str, str],
    clock: Clock,
    say: Callable[[str], None],
) -> Result:
    outcomes = {name: Outcome(name) for name in request.backends}
    for name, reason in missing.items():
        outcomes[name].refuse(reason)
    say(f"{shape}, {_routing(rule)}: checking")
    expected = expect(shape, rule, request.device, request.dtype)
    to_check = [candidate for candidate in candidates if candidate.checked]
    trials = _check_all(request, to_check, expected, outcomes, say)
    checked_tokens = expected.problem.shape.T
    del expected
    _free(request.device)
    say(f"{shape}, {_routing(rule)}: timing")
    problem = make_problem(shape, rule, request.device, request.dtype)
    subjects = _build(candidates, problem, outcomes)
    measure(subjects, outcomes, modes=request.modes, rounds=request.rounds, clock=clock)
    result = Result(
        shape=shape,
        rule=rule,
        size=problem.size,
        padded_pairs=_padded(problem),
        checked_tokens=checked_tokens,
        router=router_cost(shape, rule, request.device, rounds=request.rounds, clock=clock),
        outcomes=list(outcomes.values()),
        trials=trials,
    )
    timed = {name: subjects[name] for name in subjects if outcomes[name].why_not is None}
    _look_closer(request, result, timed, clock)
    subjects.clear()
    timed.clear()
    _free(request.device)
    return result


def _check_all(
    request: Request,
    candidates: list[Candidate],
    expected: Expected,
    outcomes: dict[str, Outcome],
    say: Callable[[str], None],
) -> dict[str, list[Trial]]:
    """Refuse what is wrong; the tile configurations of backends that have any, if they are
    wanted."""
    trials: dict[str, list[Trial]] = {}
    workspace = Workspace.of(expected.problem)
    for candidate in candidates:
        outcome = outcomes[candidate.name]
        say(f"  {candidate.name}")
        try:
            subject = candidate.build(expected.problem, workspace)
            judge(subject, expected, outcome, time_wrong=request.time_wrong)
            is_tuned = request.tune and candidate.name in MOE_MLP_TILES
            if is_tuned and isinstance(subject, ContractSubject):
                trials[candidate.name] = check_trials(candidate.name, subject, expected)
        # A backend may break off in any way; the others go on.
        except Exception as error:
            outcome.refuse(first_line(error), failed=is_fault(error))
    return trials


def judge(subject: Subject, expected: Expected, outcome: Outcome, *, time_wrong: bool) -> None:
    """Refuse ``outcome`` if ``subject`` computes wrong results, or mark it with ``time_wrong``."""
    wrong = "; ".join(faults(subject, expected))
    if not wrong:
        return
    outcome.wrong, outcome.failed = wrong, True
    if not time_wrong:
        outcome.refuse(f"wrong: {wrong}", failed=True)


def _build(
    candidates: list[Candidate], problem: Problem, outcomes: dict[str, Outcome]
) -> dict[str, Subject]:
    workspace = Workspace.of(problem)
    subjects: dict[str, Subject] = {}
    for candidate in candidates:
        if outcomes[candidate.name].why_not is not None:
            continue
        try:
            subjects[candidate.name] = candidate.build(problem, workspace)
        except Exception as error:
            outcomes[candidate.name].refuse(first_line(error), failed=is_fault(error))
    return subjects


def _look_closer(request: Request, result: Result, timed: dict[str, Subject], clock: Clock) -> None:
    """Pieces of our own backends, tile configurations, profiles."""
    for name, subject in timed.items():
        if isinstance(subject, ContractSubject):
            result.pieces[name] = time_pieces(subject, rounds=request.rounds, clock=clock)
            if name in result.trials:
                time_trials(result.trials[name], subject, rounds=request.rounds, clock=clock)
        if request.profile:
            result.profiles[name] = profile_subject(subject, "both", request.device)


def _padded(problem: Problem) -> int:
    counts_e, tile = problem.index.offsets_e1.diff(), problem.shape.tile
    return int(((counts_e + tile - 1) // tile * tile).sum())


def _routing(rule: str) -> str:
    return "top-k" if rule == "none" else f"rounded by {rule}"


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
