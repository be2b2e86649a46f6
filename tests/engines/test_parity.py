"""The parity law: the same losses, decisions and gradients however batch and model are cut."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from parity_runs import (
    BIASED,
    FEW_STEPS,
    GLOBAL_BATCH,
    LATENT,
    LAW,
    STEPS,
    UNROUNDED,
    assert_equal_runs,
    relative,
    run,
)
from torch import Tensor

from distmoe.comm import Exchange
from distmoe.config import RoundingConfig
from distmoe.moe import layer as layer_room
from distmoe.routing.round_tokens import Rounded
from distmoe.routing.routers import Scores


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    return run(1, 1, LAW[1, 1], engine="single")[0]


@pytest.fixture(scope="module")
def short_oracle() -> dict[str, Any]:
    return run(1, 1, LAW[1, 1], engine="single", steps=FEW_STEPS)[0]


@pytest.mark.parametrize(("world", "ep"), list(LAW))
def test_parity_law_with_rounding(world: int, ep: int, oracle: dict[str, Any]) -> None:
    results = run(world, ep, LAW[world, ep])
    for result in results:
        assert_equal_runs(result, oracle)
    # One rank of every ep group: their rounded counts add up to the oracle's, as integers.
    groups = [results[rank]["decisions"] for rank in range(0, world, ep)]
    assert np.array_equal(np.sum(groups, axis=0), oracle["decisions"])


class SelectedPairs:
    """The pairs that every rank chose, in the order of its decisions: layer by layer, micro-batch
    by micro-batch, step by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_rank: dict[int, list[Tensor]] = {}
        self._round = layer_room.round_scores
        monkeypatch.setattr(layer_room, "round_scores", self._record)

    def _record(self, scores: Scores, exchange: Exchange, rounding: RoundingConfig) -> Rounded:
        rounded = self._round(scores, exchange, rounding)
        self.by_rank.setdefault(exchange.rank, []).append(rounded.selected_TE)
        return rounded

    def take(self) -> list[Tensor]:
        """Of every decision [tokens of all ranks, E], ranks in order; forgotten afterwards."""
        lists = [self.by_rank[rank] for rank in sorted(self.by_rank)]
        self.by_rank = {}
        return [torch.cat(parts) for parts in zip(*lists, strict=True)]


