"""The federation secret: the one key from which every mask is drawn."""

from __future__ import annotations

import os
import secrets as system_random
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedveil.errors import ConfigurationError

__all__ = ["Secret"]

SECRET_BYTES = 32
_LABEL = b"fedveil secret v1"


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
            create: Make a new secret there if the file does not exist, with permissions 0600.

        Raises:
            ConfigurationError: If the file is missing or does not hold a secret. The error never
                quotes the file's content.
        """
        path = Path(path)
        if create and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(system_random.token_bytes(SECRET_BYTES).hex() + "\n")
        try:
            return cls(bytes.fromhex(path.read_text(encoding="ascii")))
        except FileNotFoundError:
            raise ConfigurationError(
                "There is no secret file", where=str(path), fix="Create one, or name another file."
            ) from None
        except (ValueError, UnicodeError):
            raise ConfigurationError(
                "The secret file cannot be used",
                expected=f"{2 * SECRET_BYTES} hexadecimal digits",
                where=str(path),
                fix="Restore the file; a new secret cannot continue an old federation.",
            ) from None

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
