"""Other people's MoE layers, and a bound: a file each, which imports its package when it is loaded.

A peer module has ``subject(problem) -> Subject``, which raises ValueError for a problem that the
peer cannot compute.
"""
