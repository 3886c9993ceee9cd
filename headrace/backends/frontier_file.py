"""The file of a crawler's memory: it is opened whole or not at all, and what goes wrong with it is said in words."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import sqlite3
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import IO, Any, TypeVar

from headrace.contract.errors import ConfigRejected, HeadraceError, InvariantBroken, Unavailable

T = TypeVar("T")
log = logging.getLogger("headrace.crawl")

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_OF_THE_DISK = (
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM),
)
_SCHEMA = """
create table if not exists pages(
    source text not null, url text not null, host text not null, sitemap integer not null, depth integer not null,
    due_ms integer not null, etag text not null default '', last_modified text not null default '',
    said_modified text not null default '', failures integer not null default 0, is_start integer not null,
    refused text not null default '', gone integer not null default 0, primary key (source, url)) without rowid;
create table if not exists bodies(
    source text not null, url text not null, fetched_ms integer not null, digest text not null, base text not null,
    content_type text not null, primary key (source, url, fetched_ms)) without rowid;
create index if not exists bodies_digest on bodies(digest);
create table if not exists entities(
    source text not null, key text not null, version text not null, crawl_time_ms integer not null, url text not null,
    primary key (source, key)) without rowid;
create index if not exists entities_url on entities(source, url);
create table if not exists outbox(
    number integer primary key autoincrement, source text not null, key text not null, crawl_time_ms integer not null,
    version text not null, "values" text, url text not null);
create table if not exists hosts(host text primary key, not_before_ms integer not null) without rowid;
create table if not exists epochs(epoch integer not null);
create table if not exists unneeded(digest text primary key, deletions integer not null) without rowid;
"""
_ADDED = {"pages": {"refused": "text not null default ''", "gone": "integer not null default 0"}}
"""Columns that a file of an earlier version lacks."""
_INDEXES = """
drop index if exists pages_due;
create index if not exists pages_of_host on pages(source, host, due_ms, depth, url);
create index if not exists pages_gone on pages(source, due_ms) where gone > 0 and not is_start;
"""


def opened(path: Path, *, begin_afresh: bool) -> sqlite3.Connection:
    """Return a connection to the file, which is made where there is none. Raises as `SqliteFrontier`."""
    try:
        return _whole(path)
    except sqlite3.DatabaseError as error:
        if not (begin_afresh and _is_damaged(error)):
            raise in_words(path, error) from error
        log.warning("%s is damaged (%s) and is put aside, as --begin-afresh says", path, error)
    number = next(n for n in itertools.count(1) if not path.with_suffix(f".damaged-{n}").exists())
    for suffix in ("", "-wal", "-shm"):
        found = path.with_name(path.name + suffix)
        if found.exists():
            found.rename(path.with_suffix(f".damaged-{number}{suffix}"))
    return _whole(path)


def in_words(path: Path, error: sqlite3.Error | OSError) -> HeadraceError:
    """Return what to raise for an error of the file or of its disk: which file, and what to do."""
    if isinstance(error, sqlite3.Error) and _is_damaged(error):
        return InvariantBroken(
            f"{path} is damaged ({error}). Bring it back from a copy. Where there is none, `headrace crawl "
            "--begin-afresh` puts it aside and fetches everything again."
        )
    return Unavailable(
        f"{path}: {error}. See whether its disk is full and who may write there; the stage stops, and the next start "
        "goes on from what the file has."
    )


def said_in_words(cls: type[T]) -> type[T]:
    """Let each public method of a class raise what went wrong with its file as `in_words` says it."""
    for name, method in list(vars(cls).items()):
        if not name.startswith("_") and callable(method):
            setattr(cls, name, _in_words(method))
    return cls


def _in_words(method: Callable[..., T]) -> Callable[..., T]:
    @wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> T:
        try:
            return method(self, *args, **kwargs)
        except OSError as error:
            raise in_words(self._path, error) from error
        except sqlite3.DatabaseError as error:
            # What SQLite finds wrong with a statement is a fault of ours, and stays as it is.
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF not in (*_DAMAGED, *_OF_THE_DISK):
                raise
            raise in_words(self._path, error) from error

    return called


def wait_for_disk(path: Path) -> None:
    """Wait until the disk has what SQLite has written of the file at `path`: all of it stands in its log before it is
    anywhere else. From any thread."""
    log_file = os.open(path.with_name(f"{path.name}-wal"), os.O_RDONLY)
    try:
        os.fdatasync(log_file)
    finally:
        os.close(log_file)


def locked(path: Path) -> IO[str]:
    """Return the lock of the file at `path`, held. Raises as `SqliteFrontier`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise in_words(path, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ConfigRejected(f"{path} belongs to a crawler that runs; one is enough, or give it --home.") from error
    return lock


def _is_damaged(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _DAMAGED


def _whole(path: Path) -> sqlite3.Connection:
    """Return a connection to a file that was read from end to end. Raises `sqlite3.DatabaseError`."""
    db = sqlite3.connect(path, isolation_level=None)
    try:
        (found,) = db.execute("pragma quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(" ".join(found.split()))
        db.execute("pragma journal_mode=wal")
        db.execute("pragma synchronous=normal")
        db.executescript(_SCHEMA)
        for table, columns in _ADDED.items():
            known = {name for _, name, *_ in db.execute(f"pragma table_info({table})")}
            for name in columns.keys() - known:
                db.execute(f"alter table {table} add column {name} {columns[name]}")
        db.executescript(_INDEXES)
    except BaseException:
        db.close()
        raise
    return db
