"""Gives all partitions of a group to one member: for a stage whose state is of all partitions together.

Faust's own assignor would share them out. Two aggregators then read half of the partitions each, and neither has the
watermarks of the others: no value is settled any more, and nothing fails. With this one the second waits, ready, until
the first has left the group or was declared dead.
"""

from __future__ import annotations

from typing import Any

from faust.assignor.client_assignment import ClientAssignment

from headrace.stream.shell.assignor import Assignor


class OneOwner(Assignor):
    """The member that owns most stays the owner; where none does, it is the first by its id."""

    def _perform_assignment(self, cluster: Any, member_metadata: Any) -> Any:
        told = {member: self._get_client_metadata(each) for member, each in sorted(member_metadata.items())}
        owner = max(told, key=lambda member: len(told[member].assignment.active_tps))
        owned = super()._perform_assignment(cluster, {owner: member_metadata[owner]})
        self._update_member_urls(told)
        nothing = {m: ClientAssignment(actives={}, standbys={}) for m in told if m != owner}
        distribution = self._get_changelog_distribution(nothing), self._get_external_topic_distribution(nothing)
        return {**owned, **self._protocol_assignments(nothing, *distribution, {})}
