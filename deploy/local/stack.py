"""A stack on this machine, brought up and down in numbered steps.

Up:

1. Take over what runs already; end what a killed supervisor left behind.
2. Fetch jars, and format the storage of Kafka and HDFS where it is new.
3. Start supervisord.
4. Start Kafka and HDFS, and wait until both take work.
5. Create the topics.
6. Start the stages, and wait until each is ready.

Down: the shop first, then the stages, then Kafka and HDFS, then supervisord, then every process that carries this
stack's mark.
"""

from __future__ import annotations

import fcntl
import importlib.util
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from headrace.backends.log.admin_kafka import KafkaAdmin
from headrace.contract.checks.names import VARIANTS_MAX
from headrace.contract.config import LogConfig
from headrace.contract.errors import ConfigRejected, Unavailable, meant
from headrace.contract.interfaces.log import TopicSpec
from headrace.deploy.local import readiness
from headrace.deploy.local.layout import CHECKOUT, Layout, jar_folder, trainer_of
from headrace.deploy.local.restarts import MAX_S, Crashes
from headrace.deploy.local.servers import cephfs, hdfs, kafka
from headrace.deploy.local.servers.jars import ensure_jars
from headrace.deploy.local.servers.java import find_java
from headrace.deploy.local.supervise import RENEWING, Program, Supervisor, end_orphans, orphans
from headrace.process.awake import awake_s
from headrace.serving.model.region_file import forget_region

INFRASTRUCTURE = ("kafka", "namenode", "datanode", *cephfs.SUPERVISED)
STAGES = ("ingest", "stream", "aggregate", "sink", "train", "serve", "shop")
ALSO = ("tensorboard", "shipper", "crawl")
WATCH = "watch"
INFRASTRUCTURE_S = 180.0
STAGES_S = 300.0
"""A machine's first start compiles the kernels of four stages at once: two minutes and more on two busy cores."""

LOOK_S = 0.3
ENDS_MAX = 3
REFUSED = "exit 2"
"""How a process ends that refuses its project, its settings or its environment: a new one would refuse them too."""

Say = Callable[[str], None]


def start(
    layout: Layout,
    topics: Sequence[TopicSpec],
    say: Say,
    *,
    stages: bool | Sequence[str] = True,
    more: Sequence[Program] = (),
    log: LogConfig | None = None,
    restart_max_s: float = MAX_S,
) -> None:
    """Bring the stack up, with all stages, with none, or with those named; returns when all that was started is ready.

    `more` are further programs; one that has a stage's name takes its place. `log` says with how many copies topics are
    created, `restart_max_s` how long a process that crashes again and again waits at most for its next start.
    Raises `Unavailable` with each part's reason when one is not ready in time; what runs then keeps running, so that
    its log can be read.
    """
    layout.prepare()
    with _only_one(layout):
        raise_file_limit()
        supervisor = Supervisor(layout)
        if supervisor.running():
            say("taking over what runs already")
            take_environment(supervisor, say)
            layout = with_variants(layout, supervisor)
        else:
            if orphans(layout.home):
                say(f"ended {end_orphans(layout.home)} processes that a killed supervisor had left")
            found = programs(layout, say, stages=stages, more=more)
            supervisor.start(found, restart_max_s=restart_max_s)
        layout.save()
        if layout.own_cephfs:
            supervisor.begin(("kafka",))
            begin = awake_s()
            own_cephfs(layout).start(lambda name: supervisor.begin((name,)))
            say(f"cephfs is ready after {awake_s() - begin:.1f} s")
        start_infrastructure(layout, supervisor, say)
        said = log or LogConfig()
        admin = KafkaAdmin(layout.brokers, replication=said.replication, min_insync_replicas=said.min_insync_replicas)
        admin.ensure_topics(topics)
        if stages:
            names = [p.name for p in supervisor.processes() if p.name not in INFRASTRUCTURE]
            probes = readiness.stage_probes(layout)
            # The shop comes late: its traffic would take the processor from those that still start. The crawler comes
            # after it: a site that does not answer at first would be left alone for half a minute.
            late: list[list[str]] = [[name] for name in ("shop", "crawl") if name in names]
            early = [name for name in names if [name] not in late]
            for group in [early, *late]:
                died = Died(supervisor)
                supervisor.begin(group)
                await_all({name: probes[name] for name in group if name in probes}, STAGES_S, say, died)


