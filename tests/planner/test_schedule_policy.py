import pytest

from distmoe.config import Config, apply_overrides
from distmoe.planner.cost_model import best_schedule, most_steps
from distmoe.planner.machine_profile import PRESETS, Link, Profile
from distmoe.planner.row_volumes import RankLayout
from distmoe.planner.schedule_policy import layer_shape, resolve_schedule

H200 = PRESETS["NVIDIA H200"]


def run_of(ep: int, *options: str) -> Config:
    """T = 8192 on each rank, 32 pairs of an expert and rank: 4 * ep tiles of 128 an expert."""
    sizes = ["--model.hidden_size=4096", "--moe.intermediate_size=1536", "--moe.num_experts=128"]
    tokens = ["--moe.top_k=8", "--train.micro_batch_size=2", "--data.seq_len=4096"]
    dtype = ["--train.dtype=bf16"]
    return apply_overrides(Config(), [*sizes, *tokens, f"--parallel.ep={ep}", *dtype, *options])


def test_one_rank() -> None:
    found = resolve_schedule(run_of(1), 8, 8, H200)
    assert found[:3] == ("rank", "source", 1)
    assert "nothing travels" in found.why


@pytest.mark.parametrize(
    ("ep", "per_node", "expected"),
    [
        (2, 8, ("rank", "source", 1)),
        (8, 8, ("rank", "source", 7)),
        (16, 16, ("rank", "tokens", 4)),
        (16, 8, ("node", "tokens", 4)),
        (4, 2, ("node", "tokens", 4)),
        (4, 1, ("rank", "source", 3)),
        # Nodes that do not divide the ep axis count as one, for the layer too.
        (8, 12, ("rank", "source", 7)),
        (12, 8, ("rank", "tokens", 4)),
    ],
)
def test_without_a_profile(ep: int, per_node: int, expected: tuple[str, str, int]) -> None:
    found = resolve_schedule(run_of(ep), ep, per_node, None)
    assert found[:3] == expected
    assert found.why == "no profile of this machine: by the number of ranks and nodes"


def test_few_tiles_an_expert_allow_few_steps() -> None:
    config = run_of(16, "--moe.rounding.tile=2048")
    assert resolve_schedule(config, 16, 8, None)[:3] == ("node", "tokens", 2)


@pytest.mark.parametrize(("ep", "per_node"), [(2, 8), (8, 8), (32, 8)])
def test_with_a_profile_the_cost_model_decides(ep: int, per_node: int) -> None:
    config, layout = run_of(ep), RankLayout(ep, min(ep, per_node))
    found = resolve_schedule(config, ep, per_node, H200)
    ranked = best_schedule(layer_shape(_resolved(config), dtype="bf16"), layout, H200)
    best = ranked[0].schedule
    assert found[:3] == (best.level, best.order, best.steps)
    assert "cost model for NVIDIA H200: forward" in found.why
    assert f"of {len(ranked)} schedules" in found.why


def _resolved(config: Config) -> Config:
    return apply_overrides(config, ["--moe.hidden_size=4096"])


def test_best_schedule_is_ranked_and_repeats() -> None:
    shape, layout = layer_shape(_resolved(run_of(16)), dtype="bf16"), RankLayout(16, 8)
    first, second = (best_schedule(shape, layout, H200) for _ in range(2))
    assert first == second
    times = [prediction.total_s for prediction in first]
    assert times == sorted(times)
    assert len({prediction.schedule for prediction in first}) == len(first)
    assert {p.schedule.level for p in first} == {"rank", "node", "copies"}
    assert max(p.schedule.steps for p in first) == most_steps(shape, layout) == 16


def test_order_means_nothing_between_nodes() -> None:
    config = run_of(16, "--moe.dispatch.order=source")
    assert resolve_schedule(config, 16, 8, None)[:3] == ("node", "source", 4)


def test_settings_that_are_not_auto_stay() -> None:
    for profile in (None, H200):
        for key, place, value in (("level", 0, "copies"), ("order", 1, "tokens"), ("steps", 2, 3)):
            config = run_of(8, f"--moe.dispatch.{key}={value}")
            assert resolve_schedule(config, 8, 8, profile)[place] == value
    options = [f"--moe.dispatch.{o}" for o in ("level=copies", "order=tokens", "steps=5")]
    assert resolve_schedule(run_of(8, *options), 8, 8, H200) == (
        "copies",
        "tokens",
        5,
        "as configured",
    )


def test_profile_that_lacks_something_says_so() -> None:
    one_node = Profile({"own": Link(0, 1e12), "node": Link(0, 1e11)}, {"fp32": 1e12}, 0.0)
    found = resolve_schedule(run_of(16), 16, 8, one_node)
    assert found[:3] == ("node", "tokens", 4)
    assert found.why.startswith(
        "the profile has no link 'remote' and no GEMM rate of bf16: by the number"
    )
    assert resolve_schedule(run_of(8, "--train.dtype=fp32"), 8, 8, one_node).why.startswith(
        "cost model"
    )


def test_node_must_have_a_rank() -> None:
    with pytest.raises(ValueError, match="ranks_per_node is 0; it must be at least 1"):
        resolve_schedule(run_of(2), 2, 0, None)
