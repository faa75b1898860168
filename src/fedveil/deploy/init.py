"""Writes the folders of a deployment: one for the owner, one for each client."""

from __future__ import annotations

import dataclasses
import ipaddress
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w
from torch import nn

from fedveil.config import Config, build, open_secret
from fedveil.config.classes import settled_classes
from fedveil.config.tables import NONE
from fedveil.deploy.architecture import (
    check_tokenizer,
    given_to_clients,
    save_architecture,
    save_tokenizer,
)
from fedveil.deploy.files import to_toml, write_program, write_public
from fedveil.deploy.functions import check_function
from fedveil.deploy.keys import write_certificates, write_node_key
from fedveil.errors import ConfigurationError
from fedveil.hub.adapters import saved_whole
from fedveil.hub.settings import RANDOM, is_function

__all__ = ["PROGRAMS", "Address", "programs_of", "write_deployment"]

_ARCHITECTURE, _TOKENIZER = "architecture", "tokenizer"
_CONTAINERS = ("Dockerfile", "compose.yaml")
PROGRAMS = ("supernode.sh", "supernode.service", *_CONTAINERS)
"""A client's files that are run, or say what is run."""
_NODE_PORT = 9094
"""Of a SuperNode, on the client's own machine."""
_OF_THE_OWNERS_BASE = ("auto_mapping", "base_model_name_or_path", "revision")
_DATA = ("task", "text", "text_pair", "image", "label", "labels", "max_length",
         "transform", "prompt", "completion", "messages", "label_smoothing")  # fmt: skip


@dataclass(frozen=True)
class Address:
    """Where clients find the owner.

    Attributes:
        host: A name or an IP address.
        port: Of the SuperLink.
        public_port: Of what stands in front of it; as ``port`` if nothing does.
    """

    host: str
    port: int = 9092
    public_port: int = 443

    @property
    def is_local(self) -> bool:
        """Whether everything is on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def superlink(self) -> str:
        """What SuperNodes are told."""
        return f"{self.host}:{self.port if self.is_local else self.public_port}"


def write_deployment(config: Config, address: Address, out: Path) -> list[Path]:
    """Keys, certificates, settings, programs and instructions for all sides.

    Args:
        config: The owner's file, with [partners].
        address: Where clients find the owner.
        out: A new folder.

    Returns:
        The folders: the owner's, then one for each client.

    Does NOT carry the clients' folders to them: that takes a way that both sides trust, since each
    holds a private key.

    Raises:
        ConfigurationError: The file has no [partners], or something is there already.
        FedveilError: Model or test set cannot be loaded.
    """
    if config.partners is None:
        raise ConfigurationError(
            "The file names no clients on other machines",
            expected="a table [partners] with their names",
            where=str(config.path),
        )
    owner = out / "owner"
    if out.exists() and any(out.iterdir()):
        raise ConfigurationError(
            "The folder of the deployment is not empty",
            where=str(out),
            fix="Choose another, or remove it: clients then need their new folders.",
        )
    if config.resolve(config.partners.keys).absolute() != (owner / "keys").absolute():
        raise ConfigurationError(
            "The clients' keys would not be where the owner's file says",
            expected=f'keys = "{owner / "keys"}" in [partners]',
            found=repr(config.partners.keys),
            where=str(config.path),
        )
    check_tokenizer(config)
    model = build(config).released  # says now what is wrong with the file
    check_function(config, model)
    open_secret(config)
    certificate = write_certificates(owner / "tls", address.host)
    _write_owner(config, address, owner)
    folders = [owner]
    for name, port in zip(config.partners.names, _node_ports(address), strict=False):
        folders.append(out / name)
        write_node_key(out / name / "node.key", owner / "keys" / f"{name}.pub", name)
        write_public(out / name / "ca.crt", certificate)
        _write_partner(config, address, model, name, port, out / name)
    return folders


def _node_ports(address: Address) -> Iterator[int]:
    """One for each client: the same for all, but where all of them are on this machine."""
    if not address.is_local:
        return itertools.repeat(_NODE_PORT)
    return (port for port in itertools.count(_NODE_PORT) if port != address.port)


def _write_owner(config: Config, address: Address, owner: Path) -> None:
    assert config.partners is not None
    words = {
        "federation": config.path,
        "bin": Path(sys.executable).parent,
        "listen": "127.0.0.1",
        "port": address.port,
        "public_port": address.public_port,
        "host": address.host,
        "address": f"{address.host if address.is_local else '127.0.0.1'}:{address.port}",
        "ca": str((owner / "tls" / "ca.crt").absolute()),
        "folder": owner.absolute(),
        "names": ", ".join(config.partners.names),
        "given": "\n".join(f"- {line}" for line in given_to_clients(config))
        or "- nothing of yours",
        "out": config.out,
        "secret": config.secret_path,
        **_container_words(address),
        "mounts": _mounts(config.path.parent, config.out, config.secret_path.parent, owner),
    }
    for name in ("superlink.sh", "start.sh"):
        write_program(owner / name, _filled(f"owner/{name}", words))
    for name in ("superlink.service", "nginx.conf", "README.md"):
        write_public(owner / name, _filled(f"owner/{name}", words))
    if not address.is_local:  # each container has a 127.0.0.1 of its own
        for name in _CONTAINERS:
            write_public(owner / name, _filled(f"owner/{name}", words))
    flower = {"address": words["address"], "root-certificates": words["ca"]}
    known = {"superlink": {"default": "owner", "owner": flower}}
    write_public(owner / "flwr" / "config.toml", tomli_w.dumps(known))
    write_public(owner / "app" / "pyproject.toml", _filled("owner/pyproject.toml", words))


def _write_partner(
    config: Config, address: Address, model: nn.Module, name: str, port: int, folder: Path
) -> None:
    words = {
        "name": name,
        "superlink": address.superlink,
        "port": port,
        **_container_words(address),
    }
    for file, text in programs_of(name, address.superlink, port).items():
        if file.endswith(".sh"):
            write_program(folder / file, text)
        elif not address.is_local or file not in _CONTAINERS:
            write_public(folder / file, text)
    write_public(folder / "README.md", _filled("partner/README.md", words))
    write_public(folder / "partner.toml", _partner_file(config, model, name))
    if _is_saved(config):
        save_architecture(config, model, folder / _ARCHITECTURE)
    elif _is_tokenizer_saved(config):
        save_tokenizer(config, folder / _TOKENIZER)
    for module in _modules(config):
        write_public(folder / module.name, module.read_bytes())


def _modules(config: Config) -> set[Path]:
    """Files of code that a client's settings name; other functions are of installed packages."""
    given = (_released(config), config.data.transform, config.model.rule)
    names = [name for name in given if name is not None]
    files = (f"{name.partition(':')[0]}.py" for name in names if is_function(name))
    return {config.path.parent / file for file in files if (config.path.parent / file).is_file()}


