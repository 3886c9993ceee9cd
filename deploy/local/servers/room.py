"""Starts a server once its disk has room: `python -m headrace.deploy.local.servers.room FOLDER COMMAND...`.

A server that died is recovered from what lies on its disk, and recovery writes. Kafka 4.1 whose disk becomes full while
it recovers takes the segment that it cannot index for a damaged one, deletes it, and with KRaft's own segment all
topics are gone. So none is started while less than `ROOM_BYTES` are free: that lasts for a recovery. This program
becomes the server: its id is the server's.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence

from headrace.process.awake import awake_s

ROOM_BYTES = 1 << 30
"""Recovery of a small node takes seconds, and disks that are written to at 100 MB/s take ten to fill this."""
PATIENCE_S = 60.0
"""Then it ends, and the supervisor starts it again: `status` and the log show that it waits."""
LOOK_S = 0.5


def guarded(folder: object, command: Sequence[str]) -> list[str]:
    """Return the command line that waits for room in `folder` and becomes `command`."""
    return [sys.executable, "-m", "headrace.deploy.local.servers.room", str(folder), *command]


def lacking(folder: str, room_bytes: int = ROOM_BYTES) -> str:
    """Return why no server is started in `folder`, "" where it has room."""
    free = shutil.disk_usage(folder).free
    if free >= room_bytes:
        return ""
    return f"{folder} has {free >> 20:,} MiB free and {room_bytes >> 20:,} are wanted to start; free the disk"


def main(argv: Sequence[str]) -> int:
    """Become the command once there is room; 1 after `PATIENCE_S` without."""
    folder, *command = argv
    until = awake_s() + PATIENCE_S
    if reason := lacking(folder):
        print(f"waiting: {reason}", file=sys.stderr, flush=True)
    while reason and awake_s() < until:
        time.sleep(LOOK_S)
        reason = lacking(folder)
    if not reason:
        os.execvp(command[0], command)
    print(f"gave up for now: {reason}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
