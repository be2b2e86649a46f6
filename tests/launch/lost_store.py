"""One of two ranks whose heartbeats go through the store that rank 0 serves; rank 0 fails."""

from __future__ import annotations

import sys
import time

from distmoe.config import RankInfo
from distmoe.launch.worker import run_rank

BEAT_S = 0.05


def main(rank: int, port: int) -> int:
    ranks = RankInfo(rank, 2, rank, 2, "127.0.0.1", port, "local")

    def work() -> None:
        import torch.distributed as dist

        from distmoe.comm.heartbeat import Heartbeats

        store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
        Heartbeats.open(store, rank=rank, world=2, beat_s=BEAT_S)
        time.sleep(10 * BEAT_S * (1 + 2 * rank))
        raise ValueError(f"the end of rank {rank}")

    return run_rank("train", ranks, work)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
