from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from manifests import write_manifest

from distmoe.config import (
    Config,
    ConfigError,
    apply_overrides,
    check,
    corpora,
    load_config,
    resolve,
)
from distmoe.config.schema import DataConfig


def test_one_folder_is_all() -> None:
    (corpus,) = corpora(DataConfig(path="a"))
    assert (corpus.path, corpus.weight) == ("a", 1.0)


def test_weights_become_whole_shares() -> None:
    found = corpora(DataConfig(mix=("a:0.7", "C:/b:0.3", "c:1", "d:.5")))
    assert [(corpus.path, corpus.share) for corpus in found] == [
        ("a", 7),
        ("C:/b", 3),
        ("c", 10),
        ("d", 5),
    ]
    assert found[0].weight == 7 / 25
    assert [corpus.share for corpus in corpora(DataConfig(mix=("a:30", "b:20")))] == [3, 2]


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        (("a",), "data.mix has 'a'; it must be FOLDER:WEIGHT"),
        (("a:",), "it must be FOLDER:WEIGHT"),
        ((":1",), "it must be FOLDER:WEIGHT"),
        (("a:0",), "with a number above 0"),
        (("a:-1",), "with a number above 0"),
        (("a:nan",), "with a number above 0"),
        (("a:1", "a:2"), "data.mix has the folder 'a' twice"),
        (
            ("a:0.333333", "b:1"),
            "333333:1000000; these whole numbers must add up to at most 100,000",
        ),
    ],
)
def test_wrong_mixes_are_named(mix: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        corpora(DataConfig(mix=mix))
    assert words in str(error.value)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., str]:
    return lambda name, **settings: write_manifest(tmp_path / name, **settings)


def problems(*options: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check(apply_overrides(Config(), [*options]), 1)
    return error.value.problems


def test_mix_by_option_and_by_file(tmp_path: Path, make_folder: Callable[..., str]) -> None:
    mix = [make_folder("a") + ":2", make_folder("b") + ":1"]
    by_option = apply_overrides(Config(), ["--data.mix", *mix, "--train.steps", "50"])
    (tmp_path / "run.toml").write_text(f"[data]\nmix = {json.dumps(mix)}\n[train]\nsteps = 50\n")
    assert by_option == load_config(tmp_path / "run.toml")
    assert by_option.data.mix == tuple(mix)
    check(by_option, 1)
    assert resolve(by_option).model.vocab_size == 512
    (tmp_path / "run.toml").write_text("[data]\nmix = [1]\n")
    with pytest.raises(ConfigError, match=r"data.mix is \[1\] in .*; it must be a list of strings"):
        load_config(tmp_path / "run.toml")


def test_all_corpora_have_the_same_tokenizer(make_folder: Callable[..., str]) -> None:
    one, other = make_folder("one"), make_folder("other", tokenizer="another")
    (problem,) = problems("--data.mix", f"{one}:1", f"{other}:1")
    assert problem.startswith(f"data.mix has '{other}', whose tokenizer.json (sha256 another...)")
    assert f"--tokenizer {one}/tokenizer.json" in problem


def test_documents_of_all_corpora_end_with_the_same_token(make_folder: Callable[..., str]) -> None:
    one, other = make_folder("one"), make_folder("other", eod_id=3)
    (problem,) = problems("--data.mix", f"{one}:1", f"{other}:1")
    assert problem.startswith(f"data.mix has '{other}', whose documents end with the token 3; it ")
    assert f"must be 0, as in '{one}'" in problem


def test_each_corpus_is_checked(make_folder: Callable[..., str]) -> None:
    one, short = make_folder("one"), make_folder("short", train=256)
    found = problems("--data.mix", f"{one}:1", f"{short}:1", "none:1")
    assert found[0].startswith("data.mix is 'none'; no manifest.json there")
    assert found[1].startswith(f"data.mix is '{short}'; its training split has 0 sequences")
    assert problems("--data.mix", "none") == [
        "data.mix has 'none'; it must be FOLDER:WEIGHT with a number above 0, such as "
        "'data/web:0.7'"
    ]


def test_a_mask_needs_a_token_to_predict(make_folder: Callable[..., str]) -> None:
    options = ["--data.path", make_folder("one"), "--data.document_mask", "--data.seq_len", "1"]
    assert "data.seq_len is 1; it must be at least 2 with data.document_mask" in problems(*options)


def test_a_mask_on_a_gpu_needs_heads_that_its_attention_has(
    make_folder: Callable[..., str],
) -> None:
    options = ["--data.path", make_folder("one"), "--model.head_dim", "8", "--run.device", "cuda"]
    expected = "model.head_dim is 8; it must be at least 16 with data.document_mask on a GPU"
    assert expected in problems(*options, "--data.document_mask", "--train.steps", "0")
    assert expected not in problems(*options, "--train.steps", "0")
    mla = ["--model.attention", "mla", "--model.mla.v_head_dim", "8", "--model.head_dim", "192"]
    expected = "model.mla.v_head_dim is 8; it must be at least 16 with data.document_mask on a GPU"
    assert expected in problems(*options, *mla, "--data.document_mask")
