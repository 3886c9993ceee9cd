"""Dead letters offered again after a fix: each at most once, none lost, whatever is killed.

The protocol, in the words that the tests use:

1. *Claim.* The fenced writer of the `retries` topic is opened: the broker lets only the newest one write marks.
2. *Find out.* Letters that a `retrying` mark names, and whose fate is not known, are looked for: their event ids in
   `events` from the offsets that the mark holds, and newer letters that name them. A `retried` mark says what was
   found; the others are open again. A mark that this process has seen for less than a lease is waited for: its retry
   may still be at work (`mark_leases.py`).
3. *Look up.* A `too_late` letter's event is looked up in log and lake (`look_up.py`). A repeat is settled as one, and
   what nobody can tell as `unknown`; the user may decide that (`retry --take`, `retry --drop`), and it is looked up
   once more then: a repeat is never taken. What is new is offered as looked up: no age is too late then. A letter that
   was cut is looked up too; where it is new it is `unknown`, since not all of its event is there: it can only be
   dropped. What only a later look-up can tell (the lake is away, or behind) stays open, and holds nothing up behind it.
4. *Mark.* A `retrying` mark with the batch's letters and the end offsets of `events` is committed.
5. *Offer.* Each letter's record goes through a gateway in this process, under its own event id or the one that the
   letter holds, and with its own time. What is refused again becomes a newer letter that names this one.
6. *Settle.* When Kafka has receipts for the whole batch, a `retried` mark holds each letter's fate.

Steps 3 to 6 go in rounds through the topic: at most `LOOKED_UP_MAX` letters are looked up, and what is found of them is
settled, before the next ones are read.

Killed before 4, nothing happened. Killed between 4 and 6, the next retry finds out. A holder that was paused, and was
fenced meanwhile, appends nothing once half its lease is over; the one record that may be under way then has the id
under which the new holder appends, in the same partition and within the join's `repeat_horizon_ms`: the stream counts
one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import msgspec

from headrace.contract.config import IngestConfig, JoinConfig
from headrace.contract.errors import EventRejected, Overloaded
from headrace.contract.formats.dead_letters import (
    TOO_LATE,
    Fate,
    RetryMark,
    encode_retry_mark,
)
from headrace.contract.formats.events import FEEDBACK, IMPRESSION
from headrace.contract.formats.topics import Topics
from headrace.contract.interfaces.clock import Clock
from headrace.contract.interfaces.fenced import FencedWriter
from headrace.contract.interfaces.log import Producer, Reader, Record, read_range
from headrace.contract.metrics import Metrics
from headrace.contract.privacy import Privacy
from headrace.contract.project import Project
from headrace.ingest.dead_letters.leased_producer import LeasedProducer
from headrace.ingest.dead_letters.letters import (
    Filter,
    Letter,
    States,
    id_of,
    read_letters,
    read_marks_at,
    record_of,
    time_ns_of,
    why_not_retried,
)
from headrace.ingest.dead_letters.log_time import LogTime
from headrace.ingest.dead_letters.look_up import LookUp, Verdict
from headrace.ingest.dead_letters.mark_leases import MarkLeases
from headrace.ingest.decode.message import message_of
from headrace.ingest.decode.validate import declared_types
from headrace.ingest.gateway.batcher import Outcome
from headrace.ingest.gateway.chunk_identity import Peer
from headrace.ingest.gateway.dry_run import DryRunProducer, events_in
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.gateway.gateway_dependencies import GatewayDependencies
from headrace.ingest.gateway.late_events import LateEvents
from headrace.ingest.gateway.repeats import digest
from headrace.ingest.sources.access_log_events import mappers_of

Decision = Literal["", "take", "drop"]
"""What becomes of letters of which log and lake cannot tell whether their events were taken: they stay, by default."""
SETTLER = "settler-"
"""How the runs of the gateways' own retries are named."""
LOOKED_UP_MAX = 50_000
"""Most letters that are looked up in one round, 20 MB of ids."""
Event = tuple[str, str]
"""A type's name and an event id."""
BATCH_LETTERS, BATCH_BYTES = 200, 1_048_576
SCAN_MS = 600_000
"""How long after its mark a killed retry's record may still have come into the log: the producer gives up after 5
minutes; twice that is searched, by the log's own time from the first record behind the mark on."""
_WAIT_S, _TICK_S = 1.0, 0.002
_NEVER_MS = 600_000
"""The gateway of a batch writes no punctuation: its events are old, and only gateways that run move the watermark."""


