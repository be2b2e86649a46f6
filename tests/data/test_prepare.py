from __future__ import annotations

import json
import os
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from distmoe.data.files import sha256_of_file
from distmoe.data.holdout import is_held_out
from distmoe.data.manifest import Manifest, read_manifest
from distmoe.data.shards import ShardWriter
from distmoe.data.tokenizer import Encoder

Prepare = Callable[..., Manifest]


def read_documents(folder: Path, split: str) -> list[str]:
    """Decoded documents of a split, in order; each must end with the end-of-document token."""
    manifest = read_manifest(folder)
    encoder = Encoder((folder / "tokenizer.json").read_text(encoding="utf-8"))
    texts = []
    for shard in manifest.splits[split].shards:
        tokens = np.fromfile(folder / f"{shard.name}.bin", manifest.token_dtype)
        starts = np.fromfile(folder / f"{shard.name}.idx", "<u8").astype(int)
        assert starts[0] == 0
        assert starts[-1] == len(tokens) == shard.tokens
        assert len(starts) == shard.documents + 1
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            assert tokens[end - 1] == manifest.eod_id
            assert manifest.eod_id not in tokens[start : end - 1]
            texts.append(encoder.decode(tokens[start : end - 1].tolist()))
    return texts


def split_texts(
    documents: list[str], fraction: float, seed: int = 1
) -> tuple[list[str], list[str]]:
    held_out = [
        is_held_out(number, Fraction(str(fraction)), seed=seed) for number in range(len(documents))
    ]
    return (
        [text for text, out in zip(documents, held_out, strict=True) if not out],
        [text for text, out in zip(documents, held_out, strict=True) if out],
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_round_trip(prepared: Path, documents: list[str]) -> None:
    train, validation = split_texts(documents, 0.1)
    assert len(validation) == 10
    assert read_documents(prepared, "train") == train
    assert read_documents(prepared, "validation") == validation


def test_manifest_sums_hashes_and_keys(prepared: Path, corpus: Path, tokenizer: Path) -> None:
    manifest = read_manifest(prepared)
    assert len(manifest.splits["train"].shards) > 3
    for split in manifest.splits.values():
        for shard in split.shards:
            assert sha256_of_file(prepared / f"{shard.name}.bin") == shard.sha256
            assert (prepared / f"{shard.name}.bin").stat().st_size == shard.bytes
            assert shard.tokens >= 400 or shard == split.shards[-1]
    assert manifest.totals.documents == 100
    assert [source.name for source in manifest.sources] == ["a.jsonl", "b.jsonl"]
    assert manifest.sources[1].sha256 == sha256_of_file(corpus / "b.jsonl")
    assert manifest.tokenizer_sha256 == sha256_of_file(tokenizer)
    fields = json.loads((prepared / "manifest.json").read_text())
    assert fields["vocab_size"] == 300
    assert fields["dtype"] == "uint16"
    assert fields["splits"]["validation"]["tokens"] == manifest.splits["validation"].tokens


def save_dataset(folder: Path, texts: list[str], *, files: int) -> None:
    """As `Dataset.save_to_disk` of Hugging Face does, with a cache that a `map` has left there."""
    folder.mkdir()
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    edges = [len(texts) * number // files for number in range(files + 1)]
    for name, start, end in [*zip(names, edges, edges[1:], strict=False), ("cache-1.arrow", 0, 5)]:
        table = pyarrow.table({"id": range(start, end), "body": texts[start:end]})
        with pyarrow.OSFile(str(folder / name), "wb") as file:
            with pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=11)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def zstd(data: bytes) -> bytes:
    """In two frames, as `zstd` of several threads or `cat` makes them."""
    half = len(data) // 2
    compress = pyarrow.Codec("zstd").compress
    return bytes(compress(data[:half])) + bytes(compress(data[half:]))


def test_every_format_gives_the_same_tokens(
    tmp_path: Path, documents: list[str], run_prepare: Prepare
) -> None:
    table = pyarrow.table({"id": range(len(documents)), "body": documents})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=7)
    (tmp_path / "text").mkdir()
    for number, text in enumerate(documents):
        (tmp_path / "text" / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n\n".join(json.dumps({"body": text}) for text in documents))
    save_dataset(tmp_path / "saved", documents, files=3)
    (tmp_path / "lines.jsonl.zst").write_bytes(zstd(lines.read_bytes()))
    with pyarrow.OSFile(str(tmp_path / "rows.arrow"), "wb") as file:
        with pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    shards = []
    inputs = ("rows.parquet", "text", "lines.jsonl", "lines.jsonl.zst", "saved", "rows.arrow")
    for name in inputs:
        run_prepare(tmp_path / name, tmp_path / f"out-{name}", text_key="body")
        shards.append(
            {
                k: v
                for k, v in snapshot(tmp_path / f"out-{name}").items()
                if k[-3:] in ("bin", "idx")
            }
        )
    assert all(shard == shards[0] for shard in shards)
    assert read_documents(tmp_path / "out-text", "train") == split_texts(documents, 0.1)[0]


def test_trains_a_tokenizer(
    tmp_path: Path, corpus: Path, documents: list[str], run_prepare: Prepare
) -> None:
    manifest = run_prepare(corpus, tmp_path, tokenizer=None, vocab_size=320)
    assert 257 < manifest.vocab_size <= 320
    assert read_documents(tmp_path, "train") == split_texts(documents, 0.1)[0]


def test_wide_vocabulary_is_stored_in_uint32(
    tmp_path: Path, corpus: Path, tokenizer: Path, run_prepare: Prepare
) -> None:
    fields = json.loads(tokenizer.read_text(encoding="utf-8"))
    token = {**fields["added_tokens"][0], "id": 70_000, "content": "<|far|>"}
    fields["added_tokens"].append(token)
    fields["model"]["vocab"]["<|far|>"] = 70_000
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps(fields), encoding="utf-8")
    manifest = run_prepare(corpus, tmp_path / "out", tokenizer=wide)
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 70_001)
    assert len(read_documents(tmp_path / "out", "train")) == 90


