"""Reading a configuration file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedveil.aggregation import AGGREGATIONS, RegMean
from fedveil.config.problems import Problems
from fedveil.config.tables import (
    DataTable,
    FederationTable,
    PartitionTable,
    PartnersTable,
    PartnerTable,
    table_of,
)
from fedveil.engine import Bounds, Evaluation
from fedveil.errors import ConfigurationError
from fedveil.hub.settings import ModelTable, Table
from fedveil.schemes import FedQSN, Scheme, scheme_class, scheme_names
from fedveil.training import Generation, Training

__all__ = ["Config", "load_config"]

_TABLES = (
    "model",
    "data",
    "partition",
    "clients",
    "partner",
    "partners",
    "scheme",
    "training",
    "tuning",
    "evaluation",
    "bounds",
    "generation",
    "federation",
)
_PRESETS: Mapping[str, Mapping[str, Callable[..., Scheme]]] = {
    "fedqsn": {"paper": FedQSN.paper, "once": FedQSN.once}
}


@dataclass(frozen=True)
class Config:
    """A federation as its file describes it. Data and model have not been looked for yet.

    Attributes:
        path: The file.
        model: What is fine-tuned.
        data: Where rows come from.
        partition: How the training rows are divided; None if `clients` names files.
        clients: One file per client; empty if the rows are divided.
        partners: Clients on other machines; None if all data are here.
        partner: Whose file this is, if it is a client's; None in an owner's.
        scheme: The method.
        scheme_name: What to call it in reports: its name, and its preset if one was chosen.
        training: How clients train.
        tuning: How the owner tuned its model, repeated on what clients taught; or None.
        evaluation: What is measured.
        bounds: How much one client may weigh and change.
        generation: How the tuned model answers the test set's prompts; None if it is not asked.
        federation: The run.
        is_rehearsal: Whether tiny models stand in for those that are named: a dry run.
    """

    path: Path
    model: ModelTable
    data: DataTable
    partition: PartitionTable | None
    clients: Mapping[str, str]
    partners: PartnersTable | None
    partner: PartnerTable | None
    scheme: Scheme
    scheme_name: str
    training: Training
    tuning: Training | None
    evaluation: Evaluation
    bounds: Bounds
    generation: Generation | None
    federation: FederationTable
    is_rehearsal: bool = False

    @property
    def secret_path(self) -> Path:
        """Where the federation secret is."""
        return self.resolve(self.federation.secret_file)

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.resolve(self.federation.out or f"runs/{self.path.stem}")

    def whose(self) -> PartnerTable:
        """Whose file this is.

        Raises:
            ConfigurationError: An owner's.
        """
        if self.partner is None:
            raise ConfigurationError(
                "This is no client's file",
                expected="a table [partner] with the client's name",
                found="none",
                where=str(self.path),
            )
        return self.partner

    def resolve(self, name: str) -> Path:
        """A path as the file means it: relative to the file."""
        return self.path.parent / Path(name).expanduser()

    def change(self, **changes: Any) -> Config:
        """The same with other values in [federation]; None leaves a value as it is."""
        wanted = {key: value for key, value in changes.items() if value is not None}
        problems = Problems(str(self.path))
        values = {**self.federation.model_dump(), **wanted}
        federation = _read(FederationTable, "federation", values, problems)
        problems.raise_any()
        return dataclasses.replace(self, federation=federation)


def load_config(path: str | Path) -> Config:
    """Read and check a configuration file.

    Raises:
        ConfigurationError: Everything that is wrong with it, each with its table and key.
    """
    path = Path(path).absolute()
    raw, problems = _parse(path), Problems(path.name)
    for name, value in raw.items():
        if name not in _TABLES:
            problems.add_unknown("table" if isinstance(value, dict) else "key", "", name, _TABLES)
        elif not isinstance(value, dict):
            problems.add("Not a table", name, found=repr(value), fix=f"Write [{name}] above it.")
    tables = {name: raw[name] if isinstance(raw.get(name), dict) else {} for name in _TABLES}
    if {"lora", "adapter"} <= tables["model"].keys():
        problems.add("Two adapters", "model", fix="Leave out `lora` or `adapter`.")
    if {"public", "adapter"} <= tables["model"].keys():
        problems.add(
            "An adapter of your own is not the public model's", "model", "public",
            fix="Merge it into the model first (PEFT's merge_and_unload), and train a new one "
            "with `lora`; or leave `public` out.",
        )  # fmt: skip
    if "public" in tables["model"] and tables["model"]["public"] == tables["model"].get("name"):
        problems.add(
            "The public model is the owner's own, which would be released as it is",
            "model", "public",
            fix='Name what it was fine-tuned from, or "random".',
        )  # fmt: skip
    if ("public" in tables["model"]) != ("owner" in tables["data"]) and "partner" not in raw:
        lacking = ("data", "owner") if "public" in tables["model"] else ("model", "public")
        problems.add(
            "A key is missing", *lacking,
            expected="`public` in [model] and `owner` in [data], both or neither",
            fix="Where a public model is released, the owner's data say how much its own learns.",
        )  # fmt: skip
    data = _read(DataTable, "data", tables["data"], problems)
    partition = _read(PartitionTable, "partition", tables["partition"], problems)
    if "scheme" in raw:
        scheme, scheme_name = _read_scheme(tables["scheme"], problems)
    else:
        scheme, scheme_name = FedQSN.default(of_public="public" in tables["model"]), "fedqsn-once"
    if data is not None and partition is not None:
        _check_sources(tables, data, partition, problems)
    config = Config(
        path=path,
        model=_read(ModelTable, "model", tables["model"], problems),
        data=data,
        partition=partition if data is not None and _is_divided(raw, data) else None,
        clients=_read_clients(tables["clients"], problems),
        partners=_read_if(PartnersTable, "partners", raw, tables, problems),
        partner=_read_if(PartnerTable, "partner", raw, tables, problems),
        scheme=scheme,
        scheme_name=scheme_name,
        training=_read_settings(Training, "training", tables["training"], problems),
        tuning=_read_tuning(raw, tables, problems),
        evaluation=_read_settings(Evaluation, "evaluation", tables["evaluation"], problems),
        bounds=_read_settings(Bounds, "bounds", tables["bounds"], problems),
        generation=_read_generation(raw, data, problems),
        federation=_read(FederationTable, "federation", tables["federation"], problems),
    )
    problems.raise_any()
    return config


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError("There is no such file", where=str(path)) from None
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(
            "The file cannot be read", found=f"{error}".rstrip("."), where=str(path)
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(
            "This is not TOML", found=f"{error}".rstrip("."), where=str(path)
        ) from error


def _read(kind: type[Table], table: str, values: Mapping[str, Any], problems: Problems) -> Any:
    """The checked table; None only if a problem was noted."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems.add_all(table, error, list(kind.model_fields))
        return None


