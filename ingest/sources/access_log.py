"""Access logs of nginx and Apache: a log format compiled to a parser, a line to its variables. Pure.

Variables have nginx's names, whichever server wrote them: `$http_referer` and `%{Referer}i` are both `http_referer`.
A line is matched without backtracking, so the time grows with its length only, whatever a visitor put into it. A bare
value ends at what follows it in the format; a number that is none makes the line one of another format, so that no
value passes for that of another column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import msgspec

from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.nesting import LEVELS_MAX
from headrace.ingest.decode.numbers import DECIMAL
from headrace.ingest.decode.times import CLF_SHAPE, clf_ns, decimal_ns, iso8601_ns

COMMON = '$remote_addr $remote_ident $remote_user [$time_local] "$request" $status $body_bytes_sent'
NAMED = {
    "common": COMMON,
    "combined": COMMON + ' "$http_referer" "$http_user_agent"',
    "vhost_combined": "$server_name:$server_port " + COMMON + ' "$http_referer" "$http_user_agent"',
}

Variables = dict[str, str | None]
"""What one line says, by nginx's names; None where the server wrote `-`."""

_APACHE = {
    "a": "remote_addr",
    "h": "remote_addr",
    "l": "remote_ident",
    "u": "remote_user",
    "t": "time_local",
    "r": "request",
    "s": "status",
    "b": "body_bytes_sent",
    "B": "body_bytes_sent",
    "O": "bytes_sent",
    "I": "request_length",
    "v": "server_name",
    "V": "host",
    "p": "server_port",
    "m": "request_method",
    "U": "uri",
    "q": "args",
    "H": "server_protocol",
    "D": "request_time_us",
    "T": "request_time",
    "L": "log_id",
    "P": "pid",
    "k": "connection_requests",
    "X": "connection_status",
    "f": "request_filename",
}
LISTED = frozenset(
    f"upstream_{name}"
    for name in (
        "addr",
        "status",
        "response_time",
        "connect_time",
        "header_time",
        "queue_time",
        "response_length",
        "bytes_received",
        "bytes_sent",
    )
)
"""Variables with one value for each upstream that was asked: `a, b`, and ` : ` before those of another group."""
_NUMBERS = frozenset(("status", "body_bytes_sent", "bytes_sent", "request_length", "request_time", "msec"))
_KEYED = {"i": "http_", "C": "cookie_", "o": "sent_http_", "e": "env_", "n": "note_"}


class TooDeep(Exception):
    """A JSON line has more levels than may be."""


class LineFormat(msgspec.Struct, frozen=True):
    """A log format, ready to read lines."""

    names: tuple[str, ...]
    pattern: re.Pattern[str] | None
    """None: each line is a JSON object of variables."""
    escaped: bool = True
    """Whether the server wrote escapes, as both do unless told not to."""

    def read(self, line: str) -> Variables | None:
        """Return what the line says; None where it is not of this format. Raises `TooDeep`."""
        line = line.rstrip("\r\n")
        if self.pattern is None:
            return _json_object(line)
        found = self.pattern.fullmatch(line)
        if found is None:
            return None
        return {
            name: None if value == "-" else plain_text(value, escaped=self.escaped)
            for name, value in zip(self.names, found.groups(), strict=True)
        }


def compile_format(text: str, *, escaped: bool = True) -> LineFormat:
    """Return the parser of a named format, of nginx's `log_format` or of Apache's `LogFormat`.

    Raises `ConfigRejected` where two variables touch: no line could be cut there.
    """
    if text == "json":
        return LineFormat((), None)
    parts = _pieces(NAMED.get(text, text).replace('\\"', '"'))
    names = tuple(name for kind, name in parts if kind == "variable")
    if not names:
        raise ConfigRejected(
            f"log format {text!r} has no variable; known: json, {', '.join(sorted(NAMED))}, or its text."
        )
    pattern = []
    for at, (kind, piece) in enumerate(parts):
        if kind == "literal":
            pattern.append(re.escape(piece))
            continue
        if piece == "time_local":
            pattern.append(f"({CLF_SHAPE})")
            continue
        before = parts[at - 1][1] if at else ""
        kind_after, after = parts[at + 1] if at + 1 < len(parts) else ("literal", "")
        if kind_after == "variable":
            raise ConfigRejected(f"log format {text!r}: ${piece} and ${after} touch; put a blank between them.")
        pattern.append(_variable_pattern(piece, before, after, _ends(parts[at + 1 : at + 4])))
    return LineFormat(names, re.compile("".join(pattern), re.DOTALL | re.ASCII), escaped)


def _ends(following: list[tuple[str, str]]) -> str:
    """Return the pattern of what ends a value: the literal behind it, and the time in brackets where that comes next.

    A user's name may hold blanks and brackets; a whole time with what follows it, a quote that no visitor can write
    bare, it cannot.
    """
    ends = re.escape(following[0][1]) if following else ""
    if len(following) > 1 and following[1][1] == "time_local":
        ends += CLF_SHAPE + (re.escape(following[2][1]) if len(following) > 2 else "")
    return ends


