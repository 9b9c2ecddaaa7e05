"""The certificate that listeners serve with, which may be renewed while they serve."""

from __future__ import annotations

import logging
import ssl
from typing import Final

from orchestrator.config.options import OrchestratorConfig, TlsConfig
from orchestrator.errors import StartError
from orchestrator.http.certificate import not_after

_log: Final = logging.getLogger("baton.reload")


class Certificate:
    """A certificate and its key, from files that are read again when the config is."""

    def __init__(self, tls: TlsConfig) -> None:
        """Raises `OSError` (`ssl.SSLError` is one) if the files cannot be used."""
        self._tls = tls
        self._content = self._read()
        self.context = self._made()  # of handshakes that begin now
        self.not_after = not_after(self._content[0])  # in seconds since 1970; None if nobody can tell

    def renew(self) -> bool:
        """Use the files as they are now; returns whether they have changed.

        Connections keep what they began with. Raises `OSError` if the files cannot be used: then what there
        was stays.
        """
        content = self._read()
        if content == self._content:
            return False
        self.context, self._content = self._made(), content
        self.not_after = not_after(content[0])
        return True

    def _read(self) -> tuple[bytes, bytes]:
        with open(self._tls.cert, "rb") as cert, open(self._tls.key, "rb") as key:
            return cert.read(), key.read()

    def _made(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Without a password OpenSSL would ask for one on the terminal.
        context.load_cert_chain(self._tls.cert, self._tls.key, password=lambda: "")
        return context


def certificate_of(options: OrchestratorConfig) -> Certificate | None:
    """Return the certificate of this config, if it has one. Raises `StartError`."""
    if options.tls is None:
        return None
    try:
        return Certificate(options.tls)
    except OSError as error:
        raise StartError(f"orchestrator.tls: {error}") from error


def is_renewed(certificate: Certificate | None) -> bool:
    """Renew it, if there is one; returns whether it has changed. One that cannot be used is told to the
    log.
    """
    try:
        return certificate is not None and certificate.renew()
    except OSError as error:
        _log.error("orchestrator.tls: the certificate stays as it was: %s", error)
        return False
