"""Serve the demo's catalogue as a site for the crawler, and make its traffic: ask serving to rank, show, and log
impressions, clicks and dwells through `headrace.sender`.

Rows come from DATA= (a folder with KuaiRand), else shared/data/kuairand beside the checkout, else a seeded generator.
RATE= or --rate is impressions a second; 0 shows nothing, the site stays up. It goes on where it stopped, a kill -9
included.
"""

from __future__ import annotations

import argparse
import logging
import os
from functools import partial

from headrace.cli.addresses import HOST
from headrace.cli.project_folder import is_demo
from headrace.cli.runtime import Runtime, add_common, open_runtime, stop_event
from headrace.contract.errors import ConfigRejected
from headrace.examples.shop.catalogue import Catalogue, Site, load_items
from headrace.examples.shop.freshness import Freshness
from headrace.examples.shop.traffic import find_data, load_traffic
from headrace.examples.shop.web_service import Shop, waiting_log
from headrace.process.background import Background
from headrace.sender import Sender

RATE = 200.0
RATE_MAX = 100_000.0

logger = logging.getLogger("headrace.shop")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's flags."""
    add_common(parser)
    parser.add_argument("--rate", type=_rate, default=None, help=f"impressions a second (RATE; {RATE:g})")


def main(args: argparse.Namespace) -> int:
    """Run until SIGTERM."""
    runtime, stop = open_runtime(args), stop_event()
    if not is_demo(runtime.project_dir):
        raise ConfigRejected(
            f"{runtime.project_dir} is not the demo shop, whose visitors would send it events that it does not know. "
            "`headrace traffic` plays the visitors of its own traffic.py."
        )
    metrics = runtime.metrics("shop")
    rate = args.rate if args.rate is not None else _rate(os.environ.get("RATE") or str(RATE))
    folder = find_data(runtime.project_dir, os.environ.get("DATA"))
    site = Site(Catalogue(load_items(folder)), HOST, runtime.port("catalogue"), runtime.clock)
    logger.info("catalogue on %s", site.url)
    traffic = load_traffic(folder, runtime.project.impression.fields)
    logger.info("rows: %s", traffic.label)
    metrics.ready(True)
    if rate == 0:
        logger.info("RATE=0: the shop shows nothing")
        stop.wait()
        return 0
    sender = Sender("", HOST, _forward_port(runtime), spool_dir=runtime.home / "spool" / "shop")
    freshness = Freshness(runtime.topics, metrics, runtime.clock)
    background = Background()
    background.thread("freshness", partial(freshness.run, runtime.reader(), stop))
    shop = Shop(
        project=runtime.project,
        traffic=traffic,
        rate=rate,
        log=waiting_log(sender, stop),
        metrics=metrics,
        clock=runtime.clock,
        progress=runtime.home / "shop.json",
        host=HOST,
        port=runtime.port("serving"),
        stop=stop,
        freshness=freshness,
        background=background,
    )
    shop.run()
    # 2 s of the 5 that a clean shutdown has; what has no ack by then stays in the spool for the next start.
    sender.close(timeout=2.0)
    return 0


def _forward_port(runtime: Runtime) -> int:
    """Return where the shipper listens: SHIPPER_PORT when one stands between, else the gateway."""
    told = os.environ.get("SHIPPER_PORT")
    return int(told) if told else runtime.port("forward")


def _rate(text: str) -> float:
    try:
        # `float` also takes 1_0 and digits of other scripts.
        rate = float(text) if text.isascii() and "_" not in text else -1.0
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= RATE_MAX:
        raise ConfigRejected(f"RATE={text!r}: a number from 0 to {RATE_MAX:,.0f} impressions a second is wanted.")
    return rate
