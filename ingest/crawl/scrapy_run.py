"""Scrapy as the crawler uses it: its settings, and its reactor on asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from scrapy.utils.reactor import install_reactor

from headrace.contract.config import CrawlConfig
from headrace.contract.crawl import Crawl
from headrace.ingest.crawl.politeness import host_settings


def scrapy_settings(crawls: Sequence[Crawl], config: CrawlConfig) -> dict[str, Any]:
    """Return Scrapy's settings: its politeness on, all that it would keep or try again by itself off."""
    hosts = host_settings(crawls)
    own = "headrace.ingest.crawl.politeness"
    return {
        "USER_AGENT": config.user_agent,
        "ROBOTSTXT_OBEY": True,
        "HEADRACE_ROBOTS_S": config.robots_ms / 1000,
        "HEADRACE_PARALLEL": {host: slot["concurrency"] for host, slot in hosts.items()},
        "DOWNLOAD_SLOTS": hosts,
        "CONCURRENT_REQUESTS": config.requests_max,
        "AUTOTHROTTLE_ENABLED": True,
        "AUTOTHROTTLE_START_DELAY": 0.0,
        "DOWNLOAD_MAXSIZE": 1_048_576,
        "DOWNLOAD_TIMEOUT": 20,
        "DOWNLOAD_WARNSIZE": 0,
        "DOWNLOAD_VERIFY_CERTIFICATES": True,
        "DOWNLOAD_HANDLERS": {"data": None, "file": None, "ftp": None, "s3": None},
        "REDIRECT_MAX_TIMES": config.redirects_max,
        "METAREFRESH_ENABLED": False,
        "RETRY_ENABLED": False,
        "COOKIES_ENABLED": False,
        "REFERER_ENABLED": False,
        "HTTPERROR_ALLOW_ALL": True,
        "TELNETCONSOLE_ENABLED": False,
        "REMOTE_CONTROL_ENABLED": False,
        "LOG_ENABLED": False,
        "STATS_DUMP": False,
        "DOWNLOADER_MIDDLEWARES": {
            "scrapy.downloadermiddlewares.robotstxt.RobotsTxtMiddleware": None,
            "scrapy.downloadermiddlewares.offsite.OffsiteMiddleware": None,
            f"{own}.AllowedHosts": 50,
            f"{own}.RobotsTxt": 100,
        },
        "EXTENSIONS": {
            "scrapy.extensions.throttle.AutoThrottle": None,
            "scrapy.extensions.logstats.LogStats": None,
            f"{own}.Throttle": 0,
        },
    }


def run_on_reactor(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` on Twisted's reactor over asyncio, and end it; raise what `work` raised."""
    install_reactor("twisted.internet.asyncioreactor.AsyncioSelectorReactor")
    from twisted.internet import reactor as installed

    reactor: Any = installed
    raised: list[BaseException] = []

    async def whole() -> None:
        try:
            await work
        except BaseException as error:
            raised.append(error)
        finally:
            reactor.stop()

    def begin() -> None:
        task = asyncio.ensure_future(whole())
        tasks.append(task)

    tasks: list[asyncio.Future[None]] = []
    reactor.callWhenRunning(begin)
    reactor.run(installSignalHandlers=False)
    if raised:
        raise raised[0]
