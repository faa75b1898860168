"""What may stand in each table of a configuration file."""

from __future__ import annotations

import dataclasses
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, Field, Strict, create_model

from fedveil.aggregation import Aggregation
from fedveil.hub.settings import Table, Word

__all__ = [
    "DataTable",
    "FederationTable",
    "PartitionTable",
    "PartnerTable",
    "PartnersTable",
    "table_of",
]

NONE = "none"
"""How a file says None, for which TOML has no word."""

AtLeastOne = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DataTable(Table):
    """[data]: where rows come from, and what their columns mean.

    Attributes:
        task: What the model is trained for.
        train: File or hub name of the rows that [partition] divides among clients.
        train_split: Split of a hub data set.
        train_limit: Use at most this many rows, drawn at random.
        test: File or hub name of the owner's test set; without it nothing is measured.
        test_split: Split of a hub data set.
        test_limit: Use at most this many rows, drawn at random.
        owner: File or hub name of the owner's own rows, with `public` in [model]: they say how much
            the owner's model is to learn.
        owner_split: Split of a hub data set.
        owner_limit: Use at most this many rows, drawn at random.
        tuned: File or hub name of the rows that the owner's model was tuned on, with [tuning].
        tuned_split: Split of a hub data set.
        tuned_limit: Use at most this many rows, drawn at random.
        variant: Variant of a hub data set, such as "sst2" of "nyu-mll/glue".
        revision: Branch, tag or commit of a hub data set. Sets that are made by a program can be
            read from "refs/convert/parquet" only.
        text: Column of texts.
        text_pair: Column of second texts, for tasks on pairs.
        image: Column of images.
        label: Column of classes: names or whole numbers.
        labels: All class names in order; by default those found, sorted.
        prompt: Column of prompts, of language models, or a template over columns, such as
            "Summarize: {dialogue}".
        completion: Column of their answers, or a template.
        messages: Column of conversations, instead of these two.
        references: Column of the test set with lists of all right answers, to score what the model
            writes; without it rows that ask the same are each other's.
        label_smoothing: Share of a target token that is spread over all tokens, in training.
        max_length: Tokens of a text that are read; of language models with its answer.
        transform: "module:function" applied to each image.
    """

    task: Literal["text-classification", "image-classification", "causal-lm", "seq2seq"] = (
        "text-classification"
    )
    train: Word | None = None
    train_split: Word | None = None
    train_limit: AtLeastOne | None = None
    test: Word | None = None
    test_split: Word | None = None
    test_limit: AtLeastOne | None = None
    owner: Word | None = None
    owner_split: Word | None = None
    owner_limit: AtLeastOne | None = None
    tuned: Word | None = None
    tuned_split: Word | None = None
    tuned_limit: AtLeastOne | None = None
    variant: Word | None = None
    revision: Word | None = None
    text: Word = "text"
    text_pair: Word | None = None
    image: Word = "image"
    label: Word = "label"
    labels: list[str] | None = None
    prompt: Word = "prompt"
    completion: Word = "completion"
    messages: Word = "messages"
    references: Word | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_length: AtLeastOne = 128
    transform: Word | None = None

    @property
    def has_classes(self) -> bool:
        """Whether the task is to tell classes apart."""
        return self.task.endswith("classification")


class PartitionTable(Table):
    """[partition]: how the rows of `train` are divided; see :func:`fedveil.hub.partition`."""

    how: Literal["iid", "dirichlet", "column"] = "iid"
    clients: AtLeastOne | None = None
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    column: Word | None = None
    min_size: AtLeastOne = 2
    seed: Seed | None = None


class FederationTable(Table):
    """[federation]: the run itself; see :class:`fedveil.Federation`.

    Attributes:
        rounds: Rounds in all.
        clients_per_round: Clients that take part in a round; all by default.
        releases: How many proxies one client may be sent in all rounds together.
        exposure_limit: Share of the model that one client may be shown in all rounds together.
        seed: Decides drawn subsets, and under the secret sampling, batch order and weights that
            begin at random; nothing secret.
        workers: Client processes.
        secret_file: Where the federation secret is; made on the first run.
        out: Run folder; "runs/" and the file's own name by default.
        keep_messages: Keep exactly the bytes that clients received and returned; "proxies" keeps
            those that they received.
        checkpoints: Of how many rounds checkpoints are kept.
        max_reply_mb: Megabytes (10^6 bytes) of one client's reply at most; by default what an
            honest one can be, which follows from what the client was sent.
        track: Where else the numbers of rounds go; see :func:`fedveil.report.watched`.
    """

    rounds: AtLeastOne = 1
    clients_per_round: AtLeastOne | None = None
    releases: AtLeastOne | None = None
    exposure_limit: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Seed = 0
    workers: AtLeastOne = 1
    secret_file: Word = "federation.secret"  # noqa: S105  the name of a file
    out: Word | None = None
    keep_messages: bool | Literal["proxies"] = False
    checkpoints: AtLeastOne = 3
    max_reply_mb: AtLeastOne | None = None
    track: list[Literal["tensorboard", "mlflow"]] | None = None


class PartnerTable(Table):
    """[partner]: whose file this is, if it is a client's and not the owner's.

    Attributes:
        name: What the owner calls the client.
        threads: Threads to train on. The sums of one are the same everywhere; more are faster.
        memory: Folder for what the client keeps from round to round, if the scheme wants it.
    """

    name: Word
    threads: AtLeastOne = 1
    memory: Word = "memory"


class PartnersTable(Table):
    """[partners]: clients on other machines; see :class:`fedveil.engine.patience.Patience`.

    Attributes:
        names: What clients are called.
        keys: Folder of the public keys of their SuperNodes, NAME.pub each.
        deadline: Seconds that a round takes at most if enough have answered by then.
        quorum: How many answers are enough; by default more than half.
        give_up: Seconds after which the owner stops waiting for enough of them.
    """

    names: Annotated[list[Word], Field(min_length=1)]
    keys: Word = "deployment/owner/keys"
    deadline: Seconds = 3600.0
    quorum: AtLeastOne | None = None
    give_up: Seconds = 86400.0


def table_of(settings: type) -> type[Table]:
    """The table whose keys are the fields of a settings dataclass, with their types and defaults.

    A field that may be None takes the word "none".
    """
    hints = get_type_hints(settings, include_extras=True)
    fields: dict[str, Any] = {}
    for field in (field for field in dataclasses.fields(settings) if field.init):
        fields[field.name] = (_as_written(hints[field.name]), _default(field))
    return create_model(settings.__name__, __base__=Table, **fields)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return Field(default_factory=field.default_factory)
    return ... if field.default is dataclasses.MISSING else field.default


def _as_written(hint: Any) -> Any:
    """The type that a value has in TOML: arrays for tuples, "none" for None."""
    if hint == Aggregation | str:
        return Any  # a word or a table of its own, which is read before
    if get_origin(hint) is tuple:
        return Annotated[hint, Strict(False)]
    if get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint):
        return Annotated[hint, BeforeValidator(lambda value: None if value == NONE else value)]
    return hint
