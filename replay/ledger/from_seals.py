"""Draws the ledger from seals: it costs what is new, however much there was before.

1. The steps since the last sound drawing (`kept_account`) are added to their runs.
2. The lake says how many rows it holds up to where, and the sum of their ids' hashes.
3. The join says what it made of `events`, up to the state that it stored last: the figures from `appended` to `pending`
   are of then (`sealed`), at most `join.snapshot_ms` ago.
4. The topic `samples` says what lies up to any position (`topic_seals`). The lake and each run must have the same.
5. Where count or sum differ, the range is read by id (`reread`), so that `lost` and `twice` count ids.
6. What is sound is kept for the next drawing.

Raises `NotSealed` where the seals do not tell: then all is read by id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import msgspec

from headrace.contract.config import Config
from headrace.contract.errors import Unavailable
from headrace.contract.formats.dead_letters import DeadLetter, Fate
from headrace.contract.formats.events import FEEDBACK, IMPRESSION, Punctuation
from headrace.contract.formats.positions import START, Position, Positions
from headrace.contract.formats.seals import PartitionSeal, Seal, whole, with_rows, without_rows
from headrace.contract.formats.steps import Step
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.lake import LakeReader
from headrace.contract.interfaces.log import Reader, check_topic, read_range
from headrace.contract.project import Project
from headrace.kernels.sample_ids import seal_of
from headrace.replay.ledger.draw import count_letters, draw_gateways, finish
from headrace.replay.ledger.joined import Joined, check_whole, read_joined, said_of, tasks_of
from headrace.replay.ledger.kept_account import KeptAccount, KeptRun, LakeTill, get_account, put_account
from headrace.replay.ledger.keys import KEYS, compare, covers, sample_ids
from headrace.replay.ledger.ledger import Ledger, ModelCounts
from headrace.replay.ledger.rejoin import row_count
from headrace.replay.ledger.runs import RunTotals, add_steps
from headrace.replay.ledger.topic_seals import NotSealed, TopicSeals
from headrace.stream.join.watermark import NO_TIME
from headrace.trainer.commit.lineage import lineage
from headrace.trainer.commit.steps_archive import StepsArchive, read_all_steps

ReadLetters = Callable[[], tuple[list[DeadLetter], list[tuple[DeadLetter, Fate]]]]
"""Gives all dead letters, and those of them that were offered again, with what came of it."""
CHOSEN_OF_MAX = 8
"""Most tasks among which those of a run are looked for: 2^8 choices."""
WRONG_MAX = 64
"""Most ranges of one run that are read by id; where more are wrong, all is read."""


@dataclass
class SealedStock:
    """What a drawing from seals reads, in order: effects before causes, so that the log has what an effect contains."""

    project: Project
    config: Config
    topics: Topics
    reader: Reader
    lake: LakeReader
    blobs: Blobs
    topic_ids: dict[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    """Names of the project's other models."""

    def draw(self, heads: Mapping[str, tuple[str, ...]], letters: ReadLetters) -> tuple[Ledger, KeptAccount]:
        """Return the ledger, and what the next drawing may begin with if this one is sound (`keep`).

        Args:
            heads: the tasks of the runs whose recipe is known.
            letters: reads the dead letters, when it is their turn.
        """
        ledger = Ledger(drawn_from="seals", behind_max_ms=self.config.ledger.behind_max_ms)
        before = self._kept(ledger)
        after = msgspec.structs.replace(before, topic_ids=self.topic_ids, runs={}, lake={})
        runs: dict[str, RunTotals] = {}
        for model in (*self.beside, self.project.model):
            some, end = self._runs_of(model, before, before.offsets().get(model, 0))
            runs |= some
            if model == self.project.name:
                after.steps_offset = end
            else:
                after.steps_offsets = after.steps_offsets | {model: end}
        sealed, stored, retained_ms = self._lake()
        imported = self._imported(None)
        # Before the topic's ends are asked: a state that is stored meanwhile has samples beyond them.
        joined = self._joined()
        topic = TopicSeals(self.reader, self.topics.samples)
        self._draw_join(ledger, joined)
        ledger.samples = sum(whole(place.seal.tasks).count for p in joined if (place := topic.newest(p)) is not None)
        self._check_topic(topic, joined)
        watch = _Ages(topic, joined)
        _draw_lake(ledger, self.lake, topic, sealed, before, after)
        _draw_stored(ledger, sealed, whole(imported).count, stored, retained_ms)
        watch.draw(ledger, "lake", {p: seal.upto for p, seal in sealed.items()})
        watch.draw(ledger, "model", {})
        tasks = sorted(ledger.tasks)
        due: dict[str, Seal] = {}
        for place in (each for p in joined if (each := topic.newest(p)) is not None):
            due = with_rows(due, place.seal.tasks)
        for name, totals in runs.items():
            known = before.runs.get(name)
            given = self._given(totals) if imported else {}
            choices = _choices(heads.get(name), self.project, tasks)
            found = _Run(self, ledger, topic, totals, known, choices, due, given)
            ledger.models[name] = found.draw()
            after.runs[name] = KeptRun(totals=totals, heads=found.heads)
            # A run that stands at the end of what it learnt of the lake has not said yet how far that goes.
            left = None if totals.positions else watch.count(found.heads) + found.counts.imported - totals.rows
            watch.draw(ledger, "model", totals.upto(), left, found.heads)
        told, retried = letters()
        dead, fates = count_letters(ledger, told, retried, tags_of(self.project))
        # After the letters: what they say was appended is in the log by now.
        said = said_of(joined.values())
        beyond = self._said_beyond(ledger, joined, said, fates["appended"])
        draw_gateways(ledger, ledger.appended, dead, said, fates, beyond=beyond)
        finish(ledger)
        return ledger, after

    def keep(self, account: KeptAccount) -> None:
        """Let the next drawing begin where this one ended. Raises `Unavailable`."""
        put_account(self.blobs, account)

    def _kept(self, ledger: Ledger) -> KeptAccount:
        project, generation = self.project.name, self.topics.generation
        try:
            account = get_account(self.blobs, project, generation, self.topic_ids)
            ours = {*self.beside, self.project.model}
            told = account.offsets() if account is not None else {}
            for model, offset in ((model, told[model]) for model in told.keys() & ours):
                end = self.reader.end_offsets(self.topics.of(model).steps)[0]
                if offset > end:
                    raise NotSealed(f"the kept account has steps up to {offset}, the topic ends at {end}")
        except NotSealed as error:
            ledger.reread.append(f"all steps, since {error}")
            account = None
        return account or KeptAccount(project=project, generation=generation)

    def _runs_of(self, model: str, before: KeptAccount, begin: int) -> tuple[dict[str, RunTotals], int]:
        """Return a model's runs with its steps from `begin` on, and the offset to go on from."""
        ours = {name: kept.totals for name, kept in before.runs.items() if kept.totals.model == model}
        runs = {name: msgspec.convert(msgspec.to_builtins(totals), RunTotals) for name, totals in ours.items()}
        end = self.reader.end_offsets(self.topics.of(model).steps)[0]
        add_steps(runs, self._ours(model, begin, end), lambda first: self._before(first, end))
        return runs, end

    def _before(self, first: Step, end: int) -> list[Step]:
        """Return the steps that a run which goes on from another one begins with."""
        found = lineage(self._ours(first.model, 0, end), first.run)
        return found[: found.index(first)]

    def _ours(self, model: str, begin: int, end: int) -> Iterator[Step]:
        """Yield a model's steps. Raises `InvariantBroken` for one of a `samples` topic that is no more."""
        samples = self.topics.samples
        for step in self.steps(model, begin, end):
            if step.model == model:
                check_topic(step.samples_id, self.topic_ids.get(samples, ""), samples)
                yield step

    def steps(self, model: str, begin: int, end: int) -> Iterator[Step]:
        """Yield the steps in a model's topic from `begin` to below `end`; what is none is passed over."""
        topic = self.topics.of(model).steps
        archive = StepsArchive(self.blobs, topic, self.topic_ids.get(topic, ""))
        yield from (step for _, step in read_all_steps(self.reader, topic, archive, begin=begin, end=end))

    def _lake(self) -> tuple[Mapping[int, PartitionSeal], int, int]:
        """Return the lake's seals, its rows, and before which event time retention has dropped some: of one version."""
        while True:
            state = self.lake.state()
            if state is None:
                return {}, 0, 0
            sealed, stored = self.lake.seals()
            newest = self.lake.state()
            if newest is not None and newest.version == state.version:
                break
        for partition, position in state.positions.by_partition.items():
            seal = sealed.get(partition)
            if seal is None or seal.since != START or seal.upto != position:
                raise NotSealed(
                    f"the lake has rows of partition {partition} that an older release stored without a seal"
                )
        return sealed, stored, state.retained_before_ms

    def _imported(self, version: int | None) -> Mapping[str, Seal]:
        """Return the seals of imported history, by task."""
        found, count = self.lake.imported([task.name for task in self.project.tasks], version)
        if whole(found).count != count:
            raise NotSealed("the lake has imported rows of tasks that the project does not declare any more")
        return found

    def _given(self, totals: RunTotals) -> Mapping[str, Seal]:
        """Return the seals of what the versions of the lake that a run learnt had of imported history."""
        try:
            found = [self._imported(version) for version in totals.stored]
        except Unavailable as error:
            raise NotSealed(f"run {totals.run} learnt a version of the lake that is no more: {error}") from error
        # A run learns one version; were there several, each would have all of the one before it.
        return max(found, key=lambda seals: whole(seals).count, default={})

    def _joined(self) -> dict[int, Joined]:
        events = self.topics.events
        begins, ends = self.reader.begin_offsets(events), self.reader.end_offsets(events)
        joined = read_joined(self.blobs, self.topics.generation, ends)
        # Asked again: the join may have read on before it stored what was found.
        check_whole(joined, begins, self.reader.end_offsets(events), self.topic_ids.get(events, ""))
        return joined

    def _draw_join(self, ledger: Ledger, joined: Mapping[int, Joined]) -> None:
        ledger.tasks = tasks_of(joined.values())
        ledger.sealed = {str(p): one.offset for p, one in sorted(joined.items())}
        for one in joined.values():
            ledger.appended += one.rows
            ledger.impressions += one.totals.impressions
            ledger.feedback += one.totals.feedback
            ledger.repeated_in_log += one.totals.repeated_in_log
            ledger.external += one.account.external

    def _check_topic(self, topic: TopicSeals, joined: Mapping[int, Joined]) -> None:
        """Raise `NotSealed` where the topic does not say of the join's last sample what the join's state says."""
        for partition, one in joined.items():
            if one.last > START and whole(topic.at(partition, one.last)) != whole(one.account.tasks):
                raise NotSealed(
                    f"samples/{partition} and the join's state have other seals up to the sample at {tuple(one.last)}"
                )

    def _said_beyond(self, ledger: Ledger, joined: Mapping[int, Joined], said: list[Punctuation], retried: int) -> int:
        """Return how many events that the gateways, and the retries' marks, say they appended lie beyond the join's
        states: as many as are more than the join has, and at most as many as are there.

        Args:
            retried: dead letters whose events were appended. The marks are read now, the join's states are older.
        """
        receipts = sum(one.counts.get("appended", 0) for one in said) + retried
        excess = receipts - (ledger.appended - ledger.external)
        return min(excess, self._rows_beyond(joined)) if excess > 0 else 0

    def _rows_beyond(self, joined: Mapping[int, Joined]) -> int:
        """Return how many rows of events lie in the log beyond the join's states."""
        ends = self.reader.end_offsets(self.topics.events)
        begins = {p: joined[p].offset + 1 if p in joined else 0 for p in ends}
        records = read_range(self.reader, self.topics.events, begins=begins, ends=ends)
        kinds = (IMPRESSION, FEEDBACK)
        return sum(row_count(r.value) for r in records if r.value is not None and r.headers.get("kind") in kinds)


