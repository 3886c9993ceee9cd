"""Asks Kafka, HDFS and each stage whether it is ready for work: by a little work, never by waiting a fixed time."""

from __future__ import annotations

import http.client
import logging
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable

import msgspec

from headrace.backends.blobs_hdfs import HdfsBlobs
from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.contract.errors import Unavailable
from headrace.deploy.local.layout import HOST, Layout, trainer_of

# Loopback is asked directly, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def http_get(url: str, timeout_s: float = 2.0) -> tuple[int, bytes]:
    """Return status and body; status 0 and the reason where nobody answers."""
    try:
        try:
            answer = _OPENER.open(url, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            return int(answer.status), bytes(answer.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        return 0, str(getattr(error, "reason", error)).encode()


def kafka_trouble(brokers: str, timeout_s: float = 2.0) -> str:
    """Return why Kafka takes no work, "" when it does."""
    try:
        KafkaAdmin(brokers, timeout_s=timeout_s).ensure_topics([])
    except Unavailable as error:
        return str(error)
    return ""


def hdfs_trouble(layout: Layout, patience_s: float = 1.0) -> str:
    """Return why HDFS takes no write, "" when it does: one small file is written and deleted."""
    if not layout.webhdfs:
        return "no WebHDFS address; give HEADRACE_WEBHDFS=http://host:port"
    root = urllib.parse.urlsplit(layout.store).path
    try:
        blobs = HdfsBlobs(layout.webhdfs, f"{root}/probe", patience_s=patience_s, timeout_s=5.0)
        blobs.put("written", b"probe")
        blobs.delete("written")
    except Unavailable as error:
        return safe_mode(layout.webhdfs) or str(error)
    return ""


def safe_mode(webhdfs: str) -> str:
    """Return what the NameNode says of its safe mode, "" when it is off or nobody answers."""
    status, body = http_get(f"{webhdfs}/jmx?qry=Hadoop:service=NameNode,name=NameNodeInfo")
    if status != 200:
        return ""
    try:
        beans = msgspec.json.decode(body).get("beans") or [{}]
    except msgspec.DecodeError:
        return ""
    said = str(beans[0].get("Safemode") or "")
    return f"HDFS is in safe mode: {said.strip()[:300]}" if said else ""


def stage_probes(layout: Layout) -> dict[str, Callable[[], str]]:
    """Return, a stage, the function that tells why it is not ready, "" when it is."""

    def ready(port: int, path: str = "/readyz") -> Callable[[], str]:
        def ask() -> str:
            status, body = http_get(f"http://{HOST}:{port}{path}")
            return "" if status == 200 else body.decode(errors="replace").strip()[:200] or f"HTTP {status}"

        return ask

    stages = ("ingest", "stream", "sink", "aggregate", "crawl", "train", "shop", "watch")
    return {
        **{name: ready(layout.metrics_port(name)) for name in (*stages, *map(trainer_of, layout.variants))},
        "serve": ready(layout.port("serving")),
        "tensorboard": ready(layout.port("tensorboard"), "/"),
    }


def quiet_clients() -> None:
    """Keep the clients' warnings out of the log: what is asked may not be ready yet, and the answer says so."""
    logging.basicConfig(level=logging.ERROR)
    for name in ("headrace.hdfs", "headrace.kafka"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
