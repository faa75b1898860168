"""How the updates of a round become one step."""

from fedveil.aggregation.base import AVERAGES, Aggregation, Average, Observed, Replay, Sums
from fedveil.aggregation.mean import Mean, StreamingMean
from fedveil.aggregation.registry import AGGREGATIONS, aggregation_of
from fedveil.aggregation.regmean import RegMean, RegMeanSums

__all__ = [
    "AGGREGATIONS",
    "AVERAGES",
    "Aggregation",
    "Average",
    "Mean",
    "Observed",
    "RegMean",
    "RegMeanSums",
    "Replay",
    "StreamingMean",
    "Sums",
    "aggregation_of",
]
