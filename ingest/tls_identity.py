"""The gateway's certificate and key, for the forward port and the collector."""

from __future__ import annotations

import logging
import os
import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from headrace.contract.config import IngestConfig
from headrace.contract.errors import ConfigRejected

log = logging.getLogger("headrace.ingest")


_WARN_DAYS = 14
"""A certificate that ends sooner is told of, each day: shippers refuse it from then on, all at the same moment."""


class TlsIdentity:
    """A certificate that is read again when its files change: a renewed one needs no restart."""

    def __init__(self, config: IngestConfig, password: str = "") -> None:
        """Read the files. Raises `ConfigRejected` with what is wrong, never with the key or its password."""
        self._files, self._password = (config.tls_cert, config.tls_key or config.tls_cert), password
        self._client_ca = config.tls_client_ca
        self._seen = self._changed_ns()
        self.context = self._read()
        self._ends_s = float("inf")
        self._warned_s = time.monotonic()
        self._warn()

    def days_left(self, now_ms: int) -> float:
        """Return the days until the certificate's end; below 0 where it is over."""
        return (self._ends_s - now_ms / 1_000) / 86_400

    def renew(self) -> None:
        """Serve new connections with the files as they are now; keep the old certificate where they cannot be read."""
        seen = self._changed_ns()
        if seen == self._seen:
            if time.monotonic() - self._warned_s > 86_400:
                self._warn()
            return
        self._seen = seen
        try:
            self.context = self._read()
            log.info("certificate %s read again", self._files[0])
            self._warn()
        except ConfigRejected as error:
            log.error("the old certificate stays: %s", error)

    def _warn(self) -> None:
        self._warned_s = time.monotonic()
        try:
            certificate = x509.load_pem_x509_certificate(Path(self._files[0]).read_bytes())
        except (OSError, ValueError):
            return
        self._ends_s = certificate.not_valid_after_utc.timestamp()
        for fault in faults_of(certificate, datetime.now(UTC)):
            log.warning("ingest.tls_cert %s %s", self._files[0], fault)

    def _changed_ns(self) -> tuple[int, ...]:
        files = [*self._files, self._client_ca] if self._client_ca else self._files
        return tuple(os.stat(file).st_mtime_ns if os.path.exists(file) else 0 for file in files)

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        cert, key = self._files
        try:
            # A password that is always given, if empty: OpenSSL would ask for it on the terminal and wait for ever.
            context.load_cert_chain(cert, key, password=lambda: self._password)
            if self._client_ca:
                context.load_verify_locations(self._client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:
            raise ConfigRejected(
                f"TLS cannot begin with ingest.tls_cert {cert}, ingest.tls_key {key}"
                + (f", ingest.tls_client_ca {self._client_ca}" if self._client_ca else "")
                + f": {error}. The files are PEM; HEADRACE_TLS_PASSWORD opens a key that is encrypted."
            ) from error
        return context


def faults_of(certificate: x509.Certificate, now: datetime) -> list[str]:
    """Return why clients refuse this certificate, or soon will. What a gateway serves it serves all the same."""
    faults = []
    until = certificate.not_valid_after_utc
    if now < certificate.not_valid_before_utc:
        faults.append(f"is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on: no client takes it yet")
    if now > until:
        faults.append(f"ended at {until:%Y-%m-%d %H:%M} UTC: no client takes it")
    elif now > until - timedelta(days=_WARN_DAYS):
        faults.append(f"ends at {until:%Y-%m-%d %H:%M} UTC: renew it; a new file is served within 30 s")
    try:
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        faults.append("has no subjectAltName: clients that check the host name refuse it")
    return faults
