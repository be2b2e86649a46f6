"""Checkpoints of any number of ranks, one included."""

import warnings

# torch takes a single process without a process group for an accident.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
