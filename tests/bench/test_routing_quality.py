"""Plans and statistics of the comparison of rounding by its loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from distmoe.bench.routing_quality import (
    TOP_K,
    WAYS,
    Plan,
    Result,
    as_json,
    plans,
    read_result,
    summarize,
    tile_for,
)
from distmoe.config import Config, load_config, resolve

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config() -> Config:
    return resolve(load_config(ROOT / "configs/routing_quality.toml"))


def result(way: str, ratio: float, seed: int, loss: float) -> Result:
    return Result(Plan(way, ratio, 8, seed), loss, 10, 1000, dropped=0.02, added=0.01,
                  without_expert=0.0)  # fmt: skip


def test_ratio_one_is_the_mean_of_an_expert(config: Config) -> None:
    """2,048 tokens of four ranks, top 4 of 32 experts: 256 tokens an expert."""
    assert [tile_for(ratio, config) for ratio in (1, 2, 4, 8)] == [256, 128, 64, 32]
    with pytest.raises(ValueError, match="ratio is 3; it must divide the 256 tokens"):
        tile_for(3, config)


def test_top_k_runs_once_a_seed(config: Config) -> None:
    todo = list(plans(list(WAYS), [1, 2], [1, 2, 3], config))
    assert len(todo) == 3 * (1 + 4 * 2)
    assert len({plan.name for plan in todo}) == len(todo)
    assert [plan.seed for plan in todo] == sorted(plan.seed for plan in todo)


def test_ways_differ_in_rounding_alone(config: Config) -> None:
    for plan in plans(list(WAYS), [2], [5], config):
        changed = load_config(ROOT / "configs/routing_quality.toml", plan.options())
        rounding = changed.moe.rounding
        assert (rounding.rule == "none") == (plan.way == TOP_K)
        assert (rounding.scope == "rank") == (plan.way == "local")
        assert plan.way == TOP_K or rounding.tile == 128
        assert changed.run.seed == 5
        assert changed.model == load_config(ROOT / "configs/routing_quality.toml").model


def test_differences_are_taken_seed_by_seed() -> None:
    """Top-k 5.0 and 6.0; balance 5.1 and 6.3: 0.2 above in the mean, give or take 0.141."""
    lines = summarize(
        [
            result("balance", 2, 1, 5.1),
            result(TOP_K, 0, 1, 5.0),
            result(TOP_K, 0, 2, 6.0),
            result("balance", 2, 2, 6.3),
        ]
    )
    assert [line.way for line in lines] == [TOP_K, "balance"]
    assert lines[0].loss == pytest.approx(5.5)
    assert lines[0].spread == pytest.approx(math.sqrt(0.5))
    assert lines[1].over_top_k == pytest.approx(0.2)
    assert lines[1].over_top_k_spread == pytest.approx(math.sqrt(0.02))
    assert lines[1].moved == pytest.approx(0.03)


def test_one_seed_has_no_spread_and_no_top_k_no_difference() -> None:
    (line,) = summarize([result("down", 1, 1, 5.0)])
    assert line.spread == 0
    assert line.over_top_k is None


def test_a_result_is_read_from_the_files_of_the_run(tmp_path: Path) -> None:
    # Two MoE layers, of which each counts its tokens.
    step = {"pairs": 100, "tokens": 50, "pairs_dropped": 4, "pairs_added": 3}
    (tmp_path / "expert_load.jsonl").write_text(
        json.dumps({"step": 2, "pairs": {"1": [], "2": []}}) + "\n"
    )
    lines = [step | {"tokens_without_expert": 0}, step | {"tokens_without_expert": 5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    validations = [{"step": 1, "validation_loss": 9.0}, {"step": 2, "validation_loss": 4.5}]
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, validations)))
    plan = Plan("down", 2, 8, 1)
    found = read_result(plan, tmp_path)
    assert found == Result(plan, 4.5, 2, 100, dropped=0.04, added=0.03, without_expert=0.025)
    (run,) = as_json([found])["runs"]  # type: ignore[misc]
    assert run["way"] == "down"
    assert run["validation_loss"] == 4.5
