"""Takes stock: reads the topics and the lake, and draws the ledger of what they hold."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.config import Config
from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.contract.formats.dead_letters import DeadLetter, Fate, decode_dead_letter, decode_retry_mark
from headrace.contract.formats.events import Punctuation
from headrace.contract.formats.positions import Positions, order_of
from headrace.contract.formats.seals import whole
from headrace.contract.formats.snapshot import Manifest
from headrace.contract.formats.steps import Step
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.lake import LakeReader, LakeState
from headrace.contract.interfaces.log import Reader, check_topic, read_range
from headrace.contract.project import Project
from headrace.contract.recipe import Recipe
from headrace.ingest.dead_letters.letters import Letter, superseded
from headrace.kernels.sample_ids import seal_of
from headrace.replay.ledger.draw import Found, draw, finish
from headrace.replay.ledger.from_seals import SealedStock, tags_of
from headrace.replay.ledger.joined import read_joined, wrong_accounts
from headrace.replay.ledger.kept import expected_of_kept
from headrace.replay.ledger.kept_account import KeptAccount
from headrace.replay.ledger.keys import JOINED, KEYS, is_imported, order, sample_keys
from headrace.replay.ledger.ledger import Ledger
from headrace.replay.ledger.refused import JUDGED, refused_ids
from headrace.replay.ledger.rejoin import Noted, rejoin
from headrace.replay.ledger.taken import stored_by_log
from headrace.replay.ledger.topic_seals import NotSealed
from headrace.replay.recorded import recorded, recorded_steps
from headrace.stream.rule_changes import first_rules
from headrace.stream.stored_rules import stored_rules
from headrace.trainer.commit.publish import read_manifests
from headrace.trainer.commit.steps_archive import StepsArchive
from headrace.trainer.identity import recipe_digest
from headrace.trainer.source.pieces import StoredOrder
from headrace.trainer.source.stored import stored_order

logger = logging.getLogger("headrace.ledger")

Mode = Literal["auto", "full", "seals"]


def take_stock(
    project: Project,
    config: Config,
    topics: Topics,
    reader: Reader,
    lake: LakeReader,
    *,
    blobs: Blobs | None = None,
    mode: Mode = "auto",
    topic_ids: Mapping[str, str] = MappingProxyType({}),
    beside: Sequence[str] = (),
) -> Ledger:
    """Return the ledger: from seals, or from the log where these do not tell.

    Args:
        project: with the model that its own recipe makes, whose newest run has the totals.
        beside: names of the project's other models, whose runs are accounted for as well.
        blobs: the store; without it there are no seals.
        mode: `full` reads everything and compares it with the seals; `auto` does where `events` is whole and has at
            most `ledger.full_records_max` records.
        topic_ids: of `events`, `samples` and each model's `steps`, where the broker tells them.

    Raises:
        InvariantBroken: where what is stored or was learnt is of a topic `events` or `samples` that is no more, as
            `check_topic`: its offsets say nothing of the one that is there.
        ConfigRejected: where the rules topic lacks rules that stored states were made by, as `check_fits`.
    """
    # The states before the rules: a change that is applied meanwhile is in the topic first.
    made = stored_rules(blobs, topics.generation, config.log.partitions) if blobs is not None else []
    begin = reader.begin_offsets(topics.rules)[0]
    began = first_rules(project, list(read_range(reader, topics.rules)), made, begin=begin)
    if blobs is None or mode == "full" or (mode == "auto" and _is_small(reader, topics, config)):
        ledger = _from_log(
            project, config, topics, reader, lake, blobs, began=began, topic_ids=topic_ids, beside=beside
        )
        reader.close()
        return ledger
    stock = SealedStock(project, config, topics, reader, lake, blobs, dict(topic_ids), tuple(beside))
    recipes = _recipes(project, [], _manifests(project, topics, reader, beside))

    def letters() -> tuple[list[DeadLetter], list[tuple[DeadLetter, Fate]]]:
        marks = [mark for _, mark in recorded(reader, topics.retries, decode_retry_mark)]
        found = _letters(reader, topics)
        return [letter.content for letter in found], superseded(found, marks)

    try:
        ledger, account = stock.draw({run: recipe.heads for run, recipe in recipes.items()}, letters)
        if ledger.closes:
            _keep(stock, account)
    except NotSealed as error:
        ledger = _from_log(
            project, config, topics, reader, lake, blobs, began=began, topic_ids=topic_ids, beside=beside
        )
        ledger.not_sealed = str(error)
    reader.close()
    return ledger


def _keep(stock: SealedStock, account: KeptAccount) -> None:
    try:
        stock.keep(account)
    except Unavailable as error:
        logger.warning("the next drawing begins where this one began: %s", error)


def _is_small(reader: Reader, topics: Topics, config: Config) -> bool:
    begins, ends = reader.begin_offsets(topics.events), reader.end_offsets(topics.events)
    return not any(begins.values()) and sum(ends.values()) <= config.ledger.full_records_max


def _letters(reader: Reader, topics: Topics) -> list[Letter]:
    return [Letter(offset, letter) for offset, letter in recorded(reader, topics.dead_letters, decode_dead_letter)]


def _from_log(
    project: Project,
    config: Config,
    topics: Topics,
    reader: Reader,
    lake: LakeReader,
    blobs: Blobs | None,
    *,
    began: Project,
    topic_ids: Mapping[str, str],
    beside: Sequence[str],
) -> Ledger:
    """Read effects before causes (steps, lake, samples, events), so that what an effect contains is found in the log.

    Dead letters come last: the gateways' totals, which lie among the events, must not be ahead of them.
    """
    steps = _steps(project, topics, reader, blobs, topic_ids, beside)
    state = lake.state()
    stored, imported = _in_lake(lake, state)
    topic, begins = sample_keys(read_range(reader, topics.samples), JUDGED)
    manifests = _manifests(project, topics, reader, beside)
    marks = [mark for _, mark in recorded(reader, topics.retries, decode_retry_mark)]
    trimmed = {str(p): offset for p, offset in sorted(reader.begin_offsets(topics.events).items()) if offset > 0}
    joined = read_joined(blobs, topics.generation, reader.end_offsets(topics.events)) if blobs is not None else {}
    for one in joined.values():
        check_topic(one.topic_id, topic_ids.get(topics.events, ""), topics.events)
    events = read_range(reader, topics.events)
    punctuations: list[Punctuation] = []
    noted: Noted = {}
    if trimmed:
        expected = expected_of_kept(stored, topic, events, silent_ms=config.ingest.silent_ms)
    else:
        cuts = {partition: one.offset for partition, one in joined.items()}
        expected, punctuations = rejoin(began, config, events, cuts=cuts, noted=noted)
    letters = _letters(reader, topics)
    recipes = _recipes(project, steps, manifests)
    retained_before_ms = state.retained_before_ms if state is not None else 0

    def stored_keys(version: int, tasks: tuple[str, ...], run: Sequence[Step]) -> pa.Table | None:
        recipe = recipes.get(run[0].run) if run else None
        by = "event_time" if recipe is None else recipe.stored_order
        try:
            return stored_order(lake.read(version, JOINED.names), tasks, by).select(JOINED.names).cast(JOINED)
        except (Unavailable, InvariantBroken):
            # The version is beyond lake.history_ms, or retention dropped rows of it: the log has them still.
            return _stored_by_log(expected.samples, imported, run, version, tasks, by, retained_before_ms > 0)

    found = Found(
        topic=topic.select(KEYS.names),
        topic_begins=Positions(topics.generation, begins),
        lake=stored.select(KEYS.names),
        imported=imported.select(KEYS.names),
        lake_positions=state.positions if state is not None else Positions(topics.generation),
        steps=steps,
        stored_keys=stored_keys,
        letters=[letter.content for letter in letters],
        tags=tags_of(project),
        punctuations=punctuations,
        retried=superseded(letters, marks),
        retained_before_ms=retained_before_ms,
        refused=refused_ids(pa.concat_tables([stored, imported, topic]), project.features, project.recipe),
        recipes=recipes,
    )
    ledger = draw(expected, found, recipe=project.recipe, behind_max_ms=config.ledger.behind_max_ms)
    ledger.events_begin = trimmed
    ledger.seals_wrong = wrong_accounts(joined, noted, expected.samples)
    if blobs is not None and state is not None and not retained_before_ms:
        ledger.seals_wrong += [*_wrong_lake(lake, state, stored), *_wrong_import(lake, state, imported)]
    return finish(ledger)


def _in_lake(lake: LakeReader, state: LakeState | None) -> tuple[pa.Table, pa.Table]:
    """Return JUDGED of the lake's rows: of those that the sink stored, and of imported history."""
    rows = lake.read(state.version, JUDGED.names).cast(JUDGED) if state is not None else JUDGED.empty_table()
    imported_N = pa.array(is_imported(rows))
    return rows.filter(pc.invert(imported_N)), rows.filter(imported_N)


