"""A CephFS on this machine: monitor, manager, one OSD on a file, metadata server, and the FUSE mount.

Needs root, /dev/fuse and Debian's packages (`PACKAGES`); one copy of the data, no authentication, loopback only: for
tests and for `make up STORE=cephfs`, never for data that matter. Started again on its folder it goes on with what is
there. Alone, the daemons go into the background by themselves; in a stack, its supervisor runs them in the foreground
(`programs`), starts anew what dies, and shows them. Their process ids lie in files of the folder.

As a program: `python -m headrace.deploy.local.servers.cephfs up|down|kill-osd|start-osd DIR`, or `check`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headrace.contract.errors import ConfigRejected, Unavailable
from headrace.deploy.local.layout import HOST
from headrace.process.awake import awake_s

PACKAGES = ("ceph-mon", "ceph-mgr", "ceph-osd", "ceph-mds", "ceph-fuse", "ceph-common", "fuse3")
PROGRAMS = ("ceph", "ceph-mon", "ceph-mgr", "ceph-osd", "ceph-mds", "ceph-fuse", "monmaptool", "fusermount3")
PORT = 6_789
DAEMONS = {"mon": "a", "mgr": "x", "osd": "0", "mds": "a"}
"""Each with its id, in the order in which they start."""
SUPERVISED = (*(f"ceph-{name}" for name in DAEMONS), "ceph-fuse")
"""Their names in a stack; stopped the other way round."""
# 4 GiB: the file of the OSD is sparse, so this is a bound and not a use.
OSD_BYTES = 4_294_967_296
COMMAND_S = 60.0
# A fresh file system needs 5 to 10 s until its metadata server is active; a busy machine several times that.
ACTIVE_S = 90.0

_CONF = """[global]
fsid = {fsid}
mon initial members = a
mon host = {host}:{port}
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
mon warn on pool no redundancy = false
osd crush chooseleaf type = 0
osd objectstore = bluestore
bluestore block size = {osd_bytes}
osd memory target = 939524096
osd class update on start = false
run dir = {folder}
log file = {folder}/log/$name.log
admin socket = {folder}/sock/$name.asok
pid file = {folder}/$name.pid
mon data = {folder}/mon
osd data = {folder}/osd0
mds data = {folder}/mds
mgr data = {folder}/mgr
ms bind ipv4 = true
ms bind ipv6 = false
public network = 127.0.0.0/8
"""


def missing() -> str:
    """Return what this machine lacks for a CephFS and the remedy, "" where it can run one."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not found; Debian, Ubuntu: apt-get install {' '.join(PACKAGES)}"
    if os.geteuid() != 0:
        return "a mount of CephFS needs root"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is not there or not open to this user; in a container, give it the device"
    return ""


