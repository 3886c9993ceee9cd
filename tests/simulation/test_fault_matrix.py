"""Goal: no call that fails, in any way, leaves a hole behind, or a stage that waits for ever.

Method: worlds/fault_matrix.py runs each cell, a call x a fault; worlds/fault_stages.py has the stages. Every row is run
in every test run, one call of it a fault; the long run has several calls, and every cell. Then bugs are planted.
"""

from __future__ import annotations

from collections.abc import Iterator

import fault_gateway
import fault_matrix
import pytest
from fault_crawl import ROWS as CRAWL_ROWS
from fault_gateway import GATEWAY
from fault_matrix import (
    Call,
    Fault,
    StageRow,
    calls_made,
    calls_of,
    cells_of,
    check_cell,
    contract_interfaces,
    faults_of,
)
from fault_retry import RETRY
from fault_stages import ROWS as STREAM_ROWS
from fault_stages import no_threads

from headrace.backends.frontier_sqlite import SqliteFrontier
from headrace.contract.errors import Unavailable
from headrace.contract.interfaces.blobs import Blobs
from headrace.contract.interfaces.log import Admin, Producer
from headrace.ingest.crawl import outbox_sender
from headrace.ingest.crawl.outbox_sender import OutboxSender
from headrace.ingest.gateway import loop
from headrace.ingest.gateway.batcher import Outcome
from headrace.ingest.gateway.gateway import Gateway
from headrace.ingest.gateway.log_start import LogStart
from headrace.ingest.gateway.send_queue import Receipts, SendQueue
from headrace.ingest.sources.kafka_source import KafkaSource
from headrace.process.background import Background
from headrace.process.call_watch import CallWatch
from headrace.process.waits import Waits
from headrace.stream.aggregate.stage import AggregateStage
from headrace.stream.join.join import JoinState
from headrace.stream.shell.durable_state import DurableState
from headrace.stream.shell.kept_log import KeptLog
from headrace.stream.sink.archive import EventArchive
from headrace.stream.sink.stage import SinkStage

ROWS = (*STREAM_ROWS, *CRAWL_ROWS, GATEWAY, RETRY)
BY_NAME = {row.name: row for row in ROWS}
PAIRS = [pytest.param(row, call, id=f"{row.name}-{call}") for row in ROWS for call in row.rows()]
NOT_YET = {
    "Clock": "leaves no process",
    "ArchiveReader": "the ledger's and a retry's, which change nothing of what is stored",
    "LakeReader": "the trainer's and replay's",
    "JoinedUpTo": "the gateway's settler's, whose tests let it be away",
    "StoredIds": "the gateway's settler's, whose tests let it be away",
    "LakeState": "a value, not a call",
    "JoinedState": "a value, not a call",
    "Progress": "shows only",
    "TimeSeeker": "the archive's, as ArchiveReader",
}
"""Interfaces that no stage of the matrix calls, and whose they are: each is for the one who adds that stage."""


@pytest.fixture(autouse=True)
def _no_threads() -> Iterator[None]:
    with no_threads():
        yield


