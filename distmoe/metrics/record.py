"""A step as figures, and the one place where they become lines of JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from distmoe.metrics.expert_load import LOAD_NAMES, ExpertLoad, IntArray


@dataclass(frozen=True)
class CorpusProgress:
    """How far a run has come in one corpus, had its mix been the same from its first step on.
    ``samples``: read, without those that data.skip left out; ``epochs``: how often its samples."""

    corpus: str
    samples: int
    epochs: float


@dataclass(frozen=True)
class Learned:
    """What the optimizer did. Losses: nats per token, means over the valid ``tokens`` of the global
    batch. ``grad_norm``: before clipping. ``skipped``: nothing was updated."""

    loss: float
    load_balance_loss: float
    z_loss: float
    lr: float
    grad_norm: float
    skipped: bool
    tokens: int


@dataclass(frozen=True)
class StepTimes:
    """Seconds. ``step_seconds``: since the end of the step before, without ``checkpoint_seconds``,
    what rank 0 lost to saves since then, and ``validation_seconds``; ``data_seconds``,
    ``forward_backward_seconds`` and ``optimizer_seconds`` are parts of it, on rank 0."""

    step_seconds: float
    data_seconds: float
    forward_backward_seconds: float
    optimizer_seconds: float
    checkpoint_seconds: float
    validation_seconds: float


@dataclass(frozen=True)
class Speed:
    """Of a rank: tokens/s, and 10^12 FLOP/s of the model's own FLOPs, with causal attention;
    ``mfu``: over the device's peak, a fraction of 1, nan if that is not known; ``palm_``: the same
    with attention's full square."""

    tokens_per_second_per_rank: float
    tflops_per_rank: float
    palm_tflops_per_rank: float
    mfu: float
    palm_mfu: float


@dataclass(frozen=True)
class Energy:
    """Joules that the devices of all ranks used in ``step_seconds``, and from them W and tokens/J;
    nan if one of them does not count."""

    energy_joules: float
    watts_per_rank: float
    tokens_per_joule: float


@dataclass(frozen=True)
class Slowest:
    """By the seconds in which a rank worked and waited for nobody, on a GPU in its expert kernels:
    the largest over the mean, and whose it is; nan and None in a step that was not timed."""

    slowest_over_mean: float
    slowest_rank: int | None


@dataclass(frozen=True)
class Traffic:
    """What the layers of all ranks sent, MiB. ``rows_mib``: rows of MoE layers that ranks have for
    others, four times per layer, without what is passed on inside a node or sent again for a
    recomputation; ``rows_mib_with_copies``: the same with one copy per pair. ``node_mib``,
    ``remote_mib``: bytes of all kinds, keys and values of shared sequences among them, to ranks on
    the sender's own node, and on others. ``exposed_seconds``: the mean rank's host waited for these
    messages, ``exposed_share`` of the step, a fraction of 1; on a GPU, whose stream waits instead,
    almost nothing."""

    rows_mib: float
    rows_mib_with_copies: float
    exposed_seconds: float
    exposed_share: float
    node_mib: float
    remote_mib: float


@dataclass(frozen=True)
class StepRecord:
    """A step, over all ranks. ``step`` counts from 1.

    ``warm_up``: one of the first steps of a start, which the medians leave out. ``memory_gib``:
    peak of the rank that has most. ``load``: of all MoE layers; ``layers``: of each, by the index
    of its block. ``routing``: forced, if the router did not choose by its scores, so that no figure
    of the step is taken for one of training. ``not_finite``: of a skipped step, what was not finite
    first, and on which ranks. ``samples_left_out``: of data.skip, right before this step's samples
    or among them. ``next_sample``: place, in the run's order of samples, of the one behind this
    step's last. ``corpora``: in the order of the config.
    """

    step: int
    ranks: int
    warm_up: bool
    learned: Learned
    times: StepTimes
    speed: Speed
    energy: Energy
    slowest: Slowest
    memory_gib: float
    traffic: Traffic
    load: ExpertLoad
    layers: dict[int, ExpertLoad]
    routing: Literal["real", "forced"] = "real"
    not_finite: str = ""
    samples_left_out: int = 0
    next_sample: int = 0
    corpora: tuple[CorpusProgress, ...] = ()

    def flat(self) -> dict[str, Any]:
        """Without layers and corpora, and without nesting; the names are stable."""
        return {
            "step": self.step,
            **asdict(self.learned),
            "ranks": self.ranks,
            "warm_up": self.warm_up,
            **asdict(self.times),
            **asdict(self.speed),
            **asdict(self.energy),
            **asdict(self.slowest),
            "memory_gib": self.memory_gib,
            **asdict(self.traffic),
            "routing": self.routing,
            "not_finite": self.not_finite,
            "samples_left_out": self.samples_left_out,
            "next_sample": self.next_sample,
            **self.load.flat(),
        }

    def line(self) -> dict[str, Any]:
        """Of metrics.jsonl: the flat record, and ``corpora``."""
        return {**self.flat(), "corpora": [asdict(corpus) for corpus in self.corpora]}

    def load_line(self, freq_LE: IntArray) -> dict[str, Any]:
        """Of expert_load.jsonl: ``freq_LE``, the top-k pairs of every expert, and a flat load for
        each MoE layer."""
        return {
            "step": self.step,
            "pairs": dict(zip(self.layers, freq_LE.tolist(), strict=True)),
            "layers": [{"layer": layer, **load.flat()} for layer, load in self.layers.items()],
        }

    def scalars(self) -> dict[str, float]:
        """Curves by `group/name`; none for what the step does not have."""
        flat = self.flat()
        found = {
            f"{group}/{name}": float(flat[name])
            for group, names in GROUPS.items()
            for name in names
            if name not in OF_SOME_STEPS or not _is_missing(flat[name])
        }
        for corpus in self.corpora:
            found[f"corpora_samples/{corpus.corpus}"] = float(corpus.samples)
            found[f"corpora_epochs/{corpus.corpus}"] = corpus.epochs
        return found


def _is_missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


@dataclass(frozen=True)
class ValidationRecord:
    """A validation after ``step``. In nats per token: ``validation_loss``, of all corpora by their
    weights; ``unigram_entropy``, what knowing token frequencies alone would give; ``corpora``, the
    loss of each, if there are several. ``seconds`` that it took."""

    step: int
    validation_loss: float
    unigram_entropy: float
    seconds: float
    corpora: dict[str, float]

    def line(self) -> dict[str, Any]:
        """Of validation.jsonl."""
        return asdict(self)

    def scalars(self) -> dict[str, float]:
        """Curves: the loss, and that of each corpus of a mix."""
        own = {f"validation_loss/{corpus}": loss for corpus, loss in self.corpora.items()}
        return {"validation/loss": self.validation_loss, **own}


def _names(part: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(part))


# TensorBoard group -> fields of the flat record.
GROUPS = {
    "train": tuple(name for name in _names(Learned) if name != "skipped"),
    "throughput": _names(Speed) + _names(Slowest),
    "time": _names(StepTimes),
    "experts": tuple(name for name in LOAD_NAMES if name != "pairs"),
    "communication": _names(Traffic),
    "memory": ("memory_gib",),
    "energy": _names(Energy),
}

# nan or None on a device without a known peak or a counter, or in a step that was not timed.
OF_SOME_STEPS = ("mfu", "palm_mfu", *_names(Slowest), *_names(Energy))