class Report(msgspec.Struct, kw_only=True):
    """What a retry did. `offered` = appended + repeated + skipped_lines + unknown + the sum of `refused`."""

    offered: int = 0
    appended: int = 0
    repeated: int = 0
    """The event was in the log already, or another letter of it was taken."""
    skipped_lines: int = 0
    """Lines that are no events by the corrected mapping."""
    refused: dict[str, int] = {}
    """Refused again, by reason."""
    unknown: int = 0
    """Log and lake cannot tell whether the event was taken; the user decides."""
    skipped: dict[str, int] = {}
    """Chosen and not offered, by why."""
    found_out: dict[str, int] = {}
    """What became of letters that a killed retry had left."""
    dry_run: bool = False


class Retry:
    """One run of `headrace dead-letters retry`. For one thread."""

    def __init__(
        self,
        project: Project,
        config: IngestConfig,
        topics: Topics,
        partitions: int,
        *,
        producer: Producer,
        reader: Reader,
        writer: FencedWriter,
        clock: Clock,
        metrics: Metrics,
        run: str,
        privacy: Privacy | None = None,
        leases: MarkLeases | None = None,
        look_up: LookUp | None = None,
        late: LateEvents | None = None,
        begin: int = 0,
        waits_from_ms: int = 0,
        leaves_from_ms: int = 2**62,
    ) -> None:
        """`look_up` judges `too_late` letters, which stay open without one.

        Letters below offset `begin` are none of this run's. What a look-up cannot tell yet, and was refused before
        `waits_from_ms`, waits no longer: it is unknown. Late ones refused from `leaves_from_ms` on, whose tag the
        project does not declare, are left to a gateway whose project does.
        """
        self._topics, self._producer, self._reader, self._writer = topics, producer, reader, writer
        self._clock, self._run, self._time = clock, run, LogTime(clock)
        self._gateway = GatewayDependencies(
            project=project,
            config=msgspec.structs.replace(config, batch_ms=1, grace_ms=_NEVER_MS),
            topics=topics,
            partitions=partitions,
            producer=producer,
            metrics=metrics,
            clock=self._time,
            privacy=privacy,
            late=late or LateEvents(JoinConfig().repeat_horizon_ms),
        )
        self._leases, self._look_up = leases or MarkLeases(), look_up
        self._lease_ms = self._leases.lease_ms
        self._begin, self._waits_from_ms, self._leaves_from_ms = begin, waits_from_ms, leaves_from_ms
        self._tags = {*declared_types(project), *mappers_of(project)}
        self._verdicts: dict[int, Verdict] = {}
        self._marked_s = float("-inf")
        self._taken: set[bytes] = set()
        """Digests of (tag, event id) of every letter whose event is in the log."""

    def retry(self, chosen: Filter, decide: Decision = "") -> Report:
        """Offer the chosen open letters again; those of which nobody can tell as the user decides.

        Raises `Overloaded` where another retry is at work, `Unavailable` where Kafka is away and `InvariantBroken`
        where another retry took over; run it again then, nothing is lost.
        """
        report = Report()
        self._wait_for_others()
        self._writer.open()
        self._wait_for_others(is_writer=True)
        self._time.look(self._reader, self._topics.events)
        ends = self._reader.end_offsets(self._topics.dead_letters)[0]
        states = self._survey(ends, chosen)
        self._find_out(states, ends, report)
        is_first = True
        for batch in self._rounds(states, chosen, ends, decide, self._at_work, report):
            if is_first:
                # The first batch compiles the decoders: before the mark, so that this takes nothing of its lease.
                self._offer(batch[:1], DryRunProducer(), self._clock.monotonic() + _NEVER_MS / 1000)
                is_first = False
            self._take(batch, report)
        return report

    def dry_run(self, chosen: Filter, decide: Decision = "") -> Report:
        """Say what a retry would do now, by this project; nothing is written."""
        report = Report(dry_run=True)
        self._time.look(self._reader, self._topics.events)
        ends = self._reader.end_offsets(self._topics.dead_letters)[0]
        states = self._survey(ends, chosen)
        for offset in list(states.doubtful):
            states.fates[offset] = "open"
        for batch in self._rounds(states, chosen, ends, decide, lambda: None, report):
            until_s = self._clock.monotonic() + _NEVER_MS / 1000
            self._tell(batch, *self._offer(batch, DryRunProducer(), until_s), report)
        return report

    # -- 1. claim

    def _newest_open(self) -> tuple[int, RetryMark] | None:
        """Return the newest mark, with its offset, of whose letters nothing says what came of them."""
        marks = read_marks_at(self._writer)
        doubtful = {id(mark) for mark in States(mark for _, mark in marks).doubtful.values()}
        return next(((offset, mark) for offset, mark in reversed(marks) if id(mark) in doubtful), None)

    def _wait_for_others(self, *, is_writer: bool = False) -> None:
        """Return when no open mark of another retry has been seen for less than a lease.

        Before this is the writer, the gateways' settlers are not waited for: the user's retry takes over from them.
        """
        first: int | None = None
        while (newest := self._newest_open()) is not None:
            offset, mark = newest
            left_s = self._leases.left_s(offset, self._clock.monotonic())
            if left_s <= 0 or (mark.run.startswith(SETTLER) and not is_writer):
                return
            if first is not None and offset != first:
                raise Overloaded(f"another retry is at work (run {mark.run}); wait until it has ended.")
            first = offset
            self._clock.sleep(_WAIT_S)

    # -- 2. find out

    def _survey(self, end: int, chosen: Filter) -> States:
        """Return each letter's state by the marks and by newer letters."""
        states = States(mark for _, mark in read_marks_at(self._writer))
        if states.fates or states.doubtful:
            begin = min([self._begin, *states.doubtful])
            for letter in read_letters(self._reader, self._topics.dead_letters, end, begin=begin):
                states.note(letter)
            # What is looked up is found in the log.
            again = () if chosen.reason == TOO_LATE else read_letters(self._reader, self._topics.dead_letters, end)
            for letter in again:
                if states.fate(letter.offset) in ("appended", "repeated"):
                    self._taken.add(self._identity(letter))
        return states

    def _identity(self, letter: Letter) -> bytes:
        return digest(letter.content.tag, self._id(letter))

    def _id(self, letter: Letter) -> str:
        return id_of(letter, record_of(letter.content)[0], self._topics.dead_letters)

    def _find_out(self, states: States, end: int, report: Report) -> None:
        """Mark what became of letters that a retry named before it was killed."""
        doubtful = dict(states.doubtful)
        if not doubtful:
            return
        held = {
            letter.offset: letter
            for letter in read_letters(self._reader, self._topics.dead_letters, end, begin=min(doubtful))
            if letter.offset in doubtful
        }
        # What retention has taken meanwhile is nobody's any more; without a word its mark would be waited for for ever.
        found: dict[int, Fate] = dict.fromkeys(doubtful.keys() - held.keys(), "open")
        for mark in {id(mark): mark for mark in doubtful.values()}.values():
            wanted = {o: self._events_of(held[o]) for o in mark.letters if doubtful.get(o) is mark and o in held}
            there = self._in_log(mark, set().union(*wanted.values()))
            for offset, names in wanted.items():
                found[offset] = "unknown" if there is None else "appended" if names & there else "open"
        if not found:
            return
        self._append(RetryMark(step="retried", run=self._run, at_ms=self._clock.now_ms(), outcomes=found))
        report.found_out = dict(Counter(found.values()))
        states.fates.update(found)
        for offset, fate in found.items():
            del states.doubtful[offset]
            if fate == "appended":
                self._taken.add(self._identity(held[offset]))

    def _events_of(self, letter: Letter) -> set[Event]:
        """Return the types and ids under which the letter's event may be in the log: a mapping may give them.

        Where no type has the letter's tag now, the type is empty: an event of any type with the id may be it.
        """
        trial = DryRunProducer()
        self._offer([letter], trial, self._clock.monotonic() + _NEVER_MS / 1000)
        declared = declared_types(self._gateway.project).get(letter.content.tag)
        return {("" if declared is None else declared.name, self._id(letter)), *trial.events}

    def _in_log(self, mark: RetryMark, wanted: set[Event]) -> set[Event] | None:
        """Return which of the events are in the log behind a mark; None where the log no longer reaches back so far."""
        topic = self._topics.events
        begins, ends = self._reader.begin_offsets(topic), self._reader.end_offsets(topic)
        if any(begins[p] > mark.ends.get(p, 0) for p in begins):
            return None
        found: set[Event] = set()
        for record in self._behind(mark, ends):
            if record.value is not None and record.headers.get("kind") in (IMPRESSION, FEEDBACK):
                try:
                    there = events_in(record.value, record.headers)
                except (EventRejected, LookupError):
                    continue  # No events of ours: the join counts it.
                found.update(wanted.intersection([*there, *(("", event_id) for _, event_id in there)]))
        return found

    def _behind(self, mark: RetryMark, ends: Mapping[int, int]) -> Iterator[Record]:
        """Yield the records of `events` that came within `SCAN_MS` after a mark, whatever time its writer had."""
        topic = self._topics.events
        for partition, end in ends.items():
            begins, upto = {partition: mark.ends.get(partition, 0)}, {partition: end}
            first = next(iter(read_range(self._reader, topic, begins=begins, ends=upto)), None)
            if first is not None:
                latest_ms = first.timestamp_ms + SCAN_MS
                yield from read_range(self._reader, topic, begins=begins, ends=upto, latest_ms=latest_ms)

    # -- 3. look up

    def _rounds(
        self, states: States, chosen: Filter, end: int, decide: Decision, at_work: Callable[[], None], report: Report
    ) -> Iterator[list[Letter]]:
        """Yield the batches of each round of look-ups."""
        begin = self._begin
        while begin < end:
            upto = self._judge(states, chosen, begin, end, decide, at_work)
            yield from self._batches(states, chosen, begin, upto, report)
            begin = upto

    def _judge(
        self, states: States, chosen: Filter, begin: int, end: int, decide: Decision, at_work: Callable[[], None]
    ) -> int:
        """Find out of what is too late, or unknown, whether it is new; return the offset behind what was judged."""
        late: list[Letter] = []
        undecided: set[int] = set()
        """Unknown before: the user decides, but for what is found to be a repeat by now."""
        cut: set[int] = set()
        """Looked up like others, and never taken: not all of their events is there."""
        self._verdicts.clear()
        for letter in read_letters(self._reader, self._topics.dead_letters, end, begin=begin):
            if len(late) + len(self._verdicts) >= LOOKED_UP_MAX:
                end = letter.offset
                break
            state, is_late = states.of(letter.offset), letter.content.reason == TOO_LATE
            is_cut = bool(why_not_retried(letter))
            if not chosen.takes(letter) or (is_cut and not is_late):
                continue
            if state == "unknown" and decide and not (decide == "take" and is_cut):
                states.fates[letter.offset] = "open"
                undecided.add(letter.offset)
                if not is_late:
                    self._verdicts[letter.offset] = "new" if decide == "take" else "repeated"
                    continue
            elif state != "open" or not is_late or self._leaves(letter):
                continue
            if is_cut:
                cut.add(letter.offset)
            late.append(msgspec.structs.replace(letter, content=msgspec.structs.replace(letter.content, raw=b"")))
        if late and self._look_up is not None:
            found = self._look_up.verdicts(late, at_work)
            for letter in late:
                verdict = found.get(letter.offset)
                if letter.offset in undecided and verdict != "repeated":
                    verdict = "new" if decide == "take" else "repeated"
                elif verdict is None and letter.content.seen_ms < self._waits_from_ms:
                    verdict = "unknown"
                if verdict == "new" and letter.offset in cut:
                    verdict = "unknown"
                if verdict == "unknown" and decide and not (decide == "take" and letter.offset in cut):
                    verdict = "new" if decide == "take" else "repeated"
                if verdict is not None:
                    self._verdicts[letter.offset] = verdict
        return end

    def _leaves(self, letter: Letter) -> bool:
        """Say whether the letter is another gateway's to settle: in a rolling deploy their projects differ."""
        return letter.content.tag not in self._tags and letter.content.seen_ms >= self._leaves_from_ms

    def _at_work(self) -> None:
        """Tell the settlers of other gateways, now and then, that this one looks up: a long log takes minutes."""
        if self._clock.monotonic() - self._marked_s >= self._lease_ms / 3000:
            self._append(RetryMark(step="retrying", run=self._run, at_ms=self._clock.now_ms()))

    # -- 4. mark

    def _batches(self, states: States, chosen: Filter, begin: int, end: int, report: Report) -> Iterator[list[Letter]]:
        """Yield the chosen open letters that can be offered, in their order, in batches."""
        batch: list[Letter] = []
        size = 0
        for letter in read_letters(self._reader, self._topics.dead_letters, end, begin=begin):
            if not chosen.takes(letter):
                continue
            state = states.of(letter.offset)
            looked_up = letter.offset in self._verdicts
            why = f"{state} before" if state != "open" else "" if looked_up else why_not_retried(letter)
            if not why and letter.content.reason == TOO_LATE and not looked_up:
                why = "too late, and not looked up yet: the lake is away or behind"
            if why:
                report.skipped[why] = report.skipped.get(why, 0) + 1
                continue
            if batch and (
                len(batch) >= BATCH_LETTERS
                or size + len(letter.content.raw) > BATCH_BYTES
                or looked_up != (batch[0].offset in self._verdicts)
            ):
                yield batch
                batch, size = [], 0
            batch.append(letter)
            size += len(letter.content.raw)
        if batch:
            yield batch

    def _append(self, mark: RetryMark) -> None:
        self._writer.append(encode_retry_mark(mark))
        self._marked_s = self._clock.monotonic()

    def _take(self, batch: list[Letter], report: Report) -> None:
        """Mark, offer and settle one batch."""
        begin_s, at_ms = self._clock.monotonic(), self._clock.now_ms()
        ends = self._reader.end_offsets(self._topics.events)
        offsets = tuple(letter.offset for letter in batch)
        self._append(RetryMark(step="retrying", run=self._run, at_ms=at_ms, letters=offsets, ends=ends))
        fates, reasons = self._offer(batch, self._producer, begin_s + self._lease_ms / 2000)
        self._append(RetryMark(step="retried", run=self._run, at_ms=self._clock.now_ms(), outcomes=fates))
        self._tell(batch, fates, reasons, report)

    # -- 5. offer

    def _offer(
        self, batch: list[Letter], producer: Producer, until_s: float
    ) -> tuple[dict[int, Fate], Mapping[int, str]]:
        """Return each letter's fate once Kafka has all of it, and why those were refused that were."""
        fates: dict[int, Fate] = {}
        leased = LeasedProducer(
            producer, self._clock, until_s, self._topics.dead_letters, {one.offset: one for one in batch}
        )
        name = f"retry-{self._run}"
        looked_up = batch[0].offset in self._verdicts
        gateway = Gateway(replace(self._gateway, producer=leased, looked_up=looked_up), name)
        for letter in batch:
            verdict = self._verdicts.get(letter.offset)
            if self._identity(letter) in self._taken or verdict == "repeated":
                fates[letter.offset] = "repeated"
                continue
            if verdict == "unknown":
                fates[letter.offset] = "unknown"
                continue
            record = record_of(letter.content)[0]
            if isinstance(record, dict):
                record = {**record, "event_id": record.get("event_id") or self._id(letter)}
            what = message_of(letter.content.tag, [(time_ns_of(letter.content, record), record)])
            size = len(letter.content.raw)
            gateway.offer(what, size, Peer(str(letter.offset)), partial(_settled, fates, letter.offset))
        while len(fates) < len(batch):
            gateway.drained()
            gateway.tick()
            leased.check()
            if len(fates) < len(batch):
                self._clock.sleep(_TICK_S)
        return fates, leased.reasons

    # -- 6. settle

    def _tell(self, batch: list[Letter], fates: Mapping[int, Fate], reasons: Mapping[int, str], report: Report) -> None:
        report.offered += len(batch)
        refused = Counter(report.refused)
        for letter in batch:
            fate = fates[letter.offset]
            report.appended += fate == "appended"
            report.repeated += fate == "repeated"
            report.skipped_lines += fate == "skipped"
            report.unknown += fate == "unknown"
            if fate == "refused":
                refused[reasons.get(letter.offset, letter.content.reason)] += 1
            elif fate != "unknown":
                self._taken.add(self._identity(letter))
        report.refused = dict(refused)


def _settled(fates: dict[int, Fate], offset: int, outcome: Outcome) -> None:
    told: tuple[tuple[Fate, int], ...] = (
        ("appended", outcome.appended),
        ("refused", outcome.dead_lettered),
        ("repeated", outcome.repeated),
    )
    fates[offset] = next((fate for fate, events in told if events), "skipped")
