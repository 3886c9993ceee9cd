"""History that was not logged here, in the lake: one import at a time, each in commits of its own.

An import takes offsets behind those of the one before it, from `IMPORTED_FROM` on. Its commits move no partition and no
position: a sink that commits at the same moment steps over them, and they over its commits. What they say lies in the
commit with the rows, as Delta application transactions:

| application id, each with `-g<generation>` | version |
|---|---|
| `imported-upto` | the order of the last imported row, counted from the first one |
| `imported-count`, `imported-count-<task>` | how many rows were imported, of all tasks and of one |
| `imported-sum-<task>` | the sum of their ids' hashes modulo 2**64, as a signed number |
| `import-open` | the id of the import that is under way, 0 where none is |
| `import-begin`, `import-version` | of that one: the order of its first row, and the lake's version before it, plus 1 |
| `import-from`, `import-until`, `import-now` | and its times: of the first event, of the end, of its own beginning |
| `import-count`, `import-sum` | and what it has stored so far |
| `import-done-<id>` | of an import that is over: how many rows it stored |

1. `begin` says that the import is open, in a commit without rows.
2. Each `append` stores rows and says up to which; it refuses where another process has stored any since.
3. `end` closes it. Whoever comes again with the same import is told that it is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from deltalake import Transaction

from headrace.backends.delta.leases import NOTHING_IMPORTED
from headrace.backends.lake.delta import DeltaLake
from headrace.backends.lake.lake_state import (
    FIRST_IMPORTED,
    count_id,
    imported_seals,
    imported_upto,
    signed,
    task_ids,
    upto_id,
)
from headrace.contract.errors import ConfigRejected, InvariantBroken, Unavailable
from headrace.contract.formats.positions import IMPORTED_TO, Position, order_of, orders, position_of
from headrace.contract.formats.seals import SUM_MASK, Seal

NOTHING = Seal()


@dataclass(frozen=True, kw_only=True)
class Begun:
    """An import that is under way, as the lake knows it."""

    id: int
    """63 bits."""
    begin: int
    """The order of its first row."""
    upto: int
    """That of the last row that is stored; below `begin` where none is."""
    version: int
    """The lake's version before it; -1 where there was none."""
    from_ms: int
    until_ms: int
    now_ms: int
    stored: Seal = NOTHING
    """Its rows that are stored."""

    @property
    def first_offset(self) -> int:
        """The first offset that it may take."""
        return position_of(self.begin).offset


def shown(number: int) -> str:
    """Return an import's id as people see it.

    >>> shown(255)
    '00000000000000ff'
    """
    return f"{number:016x}"


