"""A client's program that stays up: it takes messages from the SuperNode and runs no app.

Flower's way is to install the app that came with a message and to start it in a new process. Here
the installed fedveil answers, with model and data that are ready since the program began.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedveil.errors import FedveilError, ProtocolError
from fedveil.flower.bundle import check_bundle
from fedveil.flower.client import Partner, client_app
from fedveil.flower.payload import unpack
from fedveil.flower.runtime import Assignment, LostError, failed, refused
from fedveil.log import LOG
from fedveil.schemes.client import examples_of
from fedveil.wire import Message as Update

__all__ = ["Source", "StopServing", "serve"]

_POLL = 0.5
"""Seconds between two looks for a message."""
_LONGEST = 10.0
"""Seconds between two looks for a SuperNode that is not there."""
_LAST = 2.0
"""Seconds for which a last reply is tried, when the program is to end."""


class StopServing(BaseException):
    """The program is to end: raised by a signal, out of whatever is being done."""


class Source(Protocol):
    """Where messages come from: :class:`~fedveil.flower.runtime.Runtime`."""

    def take(self) -> Assignment | None:
        """The next message, or None; LostError if nobody can be asked."""


def serve(partner: Partner, source: Source) -> None:
    """Answer messages one at a time, until :class:`StopServing` is raised.

    Whatever fails costs that reply. A message of an app that is not fedveil's own is answered with
    an error that says no more than that, and this client's log says what was found.

    Args:
        partner: What this client has, loaded once: who changes its file or its data starts anew.
        source: Where messages come from.

    Does NOT protect the client's data from what updates tell of them: see the scheme. The owner
    decides what the model is that arrives, and how often it asks.
    """
    app = client_app(lambda context: partner)
    pause, waiting, lost = threading.Event(), _POLL, False
    while True:
        try:
            found = source.take()
        except LostError as problem:
            if not lost:
                LOG.warning("Waiting for the SuperNode: %s", problem)
            lost = True
            pause.wait(waiting)
            waiting = min(2 * waiting, _LONGEST)
            continue
        if lost:
            LOG.info("The SuperNode is there")
        waiting, lost = _POLL, False
        if found is None:
            pause.wait(_POLL)
        else:
            _attend(app, found)


def _attend(app: ClientApp, found: Assignment) -> None:
    """Answer one message."""
    with found:
        try:
            message, context, bundle = found.open()
            try:
                reply = _reply(app, found, message, context, bundle)
                trained = _trained(reply)
                found.answer(reply)
                if trained:
                    LOG.info("%s, update sent", trained)
            except StopServing:
                with suppress(LostError):  # both programs are told to end, and it may be gone
                    found.answer(failed(message, "stopped"), _LAST)
                raise
        except LostError as problem:
            LOG.warning("Run %d: a reply is lost: %s", found.run, problem)


def _trained(reply: Message) -> str:
    """What a reply's update says of the training behind it; empty if it holds none."""
    with suppress(FedveilError):
        data = unpack(reply.content)[0] if reply.has_content() else None
        if data is not None:
            update = Update.from_bytes(data)
            return f"round {update.round}: trained on {examples_of(update)} examples"
    return ""


def _reply(
    app: ClientApp, found: Assignment, message: Message, context: Context, bundle: bytes
) -> Message:
    """The reply to a message, whatever goes wrong."""
    try:
        _check(found, bundle)
    except ProtocolError as problem:
        LOG.error("Run %d is refused, and nothing of its app was run. %s", found.run, problem)
        with suppress(Exception):  # what comes is not looked at, but a SuperNode must be rid of it
            found.content()
        return refused(message)
    try:
        return app(found.content(), context)
    except LostError:
        raise
    except Exception as error:
        LOG.exception("Run %d: a message could not be answered", found.run)
        kind = type(error).__name__ if isinstance(error, FedveilError) else "other"
        return failed(message, kind)


def _check(found: Assignment, bundle: bytes) -> None:
    """Raise ProtocolError for an app that is not fedveil's own."""
    if not found.is_client:
        raise ProtocolError(
            "The app is not fedveil's own", expected="one with a client", found="an agent"
        )
    check_bundle(bundle)
