"""The arithmetic behind quantization: compiled by numba, and by PyTorch where that is not at hand.

`reference` says in PyTorch what is computed; `loops` and `vectors` do the same, bit for bit, in one
pass; `compiled` hands them what they need.
"""
