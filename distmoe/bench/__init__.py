"""Measurements beside a run: kernels and exchanges against other people's, what rounding does and
costs. Only tools use them; `distmoe plan` needs none."""