def tags_of(project: Project) -> frozenset[str]:
    """Return the declared tags."""
    return frozenset({project.impression.tag, *(feedback.tag for feedback in project.feedback)})


def _draw_lake(
    ledger: Ledger,
    lake: LakeReader,
    topic: TopicSeals,
    sealed: Mapping[int, PartitionSeal],
    before: KeptAccount,
    after: KeptAccount,
) -> None:
    """Hold the lake's seals against the topic's, and read by id what differs since the last sound drawing."""
    lost = twice = 0
    for partition, mine in sorted(sealed.items()):
        if mine.seal == whole(topic.at(partition, mine.upto)):
            after.lake[partition] = LakeTill((mine.upto.offset, mine.upto.rank), mine.seal)
            continue
        begin = START
        if (till := before.lake.get(partition)) is not None:
            place = Position(*till.position)
            begin = place if place <= mine.upto and whole(topic.at(partition, place)) == till.seal else START
        ledger.reread.append(f"lake, partition {partition}, after {tuple(begin)} up to {tuple(mine.upto)}")
        counted = _reread_lake(lake, topic, partition, begin, mine.upto)
        lost, twice = lost + counted[0], twice + counted[1]
        if counted == (0, 0):
            ledger.seals_wrong.append(f"lake, partition {partition}: its rows are the topic's, its seal is not")
    ledger.lost_where["lake"], ledger.twice_where["lake"] = lost, twice
    ledger.lost_where["topic"] = ledger.twice_where["topic"] = 0


