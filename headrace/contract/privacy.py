"""Personal fields at the border: what a project declares private is dropped, or replaced by a keyed hash.

A hash is `hmac:` and 32 hex digits: 128 bits of BLAKE2b under the project's key, which comes from the environment
(HEADRACE_PRIVACY_KEY) and is stored nowhere. Equal values have equal hashes, so joins, counters and features go on
working; without the key nobody finds the value by trying them all. What is a hash already stays as it is, so a dead
letter can be offered again.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.served_token import TokenKey, token_key
from headrace.contract.project import Project

KEY_NAME = "HEADRACE_PRIVACY_KEY"
KEY_BYTES_MIN = 16
_HASHED = re.compile(r"hmac:[0-9a-f]{32}")


class Privacy:
    """The private fields of one project, and its key."""

    def __init__(self, project: Project, key: str = "") -> None:
        self._key = key.encode()
        self.token_key: TokenKey = token_key(key)
        """Seals what was served: see `served_token`."""
        self.fields: dict[str, dict[str, str]] = {project.impression.tag: dict(project.impression.private)}
        self.fields |= {f.tag: dict(f.private) for f in project.feedback}
        self.everywhere = {name: how for private in self.fields.values() for name, how in private.items()}
        """Of all types together: what an event of no declared type must not show either."""
        hashed = sorted(name for name, how in self.everywhere.items() if how == "hash")
        if hashed and len(self._key) < KEY_BYTES_MIN:
            raise ConfigRejected(
                f"the fields {hashed} are hashed under a key, and {KEY_NAME} has {len(self._key)} bytes; set it to a "
                f"secret of {KEY_BYTES_MIN} bytes at least, the same for every gateway and serving process, for ever.",
                at=next(
                    (f"feedback[{n}].private" for n, f in enumerate(project.feedback) if "hash" in f.private.values()),
                    "",
                )
                if "hash" not in project.impression.private.values()
                else "impression.private",
            )

    def hash(self, value: str) -> str:
        """Return the hash that stands for `value`.

        >>> from headrace.contract.project import ImpressionType, Project
        >>> from headrace.contract.spec import FeatureSpec
        >>> nothing = Project(impression=ImpressionType(tag="t", key="k", fields={"k": "string"}), feedback=(),
        ...                   tasks=(), features=FeatureSpec())
        >>> Privacy(nothing, "a key of 16 bytes").hash("ann")
        'hmac:71327b12822d41065395434db02cd68e'
        """
        if _HASHED.fullmatch(value):
            return value
        data = value.encode("utf-8", "surrogateescape")
        return "hmac:" + hashlib.blake2b(data, digest_size=16, key=self._key[:64], person=b"headrace").hexdigest()

    def column(self, values: pa.Array) -> pa.Array:
        """Return a string column hashed, nulls kept."""
        encoded = pc.dictionary_encode(values)
        hashed = pa.array([self.hash(text) for text in encoded.dictionary.to_pylist()], pa.string())
        return hashed.take(encoded.indices)

    def batch(self, batch: pa.RecordBatch, tag: str, key: str) -> pa.RecordBatch:
        """Return a batch of the type with this tag as it may be stored; `key` follows its field where that is hashed.

        Raises `KeyError` where no declared type has the tag.
        """
        for name, how in self.fields[tag].items():
            at = batch.schema.get_field_index(name)
            if how == "hash":
                batch = batch.set_column(at, batch.schema.field(at), self.column(batch.column(at)))
                if name == key:
                    at_key = batch.schema.get_field_index("key")
                    batch = batch.set_column(at_key, batch.schema.field(at_key), batch.column(at))
        return batch

    def record(self, record: Any, tag: str) -> Any:
        """Return a record as it may be shown: dropped or hashed is what its type, or else any other, calls private."""
        private = self.everywhere | self.fields.get(tag, {})
        if not private or not isinstance(record, dict):
            return record
        shown = {}
        for name, value in record.items():
            how = private.get(name if isinstance(name, str) else "")
            if how == "hash" and isinstance(value, str | int) and not isinstance(value, bool):
                shown[name] = self.hash(str(value))
            elif how is None:
                shown[name] = value
        return shown
