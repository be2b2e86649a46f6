"""What all ranks of a training run must have alike when they start."""

from __future__ import annotations

from distmoe.config import Config, corpora
from distmoe.config.keys import key_types, value_of
from distmoe.train.changed_data import manifest_mark

# Machines may differ in these. Ranks of a node are compared where they are used.
OF_A_MACHINE = {
    "run.device",
    "launch.nproc",
    "launch.threads",
    "data.path",
    "data.mix",
    "parallel.profile",
    "parallel.ranks_per_node",
}


def common_facts(config: Config) -> dict[str, str]:
    """Every setting but those of a machine, and which data there are; for `meet`."""
    facts = {key: repr(value_of(config, key)) for key in key_types() if key not in OF_A_MACHINE}
    if not config.data.mix:
        facts["the manifest of data.path"] = manifest_mark(config.data.path)
        return facts
    for number, corpus in enumerate(corpora(config.data)):
        facts[f"entry {number} of data.mix"] = (
            f"manifest {manifest_mark(corpus.path)}, weight {corpus.weight}"
        )
    return facts
