"""The federation secret: the one key from which every mask is drawn."""

from __future__ import annotations

import os
import secrets as system_random
import stat
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedveil.errors import ConfigurationError, FedveilWarning
from fedveil.files import private_file, sync

__all__ = ["Secret"]

SECRET_BYTES = 32
_LABEL = b"fedveil secret v1"
_OTHERS = 0o066
_LONGEST = 1024
"""Bytes of a secret's file that are read: it has 65."""


class Secret:
    """32 bytes that only the server holds; every random choice about masks is keyed by them.

    A stream is ChaCha20 (RFC 8439) under a key that HKDF-SHA256 (RFC 5869) derives from the secret
    and from what the stream is for, so streams for two purposes, clients or rounds are independent
    for anyone who lacks the secret, and a guessable seed never decides what is withheld.

    The bytes appear in no ``repr``, no error and no pickle. What this does NOT protect: units that
    were released; who learns the secret learns which units were withheld, not their values.
    """

    __slots__ = ("_bytes",)

    def __init__(self, value: bytes) -> None:
        if not isinstance(value, bytes) or len(value) != SECRET_BYTES:
            size = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
            raise ConfigurationError(
                "The federation secret has the wrong size",
                expected=f"{SECRET_BYTES} bytes",
                found=size,
                fix="Make one with fedveil.Secret.generate().",
            )
        self._bytes = value

    @classmethod
    def generate(cls) -> Secret:
        """Draw a new secret from the operating system."""
        return cls(system_random.token_bytes(SECRET_BYTES))

    @classmethod
    def from_file(cls, path: str | Path, *, create: bool = False) -> Secret:
        """Read a secret (64 hexadecimal digits) from a file that only its owner may read.

        Args:
            path: The file.
            create: Make a new secret there if the file does not exist, with permissions 0600: whole
                or not at all, and of two who do so at once both get the same.

        Raises:
            ConfigurationError: If the file is missing, cannot be read or does not hold a secret.
                The error never quotes the file's content.

        Warns:
            FedveilWarning: If others can read the file or write to it.
        """
        path = Path(path)
        if create and not path.exists():
            _create(path)
        try:
            text, mode = _read(path)
            secret = cls(bytes.fromhex(text))
        except FileNotFoundError:
            raise ConfigurationError(
                "There is no secret file", where=str(path), fix="Create one, or name another file."
            ) from None
        except OSError as error:
            raise ConfigurationError(
                "The secret file cannot be read",
                expected="a file",
                found=error.strerror or type(error).__name__,
                where=str(path),
            ) from None
        except (ValueError, UnicodeError):
            raise ConfigurationError(
                "The secret file cannot be used",
                expected=f"{2 * SECRET_BYTES} hexadecimal digits",
                where=str(path),
                fix="Restore the file; a new secret cannot continue an old federation.",
            ) from None
        if os.name == "posix" and mode & _OTHERS:
            warnings.warn(
                f"Others can read or replace the secret in {path}, which has mode {mode:04o}: who "
                f"knows it knows which units were withheld from whom. Say: chmod 600 {path}",
                FedveilWarning,
                stacklevel=2,
            )
        return secret

    def words(self, count: int, *purpose: str | int) -> npt.NDArray[np.uint64]:
        """The first ``count`` 64-bit words of the stream for one purpose.

        Args:
            count: How many words.
            purpose: What the stream is for, such as ``("client mask", "client-03", 7)``. Parts are
                length-prefixed, so no two different purposes share a stream.

        Returns:
            uint64 array ``[count]``, the same on every machine.
        """
        key = self._derive(purpose)
        cipher = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
        return np.frombuffer(cipher.update(bytes(8 * count)), dtype="<u8").astype(np.uint64)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell two secrets apart and reveal nothing of either."""
        return self._derive(("fingerprint",)).hex()[:16]

    def _derive(self, purpose: tuple[str | int, ...]) -> bytes:
        info = _LABEL
        for part in purpose:
            encoded = (b"i" if isinstance(part, int) else b"s") + str(part).encode()
            info += len(encoded).to_bytes(4, "little") + encoded
        return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(self._bytes)

    def __repr__(self) -> str:
        return "Secret(hidden)"

    def __reduce__(self) -> str:
        raise TypeError("a federation secret cannot be pickled: it must not leave the server")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return system_random.compare_digest(self._bytes, other._bytes)

    def __hash__(self) -> int:
        return hash(self.fingerprint())


def _read(path: Path) -> tuple[str, int]:
    """A file's text, and its mode."""
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        return file.read(_LONGEST).decode("ascii"), mode


def _create(path: Path) -> None:
    """A new secret in a file that is whole from the first moment that it has its name.

    Raises:
        ConfigurationError: It cannot be written.
    """
    aside = path.with_name(f"{path.name}.{system_random.token_hex(4)}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with private_file(aside) as file:
                file.write(system_random.token_bytes(SECRET_BYTES).hex().encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):  # somebody else was faster: that one counts
                _put_in_place(aside, path)
            if os.name == "posix":
                sync(path.parent)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(
            "The secret file cannot be written",
            found=error.strerror or type(error).__name__,
            where=str(path),
        ) from None


def _put_in_place(aside: Path, path: Path) -> None:
    """Give a file a name that nobody else has given.

    Raises:
        FileExistsError: Somebody has.
    """
    if os.name == "posix":
        try:
            os.link(aside, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with path.open("xb") as file:
                path.chmod(0o600)
                file.write(aside.read_bytes())
    else:
        aside.rename(path)  # which replaces nothing there
