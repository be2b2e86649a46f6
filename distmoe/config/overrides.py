"""Options such as ``--moe.rounding.rule none`` on top of a config, and their help; by tyro."""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Iterator, Sequence

from distmoe.config.errors import ConfigError
from distmoe.config.keys import join, key_types, suggestion
from distmoe.config.schema import Config

_BOX = "│╭╮╰╯─ "
_SWITCH = {"true": True, "false": False}


def apply_overrides(config: Config, options: Sequence[str]) -> Config:
    """``config`` with the options' values; ConfigError, one line, for an option that is wrong.

    Names may be written with - or _, switches as `--key`, `--no-key`, `--key true`, `--key=false`.
    A list is all that its option was given: `--key a b`, or `--key a --key b`.
    """
    import tyro

    arguments = list(_plain_options(options))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(Config, default=config, args=arguments, use_underscores=True)
    except SystemExit:
        raise ConfigError(_first_paragraph(complaint.getvalue())) from None


def named_keys(options: Sequence[str]) -> set[str]:
    """The keys that options such as ``--moe.top_k 4`` name; ConfigError for an unknown one."""
    names = [option[2:].partition("=")[0] for option in options if option.startswith("--")]
    return {_known_key(name)[0] for name in names}


def print_options(config: Config, prog: str) -> None:
    """Print every option with its meaning and its value in ``config``."""
    import tyro

    with contextlib.suppress(SystemExit):
        tyro.cli(Config, default=config, args=["--help"], prog=prog, use_underscores=True)


def _plain_options(options: Sequence[str]) -> Iterator[str]:
    """The options, if their names are known, with switches and lists in the form that tyro knows.
    Of a list option that is given twice tyro would take the last."""
    rest = deque(options)
    lists: dict[str, list[str]] = {}
    while rest:
        option = rest.popleft()
        if not option.startswith("--"):
            yield option
            continue
        name, equals, value = option[2:].partition("=")
        key, positive = _known_key(name)
        if key_types()[key] == tuple[str, ...]:
            given = lists.setdefault(key, [])
            given += [value] if equals else []
            while rest and not rest[0].startswith("--"):
                given.append(rest.popleft())
            continue
        if key_types()[key] is not bool:
            yield f"--{key}{equals}{value}"
            continue
        if not equals:
            value = rest.popleft() if rest and not rest[0].startswith("--") else "true"
        if value.lower() not in _SWITCH:
            raise ConfigError(f"{key} is {value!r}; it must be true or false")
        yield _switch(key, positive == _SWITCH[value.lower()])
    for key, given in lists.items():
        yield from (f"--{key}", *given)


def _known_key(name: str) -> tuple[str, bool]:
    """The key that an option names, and whether it is meant positively."""
    key = name.replace("-", "_")
    section, _, last = key.rpartition(".")
    positive_key = join(section, last.removeprefix("no_"))
    if key in key_types():
        return key, True
    if key_types().get(positive_key) is bool:
        return positive_key, False
    raise ConfigError(f"unknown option '--{name}'; {suggestion(key)}")


def _switch(key: str, on: bool) -> str:
    section, _, last = key.rpartition(".")
    return f"--{key}" if on else f"--{join(section, 'no_' + last)}"


def _first_paragraph(box: str) -> str:
    """What tyro says in a box of several lines, in one line."""
    # The first line is the box's title; a rule, nothing but border, ends the paragraph.
    paragraph: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip(_BOX)
        if not text:
            break
        paragraph.append(text)
    return " ".join(paragraph)
