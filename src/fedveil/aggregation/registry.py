"""Aggregations by name, for configuration files and short calls."""

from __future__ import annotations

from collections.abc import Mapping

from fedveil.aggregation.base import Aggregation
from fedveil.aggregation.mean import Mean
from fedveil.aggregation.regmean import RegMean
from fedveil.errors import ConfigurationError

__all__ = ["AGGREGATIONS", "aggregation_of"]

AGGREGATIONS: Mapping[str, type[Mean] | type[RegMean]] = {"mean": Mean, "regmean": RegMean}


def aggregation_of(value: object) -> Aggregation:
    """An aggregation, or the one of that name with its own defaults.

    Raises:
        ConfigurationError: If it is neither.
    """
    if isinstance(value, Aggregation) and not isinstance(value, type):
        return value
    if not isinstance(value, str) or value not in AGGREGATIONS:
        raise ConfigurationError(
            "The aggregation is unknown", expected=" or ".join(AGGREGATIONS), found=repr(value)
        )
    return AGGREGATIONS[value]()
