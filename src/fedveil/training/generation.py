"""Texts that a language model writes, and how close they are to what was wanted."""

from __future__ import annotations

import copy
import difflib
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fedveil.errors import ConfigurationError, DataError
from fedveil.modes import evaluation_mode
from fedveil.tasks.language import LanguageModelling
from fedveil.tasks.task import Dataset, Prepared, device_of
from fedveil.training.modes import seeded

__all__ = ["SCORES", "Answers", "Generation", "answer", "generate", "score"]


@dataclass(frozen=True)
class Generation:
    """How a model answers the prompts of a test set, and how its answers are scored.

    Attributes:
        scores: Of :data:`SCORES`.
        rows: Ask at most so many prompts, the first; None for all.
        batch_size: Prompts at a time.
        settings: Of ``transformers.GenerationConfig``, in its own words; what is not said is as the
            model has it.

    Raises:
        ConfigurationError: A value is impossible.
    """

    scores: tuple[str, ...] = ("bleu", "chrf", "rouge")
    rows: int | None = None
    batch_size: int = 16
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.scores:
            _check_score(name)
        for name in ("rows", "batch_size"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and not (name == "rows" and value is None):
                raise ConfigurationError(
                    f"{name} is impossible", expected="at least 1", found=repr(value)
                )

    def check(self, model: nn.Module, task: LanguageModelling, data: Dataset) -> None:
        """Find out before a long run what would be wrong after it.

        Raises:
            ConfigurationError: The model cannot generate so, or a score's library is missing.
            DataError: The data ask nothing.
        """
        task.questions(data)
        score(["a few words"], ["a few words"], self.scores)
        config = self.config(model)
        config.max_new_tokens, config.min_new_tokens = 1, None
        try:
            # What some settings forbid is found only by asking.
            generate(model, task, [data[0]], config=config)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigurationError(
                "The model cannot generate so",
                found=str(error).strip().split("\n", maxsplit=1)[0][:200],
                fix="Settings are those of transformers.GenerationConfig.",
            ) from error

    def config(self, model: nn.Module) -> Any:
        """A ``transformers.GenerationConfig`` with these settings, for a model.

        Raises:
            ConfigurationError: There is no such setting, or it is impossible.
        """
        own: Any = _generator(model).generation_config
        config = copy.deepcopy(own)
        for name, value in self.settings.items():
            if not hasattr(config, name) or name.startswith("_"):
                near = difflib.get_close_matches(name, vars(config), n=1)
                raise ConfigurationError(
                    "There is no such setting of generation",
                    expected="an attribute of transformers.GenerationConfig",
                    found=repr(name),
                    where="[generation]",
                    fix=f"Did you mean {near[0]!r}?" if near else "",
                )
            setattr(config, name, value)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of settings that need others to matter
                config.validate()
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                "A setting of generation is impossible",
                found=str(error).strip()[:200],
                where="[generation]",
            ) from error
        return config


@dataclass(frozen=True)
class Answers:
    """What a model wrote, and how good that is.

    Attributes:
        prompts: What was asked, as it stands in the data.
        references: What is right, for each prompt at least one text.
        texts: What the model answered.
        scores: See :func:`score`.
    """

    prompts: list[Any]
    references: list[list[str]]
    texts: list[str]
    scores: dict[str, float]


def answer(
    model: nn.Module, task: LanguageModelling, data: Dataset, generation: Generation
) -> Answers:
    """Ask a model everything that a test set asks, each prompt once, and score its answers.

    Args:
        model: See :func:`generate`.
        task: What it is for.
        data: The test set. Rows that ask the same are each other's references, unless the task
            names a column of references.
        generation: How.

    Raises:
        ConfigurationError: The model cannot generate, or not so.
        DataError: The data cannot be used, or ask nothing.
    """
    config = generation.config(model)
    questions = task.questions(data)[: generation.rows]
    with seeded(0, device_of(model)):  # the same answers every time, sampled ones too
        texts = generate(
            model,
            task,
            [data[question.row] for question in questions],
            config=config,
            batch_size=generation.batch_size,
        )
    references = [question.references for question in questions]
    scores = score(texts, references, generation.scores)
    return Answers([question.prompt for question in questions], references, texts, scores)


