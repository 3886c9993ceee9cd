"""A history's files: which they are, what is in them, and their rows, batch by batch.

Whatever a file's format, a value comes out as it would from a log line: null, a bool, an integer, a float, a text or a
list. CSV is read as text and turned into the declared type where it can be; what cannot stays text, and is refused as
such. NaN is read as null.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as parquet

from headrace.contract.errors import ConfigRejected
from headrace.stream.history.mapping import Format, Input

BATCH_ROWS = 32_768
CSV_BYTES = 1 << 22
"""Of a CSV file that are parsed at a time."""
DIGEST_BYTES = 1 << 22
_TRUE, _FALSE = ("true", "t", "yes", "1"), ("false", "f", "no", "0")


@dataclass(frozen=True)
class SourceFile:
    """One file of an input."""

    path: Path
    format: Format

    @property
    def columns(self) -> list[str]:
        """Its columns. Raises `ConfigRejected` where it can't be read."""
        try:
            if self.format == "csv":
                return list(self._csv([]).schema.names)
            return list(parquet.read_schema(self.path).names)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(self.path, error) from error

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows with these columns, in order. Raises as `columns`."""
        try:
            if self.format == "csv":
                for batch in self._csv(columns):
                    for begin in range(0, batch.num_rows, BATCH_ROWS):
                        yield batch.slice(begin, BATCH_ROWS)
                return
            with parquet.ParquetFile(self.path) as file:
                yield from file.iter_batches(BATCH_ROWS, columns=list(columns), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(self.path, error) from error

    def _csv(self, columns: Sequence[str]) -> Any:
        """Open it; with columns, as text."""
        name = self.path.name.removesuffix(".gz")
        options = csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()),
            include_columns=list(columns) or None,
            strings_can_be_null=True,
            null_values=[""],
            quoted_strings_can_be_null=False,
        )
        return csv.open_csv(
            self.path,
            read_options=csv.ReadOptions(block_size=CSV_BYTES),
            parse_options=csv.ParseOptions(delimiter="\t" if name.endswith(".tsv") else ",", newlines_in_values=True),
            convert_options=options,
        )


def unreadable(path: Path, error: Exception) -> ConfigRejected:
    """Return what is raised for a file that can't be read."""
    return ConfigRejected(f"{path} can't be read: {error}.")


def files_of(given: Input, folder: Path) -> list[SourceFile]:
    """Return an input's files in the order of their names. Raises `ConfigRejected` where there are none."""
    found: list[SourceFile] = []
    for text in (given.files,) if isinstance(given.files, str) else given.files:
        root = Path(text) if Path(text).is_absolute() else folder / text
        if any(sign in text for sign in "*?["):
            at = root.relative_to(root.anchor)
            paths = sorted(Path(root.anchor).glob(str(at)))
        else:
            paths = [root]
        some = [file for path in paths for file in _expanded(path, given.format)]
        if not some:
            raise ConfigRejected(
                f"files {text!r}: there is none at {root}. Paths are relative to the mapping's folder."
            )
        found += some
    return found


def _expanded(path: Path, told: Format | None) -> list[SourceFile]:
    if not path.exists():
        return []
    if path.is_dir():
        if told == "delta" or (told is None and (path / "_delta_log").is_dir()):
            return _delta(path)
        inside = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p, path))
        return [file for each in inside if told or _by_name(each) for file in _expanded(each, told)]
    kind = told or _by_name(path)
    if kind is None or kind == "delta":
        raise ConfigRejected(f'{path}: its name does not end in .parquet, .csv, .csv.gz or .tsv; say format = "csv".')
    return [SourceFile(path, kind)]


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)


def _by_name(path: Path) -> Format | None:
    name = path.name.removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        return "csv"
    return "parquet" if name.endswith((".parquet", ".pq")) else None


def _delta(path: Path) -> list[SourceFile]:
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    try:
        table = DeltaTable(str(path))
    except (DeltaError, OSError) as error:
        raise unreadable(path, error) from error
    if table.metadata().partition_columns:
        raise ConfigRejected(
            f"{path}: a partitioned Delta table's files lack the columns that it is partitioned by. Write it as one "
            "without, or export what you want of it as Parquet."
        )
    return [SourceFile(Path(uri.removeprefix("file://")), "parquet") for uri in sorted(table.file_uris())]


