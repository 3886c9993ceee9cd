"""Kafka's errors in words for a terminal: what happened, at which address, and what to do."""

from __future__ import annotations

import argparse
import re

from headrace.cli.addresses import find_addresses, find_home
from headrace.contract.errors import ConfigRejected

_RAW = re.compile(r'(?:cimpl\.)?KafkaError\{code=(\w+),val=-?\d+,str="(.*?)"\}')
"""As librdkafka's client writes an error."""
_STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""As some libraries colour their errors, whether a terminal reads them or not."""
_REMEDY = (
    "Look whether the broker runs and is reached from here: `headrace status`, `headrace doctor`. Another one is named "
    "by --brokers or HEADRACE_BROKERS."
)


def in_words(text: str, args: argparse.Namespace) -> str:
    """Return an error's text without colours and the client's own notation; where it had some, with address and remedy.

    >>> in_words("no answer: KafkaError{code=_TRANSPORT,val=-195,str=\\"Local: Broker transport failure\\"}",
    ...          argparse.Namespace(brokers="10.0.0.1:9092")).partition(" Look")[0]
    'no answer: Broker transport failure (_TRANSPORT). The brokers are 10.0.0.1:9092.'
    """
    text = _STYLE.sub("", text)
    plain, count = _RAW.subn(lambda found: f"{_phrase(found[2])} ({found[1]})", text)
    if not count:
        return text
    try:
        brokers = find_addresses(args, find_home(getattr(args, "home", None))).brokers
    except ConfigRejected:
        return plain
    return f"{plain.rstrip('.')}. The brokers are {brokers}. {_REMEDY}"


def _phrase(text: str) -> str:
    """Return the client's phrase: `Local: ` says that the client itself says so, not the broker."""
    return text.replace("Local: ", "").strip()
