"""A mapping of access logs for the ingest tests' project."""

from __future__ import annotations

import msgspec
from ingest_world import PROJECT

from headrace.contract.mapping import AccessLog, Route
from headrace.contract.project import Project

CLF = "14/Nov/2023:22:13:20 +0000"  # START_MS
ITEM = Route(
    path="/item/{item_id}",
    event="shop.impression",
    fields={"user_id": "query:uid", "request_id": "query:rid", "title": "header:Referer"},
    skip_without=("user_id",),
)
CLICK = Route(
    path="/click",
    event="shop.click",
    method="POST",
    status=(200, 399),
    fields={"user_id": "query:uid", "request_id": "query:rid", "item_id": "query:item"},
)
LOG = AccessLog(tag="nginx.access", routes=(ITEM, CLICK))


def project(*mappings: AccessLog) -> Project:
    """Return the tests' project with these mappings."""
    return msgspec.structs.replace(PROJECT, mappings=mappings or (LOG,)).checked()
