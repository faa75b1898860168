"""Clients that answer as they like, through the engine and its bytes."""

import dataclasses
from collections.abc import Callable

from fedveil.engine.crew import Answer
from fedveil.engine.in_process import InTurn
from fedveil.wire import Dense, Message


@dataclasses.dataclass
class Liars(InTurn):
    """Clients in turn, of whom some alter their honest replies."""

    lies: dict[str, Callable[[Message], Message]] = dataclasses.field(default_factory=dict)

    def answers(self, jobs):
        for answer in super().answers(jobs):
            lie = self.lies.get(answer.client)
            if lie is None or answer.reply is None:
                yield answer
            else:
                reply = lie(Message.from_bytes(bytearray(answer.reply))).to_bytes()
                yield Answer(answer.client, reply, None, answer.before, answer.after)


def run_with(federation, lies, rounds=1, **words):
    """A run of a federation, some of whose clients lie."""
    crew = Liars(federation.workplace(), lies=lies)
    return federation.run(rounds, crew=crew, **words)


def claiming(examples):
    """Lies about how many examples a client has."""

    def lie(reply):
        return dataclasses.replace(reply, scalars={**reply.scalars, "examples": examples})

    return lie


def times(factor):
    """Sends its update so many times larger."""

    def lie(reply):
        larger = {
            name: Dense(section.tensor * factor) if isinstance(section, Dense) else section
            for name, section in reply.sections.items()
        }
        return dataclasses.replace(reply, sections=larger)

    return lie


def filled(value):
    """Sends the same value in the place of every change."""

    def lie(reply):
        same = {
            name: Dense(section.tensor * 0 + value) if isinstance(section, Dense) else section
            for name, section in reply.sections.items()
        }
        return dataclasses.replace(reply, sections=same)

    return lie
