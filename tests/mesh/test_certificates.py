"""The credentials of a run: unique names, encrypted keys, valid at any time."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from smolrun.mesh.certificates import Credentials, issue_credentials, peer_name
from smolrun.mesh.tls import MutualTls
from smolrun.wire.handshake import Identity


def leaf(credentials: Credentials) -> x509.Certificate:
    return x509.load_pem_x509_certificate(credentials.certificate.encode())


def test_a_certificate_names_its_rank_and_run_and_holds_at_any_time() -> None:
    for rank, credentials in enumerate(issue_credentials("20260101-classicdp-x", 3)):
        certificate = leaf(credentials)
        root = x509.load_pem_x509_certificate(credentials.ca.encode())
        certificate.verify_directly_issued_by(root)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [peer_name(rank, "20260101-classicdp-x")]
        uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert set(uses) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
        assert certificate.not_valid_before_utc.year == 1970
        assert certificate.not_valid_after_utc.year == 9999


def test_keys_and_authorities_are_new_every_time() -> None:
    ones = [*issue_credentials("run", 2), *issue_credentials("run", 2)]
    assert len({leaf(one).public_key().public_numbers() for one in ones}) == 4  # type: ignore[union-attr]
    assert len({one.passphrase for one in ones}) == 4
    assert len({one.ca for one in ones}) == 2


def test_a_key_cannot_be_read_without_its_passphrase() -> None:
    (credentials,) = issue_credentials("run", 1)
    assert "ENCRYPTED" in credentials.key
    with pytest.raises((TypeError, ValueError)):
        serialization.load_pem_private_key(credentials.key.encode(), password=None)
    with pytest.raises(ValueError, match="password"):
        serialization.load_pem_private_key(credentials.key.encode(), password=b"wrong")


def test_printing_credentials_shows_nothing_of_them() -> None:
    (credentials,) = issue_credentials("run", 1)
    assert repr(credentials) == str(credentials) == "Credentials(...)"
    assert f"{[credentials]}" == "[Credentials(...)]"


@pytest.mark.parametrize(
    "run_id",
    ["20260101-000000-single-mlp-abcd", "Äpfel & Birnen", "x" * 300, "...", "a" * 40 + "_b"],
)
def test_any_run_has_a_name_that_dns_allows(run_id: str) -> None:
    name = peer_name(12, run_id)
    assert name.isascii() and name == name.lower()
    for label in name.split("."):
        assert 0 < len(label) <= 63
        assert label.strip("-") == label


def test_runs_whose_names_look_alike_have_different_certificates() -> None:
    assert len({peer_name(0, run) for run in ("a.b", "a-b", "a_b", "A-B", "a" * 60, "a" * 61)}) == 6


def test_no_key_stays_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: list[tuple[int, str]] = []
    import smolrun.mesh.tls as tls

    unlink = tls.os.unlink

    def look_and_unlink(path: str) -> None:
        seen.append((Path(path).stat().st_mode & 0o777, Path(path).read_text()))
        unlink(path)

    monkeypatch.setattr(tls.os, "unlink", look_and_unlink)
    (credentials,) = issue_credentials("run", 1)
    MutualTls(credentials, Identity(0, 1, "run", "hash", 0, b"s"))
    ((mode, text),) = seen
    assert mode == 0o600
    assert "ENCRYPTED PRIVATE KEY" in text
    assert credentials.passphrase not in text
    assert list(tmp_path.iterdir()) == []


def test_no_key_stays_on_the_disk_when_it_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (one, other) = issue_credentials("run", 2)
    wrong = Credentials(one.ca, one.certificate, one.key, other.passphrase)
    with pytest.raises(OSError):  # noqa: PT011  # OpenSSL's words differ by version
        MutualTls(wrong, Identity(0, 1, "run", "hash", 0, b"s"))
    assert list(tmp_path.iterdir()) == []
