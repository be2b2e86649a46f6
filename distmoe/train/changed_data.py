"""Whether the data are those that a checkpoint was trained on, and above all its tokens."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Any

from distmoe.checkpoint.manifest import read_manifest
from distmoe.config import Config, ConfigError, corpora
from distmoe.config.data_sizes import read_data_sizes
from distmoe.config.sample_ranges import in_words, sample_ranges, without
from distmoe.data.sampler import DataPosition


def manifest_mark(folder: str) -> str:
    """The beginning of the hash of a prepared folder's manifest, which has those of its files."""
    return f"{hashlib.sha256(Path(folder, 'manifest.json').read_bytes()).hexdigest()[:12]}..."


def data_marks(config: Config) -> dict[str, Any]:
    """What a checkpoint keeps of the data: the tokenizer's hash, the token at the end of documents
    and a mark of every folder. All corpora of a mix have the same tokenizer."""
    folders = [corpus.path for corpus in corpora(config.data)]
    sizes = read_data_sizes(folders[0])
    return {
        "tokenizer_sha256": sizes.tokenizer_sha256,
        "eod_id": sizes.eod_id,
        "manifests": {folder: manifest_mark(folder) for folder in folders},
    }


def changed_data(checkpoint: Path, config: Config, *, weights_only: bool = False) -> list[str]:
    """A line if the data are others than those of ``checkpoint``, which a run that takes its
    ``weights_only`` may well have.

    ConfigError if their tokens are others, unless checkpoint.any_tokenizer is set. A checkpoint
    that was imported, or that an older version wrote, does not know.
    """
    saved, now = read_manifest(checkpoint).about.get("data"), data_marks(config)
    if not saved:
        return []
    for key in ("tokenizer_sha256", "eod_id"):
        if saved[key] != now[key] and not config.checkpoint.any_tokenizer:
            folder = corpora(config.data)[0].path
            raise ConfigError(
                f"the data in '{folder}' have {key} {now[key]}; it must be {saved[key]}, with "
                f"which {checkpoint} was trained, or checkpoint.any_tokenizer be set: its "
                "embeddings would mean other tokens"
            )
    if weights_only:
        return []
    others = [
        folder
        for folder, mark in now["manifests"].items()
        if saved["manifests"].get(folder, mark) != mark
    ]
    return [f"changed since the checkpoint: what is in {folder}" for folder in others]


def skipped_too_late(checkpoint: Path, config: Config, reached: DataPosition) -> list[str]:
    """A warning if data.skip has what the run has trained on before ``checkpoint``, where it had
    ``reached`` that place in the data: a resume that is automatic goes on after the stretch that is
    to be left out. What the checkpoint's own data.skip had is no news."""
    saved = tomllib.loads(read_manifest(checkpoint).about.get("config", ""))
    then = sample_ranges(saved.get("data", {}).get("skip", ()))
    trained = [
        range(left_out.start, min(left_out.stop, reached.samples))
        for left_out in sample_ranges(config.data.skip)
        if left_out.start < reached.samples
    ]
    late = without(trained, (*reached.left_out, *then))
    if not late:
        return []
    return [
        f"warning: data.skip has samples {in_words(late)}, which were trained on before "
        f"{checkpoint}; to leave them out, go back to a checkpoint before them: --resume FOLDER"
    ]
