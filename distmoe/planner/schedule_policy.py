"""What `auto` means for moe.dispatch.level, order and steps: resolved once, before training.

One rank exchanges nothing. With a profile of the machine the cost model decides; without one
`moe.schedule.auto_schedule`, which sees to the ranks and nodes alone.
"""

from __future__ import annotations

from typing import NamedTuple

from distmoe.config import Config, resolve
from distmoe.config.batch import rank_tokens
from distmoe.kernels.moe_mlp.activations import activation_called
from distmoe.moe.schedule import MOST_RUNS, ORDERS, auto_schedule
from distmoe.planner.cost_model import LEVELS, Prediction, best_schedule, most_steps
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.machine_profile import Profile
from distmoe.planner.row_volumes import RankLayout


class ResolvedSchedule(NamedTuple):
    """``why``: one line for the log."""

    level: str
    order: str
    steps: int
    why: str


def resolve_schedule(
    config: Config,
    world: int,
    ranks_per_node: int,
    profile: Profile | None,
    *,
    relays: bool = True,
) -> ResolvedSchedule:
    """The schedule of the expert layers of a run of ``world`` ranks, consecutive ranks on a node,
    whose dtype `with_dtype` has resolved.

    Settings that are not auto stay as they are. ``relays``: whether auto may take level node.
    ValueError for fewer than one rank on a node.
    """
    if ranks_per_node < 1:
        raise ValueError(f"ranks_per_node is {ranks_per_node}; it must be at least 1")
    config = resolve(config, world)
    dispatch = config.moe.dispatch
    if config.parallel.ep == 1:
        return ResolvedSchedule("rank", "source", 1, "one rank: nothing travels")
    layout = RankLayout.of_group(config.parallel.ep, ranks_per_node)
    if dispatch.level != "auto" and dispatch.order != "auto" and dispatch.steps:
        return ResolvedSchedule(dispatch.level, dispatch.order, dispatch.steps, "as configured")
    missing = "no profile of this machine" if profile is None else _missing(layout, profile, config)
    if missing or profile is None:
        return _without_profile(config, layout, missing, relays=relays)
    found = ranked_schedules(config, layout, profile, relays=relays)
    best = found[0].schedule
    return ResolvedSchedule(best.level, best.order, best.steps, _reason(found, profile))


def ranked_schedules(
    config: Config, layout: RankLayout, profile: Profile, *, relays: bool
) -> list[Prediction]:
    """All that a resolved config leaves, the fastest first."""
    dispatch = config.moe.dispatch
    levels = [level for level in LEVELS if relays or level != "node"]
    return best_schedule(
        layer_shape(config, dtype=config.train.dtype),
        layout,
        profile,
        levels=levels if dispatch.level == "auto" else (dispatch.level,),
        orders=ORDERS if dispatch.order == "auto" else (dispatch.order,),
        steps=dispatch.steps,
    )


def layer_shape(config: Config, *, dtype: str) -> LayerShape:
    """The expert layers of a resolved config."""
    moe = config.moe
    return LayerShape(
        num_tokens=rank_tokens(config),
        hidden=moe.hidden_size,
        intermediate=moe.intermediate_size,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        tile=moe.rounding.tile,
        dtype=dtype,
        gated=activation_called(moe.activation).gated,
        row_dtype=moe.dispatch.row_dtype,
        sum_dtype=moe.dispatch.sum_dtype,
    )


def _missing(layout: RankLayout, profile: Profile, config: Config) -> str:
    """What the profile lacks for these ranks; empty if nothing."""
    lacking = [f"link '{name}'" for name in layout.link_classes if name not in profile.links]
    if config.train.dtype not in profile.dtypes:
        lacking.append(f"GEMM rate of {config.train.dtype}")
    return f"the profile has no {' and no '.join(lacking)}" if lacking else ""


def _without_profile(
    config: Config, layout: RankLayout, why: str, *, relays: bool
) -> ResolvedSchedule:
    dispatch = config.moe.dispatch
    found = auto_schedule(
        dispatch.level,
        dispatch.order,
        dispatch.steps,
        num_ranks=layout.num_ranks,
        ranks_per_node=layout.per_node,
        relays=relays,
        most_runs=min(most_steps(layer_shape(config, dtype="bf16"), layout), MOST_RUNS),
    )
    why = f"{why}: by the number of ranks and nodes"
    return ResolvedSchedule(found.level, found.order, found.steps, why)


def _reason(found: list[Prediction], profile: Profile) -> str:
    best = found[0]
    times = [
        f"{name} {1e3 * one.overlapped_s:.3g} ms, {one.exposed_share:.0%} of it waiting"
        for name, one in (("forward", best.forward), ("backward", best.backward))
    ]
    slowest = found[-1].total_s / best.total_s
    return (
        f"cost model for {profile.origin.device or 'a device without a name'}: "
        f"{', '.join(times)} (of {len(found)} schedules, the slowest takes {slowest:.2f} times as "
        "long)"
    )
