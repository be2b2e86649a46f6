from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from distmoe.data.corpora import JoinedSplits
from distmoe.data.manifest import Manifest, read_manifest
from distmoe.data.tokens import TokenSplit, unigram_entropy


def stream(folder: Path, split: str) -> NDArray[np.int64]:
    manifest = read_manifest(folder)
    return np.concatenate(
        [
            np.fromfile(folder / f"{shard.name}.bin", manifest.token_dtype)
            for shard in manifest.splits[split].shards
        ]
    )


@pytest.mark.parametrize("seq_len", [1, 7, 64, 1000])
def test_samples_are_windows_of_the_stream(prepared: Path, seq_len: int) -> None:
    split = TokenSplit(prepared, "train")
    tokens = stream(prepared, "train")
    assert split.num_tokens == len(tokens)
    assert split.num_samples(seq_len) == (len(tokens) - 1) // seq_len
    for index in range(split.num_samples(seq_len)):
        sample = split.sample(index, seq_len)
        assert sample.dtype == np.int64
        assert (sample == tokens[index * seq_len :][: seq_len + 1]).all()


def test_read_crosses_several_shards(prepared: Path) -> None:
    split = TokenSplit(prepared, "train")
    assert (split.read(3, split.num_tokens - 3) == stream(prepared, "train")[3:]).all()


def test_sample_out_of_range(prepared: Path) -> None:
    split = TokenSplit(prepared, "train")
    for index in (-1, split.num_samples(64)):
        with pytest.raises(IndexError):
            split.sample(index, 64)


def test_unigram_entropy(prepared: Path) -> None:
    tokens = stream(prepared, "validation").tolist()
    shares = [tokens.count(token) / len(tokens) for token in set(tokens)]
    wanted = -sum(share * math.log(share) for share in shares)
    found = unigram_entropy(TokenSplit(prepared, "validation").token_shares())
    assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("size", ["short", "long", "missing"])
def test_damaged_shard_is_detected(tmp_path: Path, prepared: Path, suffix: str, size: str) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    path = tmp_path / "copy" / f"train-00001{suffix}"
    data = path.read_bytes()
    if size == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-2] if size == "short" else data + b"\0\0")
    with pytest.raises(ValueError, match=rf"train-00001{suffix} is") as error:
        TokenSplit(tmp_path / "copy", "train")
    assert str(len(data)) in str(error.value)


def test_missing_split_and_folder_are_named(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(ValueError, match=r"no split 'test' \(has: train, validation\)"):
        TokenSplit(prepared, "test")
    with pytest.raises(ValueError, match=r"no manifest.json; make one with"):
        TokenSplit(tmp_path, "train")
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match="format_version 99"):
        TokenSplit(tmp_path, "train")
    (tmp_path / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match="not a manifest"):
        TokenSplit(tmp_path, "train")


def test_a_damaged_shard_is_named_with_its_place(prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(prepared, folder)
    manifest = read_manifest(folder)
    second = manifest.splits["train"].shards[1]
    data = np.memmap(folder / f"{second.name}.bin", manifest.token_dtype, mode="r+")
    data[2] = manifest.vocab_size
    data.flush()
    split = TokenSplit(folder, "train")
    first = manifest.splits["train"].shards[0].tokens
    assert len(split.read(0, first + 2)) == first + 2
    place = f"{second.name}.bin is damaged: at byte {2 * data.itemsize}, token 2, it has the id"
    with pytest.raises(ValueError, match=place):
        split.read(first - 1, 5)
    with pytest.raises(ValueError, match=place):
        split.token_shares()


def test_joined_splits_are_one_after_the_other(
    prepared: Path, corpus: Path, run_prepare: Callable[..., Manifest], tmp_path: Path
) -> None:
    run_prepare(corpus / "a.jsonl", tmp_path / "part")
    splits = [TokenSplit(folder, "train") for folder in (prepared, tmp_path / "part", prepared)]
    joined = JoinedSplits(splits)
    want = [split.sample(n, 16) for split in splits for n in range(split.num_samples(16))]
    assert joined.num_samples(16) == len(want)
    for index, sample in enumerate(want):
        assert (joined.sample(index, 16) == sample).all()
    for index in (-1, len(want)):
        with pytest.raises(IndexError):
            joined.sample(index, 16)
    run_prepare(corpus, tmp_path / "other", tokenizer=None, vocab_size=280)
    with pytest.raises(ValueError, match=r"data.mix has .* which have different tokenizers"):
        JoinedSplits([splits[0], TokenSplit(tmp_path / "other", "train")])