def digest_of(files: Sequence[SourceFile]) -> str:
    """Return 32 hex digits of the files' contents, in order. Raises `ConfigRejected` where one can't be read."""
    total = hashlib.blake2b(digest_size=16)
    for file in files:
        one = hashlib.blake2b(digest_size=16)
        try:
            with file.path.open("rb") as stream:
                while data := stream.read(DIGEST_BYTES):
                    one.update(data)
        except OSError as error:
            raise unreadable(file.path, error) from error
        total.update(one.digest())
    return total.hexdigest()


def values_of(
    batch: pa.RecordBatch, columns: Mapping[str, str], types: Mapping[str, pa.DataType]
) -> dict[str, list[Any]]:
    """Return, by field, the values of a batch's rows; `types` says what a field is declared as."""
    return {field: plain(batch.column(name), types.get(field)) for field, name in columns.items()}


def plain(column: pa.Array, declared: pa.DataType | None) -> list[Any]:
    """Return a column's values as a log line would have them."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    if _is_text(column.type) and declared is not None and not _is_text(declared):
        return from_text(column.cast(pa.string()), declared)
    found: list[Any] = column.to_pylist()
    return found


def from_text(column: pa.Array, declared: pa.DataType) -> list[Any]:
    """Return texts as values of a declared type; a text that is none stays as it is."""
    if pa.types.is_integer(declared) or pa.types.is_floating(declared):
        try:
            found: list[Any] = pc.cast(column, declared).to_pylist()
        except pa.ArrowInvalid:
            found = [_number(text, declared) for text in column.to_pylist()]
        return [None if value != value else value for value in found]
    if pa.types.is_boolean(declared):
        known = {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}
        return [known.get(text.lower(), text) if text is not None else None for text in column.to_pylist()]
    return [_list(text) for text in column.to_pylist()]


def _number(text: str | None, declared: pa.DataType) -> Any:
    if text is None:
        return None
    try:
        return int(text) if pa.types.is_integer(declared) else float(text)
    except ValueError:
        return text


def _list(text: str | None) -> Any:
    """Read a list as CSV has it: JSON."""
    if text is None:
        return None
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


SCALE = {"s": 1_000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
_SIZES = ((10**11, 1_000.0), (10**14, 1.0), (10**17, 1e-3))
"""As `headrace.ingest.decode.times.any_unix_ns`: a number below it, and how many ms its unit has."""


def times_ms(column: pa.Array, unit: str | None, read_text: Any) -> list[Any]:
    """Return times as Unix milliseconds (int), null where there is none, and the value itself where it is no time.

    Args:
        unit: of numbers; None: their size tells it.
        read_text: gives a text's time in ns, None where it is none.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        found: list[Any] = (
            pc.cast(column, pa.timestamp("ms", kind.tz if pa.types.is_timestamp(kind) else None), safe=False)
            .cast(pa.int64())
            .to_pylist()
        )
        return found
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _scaled(column, unit)
    if not _is_text(kind):
        return [value if value is None else str(value) for value in column.to_pylist()]
    return [_text_ms(text, unit, read_text) for text in column.to_pylist()]


def _scaled(column: pa.Array, unit: str | None) -> list[Any]:
    number_N = np.array([np.nan if v is None else float(v) for v in column.to_pylist()])
    if unit is not None:
        scale_N = np.full(len(number_N), SCALE[unit])
    else:
        scale_N = np.select([number_N < bound for bound, _ in _SIZES], [scale for _, scale in _SIZES], 1e-6)
    ms_N = np.floor(number_N * scale_N)
    if pa.types.is_integer(column.type):
        # Floats have 53 bits: ns of today need 61.
        whole = column.to_pylist()
        return [None if v is None else _exact(v, scale) for v, scale in zip(whole, scale_N.tolist(), strict=True)]
    return [None if ms != ms else int(ms) if np.isfinite(ms) else str(ms) for ms in ms_N.tolist()]


def _exact(value: int, scale: float) -> int:
    return value * round(scale) if scale >= 1 else value // round(1 / scale)


def _text_ms(text: str | None, unit: str | None, read_text: Any) -> Any:
    if text is None or not text.strip():
        return None
    try:
        return _scaled(pa.array([int(text)], pa.int64()), unit)[0]
    except (ValueError, OverflowError):
        pass
    try:
        return _scaled(pa.array([float(text)]), unit)[0]
    except ValueError:
        ns = read_text(text.strip())
        return text if ns is None else ns // 1_000_000