def _reread_lake(
    lake: LakeReader, topic: TopicSeals, partition: int, begin: Position, upto: Position
) -> tuple[int, int]:
    """Return how many ids of a range the lake lacks, and has too often."""
    due = topic.rows(partition, begin, upto, KEYS)
    there = lake.read(None, KEYS.names).cast(KEYS)
    positions = [Positions(0, {partition: each}) for each in (begin, upto)]
    beyond_N, within_N = (covers(there, each) for each in positions)
    ours_N = within_N & ~beyond_N & (there["partition"].to_numpy() == partition)
    told = without_rows(topic.at(partition, upto), topic.at(partition, begin))
    if whole(seal_of(due)) != whole(told):
        raise NotSealed(f"samples/{partition} lacks samples after {tuple(begin)} up to {tuple(upto)}")
    return compare(due, sample_ids(due), sample_ids(there.filter(ours_N)), positions[1])


def _draw_stored(
    ledger: Ledger, sealed: Mapping[int, PartitionSeal], imported: int, stored: int, retained_ms: int
) -> None:
    """Count the rows that the lake's files have; what retention did not drop must be as many as were committed."""
    committed = sum(each.seal.count for each in sealed.values()) + imported
    # Imported history is the oldest: what retention dropped is taken to be of it first.
    ledger.imported = max(0, imported - max(0, committed - stored))
    ledger.stored = stored - ledger.imported
    if retained_ms and stored <= committed:
        ledger.retained = committed - stored
    elif stored != committed:
        raise NotSealed(f"{committed} rows were committed to the lake and its files hold {stored}")


