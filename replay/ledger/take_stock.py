"""Takes stock: reads the topics and the lake, and draws the ledger of what they hold."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import msgspec
import pyarrow as pa

from headrace.contract.config import Config
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.dead_letters import decode_dead_letter, decode_retry_mark
from headrace.contract.formats.events import Punctuation
from headrace.contract.formats.positions import Positions
from headrace.contract.formats.snapshot import Manifest
from headrace.contract.formats.steps import Step
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.lake import LakeReader
from headrace.contract.interfaces.log import Reader, read_range
from headrace.contract.project import Project
from headrace.contract.recipe import Recipe
from headrace.ingest.dead_letters.letters import Letter, superseded
from headrace.replay.ledger.draw import Found, draw
from headrace.replay.ledger.kept import expected_of_kept
from headrace.replay.ledger.keys import KEYS, TIMED_KEYS, sample_keys
from headrace.replay.ledger.ledger import Ledger
from headrace.replay.ledger.refused import JUDGED, refused_ids
from headrace.replay.ledger.rejoin import rejoin
from headrace.replay.ledger.taken import stored_by_log
from headrace.replay.recorded import recorded, recorded_steps
from headrace.stream.rule_changes import first_rules
from headrace.trainer.commit.publish import read_manifests
from headrace.trainer.identity import recipe_digest
from headrace.trainer.source.stored import stored_order


def take_stock(project: Project, config: Config, topics: Topics, reader: Reader, lake: LakeReader) -> Ledger:
    """Read effects before causes (steps, lake, samples, events), so that what an effect contains is found in the log.

    Dead letters come last: the gateways' totals, which lie among the events, must not be ahead of them.
    """
    steps = recorded_steps(reader, topics)
    state = lake.state()
    stored = lake.read(state.version, JUDGED.names).cast(JUDGED) if state is not None else JUDGED.empty_table()
    topic, begins = sample_keys(read_range(reader, topics.samples), JUDGED)
    manifests = read_manifests(reader, topics, project.name)
    marks = [mark for _, mark in recorded(reader, topics.retries, decode_retry_mark)]
    began = first_rules(project, list(read_range(reader, topics.rules)))
    trimmed = {str(p): offset for p, offset in sorted(reader.begin_offsets(topics.events).items()) if offset > 0}
    events = read_range(reader, topics.events)
    punctuations: list[Punctuation] = []
    if trimmed:
        expected = expected_of_kept(stored, topic, events, silent_ms=config.ingest.silent_ms)
    else:
        expected, punctuations = rejoin(began, config, events)
    letters = [Letter(offset, letter) for offset, letter in recorded(reader, topics.dead_letters, decode_dead_letter)]
    reader.close()

    steps = [step for step in steps if step.model == project.name]
    retained_before_ms = state.retained_before_ms if state is not None else 0

    def stored_keys(version: int, tasks: tuple[str, ...], run: Sequence[Step]) -> pa.Table | None:
        try:
            return stored_order(lake.read(version, TIMED_KEYS.names), tasks).select(KEYS.names).cast(KEYS)
        except (Unavailable, InvariantBroken):
            # The version is beyond lake.history_ms, or retention dropped rows of it: the log has them still.
            return stored_by_log(expected.samples, run, version, tasks, retained=retained_before_ms > 0)

    found = Found(
        topic=topic.select(KEYS.names),
        topic_begins=Positions(topics.generation, begins),
        lake=stored.select(KEYS.names),
        lake_positions=state.positions if state is not None else Positions(topics.generation),
        steps=steps,
        stored_keys=stored_keys,
        letters=[letter.content for letter in letters],
        tags=frozenset({project.impression.tag, *(feedback.tag for feedback in project.feedback)}),
        punctuations=punctuations,
        retried=superseded(letters, marks),
        retained_before_ms=retained_before_ms,
        refused=refused_ids(pa.concat_tables([stored, topic]), project.features),
        recipes=_recipes(project, steps, manifests),
    )
    ledger = draw(expected, found, recipe=project.recipe, behind_max_ms=config.ledger.behind_max_ms)
    ledger.events_begin = trimmed
    return ledger


def _recipes(project: Project, steps: Sequence[Step], manifests: Sequence[Manifest]) -> dict[str, Recipe]:
    """Return by which recipe each run was trained, where it is the project's or a snapshot tells."""
    told: dict[str, Recipe] = {}
    for manifest in manifests:
        # One that another release wrote with other fields tells nothing: the run's ranges do.
        with contextlib.suppress(msgspec.ValidationError, msgspec.DecodeError):
            told[manifest.run] = msgspec.json.decode(manifest.recipe_json, type=Recipe)
    ours = recipe_digest(project)
    return told | {step.run: project.recipe for step in steps if step.recipe == ours}
