"""`distmoe report`: the figures of runs, side by side, out of the files that they left."""
