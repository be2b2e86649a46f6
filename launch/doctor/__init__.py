"""`distmoe doctor`: what a machine and a run need, checked one by one.

`table.py` lists the checks, `cli.py` is the command; `comm.py` is `distmoe doctor comm`.
"""