def _read_if(
    kind: type[Table],
    name: str,
    raw: Mapping[str, Any],
    tables: Mapping[str, Mapping[str, Any]],
    problems: Problems,
) -> Any:
    """The checked table if the file has it, else None."""
    return _read(kind, name, tables[name], problems) if name in raw else None


def _read_settings(
    kind: Callable[..., Any],
    table: str,
    values: Mapping[str, Any],
    problems: Problems,
    *,
    fields_of: type | None = None,
) -> Any:
    """Settings made by ``kind`` from a table whose keys are the fields of a dataclass."""
    settings = fields_of or kind
    assert isinstance(settings, type)
    checked = _read(table_of(settings), table, values, problems)
    if checked is None:
        return None
    try:
        return kind(**{key: getattr(checked, key) for key in checked.model_fields_set})
    except ConfigurationError as error:
        problems.add_refused(table, error)
        return None


def _read_scheme(values: Mapping[str, Any], problems: Problems) -> tuple[Any, str]:
    fields = dict(values)
    name, preset = fields.pop("name", FedQSN.name), fields.pop("preset", None)
    if name not in scheme_names():
        problems.add_unknown("scheme", "scheme", str(name), scheme_names())
        return None, ""
    if isinstance(aggregation := fields.get("aggregation"), dict):
        fields["aggregation"] = _read_aggregation(aggregation, problems)
    kind = scheme_class(name)
    if preset is None:
        return _read_settings(kind, "scheme", fields, problems), name
    presets = _PRESETS.get(name, {})
    if preset not in presets:
        problems.add(
            f"The scheme {name!r} has no such preset", "scheme", "preset",
            expected=" or ".join(map(repr, presets)) or "none at all", found=repr(preset),
        )  # fmt: skip
        return None, ""
    scheme = _read_settings(presets[preset], "scheme", fields, problems, fields_of=kind)
    return scheme, f"{name}-{preset}"


