"""Certificates of a deployment: good ones, expired ones, and those of another role."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import trustme

from bagel.rpc.transport import Security

PAST = datetime(2001, 1, 1, tzinfo=UTC)
HOSTS = ("localhost", "127.0.0.1")


class Certificates:
    """One CA, and what it issues, as files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._authority, self._others = folder, trustme.CA(), trustme.CA()
        folder.mkdir(parents=True, exist_ok=True)
        self._authority.cert_pem.write_to_path(folder / "ca.pem")

    def of(self, role: str) -> Security:
        """What a service of that role, or a client, has."""
        return self._issue(role, role, self._authority)

    def expired(self, role: str) -> Security:
        """As `of`, but over since 2001."""
        return self._issue(f"{role}-expired", role, self._authority, PAST)

    def foreign(self, role: str) -> Security:
        """As `of`, but from a CA that nobody trusts."""
        return self._issue(f"{role}-foreign", role, self._others)

    def _issue(self, stem: str, role: str, authority: trustme.CA, not_after: datetime | None = None) -> Security:
        certificate, key = self._folder / f"{stem}.pem", self._folder / f"{stem}-key.pem"
        if not certificate.exists():
            issued = authority.issue_cert(role, *HOSTS, not_after=not_after)
            issued.private_key_pem.write_to_path(key)
            issued.cert_chain_pems[0].write_to_path(certificate)
        return Security(certificate, key, self._folder / "ca.pem")
