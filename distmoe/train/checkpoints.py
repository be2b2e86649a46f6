"""When a run is saved and resumed, and what that costs its training loop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distmoe import __version__
from distmoe.checkpoint.load import MODEL, load
from distmoe.checkpoint.manifest import has_weights_only
from distmoe.checkpoint.rng import rng_state, set_rng_state
from distmoe.checkpoint.store import CheckpointStore, SaveReport
from distmoe.config import Config, ConfigError, RankInfo, to_toml
from distmoe.config.rewound import RECORD, went_back
from distmoe.engines import Engine
from distmoe.train.changed_data import changed_data, data_marks, skipped_too_late
from distmoe.train.changed_settings import changed_settings, saved_optimizer
from distmoe.train.progress import NOTHING_DONE, Progress, saved_progress
from distmoe.train.rewind import forget, go_back, left_behind

MIB = 1 << 20


class Checkpoints:
    """The checkpoints of one run. ``seconds``: what the training loop has lost to saves so far, by
    copying its state and by waiting for the write before. ``group``: of `checkpoint_group`."""

    def __init__(
        self,
        config: Config,
        ranks: RankInfo,
        engine: Engine,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.config, self.ranks, self.engine = config, ranks, engine
        self.folder = Path(config.run.dir)
        own = config.checkpoint
        self.store = CheckpointStore(
            self.folder / "checkpoints",
            keep_last=own.keep_last,
            keep_every=own.keep_every,
            asynchronous=own.asynchronous,
            group=group,
            about={
                "distmoe": __version__,
                "world": ranks.world,
                "engine": config.parallel.engine,
                "ep": config.parallel.ep,
                "config": to_toml(config),
                "data": data_marks(config),
            },
        )
        self.seconds = 0.0
        self._told_seconds = 0.0
        self._ended: list[SaveReport] = []
        self._untold: list[str] = []

    def save(self, progress: Progress, *, expire: bool = True) -> None:
        """Save the state; collective. ``expire``: older checkpoints make room."""
        begun = time.perf_counter()
        rng_key = f"rng_{self.ranks.rank}_of_{self.ranks.world}"
        state = {**self._state(progress.done), rng_key: rng_state()}
        self.store.save(progress.done, state, about=progress.about(), expire=expire)
        self.seconds += time.perf_counter() - begun

    def finish(self, progress: Progress, *, expire: bool = True) -> None:
        """Save the last state, unless that has been done, and wait for it; collective."""
        self.wait()
        if self.store.saved_step != progress.done:
            self.save(progress, expire=expire)
            self.wait()

    def check_last(self, done: int) -> None:
        """RuntimeError if the state after ``done`` steps is not in a complete checkpoint."""
        if self.store.saved_step != done:
            raise RuntimeError(f"the state after {done} steps could not be saved; {self._newest()}")

    def resume(self) -> tuple[Progress, Path | None]:
        """What is done, and the checkpoint that says so; collective. ValueError if it is damaged,
        ConfigError if it does not fit the model or the data. With nothing to resume, no steps, and
        the checkpoint whose weights were taken, if checkpoint.init_from names one.

        What a run that goes back leaves behind is set aside as soon as the checkpoint is loaded.
        """
        path = self._wanted()
        progress = NOTHING_DONE if path is None else self._load(path)
        source = self._take_weights() if path is None else path
        self._untold += self.store.from_first(lambda: self._settle(path))
        return progress, source

    def _load(self, path: Path) -> Progress:
        if has_weights_only(path):
            raise ConfigError(
                f"checkpoint {path} has weights only; begin a run with them by "
                f"--checkpoint.init_from {path}"
            )
        if (was := saved_optimizer(path)) != self.config.optim.name:
            raise ConfigError(
                f"optim.name is {self.config.optim.name}; it must be {was} to go on from "
                f"{path}, whose optimizer it was; to begin a run with the weights alone: "
                f"--checkpoint.init_from {path}"
            )
        changed = changed_settings(path, self.config)
        self._untold += changed_data(path, self.config)
        try:
            state = load(path, self._state(0))
        except ValueError as error:
            known = f"; changed since it was saved: {', '.join(changed)}" if changed else ""
            raise ConfigError(f"{error}{known}") from error
        if changed:
            self._untold.append(f"changed since the checkpoint: {', '.join(changed)}")
        self.engine.load_state_dict(state)
        self._restore_rng(path)
        self.store.saved_step = int(state["progress"]["done"])
        progress = saved_progress(path, self.store.saved_step)
        self._untold += skipped_too_late(path, self.config, progress.data)
        return progress

    def _take_weights(self) -> Path | None:
        if not self.config.checkpoint.init_from:
            return None
        path = Path(self.config.checkpoint.init_from)
        self._refuse_damage(path)
        self._untold += changed_data(path, self.config, weights_only=True)
        state = self.engine.state_dict()
        load(path, {MODEL: state[MODEL]})
        self.engine.load_state_dict(state)
        return path

    def _refuse_damage(self, path: Path) -> None:
        if lines := self.store.damage(path):
            raise ValueError(f"checkpoint {path} is damaged: {'; '.join(lines)}")

    def wait(self) -> None:
        """Until nothing is in flight; collective."""
        begun = time.perf_counter()
        self.store.wait()
        self.seconds += time.perf_counter() - begun

    def lost_seconds(self) -> float:
        """What the loop has lost since the last call."""
        lost, self._told_seconds = self.seconds - self._told_seconds, self.seconds
        return lost

    def news(self) -> list[str]:
        """A line for every save that has ended since the last call, and for damage found."""
        ended = self.store.reports()
        self._ended += ended
        lines, self._untold = self._untold + [self._line(report) for report in ended], []
        return lines

    def summary(self) -> str:
        """What saving did and cost."""
        complete = [report for report in self._ended if not report.error]
        failed = len(self._ended) - len(complete)
        text = (
            f"{len(complete)} checkpoints written in {sum(r.seconds for r in complete):.2f} s; "
            f"the training loop lost {self.seconds:.2f} s to them"
        )
        return f"{text}; {failed} FAILED" if failed else text

    def _line(self, report: SaveReport) -> str:
        if not report.error:
            return (
                f"checkpoint of step {report.step}: {report.bytes / MIB:.1f} MiB "
                f"in {report.seconds:.2f} s"
            )
        return (
            f"error: the checkpoint of step {report.step} was NOT written: {report.error}; "
            f"{self._newest()}"
        )

    def _newest(self) -> str:
        complete = self.store.complete()
        if not complete:
            return f"there is no other in {self.store.root}"
        return f"the newest is {complete[-1]}"

    def _state(self, done: int) -> dict[str, Any]:
        """What a checkpoint holds. The schedule follows from ``done``; the samples that were taken
        are in its manifest."""
        return {**self.engine.state_dict(), "progress": {"done": done}}

    @property
    def _origin(self) -> Path | None:
        """The checkpoint that --resume names; None for auto and for never."""
        resume = self.config.checkpoint.resume
        return None if resume in ("auto", "never") else Path(resume)

    def _wanted(self) -> Path | None:
        complete: list[Path] = self.store.from_first(self.store.complete)
        if self.config.checkpoint.resume != "auto":
            if not self.store.from_first(lambda: went_back(self.folder, self._origin)):
                return self._sound_origin()
            complete = left_behind(complete, self._origin)
            # Where nothing after it is sound, it is gone back to once more.
            complete = [*([self._origin] if self._origin else []), *complete]
        found, damaged = self.store.newest_sound(complete)
        for path, lines in damaged.items():
            self._untold.append(f"warning: checkpoint {path} is damaged: {'; '.join(lines)}")
        return found

    def _sound_origin(self) -> Path | None:
        if self._origin is not None:
            self._refuse_damage(self._origin)
        return self._origin

    def _settle(self, path: Path | None) -> list[str]:
        """On rank 0, once it is certain that the run goes on from ``path``; lines for the user."""
        if self.config.checkpoint.resume == "auto":
            forget(self.folder)
            return []
        if not went_back(self.folder, self._origin):
            return go_back(self.folder, self.store.complete(), self._origin)
        if path == self._origin:
            return []
        return [
            f"went back to {self._origin or 'the beginning'} before, and goes on from there; "
            f"to do so again, delete {self.folder / RECORD}"
        ]

    def _restore_rng(self, path: Path) -> None:
        """This rank's generators, if the run had as many ranks; nothing else depends on them."""
        key = f"rng_{self.ranks.rank}_of_{self.ranks.world}"
        try:
            state = load(path, {key: rng_state()})
        except ValueError:
            return
        set_rng_state(state[key])
