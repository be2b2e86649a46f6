"""A run's settings from TOML and the command line, and back to TOML.

A file may begin with `extends = "base.toml"`, a path relative to itself: its own values win.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from distmoe.config.errors import ConfigError
from distmoe.config.keys import join, key_types, nearest, sections, suggestion, with_values
from distmoe.config.overrides import apply_overrides
from distmoe.config.schema import Config

EXTENDS = "extends"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a TOML file, changed by options such as ``--train.steps 50``.

    ConfigError for a file that cannot be read, an unknown key or a wrong type. Relations between
    settings are the matter of `check`.
    """
    config = with_values(Config(), _read_values(Path(path), ()))
    return apply_overrides(config, overrides) if overrides else config


def to_toml(config: Config) -> str:
    """The settings as TOML; `load_config` reads an equal Config back."""
    import tomli_w

    return tomli_w.dumps(dataclasses.asdict(config))


def _read_values(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """Dotted keys -> values of a file on top of those that it extends."""
    chain = (*readers, path.resolve())
    if path.resolve() in readers:
        raise ConfigError("extends goes in a circle: " + " -> ".join(str(file) for file in chain))
    tables = _parse(path)
    base = tables.pop(EXTENDS, None)
    if not isinstance(base, str | None):
        raise ConfigError(f"extends is {base!r} in {path}; it must be the path of a TOML file")
    inherited = _read_values(path.parent / base, chain) if base is not None else {}
    problems: list[str] = []
    values = dict(_flatten(tables, "", path=path, problems=problems))
    if problems:
        raise ConfigError(problems)
    return inherited | values


def _flatten(
    table: Mapping[str, Any], section: str, *, path: Path, problems: list[str]
) -> Iterator[tuple[str, Any]]:
    """Dotted keys and checked values; what is wrong is appended to ``problems``."""
    for name, value in table.items():
        key = join(section, name)
        if key in sections():
            if isinstance(value, Mapping):
                yield from _flatten(value, key, path=path, problems=problems)
            else:
                problems.append(f"{key} is {value!r} in {path}; it must be a table, [{key}]")
        elif key not in key_types():
            problems.append(f"unknown key '{key}' in {path}; {suggestion(key)}")
        elif not _has_type(value, key_types()[key]):
            wanted = _describe(key_types()[key])
            problems.append(f"{key} is {value!r} in {path}; it must be {wanted}")
        else:
            yield key, _converted(value, key_types()[key])


def _has_type(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == choice for choice in get_args(kind))
    if kind is float:
        return type(value) in (int, float)
    if kind == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    # A bool is an int to isinstance.
    return type(value) is kind


def _converted(value: Any, kind: Any) -> Any:
    """A value of the right type as the schema holds it."""
    if kind is float:
        return float(value)
    return tuple(value) if kind == tuple[str, ...] else value


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(repr(choice) for choice in get_args(kind))}"
    if kind == tuple[str, ...]:
        return "a list of strings"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names[kind]


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = nearest(path.name, [file.name for file in path.parent.glob("*.toml")])
        advice = f"; did you mean '{path.parent / near}'?" if near else ""
        raise ConfigError(f"there is no config file '{path}'{advice}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config file '{path}' cannot be read: {error}") from error
