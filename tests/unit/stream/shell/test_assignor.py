"""The groups' assignors, also where the cluster's metadata lack the topic, as after a broker's crash.

Goal: one member of a `OneOwner` group has all and keeps it; nobody is given an assignment of nothing, which looks
healthy and stands still.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from aiokafka.coordinator.protocol import ConsumerProtocolMemberMetadata
from faust.assignor.client_assignment import ClientAssignment, ClientMetadata

from headrace.contract.errors import Unavailable
from headrace.stream.shell.assignor import Assignor
from headrace.stream.shell.one_owner import OneOwner

TOPIC = "events"


def assign(kind: type[Assignor], known: dict[str, set[int]], owned: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return each member's partitions, of a group whose leader knows these topics and whose members own these."""
    app = SimpleNamespace(tables=SimpleNamespace(changelog_topics=set(), data={}))
    told = {member: metadata(f"http://{member}:1", partitions) for member, partitions in owned.items()}
    made = kind(app)._perform_assignment(SimpleNamespace(partitions_for_topic=known.get), told)  # type: ignore[arg-type]
    return {member: dict(each.assignment).get(TOPIC, []) for member, each in made.items()}


def metadata(url: str, owned: list[int]) -> ConsumerProtocolMemberMetadata:
    assignment = ClientAssignment(actives={TOPIC: owned} if owned else {}, standbys={})
    told = ClientMetadata(assignment=assignment, url=url, changelog_distribution={})
    return ConsumerProtocolMemberMetadata(4, [TOPIC], told.dumps())


@pytest.mark.parametrize("kind", [Assignor, OneOwner])
@pytest.mark.parametrize("known", [{}, {TOPIC: set()}, {"samples": {0}}])
def test_a_topic_that_the_metadata_lack_is_not_shared_out(kind: type[Assignor], known: dict[str, set[int]]):
    with pytest.raises(Unavailable, match="metadata lack events"):
        assign(kind, known, {"a": [], "b": []})


@pytest.mark.parametrize("kind", [Assignor, OneOwner])
def test_every_partition_has_one_owner(kind: type[Assignor]):
    given = assign(kind, {TOPIC: {0, 1, 2}}, {"a": [], "b": []})
    assert sorted(p for owned in given.values() for p in owned) == [0, 1, 2]


@pytest.mark.parametrize(
    ("owned", "owner"),
    [({"a": []}, "a"), ({"b": [], "a": []}, "a"), ({"a": [], "b": [0, 1, 2]}, "b"), ({"a": [0], "b": [1, 2]}, "b")],
)
def test_one_member_has_all_partitions_and_keeps_them(owned: dict[str, list[int]], owner: str):
    given = assign(OneOwner, {TOPIC: {0, 1, 2}}, owned)
    assert given == {member: [0, 1, 2] if member == owner else [] for member in owned}
