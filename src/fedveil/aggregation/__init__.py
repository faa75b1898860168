"""How the updates of a round become one step."""

from fedveil.aggregation.base import (
    AVERAGES,
    WHOLE,
    Aggregation,
    Average,
    Influence,
    Observed,
    Replay,
    Scales,
    Sums,
)
from fedveil.aggregation.mean import Mean, StreamingMean
from fedveil.aggregation.registry import AGGREGATIONS, aggregation_of
from fedveil.aggregation.regmean import RegMean, RegMeanSums

__all__ = [
    "AGGREGATIONS",
    "AVERAGES",
    "WHOLE",
    "Aggregation",
    "Average",
    "Influence",
    "Mean",
    "Observed",
    "RegMean",
    "RegMeanSums",
    "Replay",
    "Scales",
    "StreamingMean",
    "Sums",
    "aggregation_of",
]
