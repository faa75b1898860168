"""A whole federation in Flower's simulation: clients in Ray's processes, on one machine."""

from __future__ import annotations

import contextvars
import os
import sys
import warnings
from dataclasses import dataclass
from functools import lru_cache
from threading import Event
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedveil.engine.in_process import Workplace
from fedveil.engine.patience import Patience
from fedveil.errors import ConfigurationError, FedveilError, ProtocolError
from fedveil.federation import Federation, Result
from fedveil.flower.client import Partner, client_app
from fedveil.flower.crew import FlowerCrew
from fedveil.flower.directory import ByAnswer

__all__ = ["simulate"]

_PATIENCE = Patience(deadline=86400.0, poll=0.05)
_ASK_AGAIN = 30.0
"""Seconds until nodes are asked for their names again: at first there are none."""


def simulate(
    federation: Federation,
    rounds: int,
    *,
    resume: bool = False,
    from_round: int | None = None,
    overwrite: bool = False,
    processes: int = 1,
) -> Result:
    """Run a federation in Flower's simulation; the result is that of ``federation.run``.

    Proxies are not measured: clients do not have the owner's test set.

    Args:
        federation: With data for every client.
        rounds: Rounds in all.
        resume: As of :meth:`fedveil.Federation.run`.
        from_round: As of :meth:`fedveil.Federation.run`.
        overwrite: As of :meth:`fedveil.Federation.run`.
        processes: Clients at work at a time, one core each.

    Raises:
        ConfigurationError: Ray is not installed, or clients of the scheme keep something.
        FedveilError: As of :meth:`fedveil.Federation.run`.
    """
    if federation.scheme.client().remembers:
        raise ConfigurationError(
            "Clients keep nothing between rounds in Flower's simulation",
            expected='no error_feedback, and backbone="always"',
            found=repr(federation.scheme),
            fix="Run it in process: fedveil run without --engine.",
        )
    ray = _ray()
    from flwr.simulation import run_simulation

    done: list[Result | Exception] = []
    app, broken, caller = ServerApp(), Event(), contextvars.copy_context()

    def tell(_: str) -> None:
        if broken.is_set():
            raise ProtocolError("Flower's simulation broke down")

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            crew = FlowerCrew(grid, ByAnswer(_ASK_AGAIN, strict=True), _PATIENCE, tell)
            # In the context of who called: what folder it holds, this thread may use.
            result = caller.run(
                federation.run,
                rounds,
                resume=resume,
                from_round=from_round,
                overwrite=overwrite,
                crew=crew,
            )
            done.append(result)
        except Exception as error:
            done.append(error)

    place = federation.workplace()
    with warnings.catch_warnings():
        # Of Flower and Ray, about each other.
        warnings.simplefilter("ignore")
        path = os.pathsep.join(sys.path)
        ray.init(
            num_cpus=processes,
            include_dashboard=False,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
        try:
            # Kept by Ray once, rather than sent along with every message.
            partner = _Simulated(ray.put(place), tuple(sorted(place.trainers)))
            run_simulation(
                app,
                client_app(partner),
                num_supernodes=len(place.trainers),
                backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
            )
        finally:
            # The owner's half runs in a thread of its own, and would wait for clients.
            broken.set()
            ray.shutdown()
    if not done:
        raise FedveilError("The simulation stopped without a result")
    if isinstance(done[0], Exception):
        raise done[0]
    return done[0]


@dataclass(frozen=True)
class _Simulated:
    """Finds the client that a simulated node stands for."""

    place: Any
    names: tuple[str, ...]

    def __call__(self, context: Context) -> Partner:
        name = self.names[int(context.node_config["partition-id"])]
        return Partner(name, _fetch(self.place))


@lru_cache(maxsize=1)
def _fetch(place: Any) -> Workplace:
    """What clients have: once in each process."""
    import ray

    found: Workplace = ray.get(place)
    return found


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigurationError(
            "Flower's simulation needs Ray",
            expected="the package ray",
            found="none",
            fix="pip install 'fedveil[simulation]'",
        ) from None
    return ray
