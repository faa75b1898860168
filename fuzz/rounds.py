"""Fuzz rounds: `python fuzz/rounds.py [libFuzzer options] NEW_INPUTS tests/fuzz/corpus/receive`."""

from __future__ import annotations

from common import fuzz

if __name__ == "__main__":
    fuzz("receive_anything")