def middle(made: int) -> list[int]:
    return [made // 2]


def several(made: int) -> list[int]:
    return sorted({0, min(1, made - 1), made // 2, made - 1})


@pytest.mark.parametrize(("row", "call"), PAIRS)
def test_faults_of_each_call_end_well(row: StageRow, call: Call):
    """A share of the cells: another one in each row, so that every fault is met. A retry's take long."""
    cells = list(cells_of(row, call, middle))
    every = len(cells) if row is RETRY else row.share
    for cell in cells[[pair.values for pair in PAIRS].index((row, call)) % every :: every]:
        assert check_cell(row, cell), f"{cell}: the cell was skipped"


@pytest.mark.long
@pytest.mark.parametrize(("row", "call"), PAIRS)
def test_each_fault_of_several_calls_ends_well(row: StageRow, call: Call):
    for cell in cells_of(row, call, several):
        assert check_cell(row, cell), f"{cell}: the cell was skipped"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_call_that_a_stage_makes_has_a_row(row: StageRow):
    rows, made = set(row.rows()), {*calls_made(row), *calls_made(row, goes_on=True)}
    assert made == rows, f"without a row or never made: {sorted(map(str, made ^ rows))}"


def test_every_interface_of_the_contract_is_a_stages_or_says_whose_it_is():
    of_stages = {interface.__name__ for row in ROWS for interface in row.interfaces}
    contract = {interface.__name__ for interface in contract_interfaces()}
    assert contract - of_stages == set(NOT_YET)


def test_every_method_of_the_admin_has_a_row_of_each_stage_that_calls_it():
    """They are called before a stage's loop turns, and nobody but the watch of the calls would see one that hangs."""
    rows = {str(call): {row.name for row in ROWS if call in row.rows()} for call in calls_of(Admin)}
    assert rows == {
        "Admin.ensure_topics": {row.name for row in ROWS},
        "Admin.topic_id": {"stream", "aggregate", "sink", "archive"},
        "Admin.retention_ms": {"sink", "archive"},
        "Admin.delete_before": set(),
    }


def test_a_call_without_a_row_is_refused():
    class Longer:
        def put(self, name: str, data: bytes) -> None:
            """As the contract says."""

        def rename(self, name: str) -> None:
            """The contract does not know it."""

    faulty = fault_matrix.Process(fault_matrix.VirtualClock()).wrap(Blobs, Longer())
    faulty.put("a", b"")
    with pytest.raises(AssertionError, match=r"rename is called and has no row"):
        faulty.rename("a")


def test_rows_are_made_from_the_interface():
    assert [str(call) for call in calls_of(Blobs)] == ["Blobs.put", "Blobs.get", "Blobs.list", "Blobs.delete"]
    assert Call(Producer, "send.delivered") in calls_of(Producer)
    assert Fault.FULL in faults_of(Call(Producer, "send"))
    assert Fault.FULL not in faults_of(Call(Blobs, "put"))


def is_caught(name: str, method: str) -> bool:
    """Say whether some cell of this call fails."""
    row = BY_NAME[name]
    call = next(call for call in row.rows() if str(call) == method)
    try:
        for cell in cells_of(row, call, middle):
            check_cell(row, cell)
    except AssertionError:
        return True
    return False


def test_planted_a_commit_that_swallows_what_nobody_expected_is_caught(monkeypatch: pytest.MonkeyPatch):
    told = SinkStage._commit

    async def swallows(self, *what):
        await told(self, *what)
        if isinstance(self._failure, MemoryError):
            self._failure = None

    monkeypatch.setattr(SinkStage, "_commit", swallows)
    assert is_caught("sink", "LakeWriter.append")


def test_planted_an_archive_that_takes_an_unknown_outcome_for_a_commit_is_caught(monkeypatch: pytest.MonkeyPatch):
    told = EventArchive._commit

    def commit(self, taking):
        try:
            told(self, taking)
        except Unavailable:
            for partition, span in taking.taken.items():
                self._places[partition] = self._places[partition]._replace(following=span.end)

    monkeypatch.setattr(EventArchive, "_commit", commit)
    assert is_caught("archive", "ArchiveWriter.append")


def test_planted_a_refused_record_that_counts_as_delivered_is_caught(monkeypatch: pytest.MonkeyPatch):
    def counts(self, number, _record, _error, _offset):
        self._without_receipt.pop(number)

    monkeypatch.setattr(DurableState, "_on_delivered", counts)
    monkeypatch.setattr(KeptLog, "check_sent", lambda *_: None)
    assert is_caught("stream", "Producer.send.delivered")


def test_planted_a_wait_without_a_bound_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Waits, "check", lambda self: None)
    assert is_caught("aggregate", "Blobs.put")


def test_planted_a_state_that_is_stored_before_its_samples_is_caught(monkeypatch: pytest.MonkeyPatch):
    async def at_once(self, _sent):
        return

    monkeypatch.setattr(DurableState, "_await_receipts", at_once)
    monkeypatch.setattr(KeptLog, "check_sent", lambda *_: None)
    assert is_caught("stream", "Producer.send.delivered")


def test_planted_a_stage_that_goes_on_after_a_failure_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(AggregateStage, "fail", lambda self, error: None)
    monkeypatch.setattr(DurableState, "_fail", lambda self, error: self._owner.fail(error))
    assert is_caught("aggregate", "Blobs.put")


def test_planted_a_start_that_nobody_watches_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CallWatch, "wrap", lambda self, who, inner, bounds=None: inner)
    assert is_caught("stream", "Admin.topic_id") and is_caught("sink", "Admin.retention_ms")


def test_planted_a_join_that_skips_a_record_is_caught(monkeypatch: pytest.MonkeyPatch):
    told = JoinState.take_all
    monkeypatch.setattr(JoinState, "take_all", lambda self, records: told(self, records[:-1] or records))
    assert is_caught("stream", "Blobs.put")


# -- the gateway


def test_planted_a_receipt_that_is_waited_for_without_a_bound_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Receipts, "check", lambda self, now_s: None)
    assert is_caught("gateway", "Producer.send.delivered")


