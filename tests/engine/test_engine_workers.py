"""Worker processes: whatever models and data are made of reaches them."""

import torch
from torch import nn

import toys
from fedveil import FedAvg


def deep(depth=150):
    """More tensors than a process can be handed as open files."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 3) for _ in range(depth)]
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3), *layers)


def test_models_and_data_may_be_of_any_number_of_tensors():
    clients = {f"partner-{number}": toys.rows(300, seed=number) for number in range(2)}
    words = {"clients": clients, "scheme": FedAvg()}
    before = torch.multiprocessing.get_sharing_strategy()
    one = toys.federation(deep(), **words).run(1)
    two = toys.federation(deep(), workers=2, **words).run(1)
    assert not two.rounds[0].failed
    assert toys.same(toys.weights(one.global_model), toys.weights(two.global_model))
    assert torch.multiprocessing.get_sharing_strategy() == before
