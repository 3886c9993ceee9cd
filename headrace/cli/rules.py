"""The rules that a stage begins with: those in the log, or at the very first start the project's own."""

from __future__ import annotations

import time

from headrace.backends.log.fenced_kafka import FencedKafka
from headrace.cli.runtime import Runtime
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.topics import Topics
from headrace.contract.project import Project
from headrace.contract.rules import check_code, differences, rules_of
from headrace.stream.rule_changes import PEN, ensure_first, read_history


def open_pen(brokers: str, topics: Topics) -> FencedKafka:
    """Return the pen of the `rules` topic, not yet taken."""
    return FencedKafka(brokers, topics.rules, f"{PEN}-g{topics.generation}")


def unapplied(brokers: str, topics: Topics, project: Project) -> list[str]:
    """Return what the project on disk would change of the rules in force, a line each."""
    pen = open_pen(brokers, topics)
    try:
        newest = read_history(pen).newest
    finally:
        pen.close()
    return [] if newest is None else differences(newest.rules, rules_of(project))


def begin_rules(runtime: Runtime) -> Project:
    """Return the project with the rules that the log begins with; it writes them where there are none.

    Raises `ConfigRejected` when the project on disk has another partition key, or a function of the user's in other
    code than when the newest change was applied.
    """
    pen = open_pen(runtime.brokers, runtime.topics)
    try:
        history = ensure_first(pen, runtime.project, now_ms=runtime.clock.now_ms(), pause=time.sleep)
    finally:
        pen.close()
    first = history.changes[0].rules
    if first.key != runtime.project.impression.key:
        raise ConfigRejected(
            f"the project's partition key is {runtime.project.impression.key!r} and the log's is {first.key!r}: raise "
            "log.generation to begin anew."
        )
    check_code(history.changes[-1])
    return first.over(runtime.project)