def _pieces(text: str) -> list[tuple[str, str]]:
    """Return the format as ("literal", text) and ("variable", name), literals joined."""
    directive, name_of = (_NGINX_VARIABLE, _nginx_name) if "$" in text else (_APACHE_DIRECTIVE, _apache_name)
    parts: list[tuple[str, str]] = []

    def literal(piece: str) -> None:
        if parts and parts[-1][0] == "literal":
            piece = parts.pop()[1] + piece
        if piece:
            parts.append(("literal", piece))

    at = 0
    for found in directive.finditer(text):
        literal(text[at : found.start()])
        at = found.end()
        name = name_of(found)
        # Apache's %t brings its brackets along.
        brackets = name == "time_local" and directive is _APACHE_DIRECTIVE
        literal("[" if brackets else "")
        if name == "%":
            literal("%")
        else:
            parts.append(("variable", name))
        literal("]" if brackets else "")
    literal(text[at:])
    return parts


def _variable_pattern(name: str, before: str, after: str, ends: str) -> str:
    """Return the group of a variable's value. Raises `ConfigRejected` where a list could not be told from its end."""
    is_quoted = before.endswith('"') and after.startswith('"')
    if is_quoted or not after or name not in LISTED | _NUMBERS:
        return _value_pattern(before, after, ends)
    if name in _NUMBERS:
        return r"(-|[\d.]*+)"
    if after.startswith((", ", " : ")) or (after[0] == ":" and name == "upstream_addr"):
        raise ConfigRejected(f"${name} may hold several values with {after[:3]!r} between them; put it in quotes.")
    item = f"[^ ,{re.escape(after[0])}]*+"
    return f"({item}(?:(?:, | : ){item})*+)"


def _value_pattern(before: str, after: str, ends: str) -> str:
    """Return the group of a value between two literals, possessive: what it took it never gives back."""
    if not after:
        return "(.*+)"
    if before.endswith('"') and after.startswith('"'):
        # Both servers write a quote inside as an escape, so a bare one ends the value.
        return r'((?:[^"\\]++|\\.)*+)'
    first = re.escape(after[0])
    return f"([^{first}]*+)" if ends == first else f"((?:[^{first}]++|(?!{ends}){first})*+)"


def _nginx_name(found: re.Match[str]) -> str:
    return found[1] or found[2]


def _apache_name(found: re.Match[str]) -> str:
    argument, letter = found[1], found[2]
    if letter == "%":
        return "%"
    if argument is None:
        return _APACHE.get(letter, f"apache_{letter}")
    if letter == "t":
        return {"msec": "msec_int", "usec": "usec_int", "sec": "sec_int"}.get(argument.split(":")[-1], "time_text")
    if letter == "e" and argument == "UNIQUE_ID":
        return "request_id"
    if letter == "T":
        return f"request_time_{argument}"
    return _KEYED.get(letter, f"apache_{letter}_") + argument.lower().replace("-", "_")


def _json_object(line: str) -> Variables | None:
    if line.count("[") + line.count("{") > LEVELS_MAX and _is_deep(line):
        raise TooDeep
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return variables_of(value) if isinstance(value, dict) else None


def _is_deep(line: str) -> bool:
    """Say whether JSON is nested more than `LEVELS_MAX` deep. Linear in the length."""
    depth = 0
    for token in _JSON_TOKEN.finditer(line):
        depth += 1 if token[0] in ("[", "{") else -1 if token[0] in ("]", "}") else 0
        if depth > LEVELS_MAX:
            return True
    return False


def variables_of(record: Mapping[Any, Any], *, escaped: bool = False) -> Variables:
    """Return the variables of a record that a shipper parsed; `escaped` where its values still have their escapes.

    fluentd's and fluent-bit's parsers name some of them in their own way: `code` is nginx's `status`.
    """
    found: Variables = {}
    for name, value in record.items():
        text = _as_text(value)
        if text is not None and escaped:
            text = None if text == "-" else plain_text(text)
        found[str(name)] = text
    for other, name in _PARSERS_NAMES:
        if other in found and found.get(name) is None:
            found[name] = found[other]
    return found


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        return read_bytes(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        # fluent-bit's Lua filter, among others, has no integers: a status of 200.0 is 200.
        value = int(value)
    if isinstance(value, str | int | float):
        return value if isinstance(value, str) and value.isascii() else read_bytes(_raw_bytes(str(value)))
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError):
        # Keys that JSON lacks: no log line, and no value that a route could use.
        return None


def plain_text(value: str, *, escaped: bool = True) -> str:
    r"""Return a logged value as it was: nginx's `\xHH`, Apache's `\"` and other escapes undone.

    >>> plain_text(r"caf\xC3\xA9 \x22quoted\x22")
    'café "quoted"'
    """
    if not escaped or "\\" not in value:
        return value if value.isascii() else read_bytes(_raw_bytes(value))
    return read_bytes(_ESCAPE.sub(_unescaped, _raw_bytes(value)))


def _unescaped(found: re.Match[bytes]) -> bytes:
    if found[1]:
        return bytes.fromhex(found[1].decode())
    return _LETTERS.get(found[2], found[2])


