"""The key of this account on this machine, which paired machines may remember.

    MachineKey.load()  -> the key of the configuration folder, made at the first use
    MachineKey.make()  -> a key that is gone with this process

A coordinator shows it as a self-signed TLS certificate. A joiner proves it by a signature, since
Python's ssl gives a server no certificate of a client that no known authority signed. The
certificate is valid at any time: small machines may have no clock.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import ssl
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import platformdirs
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from smolrun.errors import SmolrunError
from smolrun.files import atomic_write, read_bytes

_MAX_FILE_BYTES = 16 << 10  # a key and a certificate of P-256 take 1 KiB
_ALGORITHM = ec.ECDSA(hashes.SHA256())


class MachineKey:
    """A private key (P-256) and its certificate. `public_key` is DER (SubjectPublicKeyInfo)."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate
        self.public_key = _der(key.public_key())

    @classmethod
    def make(cls) -> MachineKey:
        """A new one, in memory."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "smolrun")])
        builder = x509.CertificateBuilder(
            issuer_name=name,
            subject_name=name,
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=datetime(1970, 1, 1, tzinfo=UTC),
            not_valid_after=datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC),
        )
        return cls(key, builder.sign(key, hashes.SHA256()))

    @classmethod
    def load(cls, path: Path | None = None) -> MachineKey:
        """The one of this account, made if there is none. SmolrunError if it cannot be kept."""
        path = path or platformdirs.user_config_path("smolrun") / "nearby" / "identity.pem"
        try:
            if not path.exists():
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                atomic_write(path, cls.make()._pem(serialization.NoEncryption()), mode=0o600)
            data = read_bytes(path, _MAX_FILE_BYTES)
            key = serialization.load_pem_private_key(data, password=None)
            certificate = x509.load_pem_x509_certificate(data)
        except (OSError, ValueError, TypeError) as error:
            what = f"{path}, the key that nearby machines know this one by, cannot be read or made"
            raise SmolrunError(f"{what}: {error}; delete it if it is damaged") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise SmolrunError(f"{path} holds no P-256 key: delete it")
        return cls(key, certificate)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.public_key)

    def sign(self, data: bytes) -> bytes:
        """A signature by the private key, for `is_signed`."""
        return self._key.sign(data, _ALGORITHM)

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3 with this certificate; the client shows none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0  # nothing is ever resumed
        # ssl reads keys from files only: it gets a temporary one, encrypted, mode 0600.
        passphrase = secrets.token_hex(32)
        handle, path = tempfile.mkstemp(prefix="smolrun-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self._pem(serialization.BestAvailableEncryption(passphrase.encode())))
            context.load_cert_chain(path, password=passphrase)
        finally:
            os.unlink(path)
        return context

    def _pem(self, encryption: serialization.KeySerializationEncryption) -> bytes:
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        key = self._key.private_bytes(encoding, form, encryption)
        return key + self._certificate.public_bytes(encoding)


def client_context() -> ssl.SSLContext:
    """TLS 1.3 to a server of any certificate: the pairing decides on the key that it shows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def public_key_of(sock: ssl.SSLSocket) -> bytes:
    """The key of the certificate that the server has shown, DER; TLS has verified that the server
    holds its private key. ValueError for a certificate that cannot be read."""
    certificate = x509.load_der_x509_certificate(sock.getpeercert(binary_form=True) or b"")
    return _der(certificate.public_key())


def is_signed(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether `MachineKey.sign` of that key's owner returned `signature` for `data`."""
    try:
        key = serialization.load_der_public_key(public_key)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            return False
        key.verify(signature, data, _ALGORITHM)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def fingerprint(public_key: bytes) -> str:
    """SHA256:..., as OpenSSH shows it of its keys."""
    digest = hashlib.sha256(public_key).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _der(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("the certificate is not of a P-256 key")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.DER, form)
