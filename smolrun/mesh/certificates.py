"""One certificate authority per run and one certificate per rank, made in memory on the driver.

    issue_credentials(run_id, world_size) -> Credentials of each rank, for its start message

A certificate names its rank and its run. It is valid at any time (a machine without a clock starts
in 1970), and the authority's key is dropped once it has signed. `tls.py` uses the credentials.
Workers never import `cryptography`: only `issue_credentials` does."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

_ANY_TIME = (datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))
_LABEL_CHARS = 40  # a DNS label has 63 at most, and the hash needs its share


@dataclass(frozen=True)
class Credentials:
    """The run's authority and one rank's certificate and key, all PEM text; its repr shows nothing.

    The key is encrypted with `passphrase`: ssl loads keys from files only, so it lies on a disk for
    a moment."""

    ca: str
    certificate: str
    key: str
    passphrase: str

    def __repr__(self) -> str:
        return "Credentials(...)"


def peer_name(rank: int, run_id: str) -> str:
    """The DNS name in the certificate of a rank; unique over ranks and runs."""
    readable = re.sub(r"[^a-z0-9]+", "-", run_id.lower())[:_LABEL_CHARS].strip("-")
    digest = hashlib.sha256(run_id.encode()).hexdigest()[:16]
    return f"r{rank}.{readable}-{digest}.smolrun" if readable else f"r{rank}.{digest}.smolrun"


def issue_credentials(run_id: str, world_size: int) -> list[Credentials]:
    """Credentials of every rank of a run, under an authority that signs nothing else."""
    from cryptography.hazmat.primitives.asymmetric import ec

    authority = ec.generate_private_key(ec.SECP256R1())
    root = _sign(f"smolrun {secrets.token_hex(8)}", authority, None, authority)
    issued = []
    for rank in range(world_size):
        key, passphrase = ec.generate_private_key(ec.SECP256R1()), secrets.token_hex(32)
        leaf = _sign(peer_name(rank, run_id), key, root, authority)
        issued.append(Credentials(_pem(root), _pem(leaf), _encrypted(key, passphrase), passphrase))
    return issued


def _sign(
    name: str,
    key: EllipticCurvePrivateKey,
    root: x509.Certificate | None,
    authority: EllipticCurvePrivateKey,
) -> x509.Certificate:
    """A certificate for `name` and `key`; without a `root` it is the authority's own."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    # The common name is for people, and holds 64 characters at most.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    identifier = x509.SubjectKeyIdentifier.from_public_key
    builder = (
        x509.CertificateBuilder(subject_name=subject, public_key=key.public_key())
        .issuer_name(root.subject if root is not None else subject)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_ANY_TIME[0])
        .not_valid_after(_ANY_TIME[1])
        .add_extension(identifier(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            critical=False,
        )
        .add_extension(_usage(is_root=root is None), critical=True)
        .add_extension(x509.BasicConstraints(root is None, 0 if root is None else None), True)
    )
    if root is not None:
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        names = x509.SubjectAlternativeName([x509.DNSName(name)])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(authority, hashes.SHA256())


def _usage(*, is_root: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not is_root,
        key_cert_sign=is_root,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM).decode()


def _encrypted(key: EllipticCurvePrivateKey, passphrase: str) -> str:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(passphrase.encode()),
    ).decode()
