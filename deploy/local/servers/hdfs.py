"""HDFS on this machine: a NameNode and a DataNode with WebHDFS, loopback only."""

from __future__ import annotations

import getpass
import shutil
import subprocess
import tempfile
from pathlib import Path
from xml.sax.saxutils import escape

from headrace.contract.errors import Unavailable
from headrace.deploy.local.layout import HOST, Layout
from headrace.deploy.local.servers import room
from headrace.deploy.local.servers.java import Java
from headrace.deploy.local.servers.kafka import command_line

_WEB_XML = '<?xml version="1.0"?>\n<web-app xmlns="http://java.sun.com/xml/ns/javaee" version="2.5"></web-app>\n'


def settings(layout: Layout) -> dict[str, dict[str, str]]:
    """Return the properties of core-site.xml and hdfs-site.xml."""
    data = plain_path(layout)
    return {
        "core-site.xml": {
            "fs.defaultFS": f"hdfs://{HOST}:{layout.port('namenode')}",
            "hadoop.tmp.dir": str(data / "tmp"),
            "hadoop.http.staticuser.user": getpass.getuser(),
        },
        "hdfs-site.xml": {
            "dfs.replication": "1",
            "dfs.namenode.name.dir": (data / "name").as_uri(),
            "dfs.datanode.data.dir": (data / "data").as_uri(),
            "dfs.namenode.rpc-address": f"{HOST}:{layout.port('namenode')}",
            "dfs.namenode.http-address": f"{HOST}:{layout.port('namenode_http')}",
            "dfs.datanode.address": f"{HOST}:{layout.port('datanode')}",
            "dfs.datanode.http.address": f"{HOST}:{layout.port('datanode_http')}",
            "dfs.datanode.ipc.address": f"{HOST}:{layout.port('datanode_ipc')}",
            "dfs.datanode.hostname": HOST,
            "dfs.namenode.datanode.registration.ip-hostname-check": "false",
            # Else every restart of the NameNode costs 30 s of safe mode, for the sake of replicas that are not there.
            "dfs.namenode.safemode.extension": "0",
            # A small WebHDFS write falls from 270 ms to 30 ms.
            "dfs.client.block.write.locateFollowingBlock.initial.delay.ms": "10",
            # One DataNode: a broken pipeline cannot find a second one, so let the writer go on or begin anew.
            "dfs.client.block.write.replace-datanode-on-failure.policy": "NEVER",
            "dfs.namenode.fs-limits.min-block-size": "0",
            # A DataNode that was killed is noticed after 2 * 3 s + 10 * 1 s instead of 10 minutes.
            "dfs.namenode.heartbeat.recheck-interval": "3000",
            "dfs.heartbeat.interval": "1",
            "dfs.permissions.enabled": "false",
            "dfs.namenode.handler.count": "6",
            "dfs.datanode.max.transfer.threads": "256",
            # Checkpointing of the edit log is the secondary's work elsewhere; here edits stay short.
            "dfs.namenode.num.extra.edits.retained": "10000",
        },
    }


def plain_path(layout: Layout) -> Path:
    """Return a path of the HDFS folder that its own URI does not escape, by a link in a private folder if need be.

    The DataNode uses its folder's URI as a format string, so that the %20 of a space stops it (Hadoop 3.5.0).
    """
    folder = layout.home / "hdfs"
    if "%" not in folder.as_uri():
        return folder
    note = layout.home / "run" / "hdfs-link"
    if note.exists():
        link = Path(note.read_text())
        if link.is_symlink() and link.resolve() == folder.resolve():
            return link
    link = Path(tempfile.mkdtemp(prefix="headrace-")) / "hdfs"
    link.symlink_to(folder, target_is_directory=True)
    note.write_text(str(link))
    return link


def format_once(layout: Layout, java: Java, jars: Path) -> None:
    """Write the configuration and the empty web applications; format the NameNode when it is new."""
    folder = layout.home / "hdfs"
    conf = folder / "conf"
    conf.mkdir(parents=True, exist_ok=True)
    for name, properties in settings(layout).items():
        lines = [f"<property><name>{n}</name><value>{escape(v)}</value></property>" for n, v in properties.items()]
        (conf / name).write_text("<configuration>\n" + "\n".join(lines) + "\n</configuration>\n")
    # The Maven artifact lacks the web applications; WebHDFS only asks that they exist.
    for app in ("hdfs", "datanode", "static"):
        target = conf / "webapps" / app / "WEB-INF"
        target.mkdir(parents=True, exist_ok=True)
        (target / "web.xml").write_text(_WEB_XML)
    done = folder / "formatted"
    if done.exists():
        return
    for data in ("name", "data"):
        shutil.rmtree(folder / data, ignore_errors=True)
    command = [
        *command_line(java, jars, conf, heap_mb=128, quick=True),
        *("org.apache.hadoop.hdfs.server.namenode.NameNode", "-format", "-nonInteractive"),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if ran.returncode:
        raise Unavailable(f"the NameNode was not formatted: {(ran.stderr or ran.stdout).strip()[-500:]}")
    done.touch()


def start_commands(layout: Layout, java: Java, jars: Path) -> dict[str, list[str]]:
    """Return the command lines of both servers, which begin when the disk has room."""
    # Small servers that must answer soon: the quick compiler and the simple collector start them in half the time.
    folder = layout.home / "hdfs"
    java_line = command_line(java, jars, folder / "conf", quick=True)
    return {
        "namenode": room.guarded(folder, [*java_line, "org.apache.hadoop.hdfs.server.namenode.NameNode"]),
        "datanode": room.guarded(folder, [*java_line, "org.apache.hadoop.hdfs.server.datanode.DataNode"]),
    }
