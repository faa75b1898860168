"""A client's half on its own machine: a Flower ClientApp that trains proxies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedveil.engine.crew import Job, threads
from fedveil.engine.in_process import Workplace, work
from fedveil.errors import FedveilError, ProtocolError, WireError
from fedveil.flower.agreement import check_agreement
from fedveil.flower.payload import pack, unpack
from fedveil.log import LOG
from fedveil.wire import Message as Wire

__all__ = ["Partner", "answer", "client_app"]


@dataclass(frozen=True)
class Partner:
    """What one client has on its machine.

    Attributes:
        name: What the owner calls it.
        place: Its architecture, task and data: trainers for its own name.
        threads: Threads to train on. The sums of one are the same everywhere; more are faster, and
            differ in the last bits.
        settings: What it must have in common with the owner; see
            :func:`~fedveil.flower.agreement.settings_of`. What is not there is not compared.
    """

    name: str
    place: Workplace
    threads: int = 1
    settings: Mapping[str, object] = field(default_factory=dict)


def client_app(partner: Callable[[Context], Partner]) -> ClientApp:
    """A ClientApp that trains whatever proxy it is sent, and returns the update.

    Whatever goes wrong, the server is told its kind and nothing of what an error said: that may
    quote the client's data. The client's own log has it all.

    Args:
        partner: Finds what this client has; called for every message; Flower's own programs are
            a new process each.

    Does NOT protect the client's data from the server: see the scheme.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = answer(lambda: pack(_train(message, partner(context))))
        return Message(content=content, reply_to=message)

    @app.query()
    def name(message: Message, context: Context) -> Message:
        try:
            facts = {"client": partner(context).name}
        except Exception:
            LOG.exception("This client is not set up")
            facts = {}
        return Message(content=pack(None, facts), reply_to=message)

    return app


def answer(train: Callable[[], RecordDict]) -> RecordDict:
    """What ``train`` returns; or, whatever goes wrong in it, no more than the kind of its error."""
    try:
        return train()
    except Exception as error:
        LOG.exception("This round's training failed")
        kind = type(error).__name__ if isinstance(error, FedveilError) else "other"
        return pack(None, {"failure": kind})


def _train(message: Message, partner: Partner) -> bytearray | memoryview:
    """The update that a proxy becomes.

    Raises:
        FedveilError: The message is none, or for another client; the owner has other settings; or
            training failed.
    """
    data, facts = unpack(message.content)
    seed = facts.get("seed")
    if data is None or not isinstance(seed, int):
        raise WireError("A message has no proxy", expected="a proxy and a seed")
    # Whoever is sent what is another's must not use it: masks are per client.
    addressed = Wire.from_bytes(data).client
    if addressed != partner.name:
        raise ProtocolError(
            "A proxy is for another client", expected=partner.name, found=addressed[:80]
        )
    check_agreement(facts.get("settings"), partner.settings)
    with threads(partner.threads):
        answer = work(partner.place, Job(partner.name, bytearray(data), seed), Wire.to_bytes)
    if answer.reply is None:
        raise answer.failure or ProtocolError("Training gave no update")
    return answer.reply
