"""A run of the bench: for every shape and rounding rule, check, then time, who was asked for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from distmoe.bench.kernels.catalog import Candidate, MissingError, find
from distmoe.bench.kernels.check import Expected, expect, faults
from distmoe.bench.kernels.clock import make_clock
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


class Session:
    """Who can be timed on the device of ``request``, and who not, with the reason. ``say`` takes a
    line about what happens now."""

    def __init__(self, request: Request, say: Callable[[str], None]) -> None:
        self.request, self.say = request, say
        self.clock = make_clock(request.device)
        self.candidates: list[Candidate] = []
        self.missing: dict[str, str] = {}
        for name in request.backends:
            try:
                self.candidates.append(find(name, request.device, tiles=request.tiles))
            except MissingError as reason:
                self.missing[name] = str(reason)

    def results(self) -> Iterator[Result]:
        """As they are ready."""
        for shape in self.request.shapes:
            for rule in self.request.rules:
                yield self._result(shape, rule)

    def _result(self, shape: Shape, rule: str) -> Result:
        request, clock = self.request, self.clock
        routing = "top-k" if rule == "none" else f"rounded by {rule}"
        outcomes = {name: Outcome(name) for name in request.backends}
        for name, reason in self.missing.items():
            outcomes[name].refuse(reason)
        self.say(f"{shape}, {routing}: checking")
        expected = expect(shape, rule, request.device, request.dtype)
        trials = self._check(expected, outcomes)
        checked_tokens = expected.problem.shape.T
        del expected
        _free(request.device)
        self.say(f"{shape}, {routing}: timing")
        problem = make_problem(shape, rule, request.device, request.dtype)
        subjects = self._build(problem, outcomes)
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
        for name in subjects:
            if outcomes[name].why_not is None:
                self._look_closer(name, subjects[name], result)
        subjects.clear()
        _free(request.device)
        return result

    def _check(self, expected: Expected, outcomes: dict[str, Outcome]) -> dict[str, list[Trial]]:
        """Refuse what is wrong; the tile configurations of backends that have any, if they are
        wanted."""
        trials: dict[str, list[Trial]] = {}
        workspace = Workspace.of(expected.problem)
        for candidate in self.candidates:
            if not candidate.checked:
                continue
            name, outcome = candidate.name, outcomes[candidate.name]
            self.say(f"  {name}")
            try:
                subject = candidate.build(expected.problem, workspace)
                judge(subject, expected, outcome, time_wrong=self.request.time_wrong)
                is_tuned = self.request.tune and name in MOE_MLP_TILES
                if is_tuned and isinstance(subject, ContractSubject):
                    trials[name] = check_trials(name, subject, expected)
            # A backend may break off in any way; the others go on.
            except Exception as error:
                outcome.break_off(error)
        return trials

    def _build(self, problem: Problem, outcomes: dict[str, Outcome]) -> dict[str, Subject]:
        """Those that are not refused."""
        workspace = Workspace.of(problem)
        subjects: dict[str, Subject] = {}
        for candidate in self.candidates:
            outcome = outcomes[candidate.name]
            try:
                if outcome.why_not is None:
                    subjects[candidate.name] = candidate.build(problem, workspace)
            except Exception as error:
                outcome.break_off(error)
        return subjects

    def _look_closer(self, name: str, subject: Subject, result: Result) -> None:
        """Pieces of one of our own backends, tile configurations, a profile."""
        rounds, clock = self.request.rounds, self.clock
        if isinstance(subject, ContractSubject):
            result.pieces[name] = time_pieces(subject, rounds=rounds, clock=clock)
            if name in result.trials:
                time_trials(result.trials[name], subject, rounds=rounds, clock=clock)
        if self.request.profile:
            result.profiles[name] = profile_subject(subject, "both", self.request.device)


def judge(subject: Subject, expected: Expected, outcome: Outcome, *, time_wrong: bool) -> None:
    """Refuse ``outcome`` if ``subject`` computes wrong results, or mark it with ``time_wrong``."""
    wrong = "; ".join(faults(subject, expected))
    if not wrong:
        return
    outcome.wrong, outcome.failed = wrong, True
    if not time_wrong:
        outcome.refuse(f"wrong: {wrong}", failed=True)


def _padded(problem: Problem) -> int:
    counts_e, tile = problem.index.offsets_e1.diff(), problem.shape.tile
    return int(((counts_e + tile - 1) // tile * tile).sum())


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
