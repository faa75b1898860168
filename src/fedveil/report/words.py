"""Numbers as people read them."""

from __future__ import annotations

from fedveil.tasks.metrics import Metric

__all__ = ["DASH", "human_bytes", "human_measure", "human_percent", "human_seconds", "share"]

DASH = "–"
"""Stands for what was not measured."""

_UNITS = ("B", "kB", "MB", "GB", "TB")


def human_bytes(count: float | None) -> str:
    """Bytes in three digits and a decimal unit, such as "11.3 MB"."""
    if count is None:
        return DASH
    value, unit = float(count), 0
    # 999.5 would be rounded to "1000" of its unit.
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    if unit == 0:
        return f"{value:.0f} {_UNITS[unit]}"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {_UNITS[unit]}"


def human_measure(value: float | None, metric: Metric, *, sign: bool = True) -> str:
    """What a model reaches, such as "88.0 %" or "2.310 nats"; without its unit, "88.0"."""
    if value is None:
        return DASH
    return metric.text(value) if sign else metric.figure(value)


def human_percent(value: float | None, *, sign: bool = False) -> str:
    """A percentage to one decimal, such as "93.1" or, with its sign, "93.1 %"."""
    if value is None:
        return DASH
    return f"{value:.1f}" + (" %" if sign else "")


def human_seconds(value: float | None) -> str:
    """A time span, such as "8.3 s", "95 s", "18:40" or "1:02:15"."""
    if value is None:
        return DASH
    if value < 600:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def share(count: float | None, whole: float) -> float | None:
    """``count`` in percent of ``whole``; None if there is nothing to compare."""
    return None if count is None or whole <= 0 else 100 * count / whole
