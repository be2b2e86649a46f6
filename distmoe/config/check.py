"""Every setting against its range, its known names, the other settings and the prepared data."""

from __future__ import annotations

from collections.abc import Iterator

from distmoe.config import file_rules, layer_rules, run_rules
from distmoe.config.data_rules import data_problems
from distmoe.config.errors import ConfigError
from distmoe.config.keys import nearest, value_of
from distmoe.config.ranges import out_of_range
from distmoe.config.resolve import resolve
from distmoe.config.schema import Config
from distmoe.registry import (
    ATTENTIONS,
    ENGINES,
    EXCHANGES,
    MOE_MLP_BACKENDS,
    OPTIMIZERS,
    ROUNDING_RULES,
    ROUNDING_TRANSPORTS,
    ROUTERS,
    ROW_FORMATS,
    SCHEDULES,
    SELECTIONS,
    Registry,
)

RULES = (*layer_rules.RULES, *run_rules.RULES, *file_rules.RULES)

NAMES: dict[str, tuple[Registry, tuple[str, ...]]] = {
    "model.attention": (ATTENTIONS, ()),
    "moe.router": (ROUTERS, ()),
    "moe.rounding.rule": (ROUNDING_RULES, ()),
    "moe.rounding.selection": (SELECTIONS, ()),
    "moe.rounding.transport": (ROUNDING_TRANSPORTS, ("auto",)),
    "moe.dispatch.exchange": (EXCHANGES, ("auto",)),
    "moe.dispatch.row_dtype": (ROW_FORMATS, ()),
    "moe.kernel": (MOE_MLP_BACKENDS, ("auto",)),
    "parallel.engine": (ENGINES, ("auto",)),
    "optim.name": (OPTIMIZERS, ()),
    "optim.schedule": (SCHEDULES, ()),
}
"""Settings that pick from a registry, and what else they may be."""


def check(
    config: Config, world: int, *, local_world: int | None = None, with_data: bool = True
) -> None:
    """ConfigError, a line for every problem, if a run of ``world`` ranks is impossible.

    It needs no torch and starts nothing. Settings that are still unset are derived first; see
    `resolve` for ``local_world``. ``with_data`` false: a plan may come before the data.
    """
    resolved = resolve(config, world, local_world=local_world)
    problems = list(_problems(resolved, world, with_data=with_data))
    if problems:
        raise ConfigError(problems)


def _problems(config: Config, world: int, *, with_data: bool) -> Iterator[str]:
    wrong = dict(out_of_range(config))
    yield from wrong.values()
    yield from _unknown_names(config)
    for rule in RULES:
        # A rule may divide by its keys, so their ranges must hold first.
        if wrong.keys().isdisjoint(rule.keys):
            yield from rule.complaints(config, world)
    if with_data and wrong.keys().isdisjoint(("data.seq_len", "train.global_batch_size")):
        yield from data_problems(config)


def _unknown_names(config: Config) -> Iterator[str]:
    for key, (registry, others) in NAMES.items():
        name, known = value_of(config, key), [*others, *registry]
        if name not in known:
            near = nearest(name, known)
            advice = f"; did you mean {near}?" if near else ""
            yield f"{key} is '{name}'; it must be one of {', '.join(known)}{advice}"