def start_infrastructure(layout: Layout, supervisor: Supervisor, say: Say) -> None:
    """Start Kafka and HDFS, those that are this stack's own, and wait until both take work."""
    supervisor.begin(INFRASTRUCTURE)
    await_all(infrastructure_probes(layout), INFRASTRUCTURE_S, say)


def infrastructure_probes(layout: Layout) -> dict[str, Callable[[], str]]:
    """Return for Kafka and HDFS the function that tells why it takes no work, "" when it does."""
    probes: dict[str, Callable[[], str]] = {"kafka": lambda: readiness.kafka_trouble(layout.brokers)}
    if layout.store.startswith("hdfs://"):
        probes["hdfs"] = lambda: readiness.hdfs_trouble(layout)
    return probes


def stop(layout: Layout, say: Say) -> None:
    """End everything that the stack started; nothing of it lives when this returns."""
    supervisor = Supervisor(layout)
    if supervisor.running():
        # It would take a stage that ends for one that does not answer.
        supervisor.end((WATCH,))
        supervisor.end(("shop",))
        supervisor.end((*STAGES, *ALSO, *(p.name for p in supervisor.processes() if p.name.startswith("train@"))))
        for name in reversed(cephfs.SUPERVISED if layout.own_cephfs else ()):
            supervisor.end((name,))
        supervisor.end(INFRASTRUCTURE)
        supervisor.shutdown()
        deadline = awake_s() + 5
        while orphans(layout.home) and awake_s() < deadline:
            time.sleep(0.05)
        say("stopped")
    if left := end_orphans(layout.home):
        say(f"ended {left} processes that no supervisor answered for")
    if layout.own_cephfs:
        own_cephfs(layout).stop()
    # A stage that dies leaves its model to the next one; a stack that is put down gives the memory back.
    forget_region(layout.home)


def restart(layout: Layout, names: Sequence[str], say: Say) -> None:
    """End these processes and start them again; returns when those that can tell are ready. One that can begin anew in
    its own place keeps its port: requests wait meanwhile, and none is refused.

    Raises `ConfigRejected` where the stack does not run or has no such process, `Unavailable` when one is not ready in
    time, or ends again and again.
    """
    supervisor = _with_these(layout, names)
    with _only_one(layout):
        renewed = [name for name in names if supervisor.renew(name)]
        for name in renewed:
            say(f"{name} begins anew and keeps its port: what asks meanwhile waits until it is ready")
        ended = [name for name in names if name not in renewed]
        for name in (each for each in ended if each in RENEWING):
            say(f"{name} is ended and started: its port refuses connections until it is ready")
        supervisor.end(ended)
        _begin(layout, supervisor, names, say)


def start_named(layout: Layout, names: Sequence[str], say: Say) -> None:
    """Start these processes, those that do not run; the trainer of a variant that `layout` names is new to the stack at
    its first start. Returns and raises as `restart` does."""
    if any(trainer_of(name) in names for name in layout.variants) and Supervisor(layout).running():
        with _only_one(layout):
            layout = with_variants(layout, Supervisor(layout))
    supervisor = _with_these(layout, names)
    with _only_one(layout):
        _begin(layout, supervisor, names, say)


def stop_named(layout: Layout, names: Sequence[str], say: Say) -> None:
    """End these processes; they stay ended until somebody starts them. Raises `ConfigRejected` as `restart` does."""
    supervisor = _with_these(layout, names)
    with _only_one(layout):
        supervisor.end(names)
    for name in names:
        say(f"{name} is stopped; `headrace start {name}` starts it")