@pytest.mark.parametrize(("rule", "steps"), [("balance", STEPS), ("score", 3)])
def test_the_number_of_ranks_changes_no_pair(
    rule: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks 1, 2 and 4, balance_groups fixed: the same pairs in every layer at step 1, and the same
    losses in all steps."""
    changes = {"moe": {"rounding": RoundingConfig(rule, tile=8, balance_groups=4)}}
    recorder = SelectedPairs(monkeypatch)
    want = run(1, 1, LAW[1, 1], engine="single", steps=steps, **changes)[0]
    want_pairs = recorder.take()
    # Two MoE layers, two micro-batches.
    assert len(want_pairs) == 2 * 2 * steps
    for num_ranks in (2, 4):
        results = run(num_ranks, num_ranks, LAW[num_ranks, num_ranks], steps=steps, **changes)
        pairs = recorder.take()
        for place in range(4):
            assert torch.equal(pairs[place], want_pairs[place]), place
        for result in results:
            assert relative(result["losses"], want["losses"]) < 1e-5
        same = sum(map(torch.equal, pairs, want_pairs))
        # Later steps start from activations that differ in their last bits.
        assert same >= 0.9 * len(pairs)
        print(f"{rule}, {num_ranks} ranks: {same} of {len(pairs)} decisions equal")


@functools.cache
def unrounded_oracle(micro: int) -> dict[str, Any]:
    return run(1, 1, micro, engine="single", steps=FEW_STEPS, **UNROUNDED)[0]


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_parity_law_of_one_global_batch(world: int, ep: int) -> None:
    """Without accumulation and rounding: the load-balance loss is over the whole global batch."""
    for result in run(world, ep, GLOBAL_BATCH // world, steps=FEW_STEPS, **UNROUNDED):
        assert_equal_runs(result, unrounded_oracle(GLOBAL_BATCH))


@pytest.fixture(scope="module")
def biased_oracle() -> dict[str, Any]:
    return run(1, 1, LAW[1, 1], engine="single", steps=FEW_STEPS, **BIASED)[0]


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 4)])
def test_parity_law_with_sigmoid_and_bias(
    world: int, ep: int, biased_oracle: dict[str, Any]
) -> None:
    results = run(world, ep, LAW[world, ep], steps=FEW_STEPS, **BIASED)
    for result in results:
        assert_equal_runs(result, biased_oracle)
        biases = [name for name in result["final"] if name.endswith("bias_E")]
        assert len(biases) == 2
        for name in biases:
            assert np.array_equal(result["final"][name], biased_oracle["final"][name])
            assert len(np.unique(result["final"][name])) > 2
    groups = [results[rank]["decisions"] for rank in range(0, world, ep)]
    assert np.array_equal(np.sum(groups, axis=0), biased_oracle["decisions"])


def test_a_replay_does_not_move_the_bias(biased_oracle: dict[str, Any]) -> None:
    changes = BIASED | {"activation_checkpoint": "full"}
    result = run(2, 2, LAW[2, 2], steps=FEW_STEPS, **changes)[0]
    for name in (name for name in result["final"] if name.endswith("bias_E")):
        assert np.array_equal(result["final"][name], biased_oracle["final"][name])


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 4)])
def test_parity_law_of_the_step_so_far(world: int, ep: int) -> None:
    """With accumulation, too: every line of the law has the same two micro-batches."""
    for result in run(world, ep, GLOBAL_BATCH // 2 // world, steps=FEW_STEPS, **UNROUNDED):
        assert_equal_runs(result, unrounded_oracle(GLOBAL_BATCH // 2))


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2)])
def test_activation_checkpoint_changes_nothing(
    mode: str, world: int, ep: int, short_oracle: dict[str, Any]
) -> None:
    results = run(world, ep, LAW[world, ep], steps=FEW_STEPS, activation_checkpoint=mode)
    assert_equal_runs(results[0], short_oracle)


def test_parity_law_of_latent_attention() -> None:
    want = run(1, 1, LAW[1, 1], engine="single", steps=1, **LATENT)[0]
    for result in run(2, 2, LAW[2, 2], steps=1, **LATENT):
        assert_equal_runs(result, want)


def test_parity_law_of_short_rows(oracle: dict[str, Any]) -> None:
    """Rows are rounded alike by one rank, by two, and when a forward is made again."""
    short = {"settings": {"moe.dispatch.row_dtype": "fp8"}}
    want = run(1, 1, LAW[1, 1], engine="single", steps=2, **short)[0]
    name = next(name for name in oracle["gradients"] if "w_in" in name)
    assert relative(want["gradients"][name], oracle["gradients"][name]) > 1e-3
    for result in run(2, 2, LAW[2, 2], steps=2, activation_checkpoint="full", **short):
        assert_equal_runs(result, want)


def test_parity_law_inside_of_documents(oracle: dict[str, Any]) -> None:
    """Ranks have different numbers of documents, and of tokens with a loss."""
    want = run(1, 1, LAW[1, 1], engine="single", steps=3, document_mask=True)[0]
    assert relative(want["losses"], oracle["losses"][:3]) > 1e-4
    results = run(2, 2, LAW[2, 2], steps=3, activation_checkpoint="full", document_mask=True)
    for result in results:
        assert_equal_runs(result, want)


def test_recomputation_never_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = layer_room.round_scores
    monkeypatch.setattr(layer_room, "round_scores", lambda *a: (calls.append(1), real(*a))[1])
    run(1, 1, LAW[1, 1], engine="single", activation_checkpoint="full", steps=1)
    # Two MoE layers, two micro-batches: forward only.
    assert len(calls) == 2 * 2
