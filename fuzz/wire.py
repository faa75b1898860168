"""Fuzz reading: `python fuzz/wire.py [libFuzzer options] NEW_INPUTS tests/fuzz/corpus/read`."""

from __future__ import annotations

from common import fuzz

if __name__ == "__main__":
    fuzz("read_anything")
