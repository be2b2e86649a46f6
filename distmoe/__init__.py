"""Training of fine-grained mixture-of-experts language models.

``from distmoe import MoE, MoEConfig, update_expert_bias`` gives the layer alone, and what moves its
bias. Imports are lazy: reading a config or printing help must not pay for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distmoe.config import MoEConfig
    from distmoe.moe.expert_bias import update_expert_bias
    from distmoe.moe.layer import MoE

__version__ = "0.1.0"
__all__ = ["MoE", "MoEConfig", "__version__", "update_expert_bias"]


def __getattr__(name: str) -> Any:
    if name == "MoE":
        from distmoe.moe.layer import MoE

        return MoE
    if name == "MoEConfig":
        from distmoe.config import MoEConfig

        return MoEConfig
    if name == "update_expert_bias":
        from distmoe.moe.expert_bias import update_expert_bias

        return update_expert_bias
    raise AttributeError(f"module 'distmoe' has no attribute {name!r}")