def with_variants(layout: Layout, supervisor: Supervisor) -> Layout:
    """Let a running supervisor know the trainers of variants that it does not know yet; return the layout with all that
    it knows. Each keeps its metrics port. None is started yet; `watch`, which asks them too, is started anew."""
    saved = Layout.saved(layout.home)
    before = saved.variants if saved is not None else ()
    known = {p.name for p in supervisor.processes()}
    new = [name for name in layout.variants if trainer_of(name) not in known]
    # The place of one that the supervisor does not know any more is free.
    kept = [name for name in before if trainer_of(name) in known]
    layout = replace(layout, variants=(*kept, *(name for name in layout.variants if name not in kept)))
    if len(layout.variants) > VARIANTS_MAX:
        raise ConfigRejected(
            f"the stack knows trainers of {len(layout.variants)} variants ({', '.join(layout.variants)}), and "
            f"{VARIANTS_MAX} have metrics ports: `headrace down`, then `headrace up` forgets what is not declared."
        )
    if new:
        layout.save()
        supervisor.add([_trainer(name) for name in new])
        supervisor.end((WATCH,))
        supervisor.begin((WATCH,))
    return layout


def _trainer(variant: str) -> Program:
    return Program(trainer_of(variant), [sys.executable, "-m", "headrace.cli.main", "train", "--variant", variant])


def take_environment(supervisor: Supervisor, say: Say) -> None:
    """Give the caller's environment to what is started from now on, and say what that changes for what runs."""
    if changed := supervisor.take_environment():
        say(
            f"new values of {', '.join(changed)}: for what starts from now on; what runs keeps the old ones until "
            "`headrace restart NAME`"
        )


def _with_these(layout: Layout, names: Sequence[str]) -> Supervisor:
    supervisor = Supervisor(layout)
    known = [p.name for p in supervisor.processes()]
    if not known:
        raise ConfigRejected(f"nothing runs in {layout.home}; `headrace up` starts it.")
    if unknown := [name for name in names if name not in known]:
        near = meant(unknown[0], known)
        raise ConfigRejected(f"no process {', '.join(unknown)} here; there are {', '.join(known)}.{near}")
    return supervisor


def _begin(layout: Layout, supervisor: Supervisor, names: Sequence[str], say: Say) -> None:
    take_environment(supervisor, lambda _: None)
    died = Died(supervisor)
    supervisor.begin(names)
    probes = readiness.stage_probes(layout) | infrastructure_probes(layout)
    wanted = {"hdfs" if name in ("namenode", "datanode") else name for name in names}
    await_all({name: ask for name, ask in probes.items() if name in wanted}, STAGES_S, say, died)


def own_cephfs(layout: Layout) -> cephfs.CephFs:
    """Return the CephFS of this stack."""
    return cephfs.CephFs(layout.home / "cephfs", layout.ceph_port)


def programs(
    layout: Layout, say: Say, *, stages: bool | Sequence[str] = True, more: Sequence[Program] = ()
) -> list[Program]:
    """Return what the supervisor is to run; fetches jars and formats storage on the way."""
    found: list[Program] = []
    if layout.own_kafka or layout.own_hdfs:
        java = find_java()
        say(f"Java {java.major} of {java.origin}: {java.path}")
        jars = ensure_jars(jar_folder(layout.home), java, say)
        with ThreadPoolExecutor(2) as pool:
            waits = []
            if layout.own_kafka:
                waits.append(pool.submit(kafka.format_once, layout, java, jars["kafka"]))
                found.append(Program("kafka", kafka.start_command(layout, java, jars["kafka"])))
            if layout.own_hdfs:
                waits.append(pool.submit(hdfs.format_once, layout, java, jars["hdfs"]))
                found += [Program(n, c) for n, c in hdfs.start_commands(layout, java, jars["hdfs"]).items()]
            for wait in waits:
                wait.result()
    if layout.own_cephfs:
        if lacking := cephfs.missing():
            raise ConfigRejected(f"no CephFS can run here: {lacking}. Or name another STORE=.")
        own_cephfs(layout).prepare()
        found += [Program(name, command) for name, command in own_cephfs(layout).programs().items()]
    if not stages:
        return [*found, *more]
    if layout.shipper:
        found.append(Program("shipper", shipper_command(layout)))
    command = [sys.executable, "-m", "headrace.cli.main"]
    verbs = [*STAGES, "tensorboard", WATCH] if stages is True else [*stages, WATCH]
    found += [Program(v, [*command, v]) for v in verbs if importlib.util.find_spec(f"headrace.cli.stages.{v}")]
    found += [_trainer(name) for name in layout.variants if "train" in verbs]
    return [*(p for p in found if p.name not in {m.name for m in more}), *more]


