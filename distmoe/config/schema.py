"""The whole run as frozen dataclasses: with `model_schema` and `moe_schema` the one place where a
setting has its name and default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distmoe.config.model_schema import ModelConfig
from distmoe.config.moe_schema import MoEConfig


@dataclass(frozen=True)
class RunConfig:
    """What the run is called and where it lives."""

    name: str = "distmoe"
    """Name of the run."""
    dir: str = "runs/distmoe"
    """Folder of checkpoints, logs and the resolved config."""
    seed: int = 1
    """Seed of the initial weights and of the data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if a GPU is present, else cpu."""
    deterministic: bool = False
    """Two runs on the same machines give the same bits: torch takes operators that do, which cost
    time on a GPU, and an operator that cannot is an error."""


@dataclass(frozen=True)
class LaunchConfig:
    """Processes that `distmoe train` starts itself, when no launcher (torchrun, SLURM, MPI) has."""

    nproc: int = 1
    """Ranks on this machine."""
    threads: int = 0
    """CPU threads of a rank. 0: the cores divided by the ranks."""
    timeout_s: float = 600.0
    """Seconds that a collective may wait for a peer."""
    stall_warning_s: float = 60.0
    """Seconds after which a rank that waits for another says so, and names it."""


@dataclass(frozen=True)
class ParallelConfig:
    """Axes of the mesh: world = dp_replicate * dp_shard, dp_shard = efsdp * ep, ep innermost; cp is
    over the same ranks."""

    engine: str = "auto"
    """single, fsdp2 or deepspeed. auto: single for one rank, fsdp2 for several."""
    dp_replicate: int = 1
    """Replicas of the sharded model (HSDP)."""
    dp_shard: int = 0
    """Ranks that share the dense parameters. 0: all that are left."""
    ep: int = 1
    """P, ranks that share the experts of a layer."""
    cp: int = 1
    """C, neighbouring ranks of dp_shard that share the same sequences, where these are long: each
    computes 1 / C of the positions."""
    ranks_per_node: int = 0
    """Ranks of one machine, for moe.dispatch.level and moe.nodes_per_token. 0: what the launcher
    reports."""
    reshard_after_forward: bool = True
    """With fsdp2, free the gathered parameters between forward and backward. false: gather them
    once a step, but for the embedding, and free them in the last micro-batch's backward."""
    reduce_gradients: Literal["micro_batch", "step"] = "micro_batch"
    """With fsdp2: add up shards of gradients, reduced after every micro-batch; or whole gradients,
    in fp32, which are reduced once a step."""
    profile: str = ""
    """Speeds of links and devices, a file that `distmoe doctor comm --save` wrote. Empty: those of
    the device, if it is a known one."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """ZeRO, with parallel.engine = "deepspeed". `distmoe config FILE --deepspeed` prints what
    DeepSpeed is given."""

    zero_stage: int = 2
    """Sharded over the ranks: the optimizer's state (1), gradients too (2), parameters too (3)."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where fp32 weights and moments are kept and updated."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """With stage 3: where parameters are kept between their uses."""
    pin_memory: bool = True
    """Offload to page-locked host memory."""
    overlap_comm: bool = False
    """Reduce gradients while the backward goes on."""
    bucket_elements: int = 50_000_000
    """Elements of one reduction, all-gather or prefetch."""
    persistence_elements: int = 100_000
    """With stage 3: smaller parameters stay gathered."""


