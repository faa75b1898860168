"""Every test here runs twice: on the compiled kernels, and on PyTorch."""

import pytest

from arithmetic import arithmetic


@pytest.fixture(autouse=True, scope="module", params=["numba", "torch"])
def way(request):
    """Which arithmetic does the work."""
    with arithmetic(request.param):
        yield request.param
