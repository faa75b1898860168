"""One-shot fusion: several trained models become one, without training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from fedveil.aggregation import RegMean, RegMeanSums, StreamingMean
from fedveil.aggregation.gram import Form
from fedveil.errors import ConfigurationError, ProtocolError
from fedveil.merging.common import in_common, uncompiled, widened
from fedveil.merging.configurations import check_configurations
from fedveil.merging.fisher import fisher_step
from fedveil.merging.statistics import EVERYTHING, MergeStatistics, Progress
from fedveil.state import StateDict, load_state, read_state

__all__ = ["METHODS", "MergeMethod", "check_finite", "merge"]

MergeMethod = Literal["regmean", "mean", "fisher"]
METHODS = get_args(MergeMethod)

_DEFAULTS = RegMean()
_Read = TypeVar("_Read")

_Step = Callable[[str, Sequence[Tensor], Sequence[float]], Tensor]
"""From a tensor's name, how each model differs there from the first, and weights, the step from
the first to the merged model."""


def merge(
    models: Sequence[nn.Module],
    *,
    method: MergeMethod = "regmean",
    statistics: Sequence[MergeStatistics] | None = None,
    weights: Sequence[float] | None = None,
    keep: Sequence[str] = (),
    settings: RegMean = _DEFAULTS,
    progress: Progress | None = None,
) -> list[nn.Module]:
    """Merge models that were fine-tuned from the same one.

    Tensors that all models have in the same shape are merged: the weights of linear layers by the
    method, and so is everything else by "fisher"; "regmean" averages it. Other tensors (heads for
    different classes) stay each model's own.

    Args:
        models: At least two; none is changed. Of compiled ones what they were compiled from.
        method: "regmean" (Jin et al., 2212.09849): per linear layer, the weights that fit best what
            all models' weights do to their own inputs; averaged if some statistics have no Gram of
            the layer (it did not run, or was left out on purpose). "fisher" (Matena and Raffel,
            2111.09832): ``sum_k w_k F_k W_k / sum_k w_k F_k``. "mean": the weighted mean.
        statistics: For "regmean" and "fisher": of each model, in the models' order.
        weights: How much each model counts, above 0; by default the examples of its statistics, or
            the same for all.
        keep: Patterns (as in the shell, case-sensitive) of tensors that stay each model's own, such
            as "classifier.*" where heads have the same shape but other meanings.
        settings: For "regmean", its off-diagonal factor, its ridge, and what it excludes. All else
            comes with the statistics.
        progress: Called with how many tensors are done, and of how many.

    Returns:
        A new model if everything is merged, else one per model, each with its own kept tensors.
        Sums are float32, solutions and Fisher's quotients float64; a result has the device and
        dtypes of the model that it is a copy of, the first where there is one.

    Raises:
        ConfigurationError: The models cannot be merged, their configurations say that they compute
            something else with the same weights, or a setting is impossible.
        ProtocolError: The statistics are not of these models or not for this method.

    Does NOT protect: whoever merges sees all models and statistics in the clear, and whoever has
    the merged model has a part of each. Nothing here detects a model that was made to do harm.
    """
    common = in_common(models, keep)
    models = [uncompiled(model) for model in models]
    check_configurations(models, common.kept)
    given = _statistics(models, method, statistics)
    shares = _weights(models, given, weights)
    step = _steps(models, common.merged, method, given, settings)
    states = [read_state(model) for model in models]
    merged: StateDict = {}
    for done, name in enumerate(common.merged, start=1):
        first, *others = (widened(state[name]) for state in states)
        deltas = [torch.zeros_like(first), *(other - first for other in others)]
        merged[name] = first + step(name, deltas, shares)
        if progress is not None:
            progress(done, len(common.merged))
    return [_filled(model, merged) for model in (models if common.kept else models[:1])]


def _steps(
    models: Sequence[nn.Module],
    names: Sequence[str],
    method: MergeMethod,
    statistics: Sequence[MergeStatistics],
    settings: RegMean,
) -> _Step:
    if method == "regmean":
        return _regmean(models, names, statistics, settings)
    return _fisher(models, statistics) if method == "fisher" else _mean


def _mean(name: str, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    sums = StreamingMean({name: deltas[0].shape})
    for delta, weight in zip(deltas, weights, strict=True):
        sums.add({name: delta}, EVERYTHING, weight)
    return _given(sums.mean(name))


def _regmean(
    models: Sequence[nn.Module],
    names: Sequence[str],
    statistics: Sequence[MergeStatistics],
    settings: RegMean,
) -> _Step:
    form, size = _agreed_form(statistics)
    settings = replace(settings, form=form, size=size)
    layers, *others = (settings.layers(model) for model in models)
    for number, other in enumerate(others, start=2):
        odd = sorted(name for name in names if layers.get(name) != other.get(name))
        if odd:
            raise ConfigurationError(
                f"A weight is used differently in model 1 and in model {number}",
                expected="the same kind of layer",
                where=odd[0],
                fix="Keep it as each model's own, or merge by mean or Fisher.",
            )
    grams = [_read(s.grams, model, n) for n, (s, model) in _numbered(statistics, models)]

    def step(name: str, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        if not all(name in own for own in grams):
            return _mean(name, deltas, weights)
        sums = RegMeanSums({name: deltas[0].shape}, layers, settings)
        for delta, weight, own in zip(deltas, weights, grams, strict=True):
            sums.add({name: delta}, EVERYTHING, weight, own)
        return _given(sums.mean(name))

    return step


def _fisher(models: Sequence[nn.Module], statistics: Sequence[MergeStatistics]) -> _Step:
    diagonals = [_read(s.fisher, model, n) for n, (s, model) in _numbered(statistics, models)]

    def step(name: str, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        own = [diagonal[name] for diagonal in diagonals if name in diagonal]
        if len(own) < len(deltas):  # a running statistic is no parameter
            return _mean(name, deltas, weights)
        return fisher_step(deltas, weights, own)

    return step


def _statistics(
    models: Sequence[nn.Module], method: str, statistics: Sequence[MergeStatistics] | None
) -> Sequence[MergeStatistics]:
    """As many as models, and of them; none for the mean."""
    if method not in METHODS:
        raise ConfigurationError(
            "The method is unknown", expected=" or ".join(METHODS), found=repr(method)
        )
    statistics = statistics or ()
    wanted = 0 if method == "mean" else len(models)
    if len(statistics) != wanted:
        raise ConfigurationError(
            f"The method {method!r} takes {'statistics of each model' if wanted else 'none'}",
            expected=f"{wanted} statistics",
            found=str(len(statistics)),
            fix="Make them with `statistics_of`, beside each model's data." if wanted else "",
        )
    for number, (one, model) in _numbered(statistics, models):
        if one.method != method:
            raise ProtocolError(
                "Statistics are for another method",
                expected=method,
                found=one.method,
                where=f"statistics {number}",
            )
        _read(one.check_model, model, number)
    return statistics


def _weights(
    models: Sequence[nn.Module],
    statistics: Sequence[MergeStatistics],
    weights: Sequence[float] | None,
) -> list[float]:
    if weights is None:
        examples = [float(one.examples) for one in statistics]
        return examples or [1.0] * len(models)
    possible = len(weights) == len(models) and all(
        isinstance(w, int | float) and not isinstance(w, bool) and 0 < w < math.inf for w in weights
    )
    if not possible:
        raise ConfigurationError(
            "The weights are impossible",
            expected=f"{len(models)} numbers above 0, one per model",
            found=repr(list(weights)),
        )
    return [float(weight) for weight in weights]


def _agreed_form(statistics: Sequence[MergeStatistics]) -> tuple[Form, int]:
    forms = [(one.settings.form, one.settings.size) for one in statistics]
    for number, form in enumerate(forms[1:], start=2):
        if form != forms[0]:
            raise ConfigurationError(
                "Statistics keep their Grams in different forms",
                expected=f"{forms[0][0]} of size {forms[0][1]}, as the first",
                found=f"{form[0]} of size {form[1]}",
                where=f"statistics {number}",
                fix="Take all with the same form and size.",
            )
    return forms[0]


def _numbered(
    statistics: Sequence[MergeStatistics], models: Sequence[nn.Module]
) -> Iterator[tuple[int, tuple[MergeStatistics, nn.Module]]]:
    return enumerate(zip(statistics, models, strict=False), start=1)  # the mean has none


def _read(read: Callable[[nn.Module], _Read], model: nn.Module, number: int) -> _Read:
    """What statistics hold for a model; an error says whose they are."""
    try:
        return read(model)
    except ProtocolError as error:
        raise error.within(f"statistics {number}") from error


def _filled(model: nn.Module, merged: StateDict) -> nn.Module:
    """A copy of a model with merged tensors."""
    filled = copy.deepcopy(model)
    filled.zero_grad(set_to_none=True)
    load_state(filled, merged)
    check_finite(filled, merged)
    return filled


def check_finite(model: nn.Module, names: Iterable[str]) -> None:
    """Make sure that merged tensors fit into the model's dtypes.

    Raises:
        ConfigurationError: One does not.
    """
    state = read_state(model)
    for name in names:
        if not bool(torch.isfinite(widened(state[name])).all()):
            raise ConfigurationError(
                "A merged weight is too large",
                expected=f"finite as {state[name].dtype}".replace("torch.", ""),
                where=name,
                fix="Convert the models to float32 first, or raise the ridge.",
            )


def _given(step: Tensor | None) -> Tensor:
    assert step is not None  # every model has a part in it
    return step
