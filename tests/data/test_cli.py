from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distmoe.data.cli import main
from distmoe.data.tokens import TokenSplit


def test_builtin_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "shakespeare")
    assert main(["prepare", "--builtin", "shakespeare", "--out", out]) == 0
    assert "vocabulary 4,096" in capsys.readouterr().out
    train, validation = TokenSplit(out, "train"), TokenSplit(out, "validation")
    assert train.vocab_size == 4096
    assert train.num_tokens > 1_500_000
    assert 0.03 < validation.num_tokens / train.num_tokens < 0.07
    assert main(["prepare", "--builtin", "shakespeare", "--out", out]) == 0
    assert "nothing to do" in capsys.readouterr().err


def test_prepare_with_every_option(tmp_path: Path, corpus: Path, tokenizer: Path) -> None:
    arguments = ["prepare", str(corpus), "--out", str(tmp_path), "--tokenizer", str(tokenizer)]
    arguments += ["--text-key", "text", "--validation-fraction", "0.2", "--shard-tokens", "500"]
    arguments += ["--seed", "4", "--force"]
    assert main(arguments) == 0
    settings = TokenSplit(tmp_path, "train").manifest.settings
    assert settings["validation_fraction"] == 0.2
    assert (settings["seed"], settings["shard_tokens"]) == (4, 500)


@pytest.mark.parametrize(
    "wrong", [("--text-key", "body"), ("--eod-token", "<none>"), ("--tokenizer", "x.json")]
)
def test_a_command_that_failed_can_be_corrected(
    tmp_path: Path,
    corpus: Path,
    tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: tuple[str, str],
) -> None:
    (tmp_path / "x.json").write_text("{}")
    right = ["prepare", str(corpus), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    option, value = wrong
    value = str(tmp_path / value) if option == "--tokenizer" else value
    assert main([*right, option, value]) != 0
    capsys.readouterr()
    assert main(right) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepare", "x.jsonl"], "--out"),
        (["prepare", "--out", "o"], "no INPUT"),
        (["prepare", "none.jsonl", "--out", "o"], "input is 'none.jsonl'; there is no such file"),
        (["prepare", "x.txt", "--builtin", "shakespeare", "--out", "o"], "leave out the others"),
        (["prepare", "--builtin", "bible", "--out", "o"], "invalid choice: 'bible'"),
        (["prepare", "x", "--out", "o", "--vocab-size", "many"], "invalid int value: 'many'"),
        (["prepare", "x", "--out", "o", "--tokenizer", "t", "--vocab-size", "9"], "--vocab-size"),
        (["prepare", "--builtin", "shakespeare", "--out", "o", "--seeds", "1"], "--seeds"),
        (["look"], "invalid choice: 'look'"),
        ([], "command"),
    ],
)
def test_wrong_arguments_end_with_2_and_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_failures_end_with_1_and_one_line(
    tmp_path: Path,
    prepared: Path,
    corpus: Path,
    tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    again = ["prepare", str(corpus), "--out", str(prepared), "--tokenizer", str(tokenizer)]
    for arguments in (again, ["inspect", str(tmp_path)]):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"distmoe data {arguments[0]}: ")
        assert error.count("\n") == 1


def test_help_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--help"]) == 0
    assert "--validation-fraction" in capsys.readouterr().out


def test_torch_is_not_imported() -> None:
    code = "import sys, distmoe.data.cli, distmoe.data.tokens, distmoe.data.sampler"
    code += "; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
