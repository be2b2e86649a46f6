"""Options such as ``--moe.rounding.rule none`` on top of a config, and their help; by tyro."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence

from distmoe.config.errors import ConfigError
from distmoe.config.keys import key_types, suggestion
from distmoe.config.schema import Config

_BOX = "│╭╮╰╯─ "


def apply_overrides(config: Config, options: Sequence[str]) -> Config:
    """``config`` with the options' values; ConfigError, one line, for an option that is wrong.

    Names may be written with - or _, switches as `--key`, `--no-key`, `--key true`, `--key=false`.
    """
    import tyro

    arguments = list(_plain_switches(options))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(Config, default=config, args=arguments)
    except SystemExit:
        raise ConfigError(_first_paragraph(complaint.getvalue())) from None


def print_options(config: Config, prog: str) -> None:
    """Print every option with its meaning and its value in ``config``."""
    import tyro

    with contextlib.suppress(SystemExit):
        tyro.cli(Config, default=config, args=["--help"], prog=prog)


def _plain_switches(options: Sequence[str]) -> Iterator[str]:
    """The options with known names only, and `--key true|false` as tyro's `--key`, `--no-key`."""
    rest = list(options)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--"):
            yield option
            continue
        key, equals, value = option[2:].replace("-", "_", option.index("=") if 0 else -1).partition("=")
        yield key
