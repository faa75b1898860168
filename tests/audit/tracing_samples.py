"""Federations of which something leaks; the benchmark's, smaller."""

import toys
from fedveil.audit import Evidence
from fedveil.audit.attacks import impute, pool
from studies.tracing import ALTERATIONS, NETS, Scene, judge, look, train

__all__ = ["ALTERATIONS", "NETS", "Scene", "judge", "look", "proxy_of", "toy_run", "train"]


def toy_run(folder, model, rounds=2, **settings):
    """A run of three clients on a toy model; the model's own weights are the base."""
    base = toys.weights(model)
    toys.federation(model, out=folder, keep_messages=True, **settings).run(rounds)
    return Evidence(folder), base


def proxy_of(evidence, client, number, holes=None):
    """What a client was sent in a round, as a model."""
    kept = next(k for k in evidence.proxies([client]) if k.round == number)
    return impute(pool(evidence, [kept]), evidence.manifest, holes)
