"""FLOP/s of the expert products of a layer: as a profile has measured them, or as a share of the
layer's roofline on a machine of which only large products and copies are known."""

from __future__ import annotations

from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.machine_profile import Profile
from distmoe.planner.roofline import DeviceSpeed, LayerSize, layer_floor_s, layer_flops
from distmoe.planner.row_volumes import groups_touched

EXPERT_EFFICIENCY = 0.69
"""Of the roofline's floor: SonicMoE's kernels, forward and backward, reach 0.63 to 0.76 of it over
the 12 layers of its figure 14 (arXiv 2512.14080), 0.69 in the mean."""


def expert_flops(profile: Profile, shape: LayerShape, ep: int) -> float:
    """Forward and backward together, with the experts over ``ep`` ranks. ValueError if the profile
    has no rate of the dtype."""
    if shape.dtype not in profile.dtypes:
        raise ValueError(
            f"the profile has no GEMM rate for {shape.dtype}; it has "
            f"{', '.join(profile.dtypes) or 'none'}"
        )
    if shape.dtype in profile.gemm_flops:
        return profile.gemm_flops[shape.dtype]
    # Of each token one row comes to every rank that has one of its experts.
    ranks_per_token = groups_touched(ep, num_experts=shape.num_experts, top_k=shape.top_k)
    size = LayerSize(
        rows=round(shape.num_tokens * ranks_per_token),
        pairs=shape.num_tokens * shape.top_k,
        experts=shape.num_experts // ep,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
    )
    # The profile counts copied bytes, which are read and written.
    speed = DeviceSpeed(profile.dense_flops[shape.dtype], 2 * profile.link("own").bytes_per_s)
    flops = layer_flops(size.pairs, size.hidden, size.intermediate)["both"]
    return EXPERT_EFFICIENCY * flops / layer_floor_s(size, speed)
