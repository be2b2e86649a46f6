"""Kernel bench: one layer's expert computation, every backend and peer side by side.

`shapes` and `problem` say what is computed, `subjects` and `peers` who computes it, `check` whether
it is right, `clock` and `measure` how long it takes, `report` and `picture` what is shown.
`session` runs it all, `tuning` keeps the best tile configurations in a file; `tools/bench_moe.py`
is its command line. See docs/benchmarks/README.md.
"""
