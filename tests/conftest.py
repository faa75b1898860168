import pytest
import torch
from hypothesis import settings

from toys import MODELS

# Busy machines are slow, not wrong.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_collection_modifyitems(items):
    """What takes longest begins first: at the end one core would wait for it."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Two busy cores: threads of one test would only wait for those of another."""
    torch.set_num_threads(1)


@pytest.fixture(params=sorted(MODELS))
def build(request):
    """One of the small models, as a function of a seed."""
    return MODELS[request.param]
