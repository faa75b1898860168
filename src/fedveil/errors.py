"""Every error that fedveil raises on purpose.

FedveilError
├── ConfigurationError         a setting is impossible, unknown or contradicts another
├── UnknownArchitectureError   no rule says which units this model has
├── DataError                  a data set cannot be used: empty, mislabelled, wrong columns
├── WireError                  bytes that arrived are not a message that may be accepted
├── ProtocolError              a well-formed message at the wrong time, or from the wrong client
├── TrainingError              local training broke down (a loss that is not finite)
├── CheckpointError            a checkpoint cannot be written, read or continued
├── AuditError                 what a run has kept cannot be audited, or is not what was sent
└── ExposureError              clients may not be shown more of the model

Each message says what was expected, what was found, where, and what to do about it.
"""

from __future__ import annotations

from typing import Self

from fedveil.printable import one_line, printable

__all__ = [
    "AuditError",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "ExposureError",
    "FedveilError",
    "FedveilWarning",
    "ProtocolError",
    "TrainingError",
    "UnknownArchitectureError",
    "WireError",
]


class FedveilError(Exception):
    """A mistake that the caller can understand and repair.

    Attributes are the parts of the message, for programs that want them one by one; any may be "".
    They may quote what others sent; the message itself can be printed anywhere.
    """

    exit_code = 1

    def __init__(
        self, problem: str, *, expected: str = "", found: str = "", where: str = "", fix: str = ""
    ) -> None:
        self.problem, self.expected, self.found = problem, expected, found
        self.where, self.fix = where, fix
        super().__init__(problem, expected, found, where, fix)

    def within(self, place: str = "", *, fix: str | None = None) -> Self:
        """The same error, with the larger place in which it happened before its own.

        Args:
            place: Such as a file, a client, the number of a model.
            fix: What to do about it, in place of what it says; None leaves that.
        """
        return type(self)(
            self.problem,
            expected=self.expected,
            found=self.found,
            where=", ".join(filter(None, (place, self.where))),
            fix=self.fix if fix is None else fix,
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (client workers): rebuild them with their keywords.
        return _rebuild, (type(self), self.problem, self.expected, self.found, self.where, self.fix)

    def __str__(self) -> str:
        # What was found may be a stranger's words; problem and fix may have several lines of ours.
        where, expected, found = map(one_line, (self.where, self.expected, self.found))
        text = self.problem + (f" (in {where})" if where else "")
        if expected:
            text += f": expected {expected}"
        if found:
            text += f"{',' if expected else ':'} found {found}"
        return printable(text + "." + (f" {self.fix}" if self.fix else ""))


def _rebuild(
    kind: type[FedveilError], problem: str, expected: str, found: str, where: str, fix: str
) -> FedveilError:
    return kind(problem, expected=expected, found=found, where=where, fix=fix)


class FedveilWarning(UserWarning):
    """Work goes on, and somebody should look at something: the command line shows it as a line."""


class ConfigurationError(FedveilError, ValueError):
    """A setting is impossible, unknown or contradicts another."""

    exit_code = 2


class UnknownArchitectureError(FedveilError):
    """No rule says which units this model has."""

    exit_code = 2


class DataError(FedveilError, ValueError):
    """A data set cannot be used: it is empty, mislabelled or lacks a column."""

    exit_code = 3


class WireError(FedveilError):
    """Bytes that arrived are not a message that may be accepted."""


class ProtocolError(FedveilError):
    """A well-formed message at the wrong time, or from the wrong client."""


class TrainingError(FedveilError):
    """Local training broke down, for instance because the loss is not finite."""


class CheckpointError(FedveilError):
    """A checkpoint cannot be written, read or continued from."""

    exit_code = 4


class AuditError(FedveilError):
    """What a run has kept cannot be audited: nothing was kept, or it is not what was sent."""

    exit_code = 5


class ExposureError(FedveilError):
    """No release is left that shows its client no more of the model than was allowed."""
