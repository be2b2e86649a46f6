from __future__ import annotations

import json
from pathlib import Path

import pytest
from pages import ROOT, blocks

from distmoe.data.cli import main as data_main
from distmoe.planner.machine_profile import PRESETS, save_profile

# What the commands of the documentation find in the folder in which they are typed, beside the
# repository itself.
HOSTS = "".join(f"node{number} slots=8\n" for number in (1, 2, 3, 4))
EVENT = {"name": "forward", "ph": "X", "ts": 0, "dur": 1, "pid": 0, "tid": 0}
SUMS = {"layer": 1, "backward": False, "communication": 0.2, "exposed": 0.1, "share": 0.05}
TRACE = {"traceEvents": [EVENT], "exposure": [SUMS]}
CORPUS = {
    "vocab_size": 512,
    "tokenizer_sha256": "0",
    "eod_id": 0,
    "splits": {n: {"tokens": 10**9} for n in ("train", "validation")},
}
MODEL = 'extends = "../../configs/models/olmoe_1b_7b.toml"\n'


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the documentation's commands read: the repository, prepared data, and
    what the reader brings or has made by the commands before."""
    folder = tmp_path_factory.mktemp("workshop")
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "data") and not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    text = json.dumps({"text": "To be, or not to be.", "content": "That is the question."}) + "\n"
    written = {
        "hosts": HOSTS,
        "corpus/a.jsonl": text,
        "part-1.jsonl": text,
        "tokenizer.json": "{}",
        "saved_dataset/train/state.json": "{}",
        "mixed.toml": '[data]\nmix = ["data/web:3", "data/code:1"]\n',
        "data/code/manifest.json": json.dumps(CORPUS),
        "data/web/tokenizer.json": "{}",
        "data/corpus/manifest.json": json.dumps(CORPUS),
        "data/web/manifest.json": json.dumps(CORPUS),
        "models/olmoe/config.toml": MODEL,
        "models/olmoe/tokenizer.json": "{}",
        "OLMoE-1B-7B-0924/config.json": "{}",
        ".venv/bin/activate": "",
        "runs/quickstart/checkpoints/step-00000100/manifest.json": "{}",
        "runs/quickstart/tensorboard/events": "",
        "runs/quickstart/trace/steps-10-12-rank-0.json": json.dumps(TRACE),
        "runs/quickstart/trace/steps-10-12-rank-1.json": json.dumps(TRACE),
        "runs/balance/config.toml": "",
        "runs/none/config.toml": "",
        "runs/trace/config.toml": "",
        "h200.toml": 'device = "NVIDIA H200"\n',
        "layer.py": blocks(ROOT / "docs/layer.md", "python")[0].text,
    }
    for name, content in written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    save_profile(PRESETS["NVIDIA H200"], folder / "machine.toml")
    shakespeare = str(folder / "data/shakespeare")
    assert data_main(["prepare", "--builtin", "shakespeare", "--out", shakespeare]) == 0
    return folder