class Imports:
    """The imports of one lake; see the module.

    Args:
        seal_of: gives the seals of rows by task, as `headrace.kernels.sample_ids.seal_of`.
    """

    def __init__(self, lake: DeltaLake, seal_of: Callable[[pa.Table], dict[str, Seal]]) -> None:
        self._lake, self._generation, self._seal_of = lake, lake.generation, seal_of

    def done(self, number: int) -> int | None:
        """Return how many rows an import stored that is over; None for another. Raises `Unavailable`."""
        table = self._lake.open()
        stored = None if table is None else table.transaction_version(self._id(f"import-done-{shown(number)}"))
        return None if stored is None else int(stored)

    def open(self) -> Begun | None:
        """Return the import that is under way, if one is. Raises `Unavailable`."""
        table = self._lake.open()
        return None if table is None else self._begun(table)

    def begin(self, number: int, schema: pa.Schema, *, from_ms: int, until_ms: int, now_ms: int) -> Begun:
        """Open an import of rows of `schema` and return it as it stands.

        Raises `ConfigRejected` where another one is under way, `Unavailable` as `DeltaLake.append`.
        """
        made: list[Begun] = []

        def marks_of(table: Any) -> list[Transaction]:
            if table is not None and (open_ := self._begun(table)) is not None:
                raise ConfigRejected(f"import {shown(open_.id)} is under way, begun by another process; run it again.")
            upto = NOTHING_IMPORTED if table is None else imported_upto(table, self._generation)
            offset = position_of(upto).offset + 1
            version = -1 if table is None else int(table.version())
            if offset >= IMPORTED_TO:
                raise ConfigRejected("the lake has no offsets left for another import: raise log.generation.")
            begun = Begun(
                id=number,
                begin=order_of(Position(offset, 0)),
                upto=upto,
                version=version,
                from_ms=from_ms,
                until_ms=until_ms,
                now_ms=now_ms,
            )
            made.append(begun)
            values = {
                "import-open": number,
                "import-begin": begun.begin - FIRST_IMPORTED,
                "import-version": version + 1,
                "import-from": from_ms,
                "import-until": until_ms,
                "import-now": now_ms,
                "import-count": 0,
                "import-sum": 0,
            }
            return self._transactions(values)

        self._lake.commit(schema.empty_table(), marks_of)
        return made[-1]

    def append(self, begun: Begun, rows: pa.Table) -> Begun:
        """Store the import's next rows, in order; return how it stands then.

        Raises `Unavailable` as `DeltaLake.append`, and where the import does not stand at `begun`: another process went
        on with it, or an earlier commit of this one happened though it failed. Ask `open`, and go on from there.
        """
        order_N = orders(rows["offset"].to_numpy(), rows["rank"].to_numpy())
        if int(order_N.min()) < begun.begin or int(order_N.min()) <= begun.upto or order_N.max() >= order_of((-1, -1)):
            raise InvariantBroken(f"import {shown(begun.id)} stands at {begun.upto} and came with {order_N.min()}.")
        upto = int(order_N.max())
        after: list[Begun] = []

        def marks_of(table: Any) -> list[Transaction]:
            self._check(table, begun)
            fresh = self._seal_of(rows)
            known, count = imported_seals(table, fresh, self._generation)
            stored = begun.stored
            marks = []
            for task, seal in sorted(fresh.items()):
                stored, whole = stored.plus(seal), known.get(task, Seal()).plus(seal)
                at_count, at_sum = task_ids(task, self._generation)
                marks += [Transaction(at_count, whole.count), Transaction(at_sum, signed(whole.sum))]
            marks.append(Transaction(count_id(self._generation), count + rows.num_rows))
            marks.append(Transaction(upto_id(self._generation), upto - FIRST_IMPORTED))
            values = {"import-count": stored.count, "import-sum": signed(stored.sum)}
            after.append(replace(begun, upto=upto, stored=stored))
            return [*marks, *self._transactions(values)]

        self._lake.commit(rows, marks_of)
        return after[-1]

    def end(self, begun: Begun, schema: pa.Schema) -> None:
        """Close the import. Raises as `append`."""

        def marks_of(table: Any) -> list[Transaction]:
            self._check(table, begun)
            return self._transactions({"import-open": 0, f"import-done-{shown(begun.id)}": begun.stored.count})

        self._lake.commit(schema.empty_table(), marks_of)

    def _check(self, table: Any, begun: Begun) -> None:
        stands = None if table is None else self._begun(table)
        if stands != begun:
            at = "it is over" if stands is None else f"it stands at {position_of(stands.upto)}"
            raise Unavailable(
                f"import {shown(begun.id)} was at {position_of(begun.upto)} and {at}: another process goes on with it, "
                "or a commit happened that was told to have failed. Run the import again."
            )

    def _begun(self, table: Any) -> Begun | None:
        def ask(name: str) -> int:
            return int(table.transaction_version(self._id(name)) or 0)

        if not (number := ask("import-open")):
            return None
        return Begun(
            id=number,
            begin=ask("import-begin") + FIRST_IMPORTED,
            upto=imported_upto(table, self._generation),
            version=ask("import-version") - 1,
            from_ms=ask("import-from"),
            until_ms=ask("import-until"),
            now_ms=ask("import-now"),
            stored=Seal(ask("import-count"), ask("import-sum") & SUM_MASK),
        )

    def _transactions(self, values: Mapping[str, int]) -> list[Transaction]:
        return [Transaction(self._id(name), value) for name, value in values.items()]

    def _id(self, name: str) -> str:
        return f"{name}-g{self._generation}"
