"""transformers asks for a package called kernels, and would take the repository's folder for it."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])
    from transformers.utils import is_kernels_available

    # Its answer is kept.
    is_kernels_available()
