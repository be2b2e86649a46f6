"""torchrun for job scripts: `python -m distmoe.launch.agent`, with torchrun's own options.

Two things differ. A second signal does not make the agent leave before its ranks have saved: SLURM
signals every process of a step, and srun passes the signal on once more. And it ends with what its
ranks ended with, after a line for each that failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType

from torch.distributed.elastic.multiprocessing import SignalException, api
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from distmoe.launch.local import STOPPED, WRONG_CONFIG

Handler = Callable[[int, FrameType | None], None]


def main(argv: Sequence[str]) -> int:
    """Run torchrun's agent; the exit code: 0, 75 or 2 if ranks ended so, 128 + a signal, else 1."""
    # torchrun installs this handler anew each time that it starts its ranks.
    api._terminate_process_handler = _once(api._terminate_process_handler)  # type: ignore[assignment]
    try:
        run(parse_args(list(argv)))  # type: ignore[no-untyped-call]
    except SignalException as stop:
        print(f"the ranks of this node have left after {stop.sigval.name}", file=sys.stderr)
        return 128 + stop.sigval
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        for rank, code in codes.items():
            if code not in (STOPPED, WRONG_CONFIG):
                print(f"rank {rank} ended with {code}", file=sys.stderr)
        return next((code for code in (STOPPED, WRONG_CONFIG) if code in codes.values()), 1)
    return 0


def _once(handler: Handler) -> Handler:
    """``handler`` for the first signal; the others have no effect."""
    received: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        if len(received) == 1:
            handler(signum, frame)

    return handle


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
