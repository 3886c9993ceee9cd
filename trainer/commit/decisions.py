"""Tells serving that a run goes on in place of another one: the decision that follows from a branch.

The record in `steps` is the truth. The decision says the same in the `model` topic, so that a server, whenever it
starts, serves nothing of the run that was left. Whoever finds it missing writes it: the verb at once, else the new
run's trainer before it announces anything. Its key is made of the branch, so that twice is once.
"""

from __future__ import annotations

from headrace.contract.errors import Unavailable
from headrace.contract.formats.decision import KIND, Decision, encode_decision, key_of
from headrace.contract.formats.steps import Step
from headrace.contract.interfaces.log import Producer, Reader, read_range


def decision_of(first: Step) -> Decision | None:
    """Return what serving is told of a run that begins with this record; None where it begins afresh: then the run of
    before is served until the lake is learnt."""
    branch = first.branch
    if branch is None or not branch.run or not branch.instead_of:
        return None
    return Decision(
        model=first.model,
        what="rollback",
        run=first.run,
        refused_run=branch.instead_of,
        refused_after=branch.step if branch.instead_of == branch.run else 0,
        reason=branch.reason,
        by=branch.by,
        created_ms=branch.created_ms,
    )


def ensure_decision(reader: Reader, producer: Producer, topic: str, decision: Decision) -> bool:
    """Write the decision unless it is there; return whether it was missing. Raises `Unavailable`: call again."""
    key = key_of(decision).encode()
    if any(record.key == key and record.value is not None for record in read_range(reader, topic)):
        return False
    receipts: list[Exception | None] = []
    producer.send(
        topic,
        0,
        encode_decision(decision),
        key=key,
        headers={"kind": KIND},
        delivered=lambda error, _: receipts.append(error),
    )
    producer.flush(10.0)
    if not receipts or receipts[0] is not None:
        raise Unavailable(f"the decision about run {decision.run} got no receipt: {receipts}")
    return True
