"""The ledger's figures: the sums that must hold, and how they are shown."""

from __future__ import annotations

import msgspec

ROWS = (
    ("gateway", ("read", "appended", "dead_lettered", "repeated", "retried")),
    ("log", ("impressions", "feedback", "external", "repeated_in_log")),
    ("label", ("positives", "negatives", "waiting")),
    ("feedback", ("matched", "duplicate", "late", "orphans", "pending")),
    ("model", ("samples", "learnt", "refused", "sampled_out", "other_tasks", "skipped", "in_flight")),
    ("lake", ("stored", "imported", "retained")),
    ("verdict", ("lost", "twice")),
)


class TaskCounts(msgspec.Struct, kw_only=True):
    """One task: impressions = positives + negatives + waiting; feedback = the sum of the last five."""

    impressions: int = 0
    feedback: int = 0
    positives: int = 0
    negatives: int = 0
    waiting: int = 0
    matched: int = 0
    duplicate: int = 0
    late: int = 0
    orphans: int = 0
    pending: int = 0

    def closes(self) -> bool:
        """Say whether both sums hold."""
        judged = self.positives + self.negatives + self.waiting
        answered = self.matched + self.duplicate + self.late + self.orphans + self.pending
        return self.impressions == judged and self.feedback == answered


class ModelCounts(msgspec.Struct, kw_only=True):
    """One run of one model: samples = learnt + refused + sampled_out + other_tasks + skipped + in_flight, of what can
    be accounted for. A run that goes on from another one has that one's steps up to there too."""

    model: str = ""
    run: str = ""
    steps: int = 0
    samples: int = 0
    learnt: int = 0
    refused: int = 0
    sampled_out: int = 0
    """Negatives that the recipe's `negative_share` leaves out."""
    other_tasks: int = 0
    """Samples of tasks that it does not learn."""
    skipped: int = 0
    """Samples of its tasks that it left out by name: `headrace rollback --skip-until`, `headrace train repair`."""
    in_flight: int = 0
    """Samples of its tasks that it has still to learn."""
    imported: int = 0
    """Of all these, those of imported history: what the versions of the lake that it began with have of its tasks."""
    stored: int = 0
    """Rows that its steps took of the lake."""
    live: int = 0
    """Rows that its steps took of the topic. Where nothing is lost or twice, both together are `learnt`, `refused` and
    `sampled_out`."""
    lost: int = 0
    twice: int = 0
    unaccounted: int = 0
    """Rows that the run learnt of a version of the lake that is no more: which ones is not known any more, and they are
    in none of the other figures. Then `lost` is not known either, and is 0."""

    def closes(self) -> bool:
        """Say whether the sum holds."""
        settled = self.learnt + self.refused + self.sampled_out + self.other_tasks + self.skipped
        return self.samples == settled + self.in_flight


class Ledger(msgspec.Struct, kw_only=True):
    """All totals, integers. `read` counts events that have their outcome; what a gateway still holds is in none.

    `samples` to `in_flight` are those of the newest run of the model that the project's own recipe makes; `lost` and
    `twice` are of all models, those of variants too.
    """

    read: int = 0
    appended: int = 0
    dead_lettered: int = 0
    repeated: int = 0
    retried: int = 0
    """Dead letters that were offered again; each event is counted once, where it ended."""
    impressions: int = 0
    feedback: int = 0
    external: int = 0
    repeated_in_log: int = 0
    positives: int = 0
    negatives: int = 0
    waiting: int = 0
    matched: int = 0
    duplicate: int = 0
    late: int = 0
    orphans: int = 0
    pending: int = 0
    samples: int = 0
    learnt: int = 0
    refused: int = 0
    sampled_out: int = 0
    other_tasks: int = 0
    skipped: int = 0
    in_flight: int = 0
    stored: int = 0
    lost: int = 0
    twice: int = 0
    closes: bool = False
    tasks: dict[str, TaskCounts] = {}
    models: dict[str, ModelCounts] = {}
    lost_where: dict[str, int] = {}
    """Where `lost` was found: `log` (a gateway was given a receipt and the log lacks it), `topic`, `lake`, `model`."""
    twice_where: dict[str, int] = {}
    dead_letters: dict[str, int] = {}
    """By reason, those of declared events: their sum is `dead_lettered`."""
    undeclared: int = 0
    """Dead letters of tags that no event of the project has: in no total, since they are no event of this project's."""
    unaccounted: int = 0
    """Rows of the newest run that can't be accounted for, see `ModelCounts`."""
    behind_ms: dict[str, int] = {}
    """How old the oldest sample is that is not there yet, in the log's own time: `lake`, `model` (the newest run)."""
    behind_max_ms: int = 0
    """`ledger.behind_max_ms`."""
    overdue: list[str] = []
    """Where `behind_ms` is above it."""
    events_begin: dict[str, int] = {}
    """First offset of each partition of `events` whose beginning retention took. Then nothing accounts for what came
    before the samples, `read` to `pending`; `lost` is what the topic, the lake and the steps lack of each other."""
    drawn_from: str = "log"
    """`log`: everything was read and compared by id. `seals`: counts and sums of ids were compared, and what the join
    made of `events` is its own word."""
    sealed: dict[str, int] = {}
    """Drawn from seals: up to which offset of each partition of `events` the figures from `read` to `pending` go."""
    reread: list[str] = []
    """Drawn from seals: which ranges were read by id all the same, and why."""
    not_sealed: str = ""
    """Why seals could not tell, where the ledger was drawn from the log instead."""
    seals_wrong: list[str] = []
    """Seals that are not those of what was read: the ledger does not close."""
    imported: int = 0
    """Rows of imported history in the lake; `stored` is without them."""
    imported_due: int = 0
    """Of the newest run: its samples of imported history. With `samples` they are what it has or has still to learn."""
    retained: int = 0
    """Rows that were stored and that `lake.retention_ms` dropped since: no loss."""