def _read_aggregation(values: Mapping[str, Any], problems: Problems) -> Any:
    """The table [scheme.aggregation]."""
    fields = dict(values)
    name = fields.pop("name", RegMean().name)
    if name not in AGGREGATIONS:
        problems.add_unknown("aggregation", "scheme.aggregation", str(name), AGGREGATIONS)
        return "mean"
    read = _read_settings(AGGREGATIONS[name], "scheme.aggregation", fields, problems)
    return "mean" if read is None else read


def _read_generation(raw: Mapping[str, Any], data: DataTable | None, problems: Problems) -> Any:
    """The table [generation]: keys of ours, and those of transformers.GenerationConfig."""
    values = raw.get("generation")
    if not isinstance(values, dict):
        return None
    own = {field.name for field in dataclasses.fields(Generation)} - {"settings"}
    fields: dict[str, Any] = {name: value for name, value in values.items() if name in own}
    fields["settings"] = {name: value for name, value in values.items() if name not in own}
    if data is not None and data.has_classes:
        problems.add("Classifiers write nothing", "generation", fix="Leave [generation] out.")
    elif data is not None and data.test is None:
        problems.add("There is nothing to answer", "generation", fix="Name a `test` in [data].")
    return _read_settings(Generation, "generation", fields, problems)


def _read_tuning(
    raw: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]], problems: Problems
) -> Any:
    """The table [tuning], which belongs to `tuned` in [data] and to a public model."""
    given, has_rows = "tuning" in raw, "tuned" in tables["data"]
    if given != has_rows:
        problems.add(
            "A key is missing" if given else "A table is missing",
            *(("data", "tuned") if given else ("tuning",)),
            expected="`tuned` in [data] and a table [tuning], both or neither",
            fix="They say on which rows the owner's model was tuned, and how.",
        )
    elif given and "public" not in tables["model"]:
        problems.add(
            "The owner's tuning is repeated on what clients teach a public model", "tuning",
            fix="Name `public` in [model], or leave [tuning] and `tuned` out.",
        )  # fmt: skip
    return _read_settings(Training, "tuning", tables["tuning"], problems) if given else None


def _read_clients(values: Mapping[str, Any], problems: Problems) -> dict[str, str]:
    for name, file in values.items():
        if not isinstance(file, str) or not file:
            problems.add(
                "A client needs one file", "clients", name, expected="text", found=repr(file)
            )
    return dict(values)


def _is_divided(raw: Mapping[str, Any], data: DataTable) -> bool:
    return data.train is not None and "partner" not in raw


def _check_sources(
    tables: Mapping[str, Any], data: DataTable, partition: PartitionTable, problems: Problems
) -> None:
    """One data set is divided, or each client has a file, or clients are on other machines."""
    clients, partners, partner = (tables[name] for name in ("clients", "partners", "partner"))
    given = {"train": data.train, "[clients]": clients, "[partners]": partners}
    found = [name for name, value in given.items() if value]
    if len(found) != 1:
        problems.add(
            "It is not clear what the clients train on", "data",
            expected="one of: `train`, divided by [partition]; [clients] with one file each; "
            "[partners] with the names of clients on other machines",
            found=" and ".join(found) or "none of them",
        )  # fmt: skip
    if (clients or partners or partner) and tables["partition"]:
        problems.add("There is nothing to divide", "partition", fix="Leave [partition] out.")
    if (partners or partner) and data.labels is None and data.has_classes:
        problems.add(
            "A key is missing", "data", "labels", expected="all class names in order",
            fix="Machines that do not see each other's data must number classes alike.",
        )  # fmt: skip
    is_divided = data.train is not None and not partner
    if is_divided and partition.how != "column" and partition.clients is None:
        problems.add("A key is missing", "partition", "clients", expected="a number of clients")
    most = len(clients) or len(partners.get("names") or ()) or partition.clients
    asked = tables["federation"].get("clients_per_round")
    if isinstance(asked, int) and most and asked > most:
        problems.add(
            "More clients per round than there are", "federation", "clients_per_round",
            expected=f"at most {most}", found=str(asked),
        )  # fmt: skip