@dataclass(frozen=True)
class CephFs:
    """One cluster; everything of it lies below `folder`, the mount at `folder/mnt`."""

    folder: Path
    port: int = PORT

    @property
    def mount(self) -> Path:
        """Where files are written."""
        return self.folder / "mnt"

    @property
    def conf(self) -> Path:
        """The cluster's configuration, for `ceph -c`."""
        return self.folder / "ceph.conf"

    def programs(self) -> dict[str, list[str]]:
        """Return the command line of each of `SUPERVISED`, in the foreground. The mount takes a dead one's place."""
        found = {f"ceph-{name}": [f"ceph-{name}", "-f", *self._of(name)] for name in DAEMONS}
        mount = 'fusermount3 -u -z "$0" 2>/dev/null; exec ceph-fuse -f -c "$1" "$0"'
        return found | {"ceph-fuse": ["sh", "-c", mount, str(self.mount), str(self.conf)]}

    def prepare(self) -> None:
        """Write the configuration and the monitor's store where they are not there yet; nothing runs meanwhile."""
        # A cluster of an earlier build has the second mark alone.
        if (self.folder / "prepared").exists() or (self.folder / "made").exists():
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            self.stop()
            shutil.rmtree(self.folder)  # a preparation that did not come to its end
        for name in ("mon", "osd0", "mds", "mgr", "log", "sock", "mnt"):
            (self.folder / name).mkdir(parents=True)
        fsid = str(uuid.uuid4())
        self.conf.write_text(
            _CONF.format(fsid=fsid, host=HOST, port=self.port, osd_bytes=OSD_BYTES, folder=self.folder)
        )
        (self.folder / "osd-id").write_text(str(uuid.uuid4()))
        monmap = str(self.folder / "monmap")
        made = ["monmaptool", "--create", "--add", "a", f"{HOST}:{self.port}", "--fsid", fsid, monmap]
        _checked(made, subprocess.run(made, capture_output=True, text=True, timeout=COMMAND_S, check=False))
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        (self.folder / "prepared").touch()

    def start(self, begin: Callable[[str], None] | None = None) -> None:
        """Bring the cluster up and mount it; what runs already stays. Raises `ConfigRejected`, `Unavailable`.

        Args:
            begin: starts one of `SUPERVISED` unless it runs; left out, they go into the background by themselves.
        """
        if lacking := missing():
            raise ConfigRejected(f"no CephFS can run here: {lacking}.")
        begin = begin or (lambda program: self.start_daemon(program.removeprefix("ceph-")))
        self.prepare()
        made = (self.folder / "made").exists()
        # Each step of the making may be done again: a start that was killed goes on where it was.
        for name in DAEMONS:
            if name == "osd" and not made:
                osd = (self.folder / "osd-id").read_text()
                self._run("ceph", "osd", "new", osd)
                self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
            if name == "mds" and made and not self.pid("mds"):
                # Else the map calls one active that ended with the last run, and a mount would ask that one.
                self._run("ceph", "mds", "fail", DAEMONS["mds"])
            begin(f"ceph-{name}")
        if not made:
            self._run("ceph", "osd", "pool", "create", "meta", "8")
            self._run("ceph", "osd", "pool", "create", "data", "8")
            self._run("ceph", "fs", "new", "cephfs", "meta", "data")
            (self.folder / "made").touch()
        self._await("an active metadata server", lambda: "up:active" in self._run("ceph", "mds", "stat"))
        begin("ceph-fuse")
        self._await(f"a mount at {self.mount}", self.is_mounted)

    def start_daemon(self, name: str) -> None:
        """Start `mon`, `mgr`, `osd`, `mds` or `fuse` (the mount) in the background unless it runs."""
        if name == "fuse":
            if not self.is_mounted():
                self._unmount("-z")
                self._run("ceph-fuse", str(self.mount))
        elif not self.pid(name):
            self._run(f"ceph-{name}", *self._of(name)[2:])

    def kill_osd(self) -> None:
        """End the OSD as a power cut does; reads and writes wait until `start_daemon("osd")`."""
        pid = self.pid("osd")
        if pid:
            os.kill(pid, signal.SIGKILL)
            self._await_end([pid], 10.0)

    def stop(self) -> None:
        """Unmount and end every daemon; nothing of it runs when this returns."""
        if self.is_mounted():
            if not self._unmount():
                # A process still has a file open, or the cluster does not answer: the mount goes when they do.
                self._unmount("-z")
        elif self.mount.parent.exists():
            self._unmount("-z")  # a mount whose process was killed is no mount any more, and in the way
        pids = [pid for name in ("client", "mds", "osd", "mgr", "mon") if (pid := self.pid(name))]
        for number, patience_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
            for pid in pids:
                if _runs(pid):
                    os.kill(pid, number)
            if self._await_end(pids, patience_s):
                return

    def is_mounted(self) -> bool:
        """Say whether the mount is there."""
        return os.path.ismount(self.mount)

    def pid(self, name: str) -> int:
        """Return the process of `mon`, `mgr`, `osd`, `mds` or `client` (the mount), 0 where it does not run."""
        for file in self.folder.glob(f"{name}.*.pid"):
            text = file.read_text().strip()
            if text.isdigit() and _runs(int(text)) and self._is_ours(int(text)):
                return int(text)
        return 0

    def _of(self, name: str) -> list[str]:
        return ["-c", str(self.conf), "-i", DAEMONS[name]]

    def _unmount(self, *flags: str) -> bool:
        command = ["fusermount3", "-u", *flags, str(self.mount)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _await(self, what: str, there: Callable[[], bool]) -> None:
        begin = awake_s()
        while not there():
            if awake_s() - begin > ACTIVE_S:
                raise Unavailable(f"CephFS has not {what} after {ACTIVE_S:.0f} s; its logs are in {self.folder}/log.")
            time.sleep(0.5)

    def _run(self, program: str, *words: str) -> str:
        command = [program, "-c", str(self.conf), *words]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{' '.join(command)} gave no answer in {COMMAND_S:.0f} s.") from error
        return _checked(command, ran)

    def _is_ours(self, pid: int) -> bool:
        """Say whether a process speaks of this folder's configuration: ids are used again."""
        try:
            return str(self.conf).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    def _await_end(self, pids: list[int], patience_s: float) -> bool:
        end = awake_s() + patience_s
        while any(_runs(pid) for pid in pids):
            if awake_s() > end:
                return False
            time.sleep(0.05)
        return True


def _checked(command: list[str], ran: subprocess.CompletedProcess[str]) -> str:
    if ran.returncode:
        raise Unavailable(f"{' '.join(command)} ended with {ran.returncode}: {(ran.stderr or ran.stdout)[-500:]}")
    return ran.stdout + ran.stderr


def _runs(pid: int) -> bool:
    """Say whether a process runs; one that ended and was not asked for its status does not.

    While threads of a killed process still end, its first one is a zombie, and its files are open and locked.
    """
    proc = Path(f"/proc/{pid}")
    try:
        state = (proc / "stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" or sum(1 for _ in (proc / "task").iterdir()) > 1
    except OSError:
        return False


def main(argv: list[str]) -> int:
    """`check` the machine, or `up`, `down`, `kill-osd`, `start-osd` on a folder."""
    if argv == ["check"]:
        if lacking := missing():
            print(f"no CephFS can run here: {lacking}")
        return 1 if lacking else 0
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    ceph = CephFs(Path(argv[1]).absolute(), int(os.environ.get("CEPH_MON_PORT", PORT)))
    actions: dict[str, Callable[[], None]] = {
        "up": ceph.start,
        "down": ceph.stop,
        "kill-osd": ceph.kill_osd,
        "start-osd": lambda: ceph.start_daemon("osd"),
    }
    if argv[0] not in actions:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        actions[argv[0]]()
    except (ConfigRejected, Unavailable) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
