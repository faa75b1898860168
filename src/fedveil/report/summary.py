"""The figures of a finished run, as plain values and on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.errors import CheckpointError
from fedveil.files import write_whole
from fedveil.tasks.metrics import Metric, metric_in, metric_named

if TYPE_CHECKING:
    from fedveil.federation import Result

__all__ = ["metric_of_summary", "summarize", "write_summary"]

_VIEWS = ("global", "server_model", "proxy_before", "proxy_after")


def summarize(
    name: str,
    result: Result,
    *,
    seconds: float,
    base: float | None = None,
    own_data: float | None = None,
) -> dict[str, Any]:
    """The figures of one scheme's run.

    Args:
        name: What to call the run in tables and pictures.
        result: What the federation returned.
        seconds: Wall-clock time of the run.
        base: What the base reaches, if the run itself did not measure it: accuracy in percent, or
            the loss of a language model in nats per token.
        own_data: What a client reaches with the base and its own data alone, likewise.

    Returns:
        ``name``; ``base``, ``global``, ``server_model``, ``proxy_before``, ``proxy_after`` and
        ``own_data``: accuracies in percent on the owner's test set, after the last round (None: not
        measured); ``bytes_down`` and ``bytes_up``: means per client and round; ``seconds``;
        ``rounds``: accuracy of the global model after each round (None: not measured in it).
        ``doubt``, if the base is no better than chance: that, in words.
        Language models have losses in nats per token in the place of accuracies, lower is better,
        and say so: ``metric`` is "loss". Without it, it is accuracy.
    """
    measures = result.rounds[-1].measures if result.rounds else {}
    metric = _metric(result)
    return {
        "name": name,
        **({"metric": metric.name} if metric.lower_is_better else {}),
        "base": base if result.base is None else metric.of(result.base),
        **{view: metric.of(measures.get(view, {})) for view in _VIEWS},
        "own_data": own_data,
        **({"doubt": result.doubt} if result.doubt else {}),
        "bytes_down": result.mean_bytes_down(),
        "bytes_up": result.mean_bytes_up(),
        "seconds": seconds,
        "rounds": [metric.of(record.measures.get("global", {})) for record in result.rounds],
    }


def metric_of_summary(summary: Mapping[str, Any]) -> Metric:
    """What the figures of a summary are by; all its schemes are of one task.

    Args:
        summary: What ``summary.json`` holds.
    """
    named = [figures["metric"] for figures in summary["schemes"].values() if "metric" in figures]
    return metric_named(named[0]) if named else metric_in()


def write_summary(folder: Path, fp32_bytes: int, schemes: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write ``summary.json`` into ``folder``: whole, or not at all.

    Args:
        folder: The run folder; made if missing.
        fp32_bytes: Bytes of the model in float32, with which releases are compared.
        schemes: What :func:`summarize` returned, by name.

    Returns:
        The file.

    Raises:
        CheckpointError: It cannot be written; an earlier one is as it was.
    """
    path = folder / "summary.json"
    text = json.dumps({"fp32_bytes": fp32_bytes, "schemes": schemes}, indent=2) + "\n"
    write_whole(path, text, CheckpointError)
    return path


def _metric(result: Result) -> Metric:
    """What the run's models are judged by, by what was measured of them."""
    measured = [one for record in result.rounds for one in record.measures.values()]
    return metric_in(*measured, *([] if result.base is None else [result.base]))
