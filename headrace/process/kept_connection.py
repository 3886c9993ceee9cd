"""One HTTP connection that is kept between requests, and opened anew where the server has closed it meanwhile.

A server closes a connection that idles (serving: after 15 s), and at its restart. The client learns of it by its next
request, which nobody has read: that request is sent once more, on a new connection.
"""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from contextlib import suppress


class KeptConnection:
    """Posts to one server. Not thread-safe: one a thread."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        self._host, self._port, self._timeout_s = host, port, timeout_s
        self._connection: http.client.HTTPConnection | None = None

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
        """Return status and body of the answer. Raises `OSError` or `http.client.HTTPException` where none comes.

        A request is sent twice where a connection that was kept ends without a byte of an answer: what it does must be
        the same when it is done twice.
        """
        try:
            if self._connection is not None:
                # Closed while it idled, or by a server that ended: nobody has read what was sent.
                with suppress(ConnectionResetError, BrokenPipeError, http.client.CannotSendRequest):
                    return self._once(self._connection, path, body, headers)
                self.close()
            self._connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
            return self._once(self._connection, path, body, headers)
        except BaseException:
            # What a later answer on this connection belongs to, nobody would know.
            self.close()
            raise

    def close(self) -> None:
        """Let the connection go; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @staticmethod
    def _once(
        connection: http.client.HTTPConnection, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, bytes]:
        connection.request("POST", path, body, dict(headers))
        response = connection.getresponse()
        return response.status, response.read()
