"""`--workers`: the same bytes, whatever the number of processes, and however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distmoe.data.encoding import encode_pieces
from distmoe.data.holdout import SplitPiece, assign
from distmoe.data.manifest import Manifest
from distmoe.data.sources import find_sources, read_pieces
from distmoe.data.tokenizer import Encoder

pytestmark = pytest.mark.processes

Prepare = Callable[..., Manifest]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def children(parent: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.add(int(stat.parent.name))
    return found


def test_the_same_bytes_and_nothing_left(
    tmp_path: Path, corpus: Path, run_prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distmoe.data.encoding.BATCH_PIECES", 7)
    before = children(os.getpid())
    one = run_prepare(corpus, tmp_path / "one")
    assert run_prepare(corpus, tmp_path / "two", workers=2) == one
    assert snapshot(tmp_path / "two") == snapshot(tmp_path / "one")
    # Python's own tracker of resources stays.
    assert len(children(os.getpid()) - before) <= 1


def test_few_batches_are_read_ahead_and_a_dead_worker_is_told(
    corpus: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distmoe.data.encoding.BATCH_PIECES", 5)
    pieces, read = read_pieces(find_sources((corpus,)), "text"), 0

    def counted() -> Iterator[SplitPiece]:
        nonlocal read
        for piece in assign(pieces, fraction=0, seed=1, lengths=None):  # type: ignore[arg-type]
            read += 1
            yield piece

    before = children(os.getpid())
    batches = encode_pieces(counted(), Encoder(tokenizer.read_text()), workers=2)
    next(batches)
    assert read == 4 * 5
    started = children(os.getpid()) - before
    for process in started:
        # The tracker of resources ignores this signal.
        os.kill(process, signal.SIGTERM)
    with pytest.raises(ChildProcessError, match="a process of --workers has died"):
        list(batches)


def test_killed_work_leaves_no_process_and_is_resumed_by_any_number(
    tmp_path: Path, corpus: Path, tokenizer: Path, run_prepare: Prepare
) -> None:
    # A pipe as input keeps the work waiting, with its processes started.
    folder = tmp_path / "in"
    folder.mkdir()
    lines = "".join((corpus / name).read_text() for name in ("a.jsonl", "b.jsonl"))
    (folder / "a.jsonl").write_text(lines * 6)
    settings = {"shard_tokens": 4000, "validation_fraction": 0.1}
    code = f"""
import os, signal
from pathlib import Path
from distmoe.data import encoding, shards
from distmoe.data.prepare import prepare
from distmoe.data.spec import PrepareSpec

encoding.BATCH_PIECES = 50
finish = shards.ShardWriter.finish

def last(self):
    if self.name == "train-00003":
        print(*(p.pid for p in __import__("multiprocessing").active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(self)

if __name__ == "__main__":
    shards.ShardWriter.finish = last
    prepare(PrepareSpec((Path({str(folder)!r}),), Path({str(tmp_path / "out")!r}),
            tokenizer=Path({str(tokenizer)!r}), workers=2, **{settings!r}))
"""
    (tmp_path / "run.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    finished = json.loads((tmp_path / "out/prepare.json").read_text())["splits"]["train"]["shards"]
    assert len(finished) == 3
    kept = (tmp_path / "out/train-00000.bin").stat().st_ino
    run_prepare(folder, tmp_path / "out", **settings)
    assert (tmp_path / "out/train-00000.bin").stat().st_ino == kept
    run_prepare(folder, tmp_path / "whole", **settings)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
