"""What a web service imports: fluent-logger's sender that loses nothing. Chunks with acks, kept on disk until acked.

    sender = Sender("store", port=24224, spool_dir="/var/spool/store")
    sender.emit("impression", {"event_id": ..., "request_id": ..., "user_id": ...})

1. `emit` refuses what the gateway could not take, appends the rest to the spool and returns: from here on a kill -9 of
   the process loses nothing. (It is in the kernel's cache; `fsync=True` puts each chunk on the disk before it is sent,
   for machines that lose power.)
2. A background thread closes a chunk every `flush_ms`, notes its id in the spool, and sends it. Each tag has a lane of
   its own: up to `window` of its chunks are on their way at once, and a share of the spool.
3. A chunk that is acked is noted, and a segment of the spool whose chunks are all acked is removed.
4. After a lost connection or a restart everything without an ack is sent again under the *same* chunk ids, so that the
   gateway counts it once. A tag that the gateway leaves unacked while it acks others backs off by itself.
5. What somebody removes of the spool's folder is written anew, every few seconds, as far as it has no ack.
6. What the gateway refuses for good goes to `rejects.ndjson` beside the spool, counted and logged.

Several processes may name the same `spool_dir`: each takes a slot of it and adopts what dead processes left, at its
start and every few seconds. A process that is forked from one with a sender goes on with a sender and a slot of its own
from its first `emit` on; what its parent holds stays the parent's.
"""

from headrace.sender.sender import Sender

__all__ = ["Sender"]
