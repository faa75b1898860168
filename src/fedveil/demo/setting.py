"""How demos run: without a hub, and with the fastest kernels there are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["fast_matmul", "offline"]


@contextmanager
def fast_matmul() -> Iterator[None]:
    """Let PyTorch multiply float32 matrices with the fastest kernels it has, in workers as well.

    On CPUs with AMX they compute in bfloat16 inside; on others, in float32 (oneDNN's kernels, which
    take half the time of MKL's on AMD). So the last digits depend on the machine.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def offline() -> Iterator[None]:
    """No hub: everything the demo needs is installed."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
