"""`distmoe doctor` as a user starts it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from launch_doctor import DEVICE

from distmoe.config import ConfigError, RankInfo
from distmoe.launch import cli
from distmoe.launch.doctor import cli as doctor
from distmoe.launch.doctor import run
from distmoe.launch.doctor.finding import Finding, failed, passed, skipped, warned
from distmoe.launch.doctor.situation import Check, Situation
from distmoe.launch.doctor.table import THEMES

Captured = pytest.CaptureFixture[str]
WITHOUT_TORCH = """
import sys
from distmoe.launch.cli import main
code = main(["doctor", *sys.argv[1:]])
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""


@pytest.mark.processes
def test_this_machine(config_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(config_file), "--json", "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    report = json.loads((tmp_path / "found.json").read_text())
    # The shards of this manifest do not exist; nothing else is wrong with the run.
    assert (done.returncode, done.stderr) == (1, "")
    assert report["seconds"] < 15
    found = {(c["theme"], c["check"]): c for c in report["checks"]}
    assert list(found) == [(theme, check) for theme in THEMES for check in THEMES[theme]]
    assert [place for place, c in found.items() if c["status"] == "fail"] == [("run", "data")]
    assert "the check broke" not in done.stdout
    for place in (("communication", "gloo"), ("run", "settings"), ("run", "checkpoints")):
        assert found[place]["status"] == "pass", found[place]
    assert "fail  data                  " in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{done.stdout.count('  pass  ')} pass, ")


def told(finding: Finding) -> Check:
    return lambda situation: finding


@pytest.fixture
def with_checks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts other checks in the place of the table, and nothing in that of probes."""

    def put(**themes: dict[str, Finding]) -> None:
        table = {
            theme: {name: told(finding) for name, finding in findings.items()}
            for theme, findings in themes.items()
        }
        monkeypatch.setattr(doctor, "THEMES", table)
        monkeypatch.setattr(doctor, "COMMAND", (sys.executable, "-I", "-S", "-c", ""))

    return put


def test_what_is_printed_and_written(
    with_checks: Callable[..., None], tmp_path: Path, capsys: Captured
) -> None:
    with_checks(
        one={"a": skipped("no GPU"), "b": skipped("no GPU"), "c": passed("3 of 4")},
        other={"d": warned("slow", "a faster one")},
    )
    file = tmp_path / "found.json"
    assert cli.main(["doctor", f"--json={file}"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [
        "one",
        "  skip  a, b                  no GPU",
        "  pass  c                     3 of 4",
        "other",
        "  warn  d                     slow",
        "                              -> a faster one",
    ]
    assert last.startswith("1 pass, 1 warn, 0 fail, 2 skip; ")
    report = json.loads(file.read_text())
    assert report["host"] == socket.gethostname()
    assert report["checks"][1] == {
        "theme": "one",
        "check": "b",
        "status": "skip",
        "seen": "no GPU",
        "fix": "",
    }
    with_checks(one={"a": failed("gone", "bring it back"), "b": passed("")})
    assert cli.main(["doctor"]) == 1


def test_ranks_of_a_machine_speak_by_their_first(
    with_checks: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: Captured,
) -> None:
    with_checks(one={"a": failed("gone", "bring it back")})
    monkeypatch.setattr(doctor, "nccl", told(skipped("no GPU here")))
    monkeypatch.setattr(doctor, "TOLD_SECONDS", 0.2)
    file = tmp_path / "found.json"
    # Ranks 0 and 1 are on a machine, 2 and 3 on another.
    for rank, code in ((1, 0), (2, 1), (0, 1)):
        place = RankInfo(rank, 4, rank % 2, 2, "10.0.0.1", 29500, "torchrun")
        monkeypatch.setattr(doctor, "rank_info", lambda place=place: place)
        began = time.perf_counter()
        assert cli.main(["doctor", "--json", str(file)]) == code
        # Until all have told, which a launcher would end.
        assert not code or time.perf_counter() - began >= 0.2
        output = capsys.readouterr().out
        assert output.startswith(f"one of {socket.gethostname()}\n") is (rank != 1)
        assert file.exists() is (rank == 0)


def test_what_the_checks_are_given(
    with_checks: Callable[..., None], monkeypatch: pytest.MonkeyPatch, config_file: Path
) -> None:
    seen: list[Situation] = []
    with_checks()

    def keep(situation: Situation) -> Finding:
        seen.append(situation)
        return passed("")

    monkeypatch.setattr(doctor, "THEMES", {"one": {"a": keep}})
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    cli.main(["doctor", str(config_file), "--launch.nproc", "2"])
    cli.main(["doctor", str(config_file), "--world=16", "--ranks-per-node", "8"])
    cli.main(["doctor"])
    assert [(s.world, s.local_world) for s in seen] == [(2, 2), (16, 8), (1, 1)]
    assert [s.config and s.config.launch.nproc for s in seen] == [2, 1, None]
    assert seen[0].variables["NCCL_DEBUG"] == "INFO"

    def senseless() -> RankInfo:
        raise ConfigError("RANK is 'x'; it must be an integer")

    monkeypatch.setattr(doctor, "rank_info", senseless)
    cli.main(["doctor"])
    assert seen[-1].launcher_problem == "RANK is 'x'; it must be an integer"


def test_every_rank_tells_of_a_gpu_that_nccl_cannot_use(
    with_checks: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    with_checks()
    place = RankInfo(3, 4, 3, 4, "10.0.0.1", 29500, "torchrun")
    monkeypatch.setattr(doctor, "rank_info", lambda: place)
    monkeypatch.setattr(doctor, "TOLD_SECONDS", 0.4)
    answers = {"torch": {"devices": [DEVICE], "nccl": "2.28.9"}, "nccl": {"seconds": 1.0}}
    for answer, code in ((answers["nccl"], 0), ({"error": "RuntimeError: no memory"}, 1)):
        script = f"import json\nfor probe, answer in { ({**answers, 'nccl': answer})!r}.items():\n"
        script += " print(json.dumps({'probe': probe, 'answer': answer}))"
        monkeypatch.setattr(doctor, "COMMAND", (sys.executable, "-I", "-S", "-c", script))
        began = time.perf_counter()
        assert cli.main(["doctor"]) == code
        assert not code or time.perf_counter() - began >= 0.4
        output = capsys.readouterr().out
        assert output.startswith("fail  nccl, local rank 3 of ") is bool(code)
        assert len(output.splitlines()) == code
    assert "  RuntimeError: no memory -> NCCL_DEBUG=INFO" in output


def test_a_data_folder_that_hangs(
    with_checks: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    config_file: Path,
    capsys: Captured,
) -> None:
    released = threading.Event()

    def stale(folder: str) -> None:
        released.wait(3)
        raise ConfigError("too late")

    with_checks()
    monkeypatch.setattr(doctor, "THEMES", {"run": {"settings": run.settings}})
    monkeypatch.setattr(doctor, "SECONDS", 0.2)
    # The function of the same name hides the module.
    monkeypatch.setattr(import_module("distmoe.config.resolve"), "read_data_sizes", stale)
    began = time.perf_counter()
    assert cli.main(["doctor", str(config_file)]) == 1
    assert time.perf_counter() - began < 2
    released.set()
    assert "fail  settings              no answer in 0.2 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no.toml"], "there is no config file 'no.toml'"),
        (["--world", "0"], "--world is '0'; it must be an integer, at least 1"),
        (["--world"], "--world needs a value"),
        (["--json", "no/folder/x"], "--json is 'no/folder/x'; it must be a file in"),
        (["--train.steps", "5"], "'--train.steps' is no option without FILE"),
    ],
)
def test_wrong_arguments(capsys: Captured, arguments: list[str], words: str) -> None:
    assert cli.main(["doctor", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("distmoe doctor: error: ")
    assert words in output.err
    assert len(output.err.splitlines()) == 1


def test_help_and_the_page_name_what_there_is(capsys: Captured) -> None:
    assert cli.main(["doctor", "--help"]) == 0
    text = capsys.readouterr().out
    page = (Path(__file__).parents[3] / "docs/doctor.md").read_text()
    for option in doctor.OWN_OPTIONS:
        assert option in text
        assert option in page
    assert [name for checks in THEMES.values() for name in checks if f"`{name}`" not in page] == []