def _steps(
    project: Project,
    topics: Topics,
    reader: Reader,
    blobs: Blobs | None,
    topic_ids: Mapping[str, str],
    beside: Sequence[str],
) -> list[Step]:
    """Return the steps of all models, those of the project's own recipe last."""
    steps: list[Step] = []
    for model in (*beside, project.model):
        own = topics.of(model)
        archive = StepsArchive(blobs, own.steps, topic_ids.get(own.steps, "")) if blobs is not None else None
        steps += [step for step in recorded_steps(reader, own, archive) if step.model == model]
    for step in steps:
        check_topic(step.samples_id, topic_ids.get(topics.samples, ""), topics.samples)
    return steps


def _manifests(project: Project, topics: Topics, reader: Reader, beside: Sequence[str]) -> list[Manifest]:
    return [m for model in (*beside, project.model) for m in read_manifests(reader, topics, model)]


def _wrong_lake(lake: LakeReader, state: LakeState, stored: pa.Table) -> list[str]:
    """Say of which partitions the lake's seal is not that of its rows."""
    wrong: list[str] = []
    for partition, sealed in sorted(lake.seals()[0].items()):
        # One that moved on meanwhile is not judged.
        if sealed.upto == state.positions.at(partition):
            places_N = order(stored)
            ours_N = (places_N > order_of(sealed.since)) & (places_N <= order_of(sealed.upto))
            ours = stored.filter(pa.array(ours_N & (stored["partition"].to_numpy() == partition)))
            if whole(seal_of(ours)) != sealed.seal:
                wrong.append(
                    f"lake, partition {partition} up to {tuple(sealed.upto)}: its seal is not that of its rows"
                )
    return wrong


