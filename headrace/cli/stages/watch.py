"""Restart stages of this machine's stack that run and do not work, and tell of crashes by metrics.

`headrace up` starts it. A stage whose /healthz is red for 6 s, or that gives no answer for 60 s, is killed, and the
supervisor starts it again. What each stage's probes say is in docs/operations.md; metrics on 9109.
"""

from __future__ import annotations

import argparse

from headrace.backends.metrics_prometheus import PrometheusMetrics
from headrace.cli.addresses import find_home
from headrace.cli.runtime import set_logging, stop_event
from headrace.contract.errors import ConfigRejected
from headrace.deploy.local.layout import HOST, Layout, trainer_of
from headrace.deploy.local.readiness import http_get
from headrace.deploy.local.supervise import Supervisor
from headrace.deploy.local.watch import ANSWER_S, WATCHED, Watch, run, tell_room


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    parser.add_argument("--home", metavar="DIR", help="local state (HEADRACE_HOME; .headrace)")


def main(args: argparse.Namespace) -> int:
    """Watch the stack until SIGTERM."""
    set_logging()
    layout = Layout.saved(find_home(args.home))
    if layout is None:
        raise ConfigRejected("no stack was started here; `headrace up` starts one, and this verb with it.")
    stop = stop_event()
    metrics = PrometheusMetrics("watch", layout.port("metrics_watch"))
    watched = (*WATCHED, *map(trainer_of, layout.variants))
    urls = {name: f"http://{HOST}:{layout.metrics_port(name)}" for name in watched}
    watch = Watch(Supervisor(layout), urls, lambda url: http_get(url, ANSWER_S), metrics)
    metrics.ready(True)
    try:
        run(watch, lambda: tell_room(metrics, layout.home), stop)
    finally:
        watch.close()
        metrics.close()
    return 0
