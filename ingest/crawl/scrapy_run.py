"""Scrapy as the crawler uses it: its settings, and its reactor on asyncio."""

from __future__ import annotations

import asyncio
import weakref
import zlib
from collections.abc import Coroutine, Sequence
from importlib import import_module
from typing import Any

from scrapy.downloadermiddlewares.httpcompression import HttpCompressionMiddleware
from scrapy.exceptions import IgnoreRequest
from scrapy.utils.reactor import install_reactor

from headrace.contract.config import CrawlConfig
from headrace.contract.crawl import Crawl
from headrace.ingest.crawl.politeness import host_settings

HEAD_BYTES_MAX = 1_048_576
"""Most bytes of the headers of one answer, those before it (1xx) included. Servers send some 1,000."""
_PIECE_BYTES = 1_048_576


class Torn(IgnoreRequest):
    """A compressed body that has no end, or is damaged."""


class WholeBodies(HttpCompressionMiddleware):
    """Decompression of whole bodies: Scrapy takes what there is of a torn one, which nothing else would tell."""

    @staticmethod
    def _decode(body: bytes, encoding: bytes, max_size: int) -> bytes:
        """Return the body. Raises `Torn`, and `IgnoreRequest` where it swells beyond `max_size` bytes."""
        plain = HttpCompressionMiddleware._decode(body, encoding, max_size)
        if encoding in {b"gzip", b"x-gzip"} and not _is_whole_gzip(body):
            raise Torn("the gzip of the body is torn")
        if encoding == b"br":
            reader = import_module("brotli").Decompressor()
            reader.process(body)
            if not reader.is_finished():
                raise Torn("the brotli of the body is torn")
        return plain


def _is_whole_gzip(body: bytes) -> bool:
    """Say whether each member of a gzip is whole; what follows and is none does not count."""
    while body[:2] == b"\x1f\x8b":
        reader = zlib.decompressobj(31)
        try:
            while not reader.eof and body:
                reader.decompress(body, _PIECE_BYTES)
                body = reader.unconsumed_tail or reader.unused_data
        except zlib.error:
            return False
        if not reader.eof:
            return False
    return True


def scrapy_settings(crawls: Sequence[Crawl], config: CrawlConfig) -> dict[str, Any]:
    """Return Scrapy's settings: its politeness on, all that it would keep or try again by itself off."""
    hosts = host_settings(crawls)
    own = "headrace.ingest.crawl.politeness"
    return {
        "USER_AGENT": config.user_agent,
        "ROBOTSTXT_OBEY": True,
        "HEADRACE_ROBOTS_S": config.robots_ms / 1000,
        "HEADRACE_PLACES": frozenset(place for crawl in crawls for place in crawl.places()),
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
            "scrapy.downloadermiddlewares.httpcompression.HttpCompressionMiddleware": None,
            f"{__name__}.WholeBodies": 590,
        },
        "EXTENSIONS": {
            "scrapy.extensions.throttle.AutoThrottle": None,
            "scrapy.extensions.logstats.LogStats": None,
            f"{own}.Throttle": 0,
        },
    }


def _bound_heads() -> None:
    """Let Twisted give an answer up whose headers have no end: it keeps all of them in memory."""
    from twisted.python.failure import Failure
    from twisted.web import _newclient

    client: Any = _newclient.HTTP11ClientProtocol
    failure: Any = Failure
    plain = client.dataReceived
    read: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def bounded(protocol: Any, data: bytes) -> None:
        plain(protocol, data)
        parser = protocol._parser
        if parser is not None and parser.state in (_newclient.STATUS, _newclient.HEADER):
            read[parser] = read.get(parser, 0) + len(data)
            if read[parser] > HEAD_BYTES_MAX:
                protocol._giveUp(failure(ValueError(f"headers of more than {HEAD_BYTES_MAX} bytes")))

    client.dataReceived = bounded


def run_on_reactor(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` on Twisted's reactor over asyncio, and end it; raise what `work` raised."""
    install_reactor("twisted.internet.asyncioreactor.AsyncioSelectorReactor")
    from twisted.internet import reactor as installed

    reactor: Any = installed
    _bound_heads()
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
