"""Shares a group's partitions out, and refuses to where the cluster's metadata lack the topic.

Faust's own assignor leaves out what is missing, with a warning. After a broker's crash a client's metadata may lack a
topic that is there; the members then have an assignment of nothing, look healthy, and stand still until the metadata
are asked for again, which is minutes later.
"""

from __future__ import annotations

from typing import Any

from faust.assignor.partition_assignor import PartitionAssignor

from headrace.contract.errors import Unavailable


class Assignor(PartitionAssignor):  # type: ignore[misc,unused-ignore]
    """Faust's assignor, for topics that exist."""

    def _perform_assignment(self, cluster: Any, member_metadata: Any) -> Any:
        wanted = {topic for each in member_metadata.values() for topic in each.subscription}
        # Raised into Kafka's client, it ends the group's task, and that the stage (`GroupWatch`).
        if missing := sorted(topic for topic in wanted if not cluster.partitions_for_topic(topic)):
            raise Unavailable(
                f"the brokers' metadata lack {', '.join(missing)}: there is nothing to share out. A broker that "
                "recovers says so for a while; a new process asks again."
            )
        return super()._perform_assignment(cluster, member_metadata)
