"""Language modelling: answers to prompts, with Hugging Face tokenizers and models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedveil.errors import ConfigurationError, DataError
from fedveil.tasks.conversations import are_messages, check_answers, for_template, text_of
from fedveil.tasks.task import (
    Batch,
    Dataset,
    Measure,
    Prepared,
    check_tokens,
    column,
    column_names,
    logits_of,
)
from fedveil.tasks.templates import cells, columns_of

__all__ = ["CausalLM", "Question", "Seq2Seq"]

IGNORED = -100
"""The label of a token that is not learned, as everywhere in transformers."""


class Question(NamedTuple):
    """A prompt of a test set, and all answers to it that are right.

    Attributes:
        row: The first row that asks it.
        prompt: As it stands in the data: text, or messages.
        references: At least one.
    """

    row: int
    prompt: Any
    references: list[str]


class LanguageModelling:
    """What causal and sequence-to-sequence models share: prompts, completions, token losses.

    Rows are in one of TRL's formats, told apart by their columns:

    - ``prompt`` and ``completion``: two strings, or two lists of messages;
    - ``messages``: a conversation, whose last message is the answer;
    - ``text`` (causal models only): all of it is learned.

    Instead of a column, prompt and completion may be a template over columns, such as
    ``"Summarize:\\n{dialogue}\\nSummary:"``. Lists become text there: items between " | ", those of
    inner lists between " : ", as data-to-text sets are usually written out.

    Messages (``role`` and ``content``) are written by the tokenizer's chat template. An answer is
    text of the assistant's: a row that ends in a call of a tool is refused. Only the answer counts,
    with its end token; what is beyond ``max_length`` is cut off on the right.

    Args:
        tokenizer: One of transformers, with a padding token.
        max_length: Tokens per row, prompt and answer together (for sequence-to-sequence models: of
            each).
        label_smoothing: Share of the target that is spread over all tokens, in training only.
        prompt: The column of prompts, or a template.
        completion: The column of answers, or a template.
        messages: The column of conversations.
        text: The column of plain texts.
        references: Of a test set the column of all right answers to a prompt, as lists; without it
            rows that ask the same are each other's.

    Raises:
        ConfigurationError: The tokenizer has no padding token, a number is impossible, or a
            template is no template.
    """

    name: ClassVar[str]
    metric: ClassVar[str] = "loss"
    plain: ClassVar[bool] = False

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int = 512,
        label_smoothing: float = 0.0,
        prompt: str = "prompt",
        completion: str = "completion",
        messages: str = "messages",
        text: str = "text",
        references: str | None = None,
    ) -> None:
        if getattr(tokenizer, "pad_token_id", None) is None:
            raise ConfigurationError(
                "the tokenizer has no padding token, so texts cannot share a batch",
                where=type(self).__name__,
                fix="Set tokenizer.pad_token = tokenizer.eos_token.",
            )
        if type(max_length) is not int or max_length < 2:
            raise ConfigurationError(
                "max_length is impossible", expected="at least 2", found=repr(max_length)
            )
        if not 0 <= label_smoothing < 1:
            raise ConfigurationError(
                "label_smoothing is impossible",
                expected="from 0 to below 1",
                found=repr(label_smoothing),
            )
        self.tokenizer, self.max_length = tokenizer, max_length
        self.label_smoothing = label_smoothing
        self.prompt, self.completion = prompt, completion
        self.messages, self.text, self.references = messages, text, references
        self._fields = {*columns_of(prompt), *columns_of(completion)}

    def validate(self, data: Dataset) -> None:
        """Check every row, and that each has an answer.

        Raises:
            DataError: Naming the row and what is wrong with it.
        """
        self.prepare(data)

    def prepare(self, data: Dataset | Prepared) -> Prepared:
        """Check and tokenise all rows: "input_ids" and "labels" of each.

        Raises:
            DataError: Naming the row and what is wrong with it.
        """
        if isinstance(data, Prepared):
            return data
        rows = [
            self._encoded(number, prompt, answer)
            for number, (prompt, answer) in enumerate(self._pairs(data))
        ]
        return Prepared(rows, lengths=[len(row["input_ids"]) for row in rows])

    def questions(self, data: Dataset) -> list[Question]:
        """What a test set asks, each prompt once, in order of its first row.

        Raises:
            DataError: Rows are plain texts, which ask nothing, or a reference is no text.
        """
        pairs = list(enumerate(self._pairs(data)))
        if not all(prompt for _, (prompt, _) in pairs):
            raise DataError(
                "plain texts ask nothing that could be answered",
                expected="prompts and completions, or messages",
                found="an empty prompt",
            )
        asked: dict[str, Question] = {}
        for row, (prompt, answer) in pairs:
            question = asked.setdefault(str(prompt), Question(row, prompt, []))
            question.references.extend(self._references(data, row, answer))
        return list(asked.values())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross entropy per answer token, in nats, computed in float32."""
        logits, targets = self.answers(model, batch)
        return F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def measure(self, model: nn.Module, batch: Batch) -> Measure:
        """Summed cross entropy of answer tokens in nats, how many there are, and how many are the
        model's first choice."""
        logits, targets = self.answers(model, batch)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        correct = (logits.argmax(dim=-1) == targets).sum()
        return Measure(len(targets), float(loss), int(correct))

    def count(self, batch: Batch) -> int:
        """Answer tokens of a batch: what its mean loss is the mean over."""
        return int((batch["labels"] != IGNORED).sum())

    def answers(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores of a batch's answer tokens, float32 [tokens, V], and the tokens themselves."""
        raise NotImplementedError

    def prompt_of(self, row: Mapping[str, Any]) -> list[int]:
        """The tokens of a prepared row that come before its answer."""
        raise NotImplementedError

    def prompts(self, prompts: Sequence[list[int]], device: torch.device) -> Batch:
        """Prompts to be answered, padded where the model does not go on writing."""
        raise NotImplementedError

    def answers_in(self, written: Tensor, batch: Batch) -> Tensor:
        """What of generated tokens is the answer."""
        raise NotImplementedError

    def _encoded(self, number: int, prompt: Any, answer: Any) -> dict[str, list[int]]:
        raise NotImplementedError

    def _pairs(self, data: Dataset) -> list[tuple[Any, Any]]:
        """Prompt and answer of each row; of plain texts the prompt is empty."""
        names = column_names(data)
        if self.messages in names:
            pairs = [self._split(row, m) for row, m in enumerate(column(data, self.messages))]
            check_answers((answer for _, answer in pairs), self.messages)
            return pairs
        if not self._fields.isdisjoint(names) or not self.plain:
            pairs = list(zip(cells(data, self.prompt), cells(data, self.completion), strict=True))
            check_answers((answer for _, answer in pairs), self.completion)
            return pairs
        return [("", text) for text in column(data, self.text)]  # says if there is none

    def _references(self, data: Dataset, row: int, answer: Any) -> list[str]:
        """All right answers that one row knows."""
        if self.references is None:
            text = text_of(answer[-1]) if are_messages(answer) and answer else answer
            if not isinstance(text, str):
                raise _bad_row(row, "holds no text", "a string", repr(text), self.completion)
            return [text.strip()]
        found = data[row].get(self.references)
        if not are_messages(found) or not found or not all(isinstance(t, str) for t in found):
            raise _bad_row(
                row, "has no references", "a list of texts", repr(found), self.references
            )
        return [text.strip() for text in found]

    def _split(self, row: int, messages: Any) -> tuple[Any, Any]:
        if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) < 2:
            raise _bad_row(
                row, "has no conversation", "at least two messages", messages, self.messages
            )
        return list(messages[:-1]), list(messages[-1:])

    def _tokens(self, row: int, prompt: Any, answer: Any) -> tuple[list[int], list[int]]:
        """Tokens of prompt and answer, the latter with what ends it."""
        if are_messages(prompt) and are_messages(answer) and answer:
            return self._chat(row, list(prompt), list(answer))
        for value, where in ((prompt, self.prompt), (answer, self.completion)):
            if not isinstance(value, str):
                raise _bad_row(row, "holds no text", "a string", type(value).__name__, where)
        before = self._beginning(prompt)
        after = self.tokenizer(answer, add_special_tokens=False).input_ids
        if not after or not answer.strip():
            raise _bad_row(row, "has an empty answer", "some text", repr(answer), self.completion)
        end = self.tokenizer.eos_token_id
        return before, list(after) + ([] if end is None else [end])

    def _chat(self, row: int, prompt: list[Any], answer: list[Any]) -> tuple[list[int], list[int]]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise DataError(
                "the tokenizer has no chat template, so messages cannot be written",
                where=f"row {row}",
                fix="Set tokenizer.chat_template, or give prompts and completions as text.",
            )
        before = self._template(row, prompt, add_generation_prompt=True)
        whole = self._template(row, prompt + answer)
        if whole[: len(before)] != before:
            raise DataError(
                "the chat template writes a prompt otherwise when an answer follows",
                where=f"row {row}",
                fix="Use a template that only adds to what came before.",
            )
        return before, whole[len(before) :]

    def _template(self, row: int, messages: list[Any], **settings: bool) -> list[int]:
        try:
            found = self.tokenizer.apply_chat_template(
                for_template(messages), tokenize=True, **settings
            )
        except Exception as error:  # a template is a program, and may refuse what it is given
            raise DataError(
                f"row {row} cannot be written by the tokenizer's chat template",
                expected="messages with roles in an order that the template knows",
                found=f"{type(error).__name__}: {error}"[:200],
            ) from error
        return list(found["input_ids"] if isinstance(found, Mapping) else found)

    def _beginning(self, prompt: str) -> list[int]:
        """The tokens before an answer; at least one, if the tokenizer has any that could be it."""
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if not prompt:
            return [token for token in (begin, end) if token is not None][:1]
        tokens = list(self.tokenizer(prompt).input_ids)
        # Some tokenizers end whatever they encode.
        return tokens[:-1] if end is not None and tokens[-1:] == [end] else tokens

    def _padded(self, rows: Sequence[Mapping[str, Any]], name: str, value: int) -> Tensor:
        columns = [torch.tensor(row[name], dtype=torch.int64) for row in rows]
        return pad_sequence(columns, batch_first=True, padding_value=value)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Tokens padded on the right to the longest row: "input_ids", "attention_mask", "labels".

        Each is [B, L]; labels of sequence-to-sequence models have a length of their own.
        """
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        ids = self._padded(rows, "input_ids", int(self.tokenizer.pad_token_id))
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).to(torch.int64),
            "labels": self._padded(rows, "labels", IGNORED),
        }


class CausalLM(LanguageModelling):
    """Continue a prompt: GPT-2, Llama, Qwen, Mistral and their kin. See the class above."""

    name = "causal-lm"
    plain = True

    def answers(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """See :class:`LanguageModelling`: each token is predicted from those before it."""
        check_tokens(model, batch["input_ids"])
        output = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **_uncached(model)
        )
        logits = logits_of(output, model, "B, L, V")
        targets = batch["labels"][:, 1:]
        learned = targets != IGNORED
        # Of all logits only those that count are turned to float32: there are many.
        return logits[:, :-1][learned].float(), targets[learned]

    def prompt_of(self, row: Mapping[str, Any]) -> list[int]:
        """See :class:`LanguageModelling`."""
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        return [token for token, label in pairs if label == IGNORED]

    def prompts(self, prompts: Sequence[list[int]], device: torch.device) -> Batch:
        """See :class:`LanguageModelling`: padded on the left, where answers do not go on."""
        turned = [{"input_ids": tokens[::-1]} for tokens in prompts]
        ids = self._padded(turned, "input_ids", int(self.tokenizer.pad_token_id)).flip(1)
        places = torch.arange(ids.shape[1])
        lengths = torch.tensor([len(tokens) for tokens in prompts])
        mask = (places >= ids.shape[1] - lengths[:, None]).to(torch.int64)
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def answers_in(self, written: Tensor, batch: Batch) -> Tensor:
        """See :class:`LanguageModelling`: what comes after the prompt."""
        return written[:, batch["input_ids"].shape[1] :]

    def _encoded(self, number: int, prompt: Any, answer: Any) -> dict[str, list[int]]:
        before, after = self._tokens(number, prompt, answer)
        if len(before) >= self.max_length:
            raise _too_long(number, len(before), self.max_length)
        ids = (before + after)[: self.max_length]
        labels = [IGNORED] * len(before) + after
        return {"input_ids": ids, "labels": labels[: self.max_length]}


class Seq2Seq(LanguageModelling):
    """Turn a prompt into another text: T5 and its kin. See the class above."""

    name = "seq2seq"

    def answers(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """See :class:`LanguageModelling`."""
        check_tokens(model, batch["input_ids"])
        check_tokens(model, batch["labels"])
        labels = batch["labels"]
        output = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            decoder_input_ids=_shifted(model, labels), **_uncached(model),
        )  # fmt: skip
        logits = logits_of(output, model, "B, L, V")
        learned = labels != IGNORED
        return logits[learned].float(), labels[learned]

    def prompt_of(self, row: Mapping[str, Any]) -> list[int]:
        """See :class:`LanguageModelling`."""
        return list(row["input_ids"])

    def prompts(self, prompts: Sequence[list[int]], device: torch.device) -> Batch:
        """See :class:`LanguageModelling`."""
        rows = [{"input_ids": tokens, "labels": []} for tokens in prompts]
        batch = self.collate(rows)
        return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}

    def answers_in(self, written: Tensor, batch: Batch) -> Tensor:
        """See :class:`LanguageModelling`: all but the decoder's start."""
        return written[:, 1:]

    def _encoded(self, number: int, prompt: Any, answer: Any) -> dict[str, list[int]]:
        before, after = self._tokens(number, prompt, answer)
        end = self.tokenizer.eos_token_id
        source = before + ([] if end is None else [end])
        return {"input_ids": source[: self.max_length], "labels": after[: self.max_length]}


def _uncached(model: nn.Module) -> dict[str, bool]:
    """Nothing is generated here: keys and values need not be kept."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


def _shifted(model: nn.Module, labels: Tensor) -> Tensor:
    """What the decoder reads: the answer one place later, after its start token."""
    config: Any = model.config
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None:
        raise ConfigurationError(
            "The model does not say what its decoder starts with",
            expected="decoder_start_token_id in its config",
            found="none",
        )
    before = torch.full_like(labels[:, :1], start)
    shifted = torch.cat([before, labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, start if pad is None else pad)


def _bad_row(row: int, problem: str, expected: str, found: Any, name: str) -> DataError:
    return DataError(
        f"row {row} {problem}",
        expected=expected,
        found=str(found)[:60],
        where=f'column "{name}"',
        fix="Drop the row, or fill it.",
    )


def _too_long(row: int, length: int, most: int) -> DataError:
    return DataError(
        f"row {row} has a prompt that leaves no room for its answer",
        expected=f"a prompt of fewer than {most} tokens",
        found=str(length),
        fix="Raise max_length, or shorten the prompt.",
    )