def shipper_command(layout: Layout) -> list[str]:
    """Return the command line of the shipper on the PATH, on the configuration in deploy/."""
    (layout.home / "shipper").mkdir(exist_ok=True)
    binary = shutil.which(layout.shipper)
    if binary is None:
        raise ConfigRejected(
            f"SHIPPER={layout.shipper} and no {layout.shipper} on the PATH; install it, or leave it out."
        )
    folder = CHECKOUT / "deploy" / layout.shipper
    file = folder / ("fluent.conf" if layout.shipper == "fluentd" else "fluent-bit.conf")
    return [binary, "-c", str(file)]


class Died:
    """Tells of a process that waiting does not help: it refused its configuration, or ended three times since this was
    made. One end alone may be of a broker that was not quite there."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor, self._lock = supervisor, threading.Lock()
        self._before = {name: each.total for name, each in supervisor.crashes().items()}
        self._seen: dict[str, Crashes] = {}
        self._asked_s = -LOOK_S

    def __call__(self, name: str) -> str:
        """Return how a process ended, with its last words; "" while there is hope."""
        with self._lock:
            if awake_s() - self._asked_s >= LOOK_S:
                self._seen, self._asked_s = self._supervisor.crashes(), awake_s()
        crashes = self._seen.get(name, Crashes())
        ended = crashes.total - self._before.get(name, 0)
        if ended >= ENDS_MAX or (ended and crashes.last_exit == REFUSED):
            times = f"{ended} times, the last time " if ended > 1 else ""
            return f"it ended {times}with {crashes.last_exit}: {crashes.last_words or 'no last words'}"
        return ""


def await_all(
    probes: Mapping[str, Callable[[], str]],
    timeout_s: float,
    say: Say,
    died: Callable[[str], str] = lambda name: "",
) -> None:
    """Ask each probe until it answers "", side by side; tells each that becomes ready.

    Raises `Unavailable` with the reasons of those that did not in `timeout_s`, and at once when `died` tells that one
    of them will not. An interrupt ends the asking.
    """
    begin, given_up = awake_s(), threading.Event()

    def wait(name: str, ask: Callable[[], str]) -> tuple[str, str]:
        while reason := ask():
            if end := died(name):
                given_up.set()
                return "died", f"{name}: {end}"
            if given_up.wait(0.1) or awake_s() - begin > timeout_s:
                return "late", f"{name}: {reason}"
        say(f"{name} is ready after {awake_s() - begin:.1f} s")
        return "", ""

    with ThreadPoolExecutor(max(1, len(probes))) as pool:
        try:
            found = [each for each in pool.map(lambda item: wait(*item), probes.items()) if each[0]]
        except BaseException:
            given_up.set()
            raise
    if dead := [reason for how, reason in found if how == "died"]:
        raise Unavailable(
            f"{'; '.join(dead).rstrip('.')}. Mend what it says, then run the same again: what is ready stays, and the "
            "rest starts with the files and the environment of then. `headrace logs NAME` shows more, `headrace down` "
            "stops all."
        )
    if found:
        raise Unavailable(
            f"not ready after {timeout_s:.0f} s: {'; '.join(reason for _, reason in found)}. "
            "`headrace logs NAME` shows why; `headrace down` stops the rest."
        )


def raise_file_limit() -> None:
    """Let this process and its children open as many files as the hard limit allows, up to 65,536."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _only_one(layout: Layout) -> Iterator[None]:
    with (layout.home / "run" / "up.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigRejected(f"another `headrace up` works on {layout.home} right now; wait for it.") from error
        yield
