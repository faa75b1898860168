"""Keys and certificates of a deployment."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedveil.deploy.files import write_private, write_public

__all__ = ["write_certificates", "write_node_key"]

_DAYS = 825  # the longest that common TLS libraries take for a server's certificate


def write_node_key(private: Path, public: Path, name: str) -> None:
    """A SuperNode's key pair, as ``ssh-keygen -t ecdsa -b 384`` makes it.

    Args:
        private: Where the key goes, for its owner's eyes only.
        public: Where its public half goes.
        name: A comment in the public half.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_public(public, line + f" {name}\n".encode())


def write_certificates(folder: Path, host: str) -> bytes:
    """A certificate authority of its own, and a certificate of the SuperLink for a host.

    The authority's key is not kept: nothing else is ever signed with it. A new certificate means a
    new authority, whose ca.crt clients must be given.

    Args:
        folder: Where server.key, server.pem and ca.crt go.
        host: A name or an IP address, as clients will call the SuperLink.

    Returns:
        The authority's certificate.
    """
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    root = _certificate("fedveil federation", authority.public_key(), None)
    root = root.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    root = root.add_extension(_usage(signs=True), critical=True)
    signed_root = root.sign(authority, hashes.SHA384())
    leaf = _certificate(host, server.public_key(), signed_root.subject)
    leaf = leaf.add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
    leaf = leaf.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    leaf = leaf.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
    )
    signed_leaf = leaf.sign(authority, hashes.SHA384())
    write_private(
        folder / "server.key",
        server.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )
    write_public(folder / "server.pem", signed_leaf.public_bytes(Encoding.PEM))
    pem = signed_root.public_bytes(Encoding.PEM)
    write_public(folder / "ca.crt", pem)
    return pem


def _certificate(
    name: str, key: ec.EllipticCurvePublicKey, issuer: x509.Name | None
) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs,
        content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _names(host: str) -> list[x509.GeneralName]:
    """What the SuperLink is called: by clients, and by programs on its own machine."""
    names: list[x509.GeneralName] = []
    for name in dict.fromkeys((host, "127.0.0.1", "localhost")):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            names.append(x509.DNSName(name))
    return names
