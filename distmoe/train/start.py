"""What all ranks of a training run must have alike when they start."""

from __future__ import annotations

import hashlib
from pathlib import Path

from distmoe.config import Config
from distmoe.config.keys import key_types, value_of

# Machines may differ in these. Ranks of a node are compared where they are used.
OF_A_MACHINE = {
    "run.device",
    "launch.nproc",
    "launch.threads",
    "data.path",
    "parallel.profile",
    "parallel.ranks_per_node",
}


def common_facts(config: Config) -> dict[str, str]:
    """Every setting but those of a machine, and which data there are; for `meet`."""
    facts = {key: repr(value_of(config, key)) for key in key_types() if key not in OF_A_MACHINE}
    manifest = Path(config.data.path, "manifest.json").read_bytes()
    facts["the manifest of data.path"] = f"{hashlib.sha256(manifest).hexdigest()[:12]}..."
    return facts
