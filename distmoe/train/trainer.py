"""The training run of one rank, from a checked config to the summary."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from distmoe import runtime as runtime_room
from distmoe.checkpoint.store import checkpoint_group
from distmoe.config import Config, ConfigError, RankInfo
from distmoe.config.dtype import with_dtype
from distmoe.config.load import to_toml
from distmoe.config.sample_ranges import in_words
from distmoe.config.unused import unused_settings
from distmoe.data.batches import Batch
from distmoe.data.run_data import RunData
from distmoe.engines import Engine, compute_dtype, make_engine
from distmoe.mesh import Mesh, build_mesh
from distmoe.metrics.record import CorpusProgress
from distmoe.metrics.reporter import Reporter
from distmoe.metrics.throughput import RunPart
from distmoe.named_range import named_range
from distmoe.runtime import Runtime, StopSignal, any_rank, deterministic_algorithms
from distmoe.train.agreed_schedule import with_schedule
from distmoe.train.checkpoints import Checkpoints
from distmoe.train.collect import collect_step
from distmoe.train.communication import Communication
from distmoe.train.learning_rate import jump_of_lr, learning_rate
from distmoe.train.profiling import Profiling
from distmoe.train.progress import Progress
from distmoe.train.record_routing import RoutingRecorder
from distmoe.train.run_lock import RunLock
from distmoe.train.start import common_facts
from distmoe.train.start_facts import StartFacts
from distmoe.train.step import StepOutcome, train_step, validation_loss
from distmoe.train.stop_note import remove_stop_note, write_stop_note

SIGNAL = "a signal"


def train(config: Config, ranks: RankInfo) -> bool:
    """Train as one rank of a run; ``config`` is resolved and checked for ``ranks.world`` ranks.

    Returns when all steps are done, the time limit is reached, or a signal asked for the end;
    the last state is then in a complete checkpoint, unless it is one of steps that were skipped and
    others are left. False if a signal left steps to do.
    Raises on any error; one of the disk under a checkpoint is only told, unless the checkpoint is
    the last.
    """
    stop_signal = StopSignal()
    stop_signal.install()
    lock, problem = _lock(config, ranks)
    with ExitStack() as resources:
        if lock is not None:
            resources.callback(lock.release)
        resources.enter_context(deterministic_algorithms(config.run.deterministic))
        runtime = runtime_room.start(
            ranks,
            device=config.run.device,
            timeout_s=config.launch.timeout_s,
            threads=config.launch.threads,
            engine=config.parallel.engine,
            facts=partial(common_facts, config),
            problem=problem,
        )
        mesh = None
        if runtime.group is not None:
            mesh = build_mesh(
                config.parallel,
                device_type=runtime.device.type,
                timeout_s=config.launch.timeout_s,
            )
        trainer = Trainer.open(config, runtime, mesh, resources)
        trainer.tell([lock.note] if lock is not None and lock.note else [])
        runtime_room.keep_all_objects()
        finished = trainer.run(stop_signal)
    del trainer
    runtime_room.stop(runtime)
    stop_signal.restore()
    return finished


def _lock(config: Config, ranks: RankInfo) -> tuple[RunLock | None, str]:
    """On rank 0 the run's folder for this run alone, or why it cannot have it."""
    if ranks.rank:
        return None, ""
    try:
        return RunLock.acquire(Path(config.run.dir)), ""
    except ConfigError as error:
        return None, str(error)


def _sign_folder(config: Config) -> None:
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(to_toml(config))
    remove_stop_note(folder)