def generate(
    model: nn.Module,
    task: LanguageModelling,
    data: Dataset | Prepared,
    *,
    config: Any = None,
    batch_size: int = 16,
) -> list[str]:
    """What a model answers to each prompt.

    Args:
        model: One of transformers, or an adapter around it.
        task: What it is for; its tokenizer writes the answers.
        data: Rows, or ``task.prepare(rows)``. Their own answers are not looked at.
        config: A ``transformers.GenerationConfig``; the model's own by default.
        batch_size: Prompts at a time. Padding may change the last bits of a score, and so a word.

    Returns:
        One text for each row, without special tokens.

    Raises:
        ConfigurationError: The model cannot generate.
        DataError: The data cannot be used.
    """
    writer = _generator(model)
    prompts = [task.prompt_of(row) for row in task.prepare(data).rows]  # type: ignore[union-attr]
    # Prompts of like length in one batch need the least padding.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    texts = [""] * len(prompts)
    settings = copy.deepcopy(config or writer.generation_config)
    settings.pad_token_id = task.tokenizer.pad_token_id
    settings.eos_token_id = task.tokenizer.eos_token_id
    with evaluation_mode(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = task.prompts([prompts[number] for number in chosen], device_of(model))
            found = writer.generate(**batch, generation_config=settings)
            answers = task.answers_in(found, batch)
            written = task.tokenizer.batch_decode(answers, skip_special_tokens=True)
            for number, text in zip(chosen, written, strict=True):
                texts[number] = text.strip()
    return texts


def score(
    predictions: Sequence[str],
    references: Sequence[str | Sequence[str]],
    names: Sequence[str] = ("bleu", "chrf", "rouge"),
) -> dict[str, float]:
    """How close texts are to what was wanted, by the libraries that everybody reports.

    Args:
        predictions: What was written.
        references: What was wanted: for each text one, or several of which the closest counts (how
            is each score's own matter).
        names: Of :data:`SCORES`.

    Returns:
        "bleu" and "chrf" (sacrebleu), "rouge1", "rouge2" and "rougeL" (F-measures of rouge-score,
        with stemming) and "meteor" (nltk) from 0 to 100, "nist" (nltk) as it is.

    Raises:
        ConfigurationError: A score is unknown, or its library is not installed.
        DataError: There are not as many references as texts, or none for one.
    """
    several = [[one] if isinstance(one, str) else list(one) for one in references]
    if len(several) != len(predictions) or not predictions or not all(several):
        raise DataError(
            "Texts and references do not fit together",
            expected="at least one reference for each text, and at least one text",
            found=f"{len(predictions)} texts, {sum(map(bool, several))} with references",
        )
    scores: dict[str, float] = {}
    for name in names:
        _check_score(name)
        scores.update(SCORES[name](list(predictions), several))
    return scores


def _check_score(name: str) -> None:
    if name not in SCORES:
        raise ConfigurationError(
            "The score is unknown", expected=" or ".join(SCORES), found=repr(name)
        )


def _generator(model: nn.Module) -> Any:
    if not hasattr(model, "generate"):
        raise ConfigurationError(
            "The model cannot generate text",
            expected="a model of transformers, with a method generate",
            found=type(model).__name__,
        )
    return model


Texts = list[str]
References = list[list[str]]


def _bleu(texts: Texts, references: References) -> Mapping[str, float]:
    sacrebleu = _library("sacrebleu")
    return {"bleu": float(sacrebleu.corpus_bleu(texts, _streams(references)).score)}


def _chrf(texts: Texts, references: References) -> Mapping[str, float]:
    sacrebleu = _library("sacrebleu")
    return {"chrf": float(sacrebleu.corpus_chrf(texts, _streams(references)).score)}


def _rouge(texts: Texts, references: References) -> Mapping[str, float]:
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(list(kinds), use_stemmer=True)
    found = [scorer.score_multi(*pair) for pair in zip(references, texts, strict=True)]
    return {kind: 100 * sum(one[kind].fmeasure for one in found) / len(found) for kind in kinds}


def _meteor(texts: Texts, references: References) -> Mapping[str, float]:
    """With the synonyms of WordNet where nltk has it, else with words and their stems alone."""
    meteor = _library("nltk.translate.meteor_score").meteor_score
    words = _wordnet()
    found = [
        meteor([one.split() for one in wanted], text.split(), wordnet=words)
        for text, wanted in zip(texts, references, strict=True)
    ]
    return {"meteor": 100 * sum(found) / len(found)}


def _nist(texts: Texts, references: References) -> Mapping[str, float]:
    nist = _library("nltk.translate.nist_score").corpus_nist
    longest = max((len(text.split()) for text in texts), default=0)
    if longest == 0:
        return {"nist": 0.0}
    split = [[one.split() for one in wanted] for wanted in references]
    return {"nist": float(nist(split, [text.split() for text in texts], n=min(5, longest)))}


SCORES: Mapping[str, Callable[[Texts, References], Mapping[str, float]]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge": _rouge,
    "meteor": _meteor,
    "nist": _nist,
}
"""Scores by name."""


class _NoSynonyms:
    """WordNet where it is not installed."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _wordnet() -> Any:
    corpus = _library("nltk.corpus")
    try:
        corpus.wordnet.synsets("word")
    except LookupError:
        return _NoSynonyms()
    return corpus.wordnet


def _streams(references: References) -> list[list[str | None]]:
    """References as sacrebleu has them: first ones, second ones, ..., with gaps."""
    most = max(map(len, references))
    return [
        [wanted[place] if place < len(wanted) else None for wanted in references]
        for place in range(most)
    ]


def _library(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of their own dependencies
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = {"rouge_score": "rouge-score"}.get(name.split(".", maxsplit=1)[0], name)
        raise ConfigurationError(
            f"the package {package.split('.', maxsplit=1)[0]!r} is not installed",
            fix="pip install 'fedveil[text]'",
        ) from error
