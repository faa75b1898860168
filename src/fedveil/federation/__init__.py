"""The facade: a model, its clients, a scheme, and `run`."""

from fedveil.federation.clients import Remote
from fedveil.federation.facade import Federation, Result

__all__ = ["Federation", "Remote", "Result"]
