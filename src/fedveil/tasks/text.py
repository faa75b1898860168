"""Text classification with a Hugging Face tokenizer and model, or ones that behave alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedveil.errors import ConfigurationError, DataError
from fedveil.tasks.padding import check_padding, reads_last_place, turned_left
from fedveil.tasks.task import (
    Batch,
    Classification,
    Dataset,
    Prepared,
    check_tokens,
    column,
    logits_of,
)

__all__ = ["TextClassification"]

_PAD_ADVICE = "Asking-to-pad-a-fast-tokenizer"


class TextClassification(Classification):
    """Give each text, or pair of texts, one of several classes.

    Texts are tokenised once per data set; a batch is padded to its longest text only, where the
    model's score of a text does not depend on it: on the right, whatever side the tokenizer says.
    Texts that are too long are cut on the tokenizer's ``truncation_side``.

    Args:
        tokenizer: Called as tokenizer(texts, [pairs,] truncation=True, max_length=n), and its
            `pad` method with return_tensors="pt"; with padding_side="right", too, if it has such an
            attribute. Every tokenizer of transformers fits.
        num_labels: How many classes there are; None to learn it from the model's output.
        text: The column of texts.
        label: The column of class numbers.
        max_length: Tokens per text, special ones included; the rest is cut off.
        text_pair: The column of second texts, for tasks on pairs.

    Raises:
        ConfigurationError: The tokenizer has no padding token, or a number is impossible.
    """

    name = "text-classification"

    def __init__(
        self,
        tokenizer: Any,
        *,
        num_labels: int | None = None,
        text: str = "text",
        label: str = "label",
        max_length: int = 128,
        text_pair: str | None = None,
    ) -> None:
        super().__init__(label=label, num_labels=num_labels)
        if getattr(tokenizer, "pad_token_id", 0) is None:
            raise ConfigurationError(
                "the tokenizer has no padding token, so texts cannot share a batch",
                where="TextClassification",
                fix="Set tokenizer.pad_token = tokenizer.eos_token, and the model's "
                "config.pad_token_id to match.",
            )
        if max_length < 1:
            raise ConfigurationError(
                "max_length is impossible", expected="at least 1", found=str(max_length)
            )
        self.tokenizer = tokenizer
        self.text, self.text_pair = text, text_pair
        self.max_length = max_length

    def validate(self, data: Dataset) -> None:
        """Check that every row has text and a class number.

        Raises:
            DataError: Naming the row and what is wrong with it.
        """
        self._texts(data, self.text)
        if self.text_pair is not None:
            self._texts(data, self.text_pair)
        self.check_labels(data)

    def prepare(self, data: Dataset | Prepared) -> Prepared:
        """Check and tokenise all rows; each becomes its token lists and "labels"."""
        if isinstance(data, Prepared):
            return data
        texts = [self._texts(data, self.text)]
        if self.text_pair is not None:
            texts.append(self._texts(data, self.text_pair))
        labels = self.check_labels(data)
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        rows = [
            {**{key: values[row] for key, values in encoded.items()}, "labels": label}
            for row, label in enumerate(labels)
        ]
        self._check_lengths(rows)
        return Prepared(rows, lengths=[len(row["input_ids"]) for row in rows])

    def labels_of(self, data: Prepared) -> list[int]:
        """The class of each row."""
        return [row["labels"] for row in data.select(range(len(data)))]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Token tensors padded on the right to the longest row, [B, L], and labels, shape [B]."""
        tokens = [{k: v for k, v in row.items() if k != "labels"} for row in rows]
        batch = dict(self._pad(tokens))
        batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=torch.int64)
        return batch

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's `logits` for the batch, shape [B, C].

        Raises:
            ConfigurationError: The model would take another token for padding than the tokenizer.
        """
        check_tokens(model, batch["input_ids"])
        check_padding(model, self.tokenizer)
        # The loss is computed here, in float32, not by the model: labels are left out.
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if reads_last_place(model):
            inputs = turned_left(inputs)
        return logits_of(model(**inputs), model, "B, C")

    def _pad(self, tokens: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        # Padding apart from tokenising is what we want; fast tokenizers advise against it, once.
        advice = getattr(self.tokenizer, "deprecation_warnings", None)
        if isinstance(advice, dict):
            advice.setdefault(_PAD_ADVICE, True)
        # On the left a token's place, which many models read, would depend on the other texts.
        side = {"padding_side": "right"} if hasattr(self.tokenizer, "padding_side") else {}
        padded: Mapping[str, Tensor] = self.tokenizer.pad(tokens, return_tensors="pt", **side)
        return padded

    def _check_lengths(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for number, row in enumerate(rows):
            if not row["input_ids"]:
                raise DataError(
                    f"row {number} has a text without any token",
                    expected="some text",
                    found="an empty one",
                    where=f'column "{self.text}"',
                    fix="Drop the row.",
                )

    def _texts(self, data: Dataset, name: str) -> list[str]:
        texts = list(column(data, name))
        if all(value is None or value == "" or value != value for value in texts):
            raise DataError(
                "a column of texts holds none",
                expected="text in every row",
                found=f"{type(texts[0]).__name__ if texts[0] != '' else 'nothing'} "
                f"in all rows ({len(texts)})",
                where=f'column "{name}"',
                fix="Fill it, or name the column that the texts are in.",
            )
        for row, value in enumerate(texts):
            if not isinstance(value, str):
                raise DataError(
                    f"row {row} holds no text",
                    expected="a string",
                    found=type(value).__name__,
                    where=f'column "{name}"',
                    fix="Drop the row."
                    if value is None
                    else "Convert it to a string; load_data(..., numbers=False) reads all of a csv "
                    "file so.",
                )
        return texts
