"""Room and speed of the folders that a run writes and reads."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from distmoe.launch.doctor.finding import Finding, failed, passed, skipped, warned
from distmoe.launch.doctor.situation import Check, Situation

MIB, GIB = 1 << 20, 1 << 30
# Written and read to see how fast that goes, or less in so many seconds.
PROBE_BYTES, PROBE_SECONDS = 64 * MIB, 2.0
CHUNK = b"\xa5" * (4 * MIB)
SLOW_BYTES_PER_S = 50e6
LEAST_FREE = 5 * GIB
# NCCL and data loaders; a container has 64 MiB if nobody asked for more.
LEAST_SHARED = GIB
LEAST_TEMPORARY = GIB


def run_room(situation: Situation) -> Finding:
    """Where checkpoints and metrics go."""
    folder = situation.run_folder
    free = shutil.disk_usage(folder).free
    seen = f"{free / GIB:.1f} GiB free in {folder}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return failed(f"{folder} cannot be written", "run.dir = a folder that is yours")
    if free < LEAST_FREE:
        return warned(seen, "make room, or set run.dir to another disk")
    return passed(seen)


def run_speed(situation: Situation) -> Finding:
    """Writing and syncing, as a checkpoint does."""
    folder = situation.run_folder
    try:
        # Without a name: nothing is left, however this ends.
        with tempfile.TemporaryFile(dir=folder) as file:
            began, written = time.perf_counter(), 0
            while written < PROBE_BYTES and time.perf_counter() - began < PROBE_SECONDS:
                written += file.write(CHUNK)
            file.flush()
            os.fsync(file.fileno())
            rate = written / (time.perf_counter() - began)
            small = _sync_seconds(file.fileno())
    except OSError as error:
        return failed(str(error), "run.dir = a folder that can be written")
    seen = f"{rate / 1e6:,.0f} MB/s written and synced, {1e3 * small:.1f} ms for a small sync"
    if rate < SLOW_BYTES_PER_S:
        return warned(f"{seen}, in {folder}", "run.dir on a faster disk, for checkpoints")
    return passed(seen)


def _sync_seconds(file: int) -> float:
    began = time.perf_counter()
    os.write(file, b"\n")
    os.fsync(file)
    return time.perf_counter() - began


def data_room(situation: Situation) -> Finding:
    """Of each file system that has folders of the data."""
    together: dict[int, list[Path]] = {}
    for folder in situation.data_folders:
        if not folder.is_dir():
            return skipped(f"there is no {folder}; see `data`")
        together.setdefault(folder.stat().st_dev, []).append(folder)
    return passed(
        "; ".join(
            f"{shutil.disk_usage(folders[0]).free / GIB:.1f} GiB free in "
            f"{', '.join(map(str, folders))}"
            for folders in together.values()
        )
    )


def data_speed(situation: Situation) -> Finding:
    """Reading the start of a shard of each folder, one after the other."""
    firsts = []
    for folder in situation.data_folders:
        shards = sorted(folder.glob("*.bin"))
        if not shards:
            return skipped(f"there is no shard in {folder}; see `data`")
        firsts.append(shards[0])
    seen, slow = [], False
    for shard in firsts:
        read, rate = _read_start(shard, share=1 / len(firsts))
        name = shard if len(firsts) > 1 else shard.name
        seen.append(f"{rate / 1e6:,.0f} MB/s, {read / 1e6:.1f} MB of {name}")
        # Opening takes longer than reading a small file.
        slow |= rate < SLOW_BYTES_PER_S and read >= len(CHUNK)
    if slow:
        return warned("; ".join(seen), "the data on a faster disk")
    return passed("; ".join(seen))


def _read_start(shard: Path, *, share: float) -> tuple[int, float]:
    """Bytes read and bytes/s, from the disk as far as the kernel forgets what it knows; ``share``
    of what all folders together may take."""
    with shard.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, read = time.perf_counter(), 0
        while read < PROBE_BYTES * share and time.perf_counter() - began < PROBE_SECONDS * share:
            piece = len(file.read(len(CHUNK)))
            if not piece:
                break
            read += piece
        return read, read / max(time.perf_counter() - began, 1e-9)


def shared_memory(situation: Situation) -> Finding:
    """/dev/shm."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return warned("there is no /dev/shm", "NCCL_SHM_DISABLE=1, or a container that has one")
    whole, _, free = shutil.disk_usage(folder)
    seen = f"{free / GIB:.2f} of {whole / GIB:.2f} GiB free"
    if free < LEAST_SHARED:
        return warned(seen, "docker run --shm-size=8g, or --ipc=host")
    return passed(seen)


def temporary(situation: Situation) -> Finding:
    """Where Python and compilers of kernels put what they need for a while."""
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    seen = f"{free / GIB:.1f} GiB free in {folder}"
    return passed(seen) if free >= LEAST_TEMPORARY else warned(seen, "TMPDIR=another folder")


CHECKS: dict[str, Check] = {
    "run folder": run_room,
    "writing": run_speed,
    "data folder": data_room,
    "reading": data_speed,
    "/dev/shm": shared_memory,
    "temporary": temporary,
}
