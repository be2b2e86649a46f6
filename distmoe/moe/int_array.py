"""Integers on the host; names of what a device has as well end in ``_host``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
