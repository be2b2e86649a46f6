"""Dispatch bench: the experts of one layer over ranks, every way to move its rows, in turn.

`layer` says what is computed, `ways` how our rows can move, `peers` how other people's do, `check`
whether these compute the same, `measure` how long all of them take, `wire` how many bytes must
cross, `exposed` how much of the time is communication, by the clock and by our own accounting.
`tools/bench_dispatch.py` is the command line. See docs/benchmarks/dispatch.md.
"""
