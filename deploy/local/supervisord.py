"""supervisord with one difference: it waits 1, 2, ... at most BACKOFF_MAX_S seconds between restarts, and goes on.

The library's own wait grows by a second with every failure, and in the end it gives up. A stage whose broker is away
for an hour should be back seconds after the broker.
"""

from __future__ import annotations

import sys
import time

from supervisor.process import Subprocess
from supervisor.supervisord import main

BACKOFF_MAX_S = 5


def cap_backoff() -> None:
    """Bound the wait before the next start of a process that keeps failing."""
    change_state = Subprocess.change_state

    def capped(self: Subprocess, new_state: int, expected: bool = True) -> bool:
        changed = bool(change_state(self, new_state, expected))
        if self.backoff > BACKOFF_MAX_S:
            self.backoff = BACKOFF_MAX_S
            self.delay = min(self.delay, time.time() + BACKOFF_MAX_S)
        return changed

    Subprocess.change_state = capped


if __name__ == "__main__":
    cap_backoff()
    sys.exit(main())
