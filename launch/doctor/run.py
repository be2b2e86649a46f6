"""The run of FILE: settings, ranks against devices, data, room for its checkpoints, tiles."""

from __future__ import annotations

import shutil

from distmoe.config import Config, ConfigError, check
from distmoe.launch.doctor.finding import Finding, failed, passed, skipped, warned
from distmoe.launch.doctor.situation import Check, Situation
from distmoe.registry import MOE_MLP_TILES

GIB = 1 << 30
# fp32 weights and both moments of AdamW; Muon keeps less.
BYTES_PER_PARAMETER = 12
TUNE = "python tools/bench_moe.py --config FILE --tune --write-tiles TABLE"


def settings(situation: Situation) -> Finding:
    """Everything that `distmoe train` checks."""
    try:
        check(situation.need_run(), situation.world, local_world=situation.local_world)
    except ConfigError as error:
        more = f" (and {len(error.problems) - 1} more)" if len(error.problems) > 1 else ""
        return failed(
            f"{error.problems[0]}{more}", f"distmoe config FILE --world {situation.world}"
        )
    return passed(f"possible with {situation.world} ranks")


def ranks_and_devices(situation: Situation) -> Finding:
    """A GPU for each rank of this machine, if the run uses any."""
    config = situation.need_run()
    ranks = f"{situation.local_world} ranks on this machine"
    if config.run.device == "cpu":
        return passed(f"{ranks}, on the CPU")
    gpus = len(situation.probes.answer("torch")["devices"])
    if not gpus and config.run.device == "auto":
        return passed(f"{ranks}, on the CPU, as there is no GPU")
    seen = f"{ranks}, {gpus} GPUs"
    if gpus < situation.local_world:
        return failed(seen, "a GPU for each rank: fewer ranks, or --gpus-per-node")
    if gpus > situation.local_world:
        return warned(seen, f"launch.nproc = {gpus}, or --ranks-per-node {gpus}")
    return passed(seen)


def data(situation: Situation) -> Finding:
    """The manifests, and that the shards have the sizes that they say; not their hashes."""
    # numpy may be what is missing.
    from distmoe.data.manifest import check_files, read_manifest

    tokens = shards = 0
    try:
        folders = situation.data_folders
        for folder in folders:
            manifest = read_manifest(folder)
            check_files(folder, manifest.splits, dtype=manifest.dtype)
            tokens += manifest.totals.tokens
            shards += sum(len(split.shards) for split in manifest.splits.values())
    except ConfigError as error:
        return failed(error.problems[0], "data.mix = ['FOLDER:WEIGHT', ...]")
    except ValueError as error:
        return failed(str(error), "distmoe data prepare INPUT --out FOLDER")
    places = f" of {len(folders)} folders" if len(folders) > 1 else ""
    return passed(f"{tokens:,} tokens in {shards} shards{places}, all of the right size")


def checkpoints(situation: Situation) -> Finding:
    """What the run keeps at the same time, one that is being written among it."""
    config = situation.need_run()
    parameters = situation.probes.answer("parameters")["count"]
    kept = _kept(config)
    wanted = BYTES_PER_PARAMETER * parameters * kept
    free = shutil.disk_usage(situation.run_folder).free
    seen = (
        f"about {wanted / GIB:,.3g} GiB: {kept} of {parameters / 1e6:,.3g} M parameters, "
        f"{BYTES_PER_PARAMETER} bytes each; {free / GIB:,.1f} GiB free"
    )
    if wanted > free:
        return failed(seen, "make room, or checkpoint.keep_last = 1 and a larger checkpoint.every")
    return passed(seen)


def tiles(situation: Situation) -> Finding:
    """Which tile configurations the expert kernels take."""
    situation.need_run()
    answer = situation.probes.answer("tiles")
    if answer["wrong"]:
        return failed(f"moe.kernel_tiles: {answer['wrong']}", TUNE)
    if answer["kernel"] not in MOE_MLP_TILES:
        return skipped(f"moe.kernel {answer['kernel']} has none")
    return warned(answer["seen"], TUNE) if answer["old"] else passed(answer["seen"])


def _kept(config: Config) -> int:
    settings, steps = config.checkpoint, config.train.steps
    for_ever = steps // settings.keep_every if settings.keep_every else 0
    return for_ever + settings.keep_last + 1


CHECKS: dict[str, Check] = {
    "settings": settings,
    "ranks and devices": ranks_and_devices,
    "data": data,
    "checkpoints": checkpoints,
    "tiles": tiles,
}
