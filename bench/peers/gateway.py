"""The peer of bench/ingest.py: Fluent forward to Kafka as one would write it in an afternoon.

One Kafka record an event: msgpack.unpackb per entry, JSON, produce; a chunk is acked when all its events have receipts.
Usage: gateway.py BROKERS TOPIC PORT
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial

import confluent_kafka as ck
import msgpack


class Connection(asyncio.Protocol):
    """One shipper."""

    def __init__(self, producer: ck.Producer, topic: str) -> None:
        self.producer, self.topic = producer, topic
        self.unpacker = msgpack.Unpacker(max_buffer_size=64 << 20)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Produce every event of the messages that are whole."""
        self.unpacker.feed(data)
        for tag, body, option in self.unpacker:
            entries = msgpack.Unpacker()
            entries.feed(body)
            events = list(entries)
            delivered = partial(self.delivered, [len(events)], option["chunk"])
            for time, record in events:
                seconds = int.from_bytes(time.data[:4], "big") if isinstance(time, msgpack.ExtType) else time
                value = json.dumps({"tag": tag, "time": seconds, **record}).encode()
                while True:
                    try:
                        self.producer.produce(
                            self.topic, value, key=str(record["user_id"]).encode(), on_delivery=delivered
                        )
                        break
                    except BufferError:
                        self.producer.poll(0.01)
            self.producer.poll(0)

    def delivered(self, left: list[int], chunk: str, error: ck.KafkaError | None, _message: ck.Message) -> None:
        """Take one event's receipt; the chunk's last one acks it."""
        left[0] -= 1
        if error is None and left[0] == 0:
            self.transport.write(msgpack.packb({"ack": chunk}))


async def main(brokers: str, topic: str, port: int) -> None:
    """Serve until ended."""
    settings = {"bootstrap.servers": brokers, "enable.idempotence": True, "acks": "all", "linger.ms": 5}
    settings |= {"compression.type": "lz4", "broker.address.family": "v4", "queue.buffering.max.messages": 100_000}
    producer = ck.Producer(settings)
    server = await asyncio.get_running_loop().create_server(lambda: Connection(producer, topic), "127.0.0.1", port)
    async with server:
        while True:
            producer.poll(0)
            await asyncio.sleep(0.002)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
