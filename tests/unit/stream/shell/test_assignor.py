"""The group's assignor where the cluster's metadata lack the topic, as after a broker's crash.

Goal: nobody is given an assignment of nothing, which looks healthy and stands still.
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


def assign(kind: type[Assignor], known: dict[str, set[int]], members: int = 2) -> dict[str, list[int]]:
    """Return the partitions of each member, of a group whose leader knows these topics."""
    app = SimpleNamespace(tables=SimpleNamespace(changelog_topics=set(), data={}))
    told = ClientMetadata(
        assignment=ClientAssignment(actives={}, standbys={}), url="http://a:1", changelog_distribution={}
    )
    metadata = {str(n): ConsumerProtocolMemberMetadata(4, [TOPIC], told.dumps()) for n in range(members)}
    made = kind(app)._perform_assignment(SimpleNamespace(partitions_for_topic=known.get), metadata)
    return {member: dict(each.assignment).get(TOPIC, []) for member, each in made.items()}


@pytest.mark.parametrize("kind", [Assignor, OneOwner])
@pytest.mark.parametrize("known", [{}, {TOPIC: set()}, {"samples": {0}}])
def test_a_topic_that_the_metadata_lack_is_not_shared_out(kind: type[Assignor], known: dict[str, set[int]]):
    with pytest.raises(Unavailable, match="metadata lack events"):
        assign(kind, known)


@pytest.mark.parametrize("kind", [Assignor, OneOwner])
def test_every_partition_has_one_owner(kind: type[Assignor]):
    given = assign(kind, {TOPIC: {0, 1, 2}})
    assert sorted(p for owned in given.values() for p in owned) == [0, 1, 2]