def test_planted_an_ack_before_the_receipt_is_caught(monkeypatch: pytest.MonkeyPatch):
    told = Gateway.offer

    def at_once(self, message, size, peer, acked, *, refusable=False):
        taken = told(self, message, size, peer, None, refusable=refusable)
        if taken and acked is not None:
            acked(Outcome(0, 0, 0))
        return taken

    monkeypatch.setattr(Gateway, "offer", at_once)
    assert is_caught("gateway", "Producer.send")


def test_planted_a_refused_record_that_is_settled_is_caught(monkeypatch: pytest.MonkeyPatch):
    told = SendQueue._delivered
    monkeypatch.setattr(SendQueue, "_delivered", lambda self, item, _error, at: told(self, item, None, at))
    assert is_caught("gateway", "Producer.send.delivered")


def test_planted_a_source_that_ends_unheard_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "_raise_failed", lambda tasks: None)
    assert is_caught("gateway", "Group.take")


def test_planted_a_position_that_moves_before_the_receipts_is_caught(monkeypatch: pytest.MonkeyPatch):
    told = KafkaSource._offer

    def eager(self, admission, group, claim, records):
        told(self, admission, group, claim, records)
        group.settle(claim, records[-1].offset + 1)

    monkeypatch.setattr(KafkaSource, "_offer", eager)
    assert is_caught("gateway", "Producer.poll")


def test_planted_an_epoch_that_begins_again_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fault_gateway, "read_start", lambda *_: LogStart())
    assert is_caught("gateway", "Producer.poll")


# -- the crawler


def test_planted_a_sender_that_takes_a_refused_record_for_sent_is_caught(monkeypatch: pytest.MonkeyPatch):
    def counts(self, group, _error, _offset):
        group.open -= 1

    monkeypatch.setattr(OutboxSender, "_delivered", counts)
    assert is_caught("crawl", "Producer.send.delivered")


def test_planted_a_receipt_that_the_crawler_waits_for_without_a_bound_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outbox_sender, "RECEIPT_MAX_S", 1e9)
    assert is_caught("crawl", "Producer.send.delivered")


def test_planted_a_sender_that_dies_alone_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Background, "check", lambda self: None)
    assert is_caught("crawl", "Frontier.make_safe")


def test_planted_an_outbox_that_is_cleared_before_its_receipts_is_caught(monkeypatch: pytest.MonkeyPatch):
    told = OutboxSender._send

    def send(self, versions, group):
        told(self, versions, group)
        self._frontier.sent(group.number)

    monkeypatch.setattr(OutboxSender, "_send", send)
    assert is_caught("crawl", "Frontier.sent")


def test_planted_a_memory_that_is_begun_before_what_is_served_is_known_is_caught(monkeypatch: pytest.MonkeyPatch):
    told = SqliteFrontier.take_over

    def take_over(self, entities):
        told(self, entities)
        self.next_epoch(1)

    monkeypatch.setattr(SqliteFrontier, "take_over", take_over)
    assert is_caught("crawl", "Frontier.take_over")
