"""When a process began and which boot of the machine this is, from /proc: a process id alone is used again."""

from __future__ import annotations

import hashlib
import os


def began_at(pid: int) -> int:
    """Return when a living process began, in ticks since the machine did; -1 for one that is dead.

    Where there is no /proc the answer is 0 for each that lives: then its id alone tells.
    """
    if not os.path.exists("/proc/self/stat"):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return -1
        except PermissionError:
            pass
        return 0
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            words = file.read().rpartition(")")[2].split()
    except OSError:
        return -1
    # Behind the name: the state is the first word, the beginning the 20th (proc_pid_stat(5), fields 3 and 22).
    return -1 if words[0] in "ZX" else int(words[19])


def boot_number() -> int:
    """Return a number of this boot of the machine, 0 where none is told. A power cut may leave a file half-written."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return int.from_bytes(hashlib.sha256(file.read()).digest()[:7], "little")
    except OSError:
        return 0
