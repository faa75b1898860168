"""Which arithmetic quantizes, decodes and gathers: the compiled kernels, or PyTorch."""

from contextlib import contextmanager

import pytest

from fedveil.quantization import blockwise


@contextmanager
def arithmetic(way):
    """Work on tensors of any size with "numba" or "torch"."""
    if way == "numba":
        pytest.importorskip("numba", reason="kernels need numba")
        assert blockwise.kernels_in_use() == "numba"
    module = blockwise._load() if way == "numba" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_compiled", lambda tensor: None if tensor.is_cuda else module)
        yield