def _choices(known: tuple[str, ...] | None, project: Project, tasks: list[str]) -> list[tuple[str, ...]]:
    """Return which tasks a run may have had, the likeliest first."""
    if known is not None:
        return [known]
    some = [each for size in range(1, len(tasks) + 1) for each in combinations(tasks, size)]
    return [project.recipe.heads, *(some if len(tasks) <= CHOSEN_OF_MAX else ())]


class _Run:
    """One run, held against the topic's seals."""

    def __init__(
        self,
        stock: SealedStock,
        ledger: Ledger,
        topic: TopicSeals,
        totals: RunTotals,
        known: KeptRun | None,
        choices: list[tuple[str, ...]],
        due: Mapping[str, Seal],
        given: Mapping[str, Seal],
    ) -> None:
        """`due`: what the topic has, by task; `given`: what the run was given of imported history."""
        self.stock, self.ledger, self.topic, self.totals, self.known = stock, ledger, topic, totals, known
        self.choices, self.heads, self.due = choices, choices[0], due
        self.given = given
        self.counts = ModelCounts()

    def draw(self) -> ModelCounts:
        totals = self.totals
        if totals.irregular:
            raise NotSealed(f"run {totals.run}: {totals.irregular}")
        counts = self.counts = ModelCounts(model=totals.model, run=totals.run, steps=totals.steps)
        if self.known is not None and self.known.totals.number == totals.number:
            self.heads = self.known.heads
        elif totals.positions or not totals.stored:
            counts.lost, counts.twice = self._compare()
        elif totals.live:
            self._check_live()
        if totals.took_live is not None:
            counts.live = totals.took_live.count
            counts.stored = totals.rows - counts.live
        counts.refused = totals.refused
        counts.learnt = totals.rows - totals.refused - totals.left_out
        counts.sampled_out = totals.left_out
        ours = whole(self.due, self.heads).count
        counts.other_tasks = whole(self.due).count - ours
        counts.imported = whole(self.given, self.heads).count
        counts.skipped = whole(self._left_out(), self.heads).count
        counts.in_flight = max(0, ours + counts.imported - totals.rows - counts.skipped)
        counts.samples = totals.rows + counts.other_tasks + counts.in_flight + counts.skipped
        return counts

    def _due(self, upto: Mapping[int, Position]) -> dict[str, Seal]:
        """Return the seals, by task, of what a run that has got to `upto` took."""
        found: dict[str, Seal] = dict(self.given)
        for partition, position in upto.items():
            begin = self.totals.begin(partition)
            if position > begin:
                here = without_rows(self.topic.at(partition, position), self.topic.at(partition, begin))
                found = with_rows(found, here)
        return without_rows(found, self._left_out(upto)) if self.totals.passed_over else found

    def _left_out(self, upto: Mapping[int, Position] | None = None) -> dict[str, Seal]:
        """Return the seals of what the run left out by name, of what lies up to `upto`, or of all."""
        found: dict[str, Seal] = {}
        for each in self.totals.passed_over:
            position = Position(*each.upto)
            if upto is None or upto.get(each.partition, START) >= position:
                after = self.topic.at(each.partition, Position(*each.after))
                found = with_rows(found, without_rows(self.topic.at(each.partition, position), after))
        return found

    def _check_live(self) -> None:
        """Hold what a run took live, while it still learns the lake, against the topic. Raises `NotSealed` where that
        has something else."""
        found: dict[str, Seal] = {}
        for partition, (after, upto) in self.totals.live.items():
            ends = self.topic.at(partition, Position(*upto)), self.topic.at(partition, Position(*after))
            found = with_rows(found, without_rows(*ends))
        for heads in self.choices:
            if whole(found, heads) == self.totals.took_live:
                self.heads = heads
                return
        raise NotSealed(f"run {self.totals.run}: what it learnt live beside the lake and the topic have other seals")

    def _compare(self) -> tuple[int, int]:
        """Find the tasks by which the run's seal is the topic's; where there are none, count what is wrong."""
        due = self._due(self.totals.upto())
        for heads in self.choices:
            if whole(due, heads) == self.totals.seal:
                self.heads = heads
                return 0, 0
        known, totals = self.known, self.totals
        if totals.stored != (known.totals.stored if known is not None else {}):
            raise NotSealed(f"run {totals.run}: what it learnt of the lake and the topic have other seals")
        if known is not None:
            self.heads = known.heads
        return self._find_wrong()

    def _find_wrong(self) -> tuple[int, int]:
        """Return (lost, twice) of the ranges whose seal is not the topic's: by halving over the run's new steps."""
        steps, lost, twice = self._new_steps(), 0, 0
        sums = [self.known.totals.seal if self.known is not None else Seal()]
        for step in steps:
            rows = Seal(sum(r.rows for r in step.ranges), sum(r.sum or 0 for r in step.ranges))
            sums.append(sums[-1].plus(rows))
        low, bias = 0, Seal()
        for _ in range(WRONG_MAX):
            if self._is_right(steps, sums, len(steps), bias):
                return lost, twice
            high = len(steps)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._is_right(steps, sums, middle, bias) else (low, middle)
            for each in steps[high - 1].ranges:
                after, upto = Position(*each.after), Position(*each.upto)
                there = whole(seal_of(self.topic.rows(each.partition, after, upto, KEYS)), self.heads)
                took = Seal(each.rows, each.sum or 0)
                if took == there:
                    continue
                where = f"run {self.totals.run}, step {steps[high - 1].step}, partition {each.partition}"
                self.ledger.reread.append(f"{where}, after {each.after} up to {each.upto}")
                # As many, and not the same: at least one is missing, and one is there that should not be.
                swapped = int(took.count == there.count)
                lost += max(0, there.count - took.count) + swapped
                twice += max(0, took.count - there.count) + swapped
                bias = bias.plus(took).minus(there)
            low = high
        raise NotSealed(f"run {self.totals.run}: more than {WRONG_MAX} ranges have other seals than the topic")

    def _new_steps(self) -> list[Step]:
        begin = self.known.totals.number if self.known is not None else 0
        model = self.totals.model
        end = self.stock.reader.end_offsets(self.stock.topics.of(model).steps)[0]
        ours = (step for step in self.stock.steps(model, 0, end) if step.model == model)
        return [
            step
            for step in lineage(ours, self.totals.run)
            if step.branch is None and begin < step.step <= self.totals.number
        ]

    def _is_right(self, steps: list[Step], sums: list[Seal], taken: int, bias: Seal) -> bool:
        if taken == 0:
            return True
        positions = Positions.from_json(0, steps[taken - 1].positions).by_partition
        return sums[taken].minus(bias) == whole(self._due(positions), self.heads)


