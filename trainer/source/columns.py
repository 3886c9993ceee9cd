"""Which columns of stored samples a trainer reads: those that a step looks at.

Features are read as they were stored. What they are made of is read where a row is of another specification, whose
features are made again, and in one reading of several for what is only shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.formats.sample import sample_schema
from headrace.contract.project import Project

STEP = (
    *("partition", "offset", "rank", "event_id", "event_time_ms", "task", "label", "weight", "feedback_time_ms"),
    *("slots", "numeric", "spec", "correction", "value"),
)
"""What is learnt, judged, evaluated and recorded of a sample."""


@dataclass(frozen=True)
class StoredColumns:
    """Columns and types of stored samples."""

    step: pa.Schema
    """Of every row."""
    inputs: pa.Schema
    """Those and what features are made of: of rows of another specification, and of all that are read with them."""
    digest: str = ""
    """The specification's."""
    shown_every: int = 0
    """Of so many readings one has `inputs`, for what is only shown; 0: none for that."""

    @classmethod
    def whole(cls, schema: pa.Schema) -> StoredColumns:
        """Return what reads all columns of all rows."""
        return cls(schema, schema)

    def needs_inputs(self, rows: pa.Table) -> bool:
        """Say whether some of the rows are of another specification, so that their features must be made again."""
        if self.step.equals(self.inputs) or not rows.num_rows:
            return False
        if "spec" not in rows.column_names:
            return True
        return not pc.all(pc.fill_null(pc.equal(rows["spec"], self.digest), False)).as_py()


def stored_columns(project: Project, *, fields: Sequence[str] = (), shown_every: int = 0) -> StoredColumns:
    """Return what a trainer of this project reads; `fields` are the impression's that it looks at beside."""
    schema = sample_schema(project)
    made_of = {name for feature in project.features.features for name in feature.inputs()}
    step, inputs = ({*STEP, *fields}, {*STEP, *fields, *made_of})
    of_step, with_inputs = (pa.schema([each for each in schema if each.name in names]) for names in (step, inputs))
    return StoredColumns(of_step, with_inputs, digest=project.features.digest(), shown_every=shown_every)