def table(ledger: Ledger) -> str:
    """Return the ledger for people."""
    lines = [
        f"{title:<10}" + "".join(f"{name} {getattr(ledger, name):,}   " for name in names).rstrip()
        for title, names in ROWS
    ]
    lines += [f"  {reason:<20} {count:,}" for reason, count in sorted(ledger.dead_letters.items())]
    if ledger.undeclared:
        s = "s" * (ledger.undeclared != 1)
        lines.append(
            f"  {ledger.undeclared:,} event{s} of tags that the project does not declare: dead letters too, and in no "
            "total above. `headrace dead-letters list --reason undeclared` shows them"
        )
    lines += [_run_line(counts) for counts in ledger.models.values()]
    where = [f"lost in {w}: {n:,}" for w, n in ledger.lost_where.items() if n]
    where += [f"twice in {w}: {n:,}" for w, n in ledger.twice_where.items() if n]
    if ledger.events_begin:
        begins = ", ".join(f"{partition} at offset {offset}" for partition, offset in ledger.events_begin.items())
        where.append(
            f"events begins in partition {begins}: retention took what was before. What the gateways read and the join "
            "made of it is not accounted for; the topic, the lake and the steps are held against each other."
        )
    where += _seal_lines(ledger)
    where += [_behind_line(ledger, w, ms) for w, ms in ledger.behind_ms.items()]
    return "\n".join([*lines, *where, "the ledger closes" if ledger.closes else "THE LEDGER DOES NOT CLOSE"])


def is_sound(ledger: Ledger) -> bool:
    """Say whether nothing is lost, counted twice, overdue or past accounting for: the verb's exit code."""
    return not (ledger.lost or ledger.twice or ledger.overdue or ledger.unaccounted or ledger.seals_wrong)


def _seal_lines(ledger: Ledger) -> list[str]:
    lines = [f"WRONG SEAL: {wrong}" for wrong in ledger.seals_wrong]
    if ledger.drawn_from == "seals":
        upto = ", ".join(f"partition {partition} up to offset {offset}" for partition, offset in ledger.sealed.items())
        lines.append(
            f"drawn from seals: what the join made of events is its own word, {upto}. `headrace ledger --full` joins "
            "once more what the log still has."
        )
    lines += [f"read by id: {what}" for what in ledger.reread]
    if ledger.not_sealed:
        lines.append(f"read in full, since seals do not tell: {ledger.not_sealed}")
    return lines


def _behind_line(ledger: Ledger, where: str, behind_ms: int) -> str:
    line = f"behind in {where}: {behind_ms / 1000:,.1f} s"
    if where not in ledger.overdue:
        return line
    stage = {"lake": "sink", "model": "train"}[where]
    return (
        f"{line}: OVERDUE, ledger.behind_max_ms is {ledger.behind_max_ms / 1000:,.1f} s. "
        f"Does `{stage}` run, and `stream` before it? `headrace logs {stage}` has its last words."
    )


def _run_line(counts: ModelCounts) -> str:
    of = f" of {counts.model}" if "." in counts.model else ""
    line = f"run {counts.run}{of}: {counts.steps:,} steps, {counts.learnt:,} learnt"
    if counts.stored and counts.live:
        line += f" ({counts.stored:,} rows taken of the lake, {counts.live:,} live)"
    wrong = [f"{name} {getattr(counts, name):,}" for name in ("lost", "twice") if getattr(counts, name)]
    if counts.unaccounted:
        wrong.append(f"{counts.unaccounted:,} rows of a version of the lake that is no more can't be accounted for")
    return ", ".join([line, *wrong])
