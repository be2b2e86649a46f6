"""A backend that is wrong, or breaks off, gets no time; the others do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distmoe.bench.kernels.catalog import default_names, find
from distmoe.bench.kernels.check import Expected, expect, faults
from distmoe.bench.kernels.clock import cpu_clock
from distmoe.bench.kernels.measure import Outcome, measure
from distmoe.bench.kernels.peers import grouped_mm
from distmoe.bench.kernels.session import judge
from distmoe.bench.kernels.shapes import SHAPES
from distmoe.bench.kernels.subjects import (
    MODES,
    AutogradSubject,
    ContractSubject,
    Subject,
    Workspace,
)
from distmoe.kernels.moe_mlp import PairIndex

CPU = torch.device("cpu")
RULES = ["none", "nearest", "balance"]


@pytest.fixture(scope="module")
def expected() -> Expected:
    return expect(SHAPES["tiny"], "none", CPU, torch.bfloat16)


def built(name: str, expected: Expected) -> Subject:
    return find(name, CPU).build(expected.problem, Workspace.of(expected.problem))


def changed(expected: Expected, change: Callable[[Tensor], Tensor]) -> Subject:
    """grouped_mm with something done to y."""
    subject = grouped_mm.subject(expected.problem)
    assert isinstance(subject, AutogradSubject)
    layer = subject.layer
    return AutogradSubject(lambda *inputs: change(layer(*inputs)), expected.problem)


def timed(subject: Subject, *, rounds: int = 2) -> Outcome:
    outcome = Outcome("it")
    measure({"it": subject}, {"it": outcome}, modes=list(MODES), rounds=rounds, clock=cpu_clock())
    return outcome


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", default_names(CPU))
def test_what_runs_on_a_cpu_is_right_and_gets_a_time(name: str, rule: str) -> None:
    expected = expect(SHAPES["tiny"], rule, CPU, torch.bfloat16)
    subject = built(name, expected)
    assert faults(subject, expected) == []
    outcome = timed(subject)
    assert outcome.why_not is None
    assert outcome.pairs == expected.problem.num_pairs
    assert {mode: len(samples.ms) for mode, samples in outcome.samples.items()} == {
        mode: 2 for mode in MODES
    }


@pytest.mark.parametrize("time_wrong", [False, True])
def test_wrong_backend_gets_no_time(expected: Expected, time_wrong: bool) -> None:
    outcome = Outcome("it")
    judge(changed(expected, lambda y: 1.03 * y), expected, outcome, time_wrong=time_wrong)
    assert outcome.failed
    assert outcome.wrong is not None
    assert "y: relative error" in outcome.wrong
    assert "dw_in: relative error" in outcome.wrong
    if time_wrong:
        assert outcome.why_not is None
    else:
        assert outcome.why_not == f"wrong: {outcome.wrong}"


def test_right_backend_is_not_refused(expected: Expected) -> None:
    outcome = Outcome("it")
    judge(changed(expected, lambda y: y), expected, outcome, time_wrong=False)
    assert (outcome.why_not, outcome.wrong, outcome.failed) == (None, None, False)


def test_rows_that_nobody_writes_are_seen(expected: Expected) -> None:
    subject = built("torch", expected)
    assert isinstance(subject, ContractSubject)
    subject.rows = slice(0, 60)
    assert any(line.startswith("y: ") for line in faults(subject, expected))
    outcome = timed(subject)
    assert (outcome.samples, outcome.failed) == ({}, True)
    assert outcome.why_not == "AssertionError: not finite: y"


def test_backend_that_breaks_off_leaves_the_others_their_times(expected: Expected) -> None:
    def break_off(y: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nand more about it")

    subjects = {"bad": changed(expected, break_off), "good": built("torch", expected)}
    outcomes = {name: Outcome(name) for name in subjects}
    measure(subjects, outcomes, modes=["both"], rounds=2, clock=cpu_clock())
    assert outcomes["bad"].why_not == "RuntimeError: no such kernel"
    assert outcomes["bad"].failed
    assert len(outcomes["good"].samples["both"].ms) == 2


def test_short_memory_is_a_reason_but_no_fault(expected: Expected) -> None:
    def run_out(y: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("tried to allocate much")

    outcome = timed(changed(expected, run_out))
    assert outcome.why_not == "OutOfMemoryError: tried to allocate much"
    assert not outcome.failed


def test_references_are_made_for_fewer_tokens_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from distmoe.bench.kernels import check

    make = check.make_problem

    def make_small(shape, *rest):  # type: ignore[no-untyped-def]
        if shape.T > 16:
            raise torch.OutOfMemoryError
        return make(shape, *rest)

    monkeypatch.setattr(check, "make_problem", make_small)
    assert expect(SHAPES["tiny"], "none", CPU, torch.bfloat16).problem.shape.T == 16


def test_scores_of_peers_come_back_in_the_order_of_pairs(expected: Expected) -> None:
    """A layer whose y is the sum of its scores' squares, taken in the order of tokens."""
    problem = expected.problem

    def layer(x: Tensor, w_in: Tensor, w_out: Tensor, score: Tensor) -> Tensor:
        return x + 0 * (w_in.sum() + w_out.sum()) + score.square().sum()

    subject = AutogradSubject(layer, problem, order=problem.index.by_row_L)
    subject.run("both")
    dscore = subject.results("both")["dscore"]
    total = problem.dy_RH.float().sum()
    torch.testing.assert_close(dscore, 2 * problem.score_L * total, rtol=1e-2, atol=1e-2)


def test_our_backends_are_checked_with_poisoned_memory(expected: Expected) -> None:
    subject = built("torch", expected)
    assert isinstance(subject, ContractSubject)
    wgrad, fresh = subject.backend.wgrad, []

    def watched(x_RH: Tensor, *rest: Tensor, **index: PairIndex) -> tuple[Tensor, Tensor]:
        fresh.append(x_RH.new_empty(1))
        return wgrad(x_RH, *rest, **index)

    subject.backend.wgrad = watched  # type: ignore[method-assign]
    assert faults(subject, expected) == []
    assert bool(fresh[0].isnan().all())