def _wrong_import(lake: LakeReader, state: LakeState, imported: pa.Table) -> list[str]:
    """Say of which tasks the lake's seal is not that of its imported rows."""
    there = seal_of(imported)
    told, count = lake.imported(there, state.version)
    wrong = [
        f"lake, imported history, task {task!r}: its seal is not that of its rows"
        for task in sorted(there)
        if told.get(task) != there[task]
    ]
    if not wrong and count != imported.num_rows:
        wrong.append(f"lake, imported history: {count:,} rows were committed and {imported.num_rows:,} are there")
    return wrong


def _stored_by_log(
    samples: pa.Table,
    imported: pa.Table,
    run: Sequence[Step],
    version: int,
    tasks: tuple[str, ...],
    by: StoredOrder,
    retained: bool,
) -> pa.Table | None:
    """Return what `stored_by_log` finds: without the lake's imported rows, or with them where only so it has as many
    rows as the run took."""
    rows = max((r.stop for step in run for r in step.ranges if r.kind == "stored" and r.version == version), default=0)
    found = stored_by_log(samples, run, version, tasks, by=by, retained=retained)
    if found is None or found.num_rows == rows or not imported.num_rows:
        return found
    both = pa.concat_tables([imported.select(JOINED.names), samples])
    return stored_by_log(both, run, version, tasks, by=by, retained=retained)


def _recipes(project: Project, steps: Sequence[Step], manifests: Sequence[Manifest]) -> dict[str, Recipe]:
    """Return by which recipe each run was trained, where it is the project's or a variant's, or a snapshot tells."""
    told: dict[str, Recipe] = {}
    for manifest in manifests:
        # One that another release wrote with other fields tells nothing: the run's ranges do.
        with contextlib.suppress(msgspec.ValidationError, msgspec.DecodeError):
            told[manifest.run] = msgspec.json.decode(manifest.recipe_json, type=Recipe)
    variants = [project.of_variant(name) for name in project.variants]
    ours = {recipe_digest(one): one.recipe for one in (*variants, project)}
    return told | {step.run: ours[step.recipe] for step in steps if step.recipe in ours}
