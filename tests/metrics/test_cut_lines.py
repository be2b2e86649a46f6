"""Lines taken back at a file's end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from distmoe.metrics import cut_lines
from distmoe.metrics.cut_lines import cut_after
from distmoe.metrics.writers import JsonlWriter

LINES = [json.dumps({"step": step, "text": "x" * (7 * step % 40)}) + "\n" for step in range(1, 13)]


@pytest.mark.parametrize("cut_off", ["", '{"step": 13, "te', "\n\n"])
def test_every_step(tmp_path: Path, cut_off: str) -> None:
    path = tmp_path / "lines.jsonl"
    for step in (0, 1, 7, 11):
        path.write_text("".join(LINES) + cut_off)
        assert cut_after(path, step) == (step or -math.inf)
        assert path.read_text() == "".join(LINES[:step])


def test_a_long_file_is_not_read_nor_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(LINES) * 1000)
    parsed: list[bytes] = []
    step_of = cut_lines._step_of
    monkeypatch.setattr(cut_lines, "_step_of", lambda line: parsed.append(line) or step_of(line))
    file = path.stat().st_ino
    assert cut_after(path, 9) == 9
    assert path.read_text() == "".join(LINES) * 999 + "".join(LINES[:9])
    assert len(parsed) == 4
    assert path.stat().st_ino == file


def test_a_step_whose_line_has_no_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(LINES[0] + LINES[1].rstrip())
    writer = JsonlWriter.open(path, resumed_step=2)
    writer.write({"step": 3})
    writer.close()
    assert path.read_text() == LINES[0] + LINES[1] + '{"step": 3}\n'
