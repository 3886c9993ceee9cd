"""Where the log records of an OTLP message begin and end, found without reading them. Pure.

A reader of JSON gives up on a whole message because of one record that is nested too deeply or is none. With its text
each record can be read, or become a dead letter, by itself.
"""

from __future__ import annotations

import re

_PATH = (b'"resourceLogs"', b'"scopeLogs"', b'"logRecords"')
_DEPTH = 2 * len(_PATH)
"""Brackets around a log record: an object and a list for each part of the path."""
# A string that never ends is one token to the end: else a search would begin at each of its quotes again.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[][{},]', re.DOTALL)


def log_record_texts(message: bytes) -> list[bytes]:
    """Return the text of each log record, in order. The time grows with the message's length only, however deep it is.

    >>> log_record_texts(b'{"resourceLogs": [{"scopeLogs": [{"logRecords": [{"a": [1, 2]}, 5]}]}]}')
    [b'{"a": [1, 2]}', b'5']
    """
    found: list[bytes] = []
    depth, start, last = 0, 0, b""
    keys = [b""] * (_DEPTH + 1)
    for token in _TOKEN.finditer(message):
        kind = token[0]
        if kind in (b"[", b"{"):
            depth += 1
            if depth <= _DEPTH:
                keys[depth] = last
                start = token.end()
        elif kind == b"," or kind in (b"]", b"}"):
            if depth == _DEPTH and kind != b"}" and (keys[2], keys[4], keys[6]) == _PATH:
                text = message[start : token.start()].strip()
                found += [text] if text else []
                start = token.end()
            depth -= kind != b","
        else:
            last = kind
    return found
