"""What one partition's join has taken and made so far, beside the join's own totals: the seals of its samples, rows of
crawled values, and what the gateways said. Pure.

A function of the partition's records in order, like the join: it is stored with the join's state and goes on from
there. A state that was stored before there were accounts has none: its account begins there and is not whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import pyarrow as pa

from headrace.contract.errors import EventRejected
from headrace.contract.formats.events import EXTERNAL, PUNCTUATION, decode_batch, decode_punctuation
from headrace.contract.formats.positions import START, Position
from headrace.contract.formats.seals import RecordSeal, Seal, encode_seal, with_rows
from headrace.contract.interfaces.log import Record
from headrace.kernels.sample_ids import seal_of

EPOCHS_MAX = 10_000
"""Most epochs of gateways whose totals are kept; one more, and the account is not whole any more."""


class Account(msgspec.Struct):
    """The account of one partition. `whole`: it counts from the log's first record on."""

    whole: bool = True
    since: tuple[int, int] = (-1, -1)
    """The samples beyond this position are sealed, as [offset, rank]."""
    tasks: dict[str, Seal] = {}
    external: int = 0
    said: dict[str, dict[int, dict[str, int]]] = {}
    """By gateway and epoch: the highest of each of its totals."""

    def take_records(self, records: Iterable[Record], above: int) -> None:
        """Count records of the partition beyond offset `above`."""
        for record in records:
            kind = record.headers.get("kind", "")
            if record.offset <= above or record.value is None or kind not in (PUNCTUATION, EXTERNAL):
                continue
            # What is not ours the join counts as a bad record.
            try:
                if kind == EXTERNAL:
                    self.external += decode_batch(record.value).num_rows
                else:
                    self._hear(record.value)
            except (EventRejected, msgspec.DecodeError):
                continue

    def _hear(self, value: bytes) -> None:
        promise = decode_punctuation(value)
        if not promise.counts:
            return
        epochs = self.said.setdefault(promise.gateway, {})
        newest = epochs.setdefault(promise.epoch, {})
        for name, count in promise.counts.items():
            newest[name] = max(newest.get(name, 0), count)
        if sum(map(len, self.said.values())) > EPOCHS_MAX:
            self.whole, self.said = False, {}

    def take_samples(self, samples: pa.RecordBatch, watermark_ms: int) -> str:
        """Seal samples that come next; return their record's header."""
        self.tasks = with_rows(self.tasks, seal_of(samples))
        return encode_seal(RecordSeal(since=self.since, watermark_ms=watermark_ms, tasks=self.tasks))

    def to_plain(self) -> dict[str, Any]:
        """Return a copy for the state's manifest."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain


def load_account(plain: Mapping[str, Any], last: Position) -> Account:
    """Return the account of a state's manifest; where it has none, one that begins behind its last sample."""
    stored = plain.get("account")
    if stored is None:
        return Account(whole=False, since=(last.offset, last.rank))
    return msgspec.convert(stored, Account)


def fresh_account() -> Account:
    """Return the account of a partition that begins with its log."""
    return Account(since=(START.offset, START.rank))
