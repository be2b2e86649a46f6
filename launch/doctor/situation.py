"""What the checks look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distmoe.config import Config, RankInfo, corpora
from distmoe.launch.doctor.finding import Finding
from distmoe.metrics.nvml import Gpu


class NoRunError(Exception):
    """A check is of a run, and there is none."""


class Probes(Protocol):
    """Answers of another process; see `ProbeProcess`."""

    def answer(self, name: str) -> dict[str, Any]:
        """ProbeError if there is none."""


@dataclass(frozen=True)
class Situation:
    """``config``: the run as FILE and options say, nothing derived: that reads the data folder,
    which may hang; None without a FILE. ``world``: its ranks, ``local_world`` of them on this
    machine. ``ranks``: what a launcher said, if one has started this; if that makes no sense,
    ``launcher_problem`` says why. ``variables``: the environment. ``gpus``: asks NVML, and raises
    NvmlError."""

    config: Config | None
    world: int
    local_world: int
    ranks: RankInfo
    launcher_problem: str
    variables: Mapping[str, str]
    probes: Probes
    gpus: Callable[[], list[Gpu]]

    @property
    def wants_gpu(self) -> bool:
        """Whether the run has asked for GPUs by name."""
        return self.config is not None and self.config.run.device == "cuda"

    @property
    def run_folder(self) -> Path:
        """run.dir, or the first above it that is there; without a FILE the working folder."""
        folder = Path(self.config.run.dir if self.config else ".").absolute()
        return next(path for path in (folder, *folder.parents) if path.is_dir())

    @property
    def data_folders(self) -> list[Path]:
        """data.path, or those of data.mix. ConfigError for a wrong mix."""
        return [Path(corpus.path) for corpus in corpora(self.need_run().data)]

    def need_run(self) -> Config:
        """NoRunError without a FILE, at which a check is skipped."""
        if self.config is None:
            raise NoRunError("no FILE was given")
        return self.config


Check = Callable[[Situation], Finding]