@dataclass(frozen=True)
class DataConfig:
    """Tokenized shards, made by `distmoe data prepare`."""

    path: str = "data/shakespeare"
    """Folder with manifest.json, tokenizer.json and the shards."""
    mix: tuple[str, ...] = ()
    """Several such folders instead of path, which is then not read: FOLDER:WEIGHT, such as
    "data/web:0.7". A folder's share of the sequences is its weight over the sum of all."""
    seq_len: int = 256
    """S, tokens of a sequence."""
    skip: tuple[str, ...] = ()
    """Samples that are left out, FIRST:END by their place in the run's order of samples, such as
    "1000:1200": a stretch after which the loss spiked. The order of all others stays."""
    document_mask: bool = False
    """Attention ends at the borders of documents, and the last token of a document, which has
    nothing to predict, has no loss."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    name: str = "adamw"
    """adamw, or muon for the matrices of attention, MLPs and experts, with AdamW for all else."""
    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """Epsilon of AdamW."""
    momentum: float = 0.95
    """Decay of Muon's momentum."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and embeddings have none."""
    clip_norm: float = 1.0
    """Largest gradient norm, over dense and expert parameters together. 0: no clipping."""
    schedule: str = "cosine"
    """constant, cosine or wsd (warm-up, stable, decay)."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """Last steps in which wsd decays. 0: a tenth of train.steps."""
    min_lr_ratio: float = 0.1
    """Last learning rate over the peak."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    steps: int = 200
    """Optimizer steps in all."""
    max_minutes: float = 0.0
    """Save and leave after this many minutes of training, to be resumed. 0: no limit."""
    global_batch_size: int = 16
    """Sequences of one optimizer step, over all ranks."""
    micro_batch_size: int = 0
    """Sequences of one forward on one rank, or on the ranks of parallel.cp together. 0: no
    accumulation, global_batch_size * parallel.cp / world."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute dtype; master weights and reductions are fp32. auto: bf16 on cuda, fp32 on cpu."""
    activation_checkpoint: Literal["none", "selective", "full"] = "none"
    """selective: attention and dense MLPs are computed again in the backward.
    full: the experts too. Routing is never repeated."""
    compile: Literal["none", "dense"] = "none"
    """dense: torch.compile of attention, norms, dense MLPs and the loss; not with ZeRO 3."""
    loss_chunk_tokens: int = 0
    """Tokens whose logits exist at one time. 0: the fewest equal chunks of at most 2^29 logits,
    which are 2 GiB in fp32."""
    max_skipped_steps: int = 10
    """Stop after this many consecutive steps with a loss or gradient that is not finite."""
    validate_every: int = 100
    """Steps between validations. 0: only at the end."""
    validation_batches: int = 8
    """Global batches of one validation."""
    trace_steps: str = ""
    """Steps FIRST-LAST, such as 10-12, whose computing, transfers and waits every rank writes to
    <run.dir>/trace, for Perfetto. Empty: none."""
    profile: str = ""
    """Steps FIRST-LAST that torch.profiler records, to <run.dir>/profile, for Perfetto and
    TensorBoard. Empty: none."""
    profile_ranks: str = "0"
    """Ranks that write what profile and memory_snapshot ask for: all, or numbers such as 0,8."""
    memory_snapshot: str = ""
    """Steps FIRST-LAST whose allocations on CUDA are written to <run.dir>/profile, for
    pytorch.org/memory_viz. Empty: none."""
    record_routing: int = 0
    """Steps of this start of the run whose routing is written to <run.dir>/routing, from its first
    step on; see tools/simulate_routing.py --trace."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints under <run.dir>/checkpoints."""

    every: int = 100
    """Steps between checkpoints. 0: only when the run ends or is stopped."""
    keep_last: int = 2
    """Complete checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints of a multiple of this many steps are kept, too. 0: none."""
    asynchronous: bool = True
    """Write while training goes on."""
    resume: str = "auto"
    """auto: the newest checkpoint that is not damaged, if there is one. never: begin anew. Or the
    folder of a checkpoint, to go back to. What a run goes back from is set aside, once; restarts go
    on from what it has learned since."""
    any_tokenizer: bool = False
    """Go on, or begin, from a checkpoint that was trained with another tokenizer.json."""
    init_from: str = ""
    """Folder of a checkpoint whose weights a run begins with, if it has nothing to resume: an
    imported model, or another run's. Steps, schedule and optimizer begin anew. Empty: random
    weights."""


@dataclass(frozen=True)
class MetricsConfig:
    """What is written down."""

    log_every: int = 10
    """Steps between lines on the console."""
    tensorboard: bool = True
    """Write TensorBoard events to <run.dir>/tensorboard."""
    wandb: str = ""
    """Project of Weights & Biases that rank 0 sends the same curves to; a resumed run goes on as
    the same run there. WANDB_MODE=offline and wandb's other variables count. Empty: none."""
    expert_load_every: int = 50
    """Steps between lines of expert_load.jsonl, which has the figures of each layer, and, in
    TensorBoard, histograms and images of the expert load and the same figures."""
    layer_table_every: int = 0
    """Steps between tables of all MoE layers on the console. 0: only at the end, and of more than
    12 layers the 8 whose busiest rank is furthest above the mean."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


@dataclass(frozen=True)
class RankInfo:
    """What the launcher told this process. `source` is torchrun, deepspeed, slurm, mpi, local or
    single."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    source: str = "single"
