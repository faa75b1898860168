"""How the updates of a round become one."""

from fedveil.aggregation.mean import AVERAGES, Average, StreamingMean

__all__ = ["AVERAGES", "Average", "StreamingMean"]
