"""The facade: a model, its clients, a scheme, and `run`."""

from fedveil.federation.clients import Remote
from fedveil.federation.facade import Federation, Result
from fedveil.federation.owner import Tuning
from fedveil.federation.stage import Stage

__all__ = ["Federation", "Remote", "Result", "Stage", "Tuning"]
