"""Runs on a mix, and with attention inside of documents, from files to figures."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import TINY

from distmoe.config import Config, DataConfig, RankInfo, check, load_config, resolve
from distmoe.data.cli import main as data_main
from distmoe.data.run_data import RunData
from distmoe.data.tokens import TokenSplit, unigram_entropy
from distmoe.metrics.flops import flops_per_token
from distmoe.train.start import common_facts
from distmoe.train.trainer import train

SMALL = (
    "--launch.nproc 1 --parallel.ep 1 --metrics.tensorboard false --train.steps 6 "
    "--train.validate_every 3 --checkpoint.every 3 --checkpoint.keep_last 9"
).split()
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two corpora of short documents with the same tokenizer; the second is the smaller one."""
    root = tmp_path_factory.mktemp("corpora")
    draw, made = random.Random(0), []
    for name, words, documents in (("a", "tile row gate", 400), ("b", "one two three four", 60)):
        lines = [" ".join(draw.choices(words.split(), k=20)) for _ in range(documents)]
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (root / f"{name}.jsonl").write_text(text)
        options = ["--vocab-size", "280"]
        if made:
            options = ["--tokenizer", str(made[0] / "tokenizer.json")]
        made.append(root / name)
        arguments = [str(root / f"{name}.jsonl"), "--validation-fraction", "0.3"]
        assert data_main(["prepare", *arguments, "--out", str(made[-1]), *options]) == 0
    return made


@pytest.fixture(scope="module")
def run(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains in the folder NAME on three parts of one corpus and one of the other; its lines."""
    root = tmp_path_factory.mktemp("runs")

    def train_here(name: str, *options: str) -> list[dict[str, Any]]:
        mix = ["--data.mix", f"{folders[0]}:0.75", f"{folders[1]}:0.25"]
        config = load_config(TINY, [*SMALL, "--run.dir", str(root / name), *mix, *options])
        check(config, 1)
        assert train(resolve(config, 1), RankInfo())
        return [json.loads(line) for line in (root / name / "metrics.jsonl").open()]

    run_folder = train_here
    run_folder.root = root  # type: ignore[attr-defined]
    return run_folder


@pytest.fixture(scope="module")
def unbroken(run: Run) -> list[dict[str, Any]]:
    return run("unbroken", "--data.document_mask")


def test_corpora_are_counted_apart(unbroken: list[dict[str, Any]], folders: list[Path]) -> None:
    for record in unbroken:
        one, other = record["corpora"]
        assert [one["corpus"], other["corpus"]] == [str(folder) for folder in folders]
        # Four sequences a step, in the proportion of the weights.
        assert (one["samples"], other["samples"]) == (3 * record["step"], record["step"])
        manifest = json.loads((folders[1] / "manifest.json").read_text())
        there = (manifest["splits"]["train"]["tokens"] - 1) // 32
        assert other["epochs"] == record["step"] / there


def test_resumes_in_the_middle_of_the_mix(run: Run, unbroken: list[dict[str, Any]]) -> None:
    run("resumed", "--data.document_mask", "--train.steps", "3", "--optim.schedule", "constant")
    whole = run("whole", "--data.document_mask", "--optim.schedule", "constant")
    resumed = run("resumed", "--data.document_mask", "--optim.schedule", "constant")
    names = ("step", "loss", "grad_norm", "tokens", "corpora")
    assert [[r[name] for name in names] for r in resumed] == [
        [r[name] for name in names] for r in whole
    ]


def test_ranks_may_keep_a_mix_elsewhere_but_not_mix_it_otherwise(
    folders: list[Path], tmp_path: Path
) -> None:
    moved = [shutil.copytree(folder, tmp_path / folder.name) for folder in folders]

    def facts(paths: list[Path], weights: str) -> dict[str, str]:
        mix = tuple(f"{path}:{w}" for path, w in zip(paths, weights.split(), strict=True))
        return common_facts(Config(data=DataConfig(mix=mix)), torch.device("cpu"))

    here = facts(folders, "3 1")
    assert facts(moved, "0.75 0.25") == here
    for other in (facts(folders, "1 1"), facts(folders[::-1], "3 1")):
        assert other.keys() == here.keys()
        assert other["entry 0 of data.mix"] != here["entry 0 of data.mix"]


def test_validation_is_of_each_corpus(
    run: Run, unbroken: list[dict[str, Any]], folders: list[Path]
) -> None:
    path = run.root / "unbroken/validation.jsonl"  # type: ignore[attr-defined]
    # A model that knows how often each token occurs in the mix does not know the corpus.
    shares = [TokenSplit(folder, "validation").token_shares() for folder in folders]
    entropy = unigram_entropy(0.75 * shares[0] + 0.25 * shares[1])
    for line in map(json.loads, path.open()):
        one, other = (line["corpora"][str(folder)] for folder in folders)
        assert one != other
        assert line["unigram_entropy"] == pytest.approx(entropy)
        assert line["validation_loss"] == pytest.approx(0.75 * one + 0.25 * other)


def test_masked_ends_are_no_trained_tokens(run: Run, unbroken: list[dict[str, Any]]) -> None:
    plain = run("plain", "--train.steps", "2")[0]
    masked = unbroken[0]
    assert plain["tokens"] == 4 * 32
    assert plain["tokens"] - 16 < masked["tokens"] < plain["tokens"]
    assert masked["loss"] != plain["loss"]
    config = resolve(load_config(run.root / "plain/config.toml"), 1)  # type: ignore[attr-defined]
    flops = flops_per_token(config)
    speed = plain["tokens_per_second_per_rank"]
    assert plain["tflops_per_rank"] == pytest.approx(speed * flops.model / 1e12)
    # Attention inside of documents, which are shorter than the sequence, is less work.
    squares, data = 0, RunData(config, rank=0, world=1)
    batches = data.step(0)
    data.close()
    for batch in batches:
        for row in batch.tokens_BS.tolist():
            ends = [n + 1 for n, token in enumerate(row) if token == 0]
            edges = sorted({0, *ends, 32})
            squares += sum((b - a) ** 2 for a, b in zip(edges, edges[1:], strict=False))
    speed = masked["tokens_per_second_per_rank"]
    inside = flops_per_token(config, document_tokens=squares / 128)
    assert inside.model < flops.model
    assert masked["tflops_per_rank"] == pytest.approx(speed * inside.model / 1e12)
    assert masked["palm_tflops_per_rank"] == pytest.approx(speed * flops.palm / 1e12)
