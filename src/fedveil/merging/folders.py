"""Text classifiers in folders or on the hub: what `fedveil statistics` and `fedveil merge` do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from fedveil.aggregation import RegMean
from fedveil.errors import ConfigurationError
from fedveil.hub import load_data
from fedveil.hub.library import quiet_transformers
from fedveil.hub.models import load_untouched
from fedveil.hub.names import place_of
from fedveil.hub.settings import is_function
from fedveil.hub.tokenizers import load_tokenizer
from fedveil.merging.common import Common, in_common
from fedveil.merging.configurations import check_configurations, remarks_on_configurations
from fedveil.merging.fusion import METHODS, check_finite, merge
from fedveil.merging.statistics import MergeStatistics, Progress, statistics_of
from fedveil.merging.tokenizers import check_same_tokens, remarks_on_tokenizers
from fedveil.tasks import TextClassification
from fedveil.tasks.task import missing_column

__all__ = ["Classifier", "Merged", "Reading", "Show", "measure", "merge_folders", "open_classifier"]

Show = Callable[[str], Progress]
"""Begins to show something long, by its title."""

_KIND = "ForSequenceClassification"
# Marks a folder that may be replaced.
_RECORD = "merge.json"


@dataclass(frozen=True)
class Classifier:
    """A text classifier as it lies in its folder or on the hub.

    Attributes:
        name: The folder or hub name.
        model: In float32.
        tokenizer: Its own.
        dtype: What its weights are stored in.
    """

    name: str
    model: Any
    tokenizer: Any
    dtype: torch.dtype


@dataclass(frozen=True)
class Reading:
    """How much of which column is read, and of how many rows."""

    text: str = "text"
    max_length: int = 128
    settings: RegMean = field(default_factory=RegMean)


@dataclass(frozen=True)
class Merged:
    """What was merged, and where the results are.

    Attributes:
        folders: One if everything was merged, else one per model.
        common: What was merged and what was kept.
        warnings: What the user should look at.
    """

    folders: list[Path]
    common: Common
    warnings: list[str]


def open_classifier(name: str) -> Classifier:
    """Load a model and its tokenizer.

    Raises:
        FedveilError: They cannot be found or loaded, or the model is no text classifier.
    """
    here = Path.cwd()
    if is_function(name):
        raise ConfigurationError(
            "A function makes no trained model", expected="a folder or hub name", found=name
        )
    _check_no_adapter(name)
    model, tokenizer = load_untouched(name, here), load_tokenizer(name, here)
    if not type(model).__name__.endswith(_KIND):
        raise ConfigurationError(
            "The model is no text classifier",
            expected=f"a class that ends in {_KIND}",
            found=type(model).__name__,
            where=name,
            fix="Other models are merged in Python: see docs/merging.md.",
        )
    with quiet_transformers() as transformers:
        stored = transformers.AutoConfig.from_pretrained(place_of(name, here)).dtype
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    return Classifier(name, model, tokenizer, dtype)


def _check_no_adapter(name: str) -> None:
    if (Path(name).expanduser() / "adapter_config.json").is_file():
        raise ConfigurationError(
            "This is an adapter, and a product of merged factors is not the merged product",
            expected="a whole model",
            found="adapter_config.json",
            where=name,
            fix="Put it into its base first: PEFT's model.merge_and_unload(), save_pretrained().",
        )


def measure(
    classifier: Classifier, data: str, method: str, reading: Reading, progress: Progress
) -> MergeStatistics:
    """Statistics of a classifier on the texts of a file or hub data set.

    Raises:
        FedveilError: The data or the method do not fit.
    """
    rows = load_data(data, numbers=False)
    if reading.text not in rows.column_names:
        raise missing_column(reading.text, rows.column_names)
    longest = getattr(classifier.model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and reading.max_length > longest:
        raise ConfigurationError(
            "Texts are longer than the model can read",
            expected=f"--max-length of at most {longest}",
            found=str(reading.max_length),
        )
    task = TextClassification(
        classifier.tokenizer, text=reading.text, max_length=reading.max_length
    )
    # Statistics use no labels, so none need be given; tasks ask for one.
    texts = [{reading.text: text, task.label: 0} for text in rows[reading.text]]
    return statistics_of(
        classifier.model,
        texts,
        task=task,
        method=method,  # type: ignore[arg-type]
        settings=reading.settings,
        progress=progress,
    )


def merge_folders(
    names: Sequence[str],
    out: Path,
    *,
    method: str,
    statistics: Sequence[Path],
    data: Sequence[str],
    keep: Sequence[str],
    weights: Sequence[float],
    reading: Reading,
    overwrite: bool,
    show: Show,
) -> Merged:
    """Merge text classifiers and save the result in the first one's format.

    Args:
        names: Folders or hub names of the models.
        out: Where to save: the model itself, or one folder per model if some tensors stay each
            model's own.
        method: See :func:`fedveil.merging.merge`.
        statistics: Files of statistics, one per model in their order.
        data: Or data sets to take statistics from.
        keep: Patterns of tensors that stay each model's own.
        weights: One per model; none for the default.
        reading: How data are read, and RegMean's settings.
        overwrite: Whether to replace an earlier result.
        show: Shows progress.

    Raises:
        FedveilError: Something does not fit; ``out`` is as it was before.
    """
    _check_inputs(names, method, statistics, data)
    _check_place(out, [*names, *map(str, statistics), *data], overwrite)
    given = [MergeStatistics.load(path) for path in statistics]
    classifiers = [open_classifier(name) for name in names]
    models = [classifier.model for classifier in classifiers]
    common = in_common(models, keep)
    check_configurations(models, common.kept, [_short(name) for name in names])
    _check_tokenizers(classifiers, common)
    given += [
        measure(classifier, file, method, reading, show(f"statistics of {classifier.name}"))
        for classifier, file in zip(classifiers, data, strict=False)
    ]
    results = merge(
        models,
        method=method,  # type: ignore[arg-type]
        statistics=given,
        weights=list(weights) or None,
        keep=keep,
        settings=reading.settings,
        progress=show(f"merging {len(models)} models"),
    )
    record: dict[str, Any] = {
        "models": [_short(name) for name in names],
        "method": method,
        "weights": list(weights) or [one.examples for one in given] or [1] * len(names),
        "off_diagonal": reading.settings.off_diagonal if method == "regmean" else None,
        "kept": common.kept,
    }
    folders = _save(results, classifiers, out, record, common)
    return Merged(folders, common, _warnings(classifiers, common))


def _check_inputs(
    names: Sequence[str], method: str, statistics: Sequence[Path], data: Sequence[str]
) -> None:
    if method not in METHODS:
        raise ConfigurationError(
            "The method is unknown", expected=" or ".join(METHODS), found=repr(method)
        )
    if statistics and data:
        raise ConfigurationError(
            "--statistics and --data contradict each other", fix="Leave one out."
        )
    given = len(statistics) + len(data)
    wanted = 0 if method == "mean" else len(names)
    if given != wanted and len(names) > 1:
        raise ConfigurationError(
            "The mean takes no statistics"
            if method == "mean"
            else "Every model needs its own statistics, in the order of the models",
            expected=f"{wanted} times --statistics or --data",
            found=str(given),
        )


def _check_place(out: Path, inputs: Sequence[str], overwrite: bool) -> None:
    """Say what is in the way before anything is loaded."""
    whole = out.resolve()
    for name in [".", *inputs]:
        path = Path(name).expanduser().resolve()
        if path == whole or (whole in path.parents and path.exists()):
            raise ConfigurationError(
                "The result would replace what it is made of, or the folder that you are in",
                where=str(out),
                fix="Name another folder with --out.",
            )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ConfigurationError("The result is a folder, and there is a file", where=str(out))
    if not overwrite:
        raise ConfigurationError(
            "The folder is not empty",
            where=str(out),
            fix="Replace what is in it with --overwrite, or name another with --out.",
        )
    if not any((out / name).is_file() for name in (_RECORD, "config.json")):
        raise ConfigurationError(
            "The folder holds something else than an earlier result",
            where=str(out),
            fix="Remove it yourself, or name another with --out.",
        )


def _check_tokenizers(classifiers: Sequence[Classifier], common: Common) -> None:
    """Embeddings can only be merged if a token is the same word to all models."""
    first, *others = classifiers
    embedding = first.model.get_input_embeddings().weight
    names = {n for n, p in first.model.named_parameters() if p is embedding}
    for other in others:
        if names & {*common.merged}:
            both = first.name, other.name
            check_same_tokens(first.tokenizer, other.tokenizer, both, min(names))


def _warnings(classifiers: Sequence[Classifier], common: Common) -> list[str]:
    """What the user should look at though it was merged."""
    dtypes = [str(c.dtype).removeprefix("torch.") for c in classifiers]
    stored = [] if len({*dtypes}) == 1 else [
        f"the models are stored in different precision ({', '.join(dtypes)}); a result has that of "
        "the model that it is a copy of."
    ]  # fmt: skip
    return [
        *_warned_classes(classifiers, common),
        *remarks_on_configurations([c.model for c in classifiers]),
        *remarks_on_tokenizers([c.tokenizer for c in classifiers]),
        *stored,
    ]


def _warned_classes(classifiers: Sequence[Classifier], common: Common) -> list[str]:
    """A head that was merged although its classes mean different things."""
    model = classifiers[0].model
    head = [name for name in common.merged if not name.startswith(f"{model.base_model_prefix}.")]
    classes = [list(c.model.config.id2label.values()) for c in classifiers]
    if not head or all(names == classes[0] for names in classes[1:]):
        return []
    found = "; ".join(
        f"{c.name}: {', '.join(map(str, names[:5]))}"
        for c, names in zip(classifiers, classes, strict=True)
    )
    return [
        f"the models' classes differ ({found}), yet {', '.join(head)} were merged. "
        f"--keep {head[0].split('.')[0]}.* would keep each model's own."
    ]


def _save(
    results: Sequence[nn.Module],
    classifiers: Sequence[Classifier],
    out: Path,
    record: dict[str, Any],
    common: Common,
) -> list[Path]:
    """All results at once: a folder that is there is whole."""
    names = [""] if len(results) == 1 else _folder_names(classifiers)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{out.name}.unfinished-", dir=out.parent) as aside:
        new, old = Path(aside) / "new", Path(aside) / "old"
        for name, result, own in zip(names, results, classifiers, strict=False):
            saved: Any = result.to(own.dtype)
            check_finite(saved, common.merged)
            with quiet_transformers():
                saved.save_pretrained(new / name)
                own.tokenizer.save_pretrained(new / name)
        (new / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
    return [out / name for name in names]


def _folder_names(classifiers: Sequence[Classifier]) -> list[str]:
    """Each model's last name; numbered where several have the same."""
    names = [Path(_short(c.name)).name for c in classifiers]
    count = Counter(names)
    return [f"{n}-{i}" if count[n] > 1 else n for i, n in enumerate(names, start=1)]


def _short(name: str) -> str:
    """A folder's own name without its path, which is nobody else's business; or the hub name."""
    path = Path(name).expanduser()
    return path.resolve().name if path.is_dir() else name
