"""Write docs/config.md: every setting, from the schema's own words.

python tools/describe_config.py > docs/config.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from distmoe.config import Config
from distmoe.config.keys import key_types, sections, value_of
from distmoe.config.ranges import RANGES

HEAD = """# Settings

A run is a TOML file; `configs/` has examples. Its tables are the sections below. A file may begin
with `extends = "base.toml"`, a path relative to itself: it takes every setting of that file and
overrides what it names. Options override both, as in `distmoe train FILE --train.steps 50`; a
switch is `--metrics.tensorboard false` or `--metrics.no-tensorboard`. `distmoe config FILE` checks
a file and prints the whole run with all derived values, which is also saved with the run.

A wrong key, type, value or combination is refused before anything starts, in one line each and
with exit code 2.

This page is made from the schema: `python tools/describe_config.py > docs/config.md`.
"""


def describe() -> str:
    """The page, as Markdown."""
    return HEAD + "".join(
        _section(name, owner) for name, owner in sections().items() if _own_keys(name)
    )


def _section(name: str, owner: type) -> str:
    rows = [
        f"| `{key}` | {_kind(key_types()[key])} | `{_default(key)}` | {_allowed(key)} | {meaning} |"
        for key, meaning in zip(_own_keys(name), _meanings(owner), strict=True)
    ]
    head = "| key | type | default | range | meaning |\n| --- | --- | --- | --- | --- |\n"
    return f"\n## [{name}]\n\n{inspect.getdoc(owner)}\n\n{head}" + "\n".join(rows) + "\n"


def _own_keys(section: str) -> list[str]:
    return [key for key in key_types() if key.rpartition(".")[0] == section]


def _meanings(owner: type) -> Iterator[str]:
    """The text under each field that is no section, in order."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    kinds = get_type_hints(owner)
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if not dataclasses.is_dataclass(kinds[statement.target.id]):
                yield _text(after).replace("|", "\\|")


def _text(statement: ast.stmt | None) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return " ".join(str(statement.value.value).split())
    raise AssertionError("every field of the schema is followed by its meaning")


def _kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    return "list of str" if kind == tuple[str, ...] else str(kind.__name__)


def _default(key: str) -> str:
    value = value_of(Config(), key)
    if value == "":
        return '""'
    if value == ():
        return "[]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _allowed(key: str) -> str:
    return str(RANGES[key]) if key in RANGES else ""


if __name__ == "__main__":
    print(describe(), end="")
