"""What a stage asks of the log's admin before it begins, the same for every stage:

1. Its topics are there: those that are missing are created, and those that exist fit the settings.
2. Which they are: a topic that was deleted and made anew is not the one that something stored was made of.
3. For how long the log keeps them, for a stage that would lose what is deleted before it is stored.

What the admin raises ends the stage before it has read or written anything, and the next start asks again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.log import Admin


@dataclass(frozen=True)
class StageTopics:
    """What the log says of a stage's topics, by their names."""

    ids: Mapping[str, str]
    """As `Admin.topic_id`."""
    kept_ms: Mapping[str, int]
    """As `Admin.retention_ms`."""


def open_topics(
    admin: Admin, topics: Topics, partitions: int, *, ids_of: Sequence[str] = (), kept_of: Sequence[str] = ()
) -> StageTopics:
    """Create the topics that are missing, and return what the log says of those that are named. See the module.

    Raises as `Admin.ensure_topics`.
    """
    admin.ensure_topics(topics.specs(partitions))
    ids = {topic: admin.topic_id(topic) for topic in ids_of}
    return StageTopics(ids, {topic: admin.retention_ms(topic) for topic in kept_of})
