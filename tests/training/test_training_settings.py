import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedveil.errors import ConfigurationError
from fedveil.training import Training
from fedveil.training.settings import schedule_factor


def test_defaults_are_one_epoch_frozen_and_hashable():
    training = Training()
    assert training.total_steps(7) == 7
    assert hash(training) == hash(Training())
    with pytest.raises(dataclasses.FrozenInstanceError):
        training.steps = 3  # type: ignore[misc]


def test_length_of_a_round():
    assert Training(epochs=3).total_steps(7) == 21
    assert Training(steps=5).total_steps(7) == 5
    assert dataclasses.replace(Training(), steps=2).total_steps(7) == 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 1, "epochs": 1}, "steps and epochs"),
        ({"steps": 0}, "steps"),
        ({"epochs": -1}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": "1e-3"}, "learning_rate"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"momentum": 1.5, "optimizer": "sgd"}, "momentum"),
        ({"momentum": 0.9}, "momentum"),
        ({"schedule": "cosine"}, "schedule"),
        ({"warmup": 1.1}, "warmup"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"frozen": "*.bias"}, "frozen"),
        ({"frozen": (1,)}, "frozen"),
    ],
)
def test_impossible_settings_are_named(settings, named):
    with pytest.raises(ConfigurationError, match=named):
        Training(**settings)


def test_linear_schedule_in_closed_form():
    # int(0.3 * 10) + 1 = 4 steps up, then 7 equal stretches down to 0 at step 10.
    expected = [1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]
    training = Training(steps=10, warmup=0.3, learning_rate=0.5, optimizer="sgd")
    optimizer = training.build_optimizer([nn.Parameter(torch.zeros(1))])
    schedule = training.build_schedule(optimizer, 10)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0] / 0.5)
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)


def test_a_round_of_one_step_trains_at_full_rate():
    assert schedule_factor(0, 1, 0.06) == 1.0


@given(steps=st.integers(1, 300), warmup=st.floats(0, 1))
def test_every_step_trains_and_the_peak_is_reached_once(steps, warmup):
    factors = [schedule_factor(step, steps, warmup) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors.count(1.0) == 1
    assert schedule_factor(steps, steps, warmup) < min(1.0, factors[-1] + 1e-12)
    peak = factors.index(1.0)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_constant_schedule():
    training = Training(schedule="constant", learning_rate=0.1)
    optimizer = training.build_optimizer([nn.Parameter(torch.zeros(1))])
    schedule = training.build_schedule(optimizer, 3)
    for _ in range(3):
        assert schedule.get_last_lr() == [0.1]
        optimizer.step()
        schedule.step()
