"""A small corpus, a tokenizer for it, and a prepared folder."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distmoe.data.manifest import Manifest
from distmoe.data.prepare import prepare
from distmoe.data.spec import PrepareSpec
from distmoe.data.tokenizer import train_tokenizer

WORDS = "the tile of an expert holds tokens, and\nno row — née <|endoftext|> waits twice ".split(
    " "
)

Prepare = Callable[..., Manifest]


def make_documents(count: int) -> list[str]:
    """Texts of 5 to 60 words, each with its own number."""
    choose = random.Random(0)
    return [
        f"{number}: " + " ".join(choose.choices(WORDS, k=choose.randint(5, 60)))
        for number in range(count)
    ]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    """One JSON object a line."""
    lines = [json.dumps({"id": number, key: text}) for number, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(100)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "given.json"
    path.write_text(train_tokenizer(documents, 300), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """100 documents in two JSONL files of a folder."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", documents[:30])
    write_jsonl(folder / "b.jsonl", documents[30:])
    return folder


@pytest.fixture(scope="session")
def run_prepare(tokenizer: Path) -> Prepare:
    """prepare() without output, with small shards and the given tokenizer unless told otherwise."""

    def run(inputs: Path, out: Path, **settings: object) -> Manifest:
        defaults: dict[str, Any] = {"tokenizer": tokenizer, "shard_tokens": 400}
        defaults["validation_fraction"] = 0.1
        spec = PrepareSpec(inputs=(inputs,), out=out, **{**defaults, **settings})
        return prepare(spec, Console(file=io.StringIO()))

    return run


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, corpus: Path, run_prepare: Prepare) -> Path:
    """The corpus in several train shards and one or more validation shards."""
    out = tmp_path_factory.mktemp("prepared")
    run_prepare(corpus, out)
    return out
