"""Dead letters as an operator sees them: as JSON objects, as lines of a table, with what to do. Pure."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from headrace.contract.formats.served_token import REFUSALS
from headrace.ingest.dead_letters.letters import Letter, record_of

ADVICE: dict[str, str] = {
    "undeclared": "No event of the project has this tag: declare one, restart the gateways, retry. Or route the tag "
    "elsewhere in the shipper.",
    "no_partition_key": "The service must log the field that the project names as `key`. The record lacks it, so a "
    "retry is refused again unless `key` changes.",
    "no_request_id": "The service must log `request_id`, which impression and feedback share. Else refused again.",
    "bad_type": "Correct the service, or declare the field with the type that it logs, restart the gateways, retry.",
    "unknown_field": "Declare the field, or set unknown='drop' for this event, restart the gateways, retry.",
    "future": "A clock runs ahead: correct it (NTP) on the host of `origin`. Once the event's time is past, retry.",
    "too_late": "It is older than the stream's memory of repeats. The gateways look it up by themselves; in the state "
    "`unknown` log and lake cannot tell whether it was taken: retry it with --take, or with --drop if it was.",
    "too_deep": "Log flatter records: what lies beyond 100 levels was left out. It cannot be retried.",
    "too_large": "One event is larger than ingest.batch_bytes: log less, or raise it (the broker's limit is 1 MB).",
    **REFUSALS,
    "bad_line": "The line is not of the log format that the mapping names: correct `format`, restart the gateways, "
    "retry.",
    "bad_chunk": "The shipper's chunk cannot be unpacked at all: look at its version and compression. It cannot be "
    "retried: it is no event.",
}
"""By reason, one line: what to do."""
AFTER: dict[str, str] = {
    "retried": "A retry or the gateways have settled it: nothing is left to do.",
    "refused": "A retry was refused. The newer letter that names this one (`retry_of`) is to be corrected and retried.",
    "retrying": "A retry is at work at it, or was killed: the next one finds out. headrace dead-letters retry {0}",
    "unknown": "Log and lake cannot tell if it was taken. Decide: headrace dead-letters retry --take {0}, or --drop.",
}
"""By state, where it is not `open`: what is left to do, with the letter's id."""
ADVICE_ELSE = "Read `detail`, correct the service or the declaration, restart the gateways, retry."


def view(letter: Letter, state: str) -> dict[str, Any]:
    """Return the letter as one JSON object has it.

    `record` is the whole record. What JSON cannot say (bytes that are no text, not-a-number) is text in it, and then,
    as where there is no whole record, `raw` has the kept bytes of MessagePack in base64.
    """
    told = letter.content
    shown: dict[str, Any] = {
        "id": letter.id,
        "partition": 0,
        "offset": letter.offset,
        "state": state,
        "reason": told.reason,
        "detail": _text(told.detail),
        "tag": _text(told.tag),
        "origin": _text(told.origin),
        "event_id": _text(told.event_id),
        "time_ns": told.time_ns,
        "gateway": told.gateway,
        "seen_ms": told.seen_ms,
        "raw_truncated": told.raw_truncated,
        "attempts": told.attempts,
    }
    if told.retry_of >= 0:
        shown["retry_of"] = f"0/{told.retry_of}"
    record, whole = record_of(told)
    exact = False
    if whole:
        shown["record"], exact = plain(record)
    if not exact:
        shown["raw"] = base64.b64encode(told.raw).decode()
    return shown


def plain(value: Any) -> tuple[Any, bool]:
    """Return `value` as JSON can say it, and whether that is all of it."""
    if value is None or isinstance(value, bool | int):
        return value, True
    if isinstance(value, float):
        return (value, True) if math.isfinite(value) else (str(value), False)
    if isinstance(value, str):
        text = _text(value)
        return text, text == value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace"), False
    if isinstance(value, dict):
        pairs = [(key if isinstance(key, str) else str(key), key, item) for key, item in value.items()]
        shown = [(_text(name), plain(item)) for name, _, item in pairs]
        exact = all(name == key for (name, _), (_, key, _) in zip(shown, pairs, strict=True))
        return {name: item for name, (item, _) in shown}, exact and all(whole for _, (_, whole) in shown)
    if isinstance(value, list | tuple):
        items = [plain(item) for item in value]
        return [item for item, _ in items], all(whole for _, whole in items)
    return str(value), False


def _text(text: str) -> str:
    """Return text that UTF-8 can say; bytes that it cannot are U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


COLUMNS = (("ID", 9), ("SEEN (UTC)", 19), ("STATE", 8), ("REASON", 16), ("TAG", 18), ("ORIGIN", 15), ("WHAT", 29))
"""Titles and widths: 114 characters and 6 spaces make 120."""


def row(letter: Letter, state: str, seen: str, *, whole: bool = False) -> str:
    """Return the letter's line of the table; `seen` is its time as text. Unless `whole`, it fits 120 characters."""
    told = letter.content
    cells = (letter.id, seen, state, told.reason, told.tag, told.origin, told.detail)
    widths = [max(width, len(_text(text))) if whole else width for text, (_, width) in zip(cells, COLUMNS, strict=True)]
    return " ".join(_cell(text, width) for text, width in zip(cells, widths, strict=True)).rstrip()


def title() -> str:
    """Return the table's first line."""
    return " ".join(_cell(name, width) for name, width in COLUMNS).rstrip()


def _cell(text: str, width: int) -> str:
    # A tag or detail may hold anything that a stranger sent: control characters must not reach a terminal.
    shown = "".join(c if c.isprintable() else "?" for c in _text(text))
    return (shown if len(shown) <= width else shown[: width - 1] + "…").ljust(width)


def summary(counts: Mapping[tuple[str, str], int]) -> list[str]:
    """Return counts by reason and state, for the end of the table."""
    reasons = Counter[str]()
    for (reason, _), count in counts.items():
        reasons[reason] += count
    total = sum(reasons.values())
    lines = [f"{total:,} letter{'s' * (total != 1)}"]
    for reason, total in reasons.most_common():
        states = ", ".join(f"{count:,} {state}" for (r, state), count in sorted(counts.items()) if r == reason)
        lines.append(f"  {total:>9,}  {_cell(reason, 18)} {states}")
    return lines
