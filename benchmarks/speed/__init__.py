"""Speed, bytes and memory of fedveil, as ratios to the physical floor, beside its competitors.

`python benchmarks/run.py` (or `make bench`) measures; see `benchmarks/README.md`.
"""
