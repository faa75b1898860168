"""One-shot fusion of trained models: RegMean, and the mean and Fisher merging it is compared with.

    statistics = fedveil.merging.statistics_of(model, data, task=task)  # beside the data
    (merged,) = fedveil.merging.merge([one, other], statistics=[statistics, theirs])

RegMean is by Jin et al. (2212.09849), Fisher merging by Matena and Raffel (2111.09832).
"""

from fedveil.merging.common import Common, in_common
from fedveil.merging.fusion import MergeMethod, merge
from fedveil.merging.statistics import MergeStatistics, StatisticsMethod, statistics_of

__all__ = [
    "Common",
    "MergeMethod",
    "MergeStatistics",
    "StatisticsMethod",
    "in_common",
    "merge",
    "statistics_of",
]
