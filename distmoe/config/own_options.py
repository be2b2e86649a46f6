"""Options that a command has beside the settings of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from distmoe.config.errors import ConfigError


def split_options(
    argv: Sequence[str], own: Sequence[str], *, switches: Sequence[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """The values of the options ``own``, with "" for ``switches``, and the rest: settings of a
    run. ConfigError for an option without a value."""
    options: dict[str, str] = {}
    settings: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        if argument in switches:
            options[option] = ""
        elif option not in own:
            settings.append(argument)
        elif not equals and not rest:
            raise ConfigError(f"{option} needs a value")
        else:
            options[option] = value if equals else rest.pop(0)
    return options, settings


def integer_option(options: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    """The value of an option; ``default``, which may be anything, where it is not given.
    ConfigError if it is no integer from ``least`` on."""
    if name not in options:
        return default
    text = options[name]
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name} is '{text}'; it must be an integer, at least {least}")
    return int(text)


def number_option(options: Mapping[str, str], name: str, default: float, *, least: float) -> float:
    """The same for any finite number."""
    if name not in options:
        return default
    try:
        number = float(options[name])
    except ValueError:
        number = float("nan")
    if not least <= number < float("inf"):
        raise ConfigError(f"{name} is '{options[name]}'; it must be a number, at least {least:g}")
    return number


def file_option(options: Mapping[str, str], name: str) -> Path | None:
    """The file that an option names, to be written; None where it is not given. ConfigError if it
    cannot be one."""
    if name not in options:
        return None
    path = Path(options[name])
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{name} is '{path}'; it must be a file in a folder that exists")
    return path