class _Ages:
    """How old the oldest sample is that has not got somewhere, by the watermarks that the records of samples tell."""

    def __init__(self, topic: TopicSeals, joined: Mapping[int, Joined]) -> None:
        self._topic, self._partitions = topic, list(joined)
        told = [place.seal.watermark_ms for p in joined if (place := topic.newest(p)) is not None]
        self._newest_ms = max([NO_TIME, *told, *(one.watermark_ms for one in joined.values())])

    def draw(
        self,
        ledger: Ledger,
        where: str,
        upto: Mapping[int, Position],
        left: int | None = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        """Say how old the oldest sample beyond `upto` is; none is where `left` is at most 0. With `tasks`, a partition
        counts where one of theirs is beyond: a run that learns some of the tasks does not move on for the others'."""
        if self._newest_ms == NO_TIME:
            return
        oldest_ms = self._newest_ms
        for partition in self._partitions if left is None or left > 0 else ():
            place = self._topic.following(partition, upto.get(partition, START))
            if place is not None and (tasks is None or self._has_more(partition, upto.get(partition, START), tasks)):
                oldest_ms = min(oldest_ms, place.seal.watermark_ms)
        ledger.behind_ms[where] = max(0, self._newest_ms - oldest_ms)

    def count(self, tasks: Sequence[str]) -> int:
        """Return how many samples of these tasks the topic has had."""
        places = [self._topic.newest(partition) for partition in self._partitions]
        return sum(whole(place.seal.tasks, tasks).count for place in places if place is not None)

    def _has_more(self, partition: int, position: Position, tasks: Sequence[str]) -> bool:
        """Say whether a sample of these tasks is beyond a position; true where the seals do not tell."""
        newest = self._topic.newest(partition)
        try:
            before = self._topic.at(partition, position)
        except NotSealed:
            return True
        return newest is not None and whole(without_rows(newest.seal.tasks, before), tasks).count > 0
