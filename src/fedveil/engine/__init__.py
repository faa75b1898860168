"""Where rounds run. In process: real message bytes, clients in worker processes or in turn."""

from fedveil.engine.in_process import Evaluation, InProcess
from fedveil.engine.observer import Observer
from fedveil.engine.records import RoundRecord

__all__ = ["Evaluation", "InProcess", "Observer", "RoundRecord"]
