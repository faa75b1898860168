"""The facade: a model, its clients, a scheme, and `run`."""

from fedveil.federation.clients import Remote
from fedveil.federation.facade import Federation, Result
from fedveil.federation.owner import Tuning

__all__ = ["Federation", "Remote", "Result", "Tuning"]
