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
        self._seen = self._state()
        self._told = ""
        self._warned_s = time.monotonic()
        self.context, self._certificate = self._read()
        self._warn()

    def days_left(self, now_ms: int) -> float:
        """Return the days until the end of the certificate that is served; below 0 where it is over."""
        if self._certificate is None:
            return float("inf")
        return (self._certificate.not_valid_after_utc.timestamp() - now_ms / 1_000) / 86_400

    def renew(self) -> None:
        """Serve new connections with the files as they are now; keep the old certificate where they cannot be read.

        What could not be read is tried again at each call, and told again each day.
        """
        is_due = time.monotonic() - self._warned_s > 86_400
        seen = self._state()
        if seen != self._seen:
            try:
                self.context, self._certificate = self._read()
            except ConfigRejected as error:
                if is_due or str(error) != self._told:
                    self._told, self._warned_s = str(error), time.monotonic()
                    log.error("the old certificate stays: %s", error)
                return
            self._seen, self._told = seen, ""
            log.info("certificate %s read again", self._files[0])
        elif not is_due:
            return
        self._warn()

    def _warn(self) -> None:
        self._warned_s = time.monotonic()
        if self._certificate is not None:
            for fault in faults_of(self._certificate, datetime.now(UTC)):
                log.warning("ingest.tls_cert %s %s", self._files[0], fault)

    def _state(self) -> tuple[tuple[int, ...], ...]:
        """Return what tells a renewed file: tools set its times back, a mended mode changes no time of its content."""
        return tuple(_state_of(file) for file in (*self._files, self._client_ca) if file)

    def _read(self) -> tuple[ssl.SSLContext, x509.Certificate | None]:
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
        return context, _certificate_of(cert)


def _state_of(file: str) -> tuple[int, ...]:
    try:
        found = os.stat(file)
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size


def _certificate_of(file: str) -> x509.Certificate | None:
    """Return the certificate for its times, None where only OpenSSL can read it."""
    try:
        return x509.load_pem_x509_certificate(Path(file).read_bytes())
    except (OSError, ValueError):
        return None


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
