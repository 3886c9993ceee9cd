"""How a user says which lines of an access log are events. Data only; no I/O.

AccessLog(
    tag="nginx.access",
    routes=(
        Route(
            path="/item/{item_id}",
            event="store.impression",
            fields={"user_id": "cookie:uid", "request_id": "query:rid", "event_id": "log:request_id"},
            skip_without=("user_id",),
        ),
    ),
)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from headrace.contract.errors import ConfigRejected, listed, meant

SOURCE_KINDS = ("path", "query", "cookie", "header", "log")
ENVELOPE_FIELDS = frozenset({"event_id", "request_id", "place", "event_time_ms", "value", "version"})
PLACEHOLDER = re.compile(r"\{(\w+)\}")


class Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Requests of one kind, and the event that each is. The first route that a line matches counts."""

    path: str
    """`/item/{item_id}`: each placeholder is one segment, decoded, and gives the event's field of its name."""
    event: str
    """Tag of a declared event."""
    fields: dict[str, str] = {}
    """Event field to where its value is: `query:NAME`, `cookie:NAME`, `header:NAME`, `path:PLACEHOLDER`, `=TEXT` (the
    same for all), or `log:VARIABLE`: nginx's name, such as `remote_addr`, or a key of a record parsed already."""
    method: str = "GET"
    status: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]] = (200, 299)
    """Lowest and highest answer that counts."""
    skip_without: tuple[str, ...] = ()
    """Fields whose absence makes a line no event, such as the cookie of a visitor who is a crawler."""

    def placeholders(self) -> tuple[str, ...]:
        """Return the names in the path."""
        return tuple(PLACEHOLDER.findall(self.path))


class AccessLog(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An access log as a shipper tails it. Lines that no route matches are no events: counted and skipped."""

    tag: str
    """The shipper's tag of these lines; no declared event has it."""
    routes: tuple[Route, ...]
    format: str = "combined"
    """combined, common, vhost_combined, json (an object a line), or a log_format (nginx) or LogFormat (Apache) itself.
    Records that the shipper's own parser cut into fields are known by their keys, whatever stands here."""
    field: str = "log"
    """Record's field that holds the line; without it, `message`."""
    escaped: bool = True
    """Whether the server writes its escapes (`\\x22`), as both do unless told `escape=none`; json has its own."""


def mapping_faults(
    mappings: Sequence[AccessLog], fields_by_tag: Mapping[str, Collection[str]], key: str
) -> Iterator[ConfigRejected]:
    """Give the first fault of each mapping that contradicts the events, given as their fields by tag."""
    seen: set[str] = set()
    for number, mapping in enumerate(mappings):
        try:
            _check_mapping(mapping, fields_by_tag, key, seen)
        except ConfigRejected as error:
            yield ConfigRejected(str(error), at=f"mappings[{number}]")
        seen.add(mapping.tag)


def _check_mapping(
    mapping: AccessLog, fields_by_tag: Mapping[str, Collection[str]], key: str, seen: Collection[str]
) -> None:
    if mapping.tag in fields_by_tag or mapping.tag in seen:
        raise ConfigRejected(f"mapping {mapping.tag!r}: the tag is taken; a log has one of its own.")
    if not mapping.routes:
        raise ConfigRejected(f"mapping {mapping.tag!r} has no route: every line would be skipped.")
    for route in mapping.routes:
        where = f"mapping {mapping.tag!r}, route {route.path!r}"
        if route.event not in fields_by_tag:
            raise ConfigRejected(
                f"{where}: no declared event has tag {route.event!r}; there are {listed(fields_by_tag)}."
                f"{meant(route.event, fields_by_tag)}"
            )
        _check_route(route, where, {*fields_by_tag[route.event], key}, key)


def _check_route(route: Route, where: str, known: set[str], key: str) -> None:
    names = route.placeholders()
    bare = PLACEHOLDER.sub("", route.path)
    if not route.path.startswith("/") or "{" in bare or "?" in bare or len(set(names)) < len(names):
        raise ConfigRejected(f"{where}: a path begins with /, has no query, and names each {{placeholder}} once.")
    if any(PLACEHOLDER.search(part) and not PLACEHOLDER.fullmatch(part) for part in route.path.split("/")):
        raise ConfigRejected(f"{where}: a {{placeholder}} is a whole segment.")
    if route.status[0] > route.status[1]:
        raise ConfigRejected(f"{where}: status {route.status} is (lowest, highest).")
    unknown = route.fields.keys() - known - ENVELOPE_FIELDS
    if unknown:
        raise ConfigRejected(f"{where}: the event has no field {listed(unknown)}; it has {listed(known)}.")
    for name, source in route.fields.items():
        kind, colon, value = source.partition(":")
        if source.startswith("="):
            continue
        if kind not in SOURCE_KINDS or not colon or not value or (kind == "path" and value not in names):
            kinds = ", ".join(f"{each}:NAME" for each in SOURCE_KINDS)
            raise ConfigRejected(f"{where}: field {name!r} comes from {source!r}; it can come from {kinds} or =TEXT.")
    given = route.fields.keys() | (set(names) & (known | ENVELOPE_FIELDS))
    missing = {"request_id", key} - given
    if missing:
        raise ConfigRejected(f"{where}: nothing gives {listed(missing)}; every line would be a dead letter.")
    if set(route.skip_without) - given:
        raise ConfigRejected(
            f"{where}: skip_without names {listed(set(route.skip_without) - given)}, which nothing gives."
        )
