"""One shipper's connection: bytes in, messages to the gateway, acks out.

It ends by itself, with a counted reason, when its peer breaks the protocol, leaves a handshake or a message
unfinished for too long, or does not read its acks. An idle connection between messages may stay for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
import traceback
from functools import partial
from typing import TYPE_CHECKING

from headrace.contract.config import IngestConfig
from headrace.contract.metrics import Metrics
from headrace.ingest.forward.endpoint import Endpoint
from headrace.ingest.forward.fluent_handshake import Handshake
from headrace.ingest.forward.protocol import Decoder, Ping, Refused, encode_ack
from headrace.ingest.gateway.batcher import Outcome
from headrace.ingest.gateway.chunk_identity import Peer, peer_of

if TYPE_CHECKING:
    from headrace.ingest.forward.forward_server import ForwardServer

log = logging.getLogger("headrace.ingest")

_PONG_BYTES_MAX = 4_096
_PING_BYTES_MAX = 65_536
"""Most bytes taken from a peer that has not shown the key yet: a PING has some 300."""
_ACK_BYTES_MAX = 1_048_576
"""A peer that leaves this many bytes of acks unread is disconnected. 1 MiB is some 20,000 acks."""
_UNACKED_S = 2.0
"""How long a connection stays open that has a chunk beyond the ceiling of dead letters: some thirty round trips."""
_TLS_HELLO = b"\x16\x03"


class Connection(asyncio.Protocol):
    """One shipper. A `trusted` one needs no handshake: the mode of the Unix socket's file has let it in."""

    def __init__(
        self,
        server: ForwardServer,
        config: IngestConfig,
        endpoint: Endpoint,
        metrics: Metrics,
        *,
        trusted: bool = False,
    ) -> None:
        self._server, self._config, self._endpoint = server, config, endpoint
        self._admission, self._metrics = server.admission, metrics
        self._in_handshake = bool(endpoint.shared_key) and not trusted
        self._decoder = Decoder(config.chunk_bytes_max, greets=self._in_handshake)
        self._handshake: Handshake | None = None
        self._transport: asyncio.Transport | None = None
        self._peer = Peer("unknown")
        self._unacked = 0
        self._closing: asyncio.TimerHandle | None = None
        self._is_first_read = True
        self.since_s = server.awake_s()
        """When the open handshake or the unfinished message began, or the peer sent its end."""
        self.half_closed = False
        self._has_undecoded = False
        self.partial_bytes = 0
        """Of a message that has not ended yet; whole messages that wait for `resume` are not among them."""

    @property
    def in_handshake(self) -> bool:
        """Whether the handshake is not over yet."""
        return self._in_handshake

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Enter, or be refused beyond the bound; begin the handshake where one is asked for."""
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a forward connection is a stream")
        self._transport = transport
        self._peer = peer_of(transport.get_extra_info("peername"))
        if not self._server.enter(self):
            self.refuse("connections_max", f"{self._config.connections_max} connections are open")
            return
        if self._in_handshake:
            key, name, users = self._endpoint.shared_key, self._endpoint.name, self._endpoint.users or None
            salt = os.urandom(16) if users else b""
            self._handshake = Handshake(key, name, os.urandom(16), users=users, salt=salt)
            # In one piece, as PONG and acks: fluent-bit parses a single read.
            transport.write(self._handshake.helo())
            self._server.begin(self)
        if not self._admission.is_open():
            self.pause()

    def data_received(self, data: bytes) -> None:
        """Decode, offer; on what is no forward message, close."""
        if self._is_first_read:
            self._is_first_read = False
            if data.startswith(_TLS_HELLO):
                self.refuse("tls", "it speaks TLS and this port does not; set ingest.tls_cert and ingest.tls_key")
                return
        self.take(data)

    def take(self, data: bytes) -> None:
        """Offer the messages that `data` completes, as far as the buffer's bound allows; the rest waits undecoded."""
        self._has_undecoded = False
        try:
            moved = self._offer_all(data)
            if self._in_handshake and self._decoder.pending_bytes > _PING_BYTES_MAX:
                raise Refused("too_large", f"more than {_PING_BYTES_MAX} bytes before the handshake's end")
        except Refused as refused:
            if refused.reason == "too_large" and not self._in_handshake and self._transport is not None:
                # Said, because no time will help: our sender cuts the chunk. Other shippers take it as no ack.
                self._transport.write(self._decoder.too_large())
            self.refuse(refused.reason, str(refused))
            return
        except Exception as error:
            # A fault of ours must cost one connection, not all of them. Without the message: it may quote the event.
            log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            self.refuse("internal", f"{type(error).__name__} while decoding; its shipper still has the data")
            return
        self._count_partial(0 if self._has_undecoded or self._transport is None else self._decoder.pending_bytes)
        if not self._in_handshake:
            if moved or not self.partial_bytes:
                self._server.finish(self)
            if self.partial_bytes and self._server.begin(self):
                self.since_s = self._server.awake_s()

    def _offer_all(self, data: bytes) -> bool:
        """Return whether a message was completed."""
        moved = False
        for message, size in self._decoder.feed(data):
            moved = True
            if isinstance(message, Ping):
                self._answer_ping(message)
                continue
            acked = None
            if message.chunk is not None:
                self._unacked += 1
                acked = partial(self._ack, encode_ack(message))
            if not self._admission.offer(message, size, self._peer, acked, refusable=acked is not None):
                self._close_soon()
            self._server.has_sent(self)
            if self._admission.must_wait():
                # One read of 256 KiB may hold gigabytes, packed: what is not taken yet waits for `resume`. No other
                # connection is read from until then, so there is one such rest at a time.
                self._has_undecoded = True
                break
        return moved

    def _close_soon(self) -> None:
        """Close after a while, because a chunk stays unacked: its shipper keeps it and tries again later.

        Not at once: chunks of other tags, which came along, are to get their acks here.
        """
        if self._closing is None:
            self._closing = asyncio.get_running_loop().call_later(_UNACKED_S, self._close_unacked)

    def _close_unacked(self) -> None:
        if self._transport is not None:
            self.refuse(
                "dead_letter_ceiling",
                "too many events of a tag are dead letters (/readyz says which and why), or too many late ones wait to "
                "be looked up (late_waiting)",
            )

    def _answer_ping(self, ping: Ping) -> None:
        if self._handshake is None or self._transport is None:
            raise Refused("no_ping", "a PING that nobody asked for")
        pong, refusal = self._handshake.answer(ping.value)
        self._transport.write(pong)
        if refusal:
            raise Refused(
                refusal, "the handshake failed: does the client have this gateway's key and its own password?"
            )
        self._in_handshake, self._handshake = False, None

    def eof_received(self) -> bool:
        """Keep the other direction open while acks are due: some clients send, end their side and still read."""
        if self._transport is None or not self._unacked or self._transport.get_extra_info("ssl_object") is not None:
            return False
        self.half_closed = True
        self.since_s = self._server.awake_s()
        self._server.begin(self)
        self._count_partial(0)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave; the chunks go on, their acks are dropped."""
        self._transport = None
        self._count_partial(0)
        self._server.leave(self)

    def refuse(self, reason: str, why: str) -> None:
        """Close at once, counted; nothing further is acked here."""
        self._admission.refuse(self._peer.origin, reason, why)
        self.close()

    def close(self) -> None:
        """Write what is left, then close. A peer that reads nothing is not waited for."""
        self._count_partial(0)
        if self._transport is not None and not self._transport.is_closing():
            # A PONG with its refusal may still go out.
            if self._transport.get_write_buffer_size() > _PONG_BYTES_MAX:
                self._transport.abort()
            else:
                self._transport.close()
        self._transport = None
        self._server.leave(self)

    def pause(self) -> None:
        """Read no more for now."""
        if self._transport is not None and not self._transport.is_closing() and self._transport.is_reading():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Take what waits undecoded, then read on, unless the bound is reached again."""
        if self._transport is None or self._transport.is_closing():
            return
        # The time in which the gateway did not read is not the peer's.
        self.since_s = self._server.awake_s()
        if self._has_undecoded:
            self.take(b"")
        if self._transport is not None and self._admission.is_open() and not self._transport.is_reading():
            self._transport.resume_reading()

    def _count_partial(self, pending: int) -> None:
        self._server.count_partial(pending - self.partial_bytes)
        self.partial_bytes = pending

    def _ack(self, data: bytes, _outcome: Outcome) -> None:
        self._unacked -= 1
        if self._transport is None or self._transport.is_closing():
            return
        try:
            self._transport.write(data)
        except Exception as error:
            # It must cost this connection only, not the turn in which others are acked. Its shipper sends again.
            self.refuse("internal", f"{type(error).__name__} while an ack was written")
            return
        self._metrics.add("chunks_acked_total")
        if self._transport.get_write_buffer_size() > _ACK_BYTES_MAX:
            self.refuse("slow_reader", "acks stay unread")
        elif self.half_closed and not self._unacked:
            self.close()
