"""The schema as a flat table of dotted keys: `moe.rounding.tile` -> int."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, get_type_hints

from distmoe.config.schema import Config


@cache
def sections() -> dict[str, type]:
    """Every section's dataclass; the whole run's is called ''."""
    return dict(_walk_sections(Config, ""))


@cache
def key_types() -> dict[str, Any]:
    """The type of every setting."""
    return {
        join(section, name): kind
        for section, owner in sections().items()
        for name, kind in get_type_hints(owner).items()
        if not dataclasses.is_dataclass(kind)
    }


def join(section: str, name: str) -> str:
    """The dotted key of a name in a section."""
    return f"{section}.{name}" if section else name


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of ``config`` with the values of some dotted keys."""
    for key, value in values.items():
        config = _replaced(config, key.split("."), value)
    return config


def suggestion(key: str) -> str:
    """What to say of an unknown key: its nearest neighbour, or what its section knows."""
    by_words = {known.replace(".", "_"): known for known in key_types()}
    if (words := key.replace(".", "_")) in by_words:
        return f"did you mean '{by_words[words]}'?"
    section, _, name = key.rpartition(".")
    if section not in sections():
        near = nearest(key, key_types())
        return f"did you mean '{near}'?" if near else suggestion(section)
    names = [field.name for field in dataclasses.fields(sections()[section])]
    if near := nearest(name, names):
        return f"did you mean '{join(section, near)}'?"
    # The name may belong to another section.
    if near_name := nearest(name, [known.rpartition(".")[2] for known in key_types()]):
        homes = [known for known in key_types() if known.rpartition(".")[2] == near_name]
        return f"did you mean '{nearest(key, homes, cutoff=0.0)}'?"
    return f"known{' in ' + section if section else ''}: {', '.join(names)}"


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name most like ``name``, if one is alike enough."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, cutoff)), None)


def _walk_sections(owner: type, section: str) -> Iterable[tuple[str, type]]:
    yield section, owner
    for name, kind in get_type_hints(owner).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _walk_sections(kind, join(section, name))


def _replaced(owner: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    inner = _replaced(getattr(owner, name), rest, value) if rest else value
    return dataclasses.replace(owner, **{name: inner})
