"""Router logits: logits_TE = x_TH w_EH^T in fp32, batch-invariant.

A row's logits may not depend on how many rows there are or how they are cut into ranks, or the
routing decision would. `reference` is the specification and, on a CPU, the implementation.
"""

from distmoe.kernels.router_logits.reference import router_logits

__all__ = ["router_logits"]