def test_one_long_text_is_read_in_pieces_and_its_tail_held_out(
    tmp_path: Path, run_prepare: Prepare
) -> None:
    text = "".join(f"line {number} of the tile\n" for number in range(20_000))
    assert len(text) > 5 * (1 << 16)
    (tmp_path / "long.txt").write_text(text)
    run_prepare(tmp_path / "long.txt", tmp_path / "out")
    (train,) = read_documents(tmp_path / "out", "train")
    (validation,) = read_documents(tmp_path / "out", "validation")
    assert train + validation == text
    assert train.endswith("\n")
    assert abs(len(validation) / len(text) - 0.1) < 0.001
    # Pieces change no token.
    encoder = Encoder((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = np.fromfile(tmp_path / "out" / "train-00000.bin", "<u2")
    assert (tokens[:-1] == encoder.encode([train])[0]).all()


@pytest.mark.parametrize("count", [1, 3, 19])
def test_few_documents_give_their_tails(
    tmp_path: Path, documents: list[str], run_prepare: Prepare, count: int
) -> None:
    texts = [text.replace("\n", " ") * 3 for text in documents[:count]]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    run_prepare(tmp_path / "few.jsonl", tmp_path / "out")
    heads = read_documents(tmp_path / "out", "train")
    tails = read_documents(tmp_path / "out", "validation")
    assert [head + tail for head, tail in zip(heads, tails, strict=True)] == texts


def test_empty_records_are_left_out(
    tmp_path: Path, documents: list[str], run_prepare: Prepare
) -> None:
    texts = [text if number % 3 else "" for number, text in enumerate(documents)]
    (tmp_path / "gaps.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    manifest = run_prepare(tmp_path / "gaps.jsonl", tmp_path / "out")
    assert manifest.totals.documents == sum(map(bool, texts))


class KilledError(Exception):
    """Stands for kill -9."""


def run_until_rename(
    monkeypatch: pytest.MonkeyPatch, renames: int, run: Callable[[], Manifest]
) -> Manifest | None:
    """Call ``run`` and stop it instead of its rename number ``renames``; None if it was stopped."""
    left = renames

    def replace(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace)
        try:
            return run()
        except KilledError:
            return None


@pytest.mark.parametrize("source", ["documents", "tails"])
def test_resumes_after_a_kill_at_any_rename(
    tmp_path: Path,
    corpus: Path,
    documents: list[str],
    run_prepare: Prepare,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
) -> None:
    inputs, settings = corpus, {"shard_tokens": 1500}
    if source == "tails":
        inputs = tmp_path / "few"
        inputs.mkdir()
        for number in range(6):
            (inputs / f"{number}.txt").write_text("\n".join(documents[number * 10 :][:10]))
    monkeypatch.setattr("distmoe.data.encoding.BATCH_PIECES", 7)
    run_prepare(inputs, tmp_path / "whole", **settings)
    wanted = snapshot(tmp_path / "whole")
    for renames in range(1000):
        out = tmp_path / f"killed-{renames}"
        run = partial(run_prepare, inputs, out, **settings)
        if run_until_rename(monkeypatch, renames, run) is not None:
            break
        run()
        assert snapshot(out) == wanted
    assert renames > 10


def test_resume_does_not_redo_finished_shards(
    tmp_path: Path, corpus: Path, run_prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = Encoder.encode

    def counted(self: Encoder, texts: list[str]) -> list[np.ndarray]:
        encoded.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(Encoder, "encode", counted)
    monkeypatch.setattr("distmoe.data.encoding.BATCH_PIECES", 5)
    finish = ShardWriter.finish

    def finish_or_die(self: ShardWriter) -> object:
        if self.name == "train-00003":
            raise KilledError
        return finish(self)

    monkeypatch.setattr(ShardWriter, "finish", finish_or_die)
    with pytest.raises(KilledError):
        run_prepare(corpus, tmp_path)
    inodes = {n: (tmp_path / f"train-0000{n}.bin").stat().st_ino for n in range(3)}
    encoded.clear()
    monkeypatch.setattr(ShardWriter, "finish", finish)
    manifest = run_prepare(corpus, tmp_path)
    finished = sum(shard.documents for shard in manifest.splits["train"].shards[:3])
    assert sum(encoded) <= 100 - finished
    assert inodes == {n: (tmp_path / f"train-0000{n}.bin").stat().st_ino for n in range(3)}


def test_second_call_does_nothing(
    tmp_path: Path, corpus: Path, run_prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_prepare(corpus, tmp_path)
    for name in ("prepare.read_pieces", "journal.sha256_of_file"):
        monkeypatch.delattr(f"distmoe.data.{name}")
    assert run_prepare(corpus, tmp_path) == first


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 2}, "seed is 2, was 1"),
        ({"shard_tokens": 401}, "shard_tokens is 401, was 400"),
        ({"validation_fraction": 0.2}, "validation_fraction is 0.2, was 0.1"),
        ({"tokenizer": None, "vocab_size": 300}, "tokenizer_sha256 is None"),
    ],
)
def test_other_settings_are_refused_and_forced(
    tmp_path: Path, corpus: Path, run_prepare: Prepare, settings: dict[str, Any], words: str
) -> None:
    run_prepare(corpus, tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=words) as refusal:
        run_prepare(corpus, tmp_path, **settings)
    assert "--force" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert snapshot(tmp_path) == before
    (tmp_path / "notes.txt").write_text("mine")
    run_prepare(corpus, tmp_path, **settings, force=True)
    assert snapshot(tmp_path) != before
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_changed_input_is_refused(
    tmp_path: Path, documents: list[str], run_prepare: Prepare
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    run_prepare(source, tmp_path / "out")
    source.write_text(source.read_text().replace("tile", "TILE"))
    with pytest.raises(ValueError, match=r"input 'in.jsonl' has changed"):
        run_prepare(source, tmp_path / "out")


def test_changed_tokenizer_stops_a_resume(
    tmp_path: Path, corpus: Path, run_prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_until_rename(monkeypatch, 8, lambda: run_prepare(corpus, tmp_path)) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json has changed"):
        run_prepare(corpus, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("x.jsonl", b'{"body": "a"}\n', "--text-key is 'text'; the record has: body"),
        ("x.jsonl", b'{"text": 5}\n', "'text' is int; it must be a string"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "not valid Unicode"),
        ("x.jsonl", b"[1]\n", "the record has: list"),
        ("x.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("x.jsonl.xz", b"nonsense", "damaged"),
        ("x.jsonl.gz", b"nonsense", "damaged"),
        ("x.jsonl.zst", b"nonsense", "damaged"),
        ("x.jsonl.zst", zstd(b'{"text": "abc"}' * 99)[:-9], "damaged"),
        ("x.parquet", b"nonsense", "damaged"),
        ("x.arrow", b"nonsense", "damaged"),
        ("x.txt", b"", "hold no text"),
        ("x.csv", b"a,b", "allowed are .txt"),
    ],
)
def test_bad_inputs_are_named(
    tmp_path: Path, run_prepare: Prepare, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        run_prepare(tmp_path / name, tmp_path / "out")


def test_damaged_datasets_are_named(
    tmp_path: Path, documents: list[str], run_prepare: Prepare
) -> None:
    saved = tmp_path / "both" / "train"
    saved.parent.mkdir()
    save_dataset(saved, documents, files=2)
    with pytest.raises(ValueError, match="--text-key is 'text'; it has: id, body"):
        run_prepare(saved, tmp_path / "out")
    (saved / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="data-00001-of-00002.arrow of its state.json is missing"):
        run_prepare(saved, tmp_path / "out")
    (saved / "state.json").write_text('{"_data_files": 3}')
    with pytest.raises(ValueError, match="state.json is damaged"):
        run_prepare(saved, tmp_path / "out")
    (saved.parent / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="with the splits train, test: name one, such as .*/train"):
        run_prepare(saved.parent, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workers": 0}, "--workers is 0; it must be at least 1"),
        ({"validation_fraction": 0.6}, "--validation-fraction is 0.6"),
        ({"shard_tokens": 0}, "--shard-tokens is 0"),
        ({"tokenizer": None, "vocab_size": 256}, "--vocab-size is 256"),
        ({"tokenizer": Path("none.json")}, "--tokenizer is 'none.json'"),
        ({"eod_token": "</s>"}, "--eod-token is '</s>'; the tokenizer has no such token"),
    ],
)
def test_bad_settings_are_named(
    tmp_path: Path, corpus: Path, run_prepare: Prepare, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        run_prepare(corpus, tmp_path, **settings)