@dataclass
class Trainer:
    """Everything of a run. ``done``: finished steps; ``skipped_in_a_row``: what was not finite in
    the last ones, if they were without an update."""

    config: Config
    runtime: Runtime
    engine: Engine
    checkpoints: Checkpoints
    data: RunData
    reporter: Reporter
    recorder: RoutingRecorder
    communication: Communication
    profiling: Profiling
    done: int = 0
    skipped_in_a_row: tuple[str, ...] = ()

    @classmethod
    def open(
        cls, config: Config, runtime: Runtime, mesh: Mesh | None, resources: ExitStack
    ) -> Trainer:
        """Made in the order of the data path, resumed, and introduced to the user; collective. What
        has to be closed is left to ``resources``."""
        config, why_schedule = with_schedule(with_dtype(config, runtime.device.type), runtime)
        ranks = runtime.ranks
        profiling = Profiling(config, runtime)
        resources.callback(profiling.close)
        engine = make_engine(config, mesh, runtime.device)
        resources.callback(engine.close)
        group = checkpoint_group(timeout_s=config.launch.timeout_s)
        checkpoints = Checkpoints(config, ranks, engine, group)
        progress, source = checkpoints.resume()
        data = RunData(config, rank=ranks.rank, world=ranks.world, begin=progress.data)
        resources.callback(data.close)
        if ranks.rank == 0:
            _sign_folder(config)
        layers, done = engine.model.moe_layers(), progress.done
        reporter = Reporter.open(config, rank=ranks.rank, world=ranks.world, resumed_step=done)
        resources.callback(reporter.close)
        recorder = RoutingRecorder.open(config, ranks, layers, resumed_step=done)
        comm = Communication.open(config, runtime, engine.model)
        resources.callback(comm.close)
        trainer = cls(
            config, runtime, engine, checkpoints, data, reporter, recorder, comm, profiling, done
        )
        start = StartFacts(config, runtime, layers, mesh, data, why_schedule, done, source)
        reporter.header(start.rows(recorder))
        trainer.tell([f"warning: {line}" for line in unused_settings(config)])
        trainer.tell(checkpoints.news() + jump_of_lr(config, progress))
        return trainer

    def run(self, stop_signal: StopSignal) -> bool:
        """Train until the steps are done or something asks for the end; save; summarise. False if
        a signal left steps to do."""
        config, clock = self.config, self.reporter.clock
        stopped = ""
        clock.begin()
        if self.done >= config.train.steps:
            self.tell([f"nothing is left to do: train.steps is {config.train.steps}"])
        while self.done < config.train.steps and not stopped:
            with self.profiling.step(self.done + 1):
                self._step()
            self._tell_profiles(self.profiling.end)
            last = self.done == config.train.steps
            if self._is_due(config.train.validate_every) and not last:
                self._validate()
            # Weights that may be damaged must not push out good ones.
            is_sound = not self.skipped_in_a_row
            if self._is_due(config.checkpoint.every) and is_sound and not last:
                with clock.part(RunPart.CHECKPOINT):
                    self.checkpoints.save(self._progress())
            # A signal reaches one rank before the others, and clocks differ; from here on all
            # ranks must take the same turn.
            limit_s = config.train.max_minutes * 60
            if any_rank(bool(stop_signal.received), self.runtime):
                stopped = SIGNAL
            elif limit_s > 0 and any_rank(clock.elapsed() >= limit_s, self.runtime):
                stopped = "train.max_minutes"
        return self._finish(stopped)

    def _finish(self, stopped: str) -> bool:
        """Save, validate, summarise; ``stopped``: by what. What `run` gives."""
        config, clock = self.config, self.reporter.clock
        self._tell_trace(self.communication.end_trace(self.done))
        self._tell_profiles(self.profiling.finish)
        # Weights that may be damaged: a run that is stopped goes on from the last ones that are
        # not; one that has all its steps saves them beside those.
        is_sound = not self.skipped_in_a_row
        ends = self.done >= config.train.steps
        with clock.part(RunPart.CHECKPOINT):
            if is_sound or ends:
                self.checkpoints.finish(self._progress(), expire=is_sound)
            else:
                self.checkpoints.wait()
        self.tell(self.checkpoints.news())
        if stopped != SIGNAL:
            self._validate()
        if not ends:
            self.reporter.console.line(self._goes_on(stopped, is_sound=is_sound))
        self.reporter.finish(
            step=self.done,
            unigram_entropy=self.data.unigram_entropy,
            saving=self.checkpoints.summary(),
            checkpoint_seconds=self.checkpoints.lost_seconds(),
            stopped="" if ends else stopped,
        )
        if is_sound or ends:
            self.checkpoints.check_last(self.done)
        if stopped != SIGNAL or ends:
            return True
        if self.runtime.ranks.rank == 0:
            saved = max(self.checkpoints.store.saved_step, 0)
            write_stop_note(Path(config.run.dir), saved, config.train.steps)
        return False

    def _goes_on(self, stopped: str, *, is_sound: bool) -> str:
        """What the user can do with a run that is not at its end."""
        where = f"stopped by {stopped} at step {self.done} of {self.config.train.steps}"
        if is_sound:
            return f"{where}; the same command goes on from here"
        return (
            f"{where}, and not saved: the last {len(self.skipped_in_a_row)} steps had a loss or "
            "gradient that is not finite; the same command goes on from step "
            f"{max(self.checkpoints.store.saved_step, 0)}"
        )

    def _progress(self) -> Progress:
        lr = learning_rate(self.config, self.done - 1) if self.done else None
        return Progress(self.data.reached(self.done), lr)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.done % every == 0

    def _step(self) -> None:
        clock = self.reporter.clock
        with clock.part(RunPart.DATA), named_range("data"):
            batches = self.data.step(self.done)
        lr = learning_rate(self.config, self.done)
        self.communication.begin(self.done + 1)
        outcome = self._train(batches, lr)
        lap = clock.lap()
        self.done += 1
        communication, trace = self.communication.end(self.done)
        if self.recorder.steps_left:
            with clock.part(RunPart.ROUTING_TRACE):
                self.recorder.write(self.done)
        left_out = self.data.left_out(self.done - 1)
        record, freq_LE = collect_step(
            outcome,
            self.config,
            self.runtime,
            step=self.done,
            lr=lr,
            lap=lap,
            checkpoint_seconds=self.checkpoints.lost_seconds(),
            communication=communication,
            bytes_per_value=compute_dtype(self.config).itemsize,
            peak=self.reporter.peak,
            samples_left_out=sum(map(len, left_out)),
            next_sample=self.data.reached(self.done).samples,
            corpora=tuple(CorpusProgress(*read) for read in self.data.read(self.done)),
        )
        self.reporter.step(record, freq_LE)
        if left_out:
            self.tell([f"step {self.done} left out samples {in_words(left_out)} (data.skip)"])
        self._tell_trace(trace)
        self.tell(self.checkpoints.news())
        self._count_skipped(outcome)

    def _train(self, batches: list[Batch], lr: float) -> StepOutcome:
        training = self.reporter.clock.part(RunPart.TRAINING)
        with training, self.recorder.recording(), self.communication.explained():
            return train_step(
                self.engine,
                batches,
                lr=lr,
                moe=self.config.moe,
                device=self.runtime.device,
                group=self.runtime.group,
            )

    def _count_skipped(self, outcome: StepOutcome) -> None:
        """RuntimeError after too many steps in a row without an update."""
        skipped = (*self.skipped_in_a_row, outcome.not_finite) if outcome.skipped else ()
        self.skipped_in_a_row = skipped
        most = self.config.train.max_skipped_steps
        if len(skipped) > most:
            raise RuntimeError(
                f"{len(skipped)} steps in a row had a loss or gradient that is not finite, first "
                f"of all: {skipped[0]}; train.max_skipped_steps is {most}"
            )

    def _tell_trace(self, trace: Path | None) -> None:
        if trace is not None:
            self.tell([f"trace: {trace}, and beside it those of the other ranks"])

    def _tell_profiles(self, written: Callable[[int], list[str]]) -> None:
        if self.profiling.is_on:
            with self.reporter.clock.part(RunPart.PROFILE):
                self.tell(written(self.done))

    def tell(self, lines: list[str]) -> None:
        """Print lines, on rank 0."""
        for line in lines:
            self.reporter.console.line(line)

    def _validate(self) -> None:
        begun = time.perf_counter()
        losses, mean = {}, 0.0
        with self.reporter.clock.part(RunPart.VALIDATION):
            for corpus, weight, batches in self.data.held_out():
                losses[corpus] = validation_loss(
                    self.engine, batches, device=self.runtime.device, group=self.runtime.group
                )
                mean += weight * losses[corpus]
        self.reporter.validation(
            self.done,
            mean,
            self.data.unigram_entropy,
            seconds=time.perf_counter() - begun,
            corpora=losses if len(losses) > 1 else {},
        )
