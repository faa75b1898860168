"""Clients that begin or end far from the others are named; it cuts nothing."""

import math

import pytest
from engine_samples import run_with, times

import toys
from fedveil import Bounds, FedAvg
from fedveil.engine.outliers import far_from_others

USUAL = dict.fromkeys("abcd", 1.0)


@pytest.mark.parametrize(
    ("first", "last", "lengths", "words"),
    [
        ({"a": 9.0}, {}, {}, "begins at a loss of 9 nats, where others have 1"),
        ({}, {"a": 9.0}, {}, "ends at a loss of 9"),
        ({}, {"a": math.nan}, {}, "ends at a loss of nan"),
        ({}, {}, {"a": 0.01}, "0.01 times the median length"),
    ],
)
def test_who_stands_out_is_named_alone(first, last, lengths, words):
    found = far_from_others({**USUAL, **first}, {**USUAL, **last}, {**USUAL, **lengths})
    assert list(found) == ["a"]
    assert words in found["a"]


@pytest.mark.parametrize(
    ("first", "lengths"),
    [({"a": 2.5}, {}), ({"a": 0.01}, {}), ({}, {"a": 0.2}), ({}, {"a": 0.0}), ({}, {"a": 50.0})],
)
def test_what_is_usual_or_told_of_elsewhere_is_not(first, lengths):
    assert not far_from_others({**USUAL, **first}, USUAL, {**USUAL, **lengths})


def test_of_two_clients_nobody_is_the_odd_one():
    assert not far_from_others({"a": 9.0, "b": 1.0}, {}, {"a": 1.0, "b": 1.0})


def test_a_loss_that_nobody_told_is_no_reason():
    assert not far_from_others({}, {"b": 1.0}, USUAL)


def test_a_client_that_changes_next_to_nothing_is_in_the_record():
    run = toys.federation(toys.mlp(), scheme=FedAvg(), bounds=Bounds.none())
    record = run_with(run, {"partner-1": times(0.001)}).rounds[0]
    assert list(record.unusual) == ["partner-1"]
    assert "partner-1" in record.bytes_up