def read_bytes(data: bytes) -> str:
    """Return text: UTF-8, else Latin-1, which reads any bytes and keeps each."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _raw_bytes(value: str) -> bytes:
    """Return the bytes that a shipper read; half a surrogate pair, which no bytes give, becomes a question mark."""
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return value.encode("utf-8", "replace")


class Request(NamedTuple):
    """What a visitor asked for."""

    method: str
    segments: tuple[str, ...]
    """The path, cut at its slashes and then decoded: `/a%2Fb/` is ("a/b", "")."""
    query: str


def request_of(variables: Variables) -> Request | None:
    """Return the request of a line; None where there is none that a route could match (`-`, TLS on a plain port)."""
    method, target = variables.get("request_method"), variables.get("request_uri")
    if target is None and (path := variables.get("uri")) is not None:
        args = (variables.get("args") or "").removeprefix("?")
        target = f"{path}?{args}" if args else path
    line = variables.get("request")
    if line is not None and (method is None or target is None):
        found = _REQUEST_LINE.fullmatch(line)
        if found is None:
            return None
        method, target = found[1], found[2]
    if method is None or target is None:
        return None
    if not target.startswith("/"):
        # A proxy's form: scheme and host come before the path.
        absolute = _ABSOLUTE.match(target)
        if absolute is None:
            return None
        target = target[absolute.end() :] or "/"
        target = target if target.startswith("/") else f"/{target}"
    path, _, query = target.partition("#")[0].partition("?")
    return Request(method, tuple(map(_decoded, path[1:].split("/"))), query)


def _decoded(text: str) -> str:
    return read_bytes(unquote_to_bytes(_raw_bytes(text))) if "%" in text else text


def query_value(query: str, name: str) -> str | None:
    """Return the first value of a parameter, None where there is none.

    >>> query_value("a=1&uid=caf%C3%A9+noir", "uid")
    'café noir'
    """
    for pair in query.split("&"):
        key, _, value = pair.partition("=")
        if key == name or ("%" in key and _decoded(key) == name):
            return _decoded(value.replace("+", " "))
    return None


def listed_values(text: str) -> list[str]:
    """Return the values of a variable of `LISTED`, without those (`-`) that nginx does not know.

    >>> listed_values("0.001, - : 0.002")
    ['0.001', '0.002']
    """
    return [value for value in map(str.strip, _BETWEEN.split(text)) if value not in ("", "-")]


def cookie_value(variables: Variables, name: str) -> str | None:
    """Return a cookie, from a variable of its own or from the whole header."""
    own = variables.get(f"cookie_{name}")
    if own is None:
        own = variables.get(f"cookie_{name.lower().replace('-', '_')}")
    if own is not None:
        return own.strip('"')
    for pair in (variables.get("http_cookie") or "").split(";"):
        key, _, value = pair.partition("=")
        if key.strip() == name:
            return value.strip().strip('"')
    return None


def time_of(variables: Variables) -> int | None:
    """Return the line's own time in ns: `$msec` where it has that, else `$time_iso8601` or `$time_local`."""
    msec = variables.get("msec")
    if msec is not None and DECIMAL.fullmatch(msec):
        return decimal_ns(msec, "s")
    for name, unit in (("usec_int", 1_000), ("msec_int", 1_000_000), ("sec_int", 1_000_000_000)):
        number = variables.get(name)
        if number is not None and number.isascii() and number.isdigit() and len(number) < 20:
            return int(number) * unit
    iso = variables.get("time_iso8601")
    if iso is not None and (found := iso8601_ns(iso)) is not None:
        return found
    local = variables.get("time_local")
    return None if local is None else clf_ns(local)


_NGINX_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)
_APACHE_DIRECTIVE = re.compile(r"%[!\d,]*[<>]?(?:\{([^}]*)\})?[<>]?(\^t[io]|[a-zA-Z%])", re.ASCII)
_ESCAPE = re.compile(rb"\\(?:x([0-9A-Fa-f]{2})|(.))", re.DOTALL)
# A string that never ends is one token to the end: else a search would begin at each of its quotes again.
_JSON_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[][{}]', re.DOTALL)
_LETTERS = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"b": b"\b", b"v": b"\v", b"f": b"\f"}
_REQUEST_LINE = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) (\S++(?: (?!HTTP/)\S*+)*+)(?: HTTP/\d(?:\.\d)?)?", re.ASCII
)
_ABSOLUTE = re.compile(r"https?://[^/?#]*", re.IGNORECASE)
_BETWEEN = re.compile(r",\s| :(?:\s|$)")
_PARSERS_NAMES = (
    ("remote", "remote_addr"),
    ("host", "remote_addr"),
    ("user", "remote_user"),
    ("method", "request_method"),
    ("path", "request_uri"),
    ("code", "status"),
    ("size", "body_bytes_sent"),
    ("referer", "http_referer"),
    ("agent", "http_user_agent"),
)
Reader = Callable[[Variables, Request], str | None]
"""Takes one value out of a line."""
