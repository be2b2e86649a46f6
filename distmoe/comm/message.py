"""One message in flight, and who may wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

Way = Literal["send", "receive", "exchange"]


class Message:
    """Rows to or from ``peer``; None: one collective with all peers, whose way is "exchange".

    ``finish`` blocks until the rows are there, or gone, and may be called once only: gloo counts
    completions, and a second wait would never end. So whichever thread comes first calls it, and
    any other waits for that one. ``on_stream``: ``finish`` makes the current CUDA stream wait
    instead of the host, and may be called for every stream.
    """

    def __init__(
        self,
        way: Way,
        peer: int | None,
        num_bytes: int,
        finish: Callable[[], object],
        *,
        on_stream: bool = False,
    ) -> None:
        self.way, self.peer, self.num_bytes = way, peer, num_bytes
        self.on_stream = on_stream
        self.completed_at = float("nan")
        self._finish = finish
        self._claim = threading.Lock()
        # Held until it is over: a lock costs a tenth of an Event, and this is made per message.
        self._over = threading.Lock()
        self._over.acquire()
        self._error: BaseException | None = None

    @property
    def is_complete(self) -> bool:
        """Whether a wait for it, in any thread, has ended well."""
        return not self._over.locked() and self._error is None

    def wait(self) -> None:
        """Block until it is complete; again is harmless. What went wrong is raised each time."""
        if self.on_stream:
            self._finish()
        elif self._claim.acquire(blocking=False):
            self._finish_here()
        else:
            with self._over:
                pass
        if self._error is not None:
            raise self._error

    def _finish_here(self) -> None:
        try:
            self._finish()
        except BaseException as error:  # noqa: BLE001
            self._error = error
        self.completed_at = time.perf_counter()
        # The rows may be freed as soon as nobody else holds them.
        del self._finish
        self._over.release()
