"""One round in small before the first, so that what would fail at every client fails here."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, replace

import torch
from torch import nn

from fedveil.engine.crew import Job, threads
from fedveil.engine.in_process import OUT_OF_MEMORY, Workplace, work
from fedveil.engine.rounds import MEASURING_THREADS
from fedveil.engine.sending import bytes_of_tensors
from fedveil.errors import FedveilError, TrainingError
from fedveil.schemes import Scheme
from fedveil.secret import Secret
from fedveil.tasks import Prepared
from fedveil.training import Trainer, Training
from fedveil.training.modes import seeded
from fedveil.training.trainer import trained_names
from fedveil.wire import Limits, Message, reply_limits

__all__ = ["Preflight"]

_ROWS = 4
_CLIENT = "preflight"
_MASKS = Secret(bytes(32))
"""Of masks that are drawn and thrown away: nobody is sent anything that they cut."""


@dataclass(frozen=True)
class Preflight:
    """Tries what clients will do, where it harms nobody.

    A proxy is made of the model as clients get theirs, under a secret of its own; it goes through
    the bytes of the wire, is trained for one step on a few rows, and its update is checked and
    added to a sum that is thrown away. Nothing of it is released, kept, or counted as shown; the
    random generators go on as if there had been none of it.

    Does NOT find: what only some clients' rows, or more than a few of them at once, bring about.

    Attributes:
        scheme: Of the federation.
        model: What proxies are of. It is not changed.
        place: What clients have; its architecture is trained in.
        training: How clients train.
        rows: Some that the owner may use; None if there are none.
        here: Whether clients work on this machine, with its memory.
        processes: Whether they do so in processes of their own.
    """

    scheme: Scheme
    model: nn.Module
    place: Workplace
    training: Training
    rows: Prepared | None
    here: bool
    processes: bool

    def run(self) -> str:
        """Try it.

        Returns:
            Why a round was not tried; empty if it was.

        Raises:
            FedveilError: No client could train, or none of its updates be used.
        """
        trained_names(self.place.architecture, self.training)
        if self.processes:
            bytes_of_tensors(self.place)
        if not self.rows:
            return "the owner has no rows (a test set, or others of its own)"
        try:
            with seeded(0, torch.device("cpu")), threads(MEASURING_THREADS):
                self._round(self.rows)
        except FedveilError as error:
            if error.problem == OUT_OF_MEMORY and not self.here:
                return "this machine has too little memory to train"
            raise _said(error) from error
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            failure = TrainingError(
                "A round cannot be run with this model",
                found=f"{type(error).__name__}: {error}",
                where=f"{frame.filename}:{frame.lineno}",
            )
            raise _said(failure) from error
        return ""

    def _round(self, rows: Prepared) -> None:
        small = _small(self.training)
        some = rows.part([n % len(rows) for n in range(small.batch_size)])
        server = self.scheme.server(self.model, _MASKS)
        server.begin_round(1)
        message = server.release(_CLIENT)
        limits = reply_limits(message, self.scheme.beside(self.model))
        trainer = Trainer(self.place.task, some, small)
        place = replace(self.place, trainers={_CLIENT: trainer}, test=None, memories=None)
        reply = _answered(place, message, limits)
        server.inspect(_CLIENT, reply)
        server.absorb(_CLIENT, reply, 1.0)


def _answered(place: Workplace, message: Message, limits: Limits) -> Message:
    """A client's reply, by way of bytes in both directions.

    Raises:
        FedveilError: There is none.
    """
    answer = work(place, Job(_CLIENT, message.to_bytes(), 0), Message.to_bytes)
    if answer.reply is None:
        raise answer.failure or TrainingError("Training gave no update")
    return Message.from_bytes(bytearray(answer.reply), limits=limits)


def _small(training: Training) -> Training:
    """One step on a few rows, in pieces if the client's are."""
    pieces = min(2, training.gradient_accumulation_steps)
    whole = -(-training.batch_size // training.gradient_accumulation_steps)
    rows = pieces * min(whole, _ROWS // pieces)
    return replace(
        training, steps=1, epochs=None, batch_size=rows, gradient_accumulation_steps=pieces
    )


def _said(error: FedveilError) -> FedveilError:
    """The error, which says that it is not too late."""
    fix = f"{error.fix} Nothing has been released: this was tried on a few rows here.".strip()
    return error.within(fix=fix)