def programs_of(name: str, superlink: str, port: int) -> dict[str, str]:
    """A client's files that are run, or say what is run, as this fedveil writes them.

    Args:
        name: What the owner calls the client.
        superlink: The "host:port" that its SuperNode connects to.
        port: That its SuperNode opens on its own machine.
    """
    words = {
        "name": name,
        "superlink": superlink,
        "port": port,
        "version": version("fedveil"),
    }
    return {file: _filled(f"partner/{file}", words) for file in PROGRAMS}


def _released(config: Config) -> str:
    """The name of what clients train: not that of the owner's model, if another is released."""
    public = config.model.public
    return config.model.name if public is None or public == RANDOM else public


def _is_saved(config: Config) -> bool:
    """Whether clients are given the architecture, rather than a name under which they have it."""
    return not is_function(_released(config)) and not config.scheme.clients_hold_rest


def _is_tokenizer_saved(config: Config) -> bool:
    """Whether a tokenizer is named that is a folder of the owner's, and not known by that name."""
    named = config.model.tokenizer
    return named is not None and (config.path.parent / Path(named).expanduser()).is_dir()


def _told(name: str) -> str:
    """What clients call a model that they hold: no path of the owner's machine."""
    path = Path(name)
    elsewhere = path.is_absolute() or path.parts[:1] in (("..",), ("~",)) or name.startswith("~")
    return path.name if elsewhere else name


def _partner_file(config: Config, released: nn.Module, name: str) -> str:
    """A client's partner.toml: nothing in it that a client need not know."""
    model: dict[str, Any] = {"name": _told(_released(config))}
    if _is_saved(config):
        model["name"] = _ARCHITECTURE
    elif _is_tokenizer_saved(config):
        model["tokenizer"] = _TOKENIZER
    elif config.model.tokenizer is not None:
        model["tokenizer"] = config.model.tokenizer
    if (classes := _classes(config)) is not None:
        model["num_labels"] = classes
    if config.model.lora is not None:
        model["lora"] = {k: v for k, v in config.model.lora.items() if k not in _OF_THE_OWNERS_BASE}
        if whole := saved_whole(released):  # without weights nobody there sees what is new
            model["lora"]["modules_to_save"] = whole
    if config.scheme.clients_hold_rest and config.model.new_head and not config.model.public:
        model["new_head"] = True
    if config.model.rule is not None:
        model["rule"] = config.model.rule
    if config.model.dtype != "float32":
        model["dtype"] = config.model.dtype
    data = {key: value for key, value in config.data.model_dump().items() if key in _DATA}
    scheme = _settings(config.scheme)
    known = {name: scheme[name] for name in scheme if name in config.scheme.client_fields}
    tables = {
        "partner": {"name": name, "threads": 1},
        "model": model,
        "data": {"train": "data.csv", **data},
        "scheme": {"name": config.scheme.name, **known},
        "training": _settings(config.training),
    }
    head = f"# What {name} has. Change `train` in [data] to where your data are.\n"
    return head + to_toml(tables)


def _classes(config: Config) -> int | None:
    """How many classes a client's model has where its labels do not say; names stay here."""
    labels = config.data.labels
    if config.model.num_labels is not None or labels is None or not config.data.has_classes:
        return config.model.num_labels
    count = len(settled_classes(config, labels))
    return None if count == len(labels) else count


def _settings(values: Any) -> dict[str, Any]:
    """The fields of a settings dataclass as a file says them: None is a word where something else
    would be meant by silence."""
    written = {}
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        written[field.name] = NONE if value is None and field.default is not None else value
    return written


def _container_words(address: Address) -> dict[str, str]:
    see = "" if address.is_local else ", or see `compose.yaml`"
    return {"version": version("fedveil"), "containers": see}


def _mounts(*folders: Path) -> str:
    """Lines of a compose file that mount folders where they are, those inside others left out."""
    paths = {folder.absolute() for folder in folders}
    outer = sorted(path for path in paths if not paths & set(path.parents))
    return "\n".join(f"      - {path}:{path}" for path in outer)


def _filled(template: str, words: Mapping[str, object]) -> str:
    """A template with its words; every word in double braces must be known."""
    text = files("fedveil.deploy").joinpath("templates", *template.split("/")).read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: str(words[found[1]]), text)
