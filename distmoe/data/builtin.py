"""Data sets that come with the package: name -> text and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ASSETS = Path(__file__).parent / "assets"


class Builtin(NamedTuple):
    """Files of a data set that needs no download."""

    text: Path
    tokenizer: Path


BUILTINS = {
    "shakespeare": Builtin(ASSETS / "shakespeare.jsonl.xz", ASSETS / "tokenizer-4096.json"),
}
