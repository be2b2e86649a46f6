"""`distmoe data inspect`: what it shows, and what it finds wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distmoe.data.cli import main
from distmoe.data.lengths import document_lengths
from distmoe.data.manifest import Manifest, read_manifest

Prepare = Callable[..., Manifest]
Captured = pytest.CaptureFixture[str]


def lengths_of(folder: Path, split: str) -> list[int]:
    found: list[int] = []
    for shard in read_manifest(folder).splits[split].shards:
        found += np.diff(np.fromfile(folder / f"{shard.name}.idx", "<u8").astype(int)).tolist()
    return found


def test_lengths(prepared: Path) -> None:
    lengths = lengths_of(prepared, "train")
    found = document_lengths(prepared, read_manifest(prepared).splits["train"])
    assert (found.shortest, found.longest) == (min(lengths), max(lengths))
    assert found.mean == pytest.approx(np.mean(lengths))
    for each in found.bins:
        own = [length for length in lengths if each.low <= length <= each.high]
        assert (each.documents, each.tokens) == (len(own), sum(own))
        assert each.high == 2 * each.low - 1
    assert sum(each.documents for each in found.bins) == len(lengths)


def test_shows_documents_and_lengths(
    prepared: Path, documents: list[str], capsys: Captured
) -> None:
    assert main(["inspect", str(prepared), "--samples", "2", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "all hashes and tokens: as they should be" in shown
    assert f"{read_manifest(prepared).splits['train'].tokens:,}" in shown
    assert shown.count("a document of train") == 2
    # Of 90 documents the first and the one in the middle; number 0 or 1 of ten is held out.
    train = read_manifest(prepared).splits["train"]
    assert train.documents == 90
    assert documents[0][:20] in shown or documents[1][:20] in shown
    assert main(["inspect", str(prepared), "--json", "--samples", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    samples = report.pop("samples")
    numbers = [int(text.partition(":")[0]) for text in samples["train"]]
    # Documents 0, 30 and 60 of the split, of whose strata one of ten is left out.
    assert [number - number // 10 for number in numbers] == pytest.approx([0, 30, 60], abs=1)
    assert report.pop("lengths")["train"]["bins"]
    assert report.pop("verified") is False
    assert report == json.loads((prepared / "manifest.json").read_text())


def test_a_mix_and_a_config(
    tmp_path: Path, prepared: Path, documents: list[str], run_prepare: Prepare, capsys: Captured
) -> None:
    (tmp_path / "few.txt").write_text("\n".join(documents[:20]))
    run_prepare(tmp_path / "few.txt", tmp_path / "few")
    assert main(["inspect", str(prepared), str(tmp_path / "few"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["folders"]) == [str(prepared), str(tmp_path / "few")]
    tokens = [read_manifest(f).splits["train"].tokens for f in (prepared, tmp_path / "few")]
    assert [row["share"] for row in report["mix"]] == [n / sum(tokens) for n in tokens]
    config = tmp_path / "run.toml"
    config.write_text(
        f"[data]\nmix = ['{prepared}:1', '{tmp_path / 'few'}:3']\nseq_len = 8\n"
        "[train]\nsteps = 10\nglobal_batch_size = 4\n"
    )
    assert main(["inspect", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "the mix, read for 10 steps" in shown
    assert f"{320 * 0.75 / tokens[1]:.3g}" in shown
    assert main(["inspect", str(config), str(prepared)]) == 2
    assert "it must be the only input" in capsys.readouterr().err
    config.write_text("[data]\nmix = ['a']\n")
    assert main(["inspect", str(config)]) == 2
    assert "data.mix has 'a'; it must be FOLDER:WEIGHT" in capsys.readouterr().err


def test_folders_of_other_tokenizers_are_no_mix(
    tmp_path: Path, prepared: Path, corpus: Path, run_prepare: Prepare, capsys: Captured
) -> None:
    run_prepare(corpus, tmp_path / "other", tokenizer=None, vocab_size=280)
    assert main(["inspect", str(prepared), str(tmp_path / "other")]) == 1
    assert "other' has another tokenizer than '" in capsys.readouterr().err


@pytest.fixture
def copy(tmp_path: Path, prepared: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "copy")


def found(folder: Path, capsys: Captured, *options: str) -> str:
    assert main(["inspect", str(folder), *options]) == 1
    return capsys.readouterr().err.removeprefix("distmoe data inspect: ")


def change(path: Path, dtype: str, entry: int, value: int) -> None:
    data = np.memmap(path, dtype, mode="r+")
    data[entry] = value
    data.flush()


@pytest.mark.parametrize("value", [0, 298, 300])
def test_a_changed_token_is_found(copy: Path, capsys: Captured, value: int) -> None:
    manifest = read_manifest(copy)
    assert (manifest.vocab_size, manifest.eod_id) == (300, 0)
    path = copy / "train-00001.bin"
    change(path, "<u2", 5, value)
    assert main(["inspect", str(copy)]) == 0
    lines = found(copy, capsys, "--verify").splitlines()
    assert lines[0] == f"{path} has another sha256 than its manifest says"
    # An id that is in the vocabulary could stand there.
    assert len(lines) == (1 if value == 298 else 2)
    place = f"{path} is damaged: at byte 10, token 5, it has the id {value}; "
    assert all(line.startswith(place) for line in lines[1:])


def test_a_moved_end_of_a_document_is_found(copy: Path, capsys: Captured) -> None:
    path, end = copy / "train-00002.bin", lengths_of(copy, "train")
    first = sum(shard.documents for shard in read_manifest(copy).splits["train"].shards[:2])
    change(path, "<u2", end[first] - 1, 7)
    assert f"is damaged: at byte {2 * end[first] - 2}, token {end[first] - 1}" in found(
        copy, capsys, "--verify"
    )


@pytest.mark.parametrize(("entry", "value"), [(0, 1), (2, 0), (2, 1 << 40), (-1, 3)])
def test_a_changed_offset_is_found(copy: Path, capsys: Captured, entry: int, value: int) -> None:
    path = copy / "train-00001.idx"
    change(path, "<u8", entry, value)
    number = entry % (path.stat().st_size // 8)
    line = found(copy, capsys, "--verify")
    assert line.startswith(f"{path} is damaged: at byte {8 * number}, entry {number}, it has")


def test_all_that_is_wrong_is_told_at_once(copy: Path, capsys: Captured) -> None:
    (copy / "train-00000.bin").unlink()
    (copy / "tokenizer.json").write_text("{}")
    lines = found(copy, capsys, "--verify").splitlines()
    assert [line.partition("copy/")[2][:16] for line in lines[:1]] == ["tokenizer.json h"]
    assert "train-00000.bin is missing" in lines[1]


def test_all_folders_are_looked_at(copy: Path, tmp_path: Path, capsys: Captured) -> None:
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    for folder in (copy, other):
        (folder / "tokenizer.json").unlink()
    assert main(["inspect", str(copy), str(other), "--verify"]) == 1
    lines = capsys.readouterr().err.splitlines()
    for folder, line in zip((copy, other), lines, strict=True):
        assert f"{folder}/tokenizer.json is missing" in line


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"dtype"', "dtype", "line 3 column 3 (char"),
        ('"format_version": 1', '"format_version": 7', "has format_version 7; this code reads 1"),
        ('"vocab_size"', '"size"', "'size'"),
        ('"dtype": "uint16"', '"dtype": "uint32"', "train-00000 has"),
    ],
)
def test_a_damaged_manifest_names_the_place(
    copy: Path, capsys: Captured, old: str, new: str, words: str
) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace(old, new))
    line = found(copy, capsys)
    assert line.startswith(str(path))
    assert words in line


def test_counts_are_checked(prepared: Path, capsys: Captured) -> None:
    assert main(["inspect", str(prepared), "--samples", "-1"]) == 2
    assert "'-1' must be a whole number, at least 0" in capsys.readouterr().err
    assert main(["inspect", str(prepared), "--samples", "0"]) == 0
    assert "a document of" not in capsys.readouterr().out
