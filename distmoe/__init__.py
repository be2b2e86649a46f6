"""Training of fine-grained mixture-of-experts language models.

``from distmoe import MoE, MoEConfig`` gives the layer alone. Imports are lazy: reading a config or
printing help must not pay for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distmoe.config import MoEConfig
    from distmoe.moe.layer import MoE

__version__ = "0.1.0"
__all__ = ["MoE", "MoEConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "MoE":
        from distmoe.moe.layer import MoE

        return MoE
    if name == "MoEConfig":
        from distmoe.config import MoEConfig

        return MoEConfig
    raise AttributeError(f"module 'distmoe' has no attribute {name!r}")
