"""Where rounds run. In process: real message bytes, clients in worker processes or in turn."""

from fedveil.engine.bounds import Bounds
from fedveil.engine.observer import Observer
from fedveil.engine.rounds import Evaluation, Rounds
from fedveil.engine.trackers import watched

__all__ = ["Bounds", "Evaluation", "Observer", "Rounds", "watched"]
