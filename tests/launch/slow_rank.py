"""A rank that takes some seconds to save after a signal, and leaves a file then."""

import signal
import sys
import time
from pathlib import Path

from distmoe.launch.env import rank_info

SAVING_S = 1.5


def main(folder: Path) -> None:
    rank = rank_info().rank
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    (folder / f"ready-{rank}").touch()
    while not received:
        time.sleep(0.01)
    time.sleep(SAVING_S)
    (folder / f"saved-{rank}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
