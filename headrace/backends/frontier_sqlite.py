"""The crawler's memory in one SQLite file. What it must do, and the steps 1 to 4 that it serves, say
`headrace.contract.interfaces.frontier`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from headrace.backends.frontier_file import locked, opened, said_in_words, wait_for_disk
from headrace.contract.interfaces.frontier import GONE, Body, Found, Noted, Page, Settled, Version


@said_in_words
class SqliteFrontier:
    """One crawler's file, locked: a second crawler on it is refused. For one thread.

    Each call raises `Unavailable` where the disk is full, read-only or fails: nothing of the call was noted then, but
    what this object counts may be wrong, so that its process ends. `InvariantBroken` where the file is damaged.
    """

    def __init__(self, path: Path, *, bodies_per_page: int = 5, begin_afresh: bool = False) -> None:
        """Open the file, or make it.

        Args:
            begin_afresh: put a file that is damaged aside, and make a new one.

        Raises:
            ConfigRejected: another crawler has it.
            InvariantBroken: it is damaged.
            Unavailable: the disk does not give it.
        """
        self._lock = locked(path)
        self._path, self._bodies_per_page = path, bodies_per_page
        try:
            self._db = opened(path, begin_afresh=begin_afresh)
        except BaseException:
            self._lock.close()
            raise
        self._pages = Counter(dict(self._db.execute("select source, count(*) from pages group by source").fetchall()))
        self._living = self._count_living()
        self._waiting = int(self._db.execute("select count(*) from outbox").fetchone()[0])
        self._unsafe = True

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()
        self._lock.close()

    def is_new(self) -> bool:
        """Say whether no crawler has begun with this file yet."""
        return self._db.execute("select 1 from epochs").fetchone() is None

    def take_over(self, entities: Iterable[tuple[str, str, int]]) -> None:
        """Note entities of a file that is lost, as (source, key, crawl time): what comes is newer than these."""
        with self._db:
            self._db.executemany(
                "insert or replace into entities values (?,?,'',?,'')", ((s, key, at_ms) for s, key, at_ms in entities)
            )
        self._living = self._count_living()

    def next_epoch(self, now_ms: int, above: int = 0) -> int:
        """Return a number above that of every crawler before, of this file, `above` and, by the clock, of others."""
        with self._db:
            self._db.execute("begin immediate")
            (before,) = self._db.execute("select coalesce(max(epoch), 0) from epochs").fetchone()
            epoch = max(now_ms, int(before) + 1, above + 1)
            self._db.execute("delete from epochs")
            self._db.execute("insert into epochs values (?)", (epoch,))
        return epoch

    def set_starts(self, source: str, starts: Iterable[Found]) -> None:
        """Add the addresses that a source begins with, and forget those that it no longer begins with."""
        declared = list(starts)
        with self._db:
            self._db.execute(
                f"delete from pages where source=? and is_start and url not in ({_marks(declared)})",
                (source, *(one.url for one in declared)),
            )
            for one in declared:
                self._db.execute(
                    "insert into pages(source, url, host, sitemap, depth, due_ms, is_start) values (?,?,?,?,0,0,1) "
                    "on conflict do update set is_start = 1, sitemap = excluded.sitemap",
                    (source, one.url, host_of(one.url), one.sitemap),
                )
            (self._pages[source],) = self._db.execute("select count(*) from pages where source=?", (source,)).fetchone()

    def due(self, now_ms: int, sources: Sequence[str], busy: Sequence[str], limit: int) -> list[Page]:
        """Return up to `limit` addresses that are due, the longest due first, none of a host that is busy or waits."""
        waits = self._waits()
        found: list[tuple[int, int, str, Page]] = []
        for source, host in self._hosts(sources):
            if host in busy or waits.get(host, 0) > now_ms:
                continue
            rows = self._db.execute(
                "select due_ms, depth, url, sitemap, etag, last_modified, failures, refused, gone from pages "
                "where source=? and host=? and due_ms <= ? order by due_ms, depth, url limit ?",
                (source, host, now_ms, limit),
            )
            found += [
                (
                    due_ms,
                    depth,
                    url,
                    Page(source, url, host, bool(sitemap), depth, etag, changed, failures, refused, gone),
                )
                for due_ms, depth, url, sitemap, etag, changed, failures, refused, gone in rows
            ]
        return [page for *_, page in sorted(found, key=lambda one: one[:3])[:limit]]

    def next_due_ms(self, sources: Sequence[str]) -> int | None:
        """Return when the next address is due, hosts' waits included; None where there is none."""
        waits, found = self._waits(), []
        for source, host in self._hosts(sources):
            (due_ms,) = self._db.execute(
                "select min(due_ms) from pages where source=? and host=?", (source, host)
            ).fetchone()
            found.append(max(int(due_ms), waits.get(host, 0)))
        return min(found, default=None)

    def settle(self, page: Page, settled: Settled, *, pages_max: int, keys_max: int, depth_max: int) -> Noted:
        """Note what an answer brought, in one transaction; return what came of it."""
        with self._db:
            self._db.execute("begin immediate")
            before, page = page, self._moved(page, settled)
            noted = self._write_versions(page, settled, keys_max)
            if page.depth < depth_max:
                noted.links_over = self._add_links(page, settled, pages_max)
            is_whole = not (noted.keys_over or noted.links_over)
            validators = (settled.etag, settled.last_modified) if is_whole else ("", "")
            self._db.execute(
                "update pages set due_ms=?, etag=?, last_modified=?, failures=0, gone=0, refused=? "
                "where source=? and url=?",
                (settled.due_ms, *validators, settled.refused, page.source, page.url),
            )
            noted.unneeded = self._keep_body(page, settled) if settled.body is not None else []
            noted.unneeded += [] if page is before else self._leave(before, settled.due_ms)
            return noted

    def not_modified(self, page: Page, due_ms: int) -> None:
        """Note that the document is as it was."""
        with self._db:
            self._db.execute(
                "update pages set due_ms=?, failures=0, gone=0 where source=? and url=?",
                (due_ms, page.source, page.url),
            )

    def failed(self, page: Page, due_ms: int) -> None:
        """Note that the document could not be fetched."""
        with self._db:
            self._db.execute(
                "update pages set due_ms=?, failures=failures+1 where source=? and url=?",
                (due_ms, page.source, page.url),
            )

    def gone(self, page: Page, at_ms: int, due_ms: int) -> list[str]:
        """Note that a document is no more: its entities end, and its bodies are forgotten; the address stays known.

        Return the digests of bodies that nothing needs any more.
        """
        with self._db:
            self._db.execute("begin immediate")
            ended = self._db.execute(
                "select key, crawl_time_ms from entities where source=? and url=? and version<>? order by key",
                (page.source, page.url, GONE),
            ).fetchall()
            for key, before_ms in ended:
                self._write(page, key, GONE, max(at_ms, before_ms + 1), None)
            self._living[page.source] -= len(ended)
            self._db.execute(
                "update pages set due_ms=?, etag='', last_modified='', failures=0, gone=gone + (not is_start) "
                "where source=? and url=?",
                (due_ms, page.source, page.url),
            )
            # Extracted again, a body of a page that is gone would bring back what has ended.
            return self._forget_bodies(page)

    def wait_for(self, host: str, not_before_ms: int) -> None:
        """Ask nothing of the host before then, or before what was noted already, if that is later."""
        with self._db:
            self._db.execute(
                "insert into hosts values (?, ?) on conflict do update set "
                "not_before_ms = max(not_before_ms, excluded.not_before_ms)",
                (host, not_before_ms),
            )

    def outbox(self, after: int, limit: int) -> list[Version]:
        """Return what waits for Kafka behind number `after`, in order."""
        rows = self._db.execute(
            'select number, source, key, crawl_time_ms, version, "values", url from outbox where number > ? '
            "order by number limit ?",
            (after, limit),
        )
        return [Version(*row) for row in rows]

    def sent(self, number: int) -> None:
        """Take out of the outbox what every partition has: all up to `number`."""
        with self._db:
            deleted = self._db.execute("delete from outbox where number <= ?", (number,))
        self._waiting -= deleted.rowcount

    def waiting(self) -> int:
        """Return how many versions wait for Kafka."""
        return self._waiting

    def pages(self, source: str) -> int:
        """Return how many addresses of a source are known."""
        return self._pages[source]

    def make_safe(self) -> None:
        """Make all that was noted outlive a power cut; a crash of the process alone takes nothing anyway.

        From any thread; what is noted meanwhile is perhaps not safe.
        """
        if self._unsafe:
            self._unsafe = False
            try:
                wait_for_disk(self._path)
            except OSError:
                self._unsafe = True
                raise

    def has_body(self, digest: str) -> bool:
        """Say whether a body of this digest is stored."""
        return self._db.execute("select 1 from bodies where digest=? limit 1", (digest,)).fetchone() is not None

    def may_be_stored(self, digest: str) -> None:
        """Note that a body is about to be stored: where no page comes to need it, `unneeded` names it."""
        with self._db:
            self._db.execute("insert or ignore into unneeded values (?, 0)", (digest,))

    def unneeded(self) -> list[str]:
        """Return the digests of bodies that may be in the store and that no page needs."""
        rows = self._db.execute("select digest from unneeded where digest not in (select digest from bodies)")
        return sorted(digest for (digest,) in rows)

    def deleted(self, digest: str, *, may_return: bool = False) -> None:
        """Note that a body is no longer in the store.

        Args:
            may_return: a process before this one may still be storing it: `unneeded` names it once more, at the next
                start.
        """
        with self._db:
            self._db.execute("begin immediate")
            self._db.execute("update unneeded set deletions=deletions+1 where digest=?", (digest,))
            self._db.execute("delete from unneeded where digest=? and deletions>=?", (digest, 1 + may_return))

    def newest_bodies(self, source: str) -> list[Body]:
        """Return the newest body of every address of a source."""
        rows = self._db.execute(
            "select digest, base, content_type, source, url, coalesce(sitemap, 0), coalesce(refused, ''), "
            "max(fetched_ms) from bodies left join pages using (source, url) where source=? group by url order by url",
            (source,),
        )
        return [Body(d, b, c, s, u, bool(m), r) for d, b, c, s, u, m, r, _ in rows]

    def extracted_again(self, body: Body, rows: Sequence[tuple[str, str, str]], at_ms: int, keys_max: int) -> Noted:
        """Write the versions that another extraction of a stored body changed; return what came of it."""
        page = Page(body.source, body.url, host_of(body.url), body.sitemap, 0, "", "", 0)
        with self._db:
            self._db.execute("begin immediate")
            return self._write_versions(page, Settled(at_ms=at_ms, due_ms=0, rows=rows), keys_max)

    def _write_versions(self, page: Page, settled: Settled, keys_max: int) -> Noted:
        noted = Noted()
        for key, version, values in settled.rows:
            known = self._db.execute(
                "select version, crawl_time_ms, url from entities where source=? and key=?", (page.source, key)
            ).fetchone()
            if known is not None and known[0] == version:
                self._note_owner(page, key, known[2])
                continue
            if known is None or known[0] == GONE:
                if self._living[page.source] >= keys_max:
                    noted.keys_over += 1
                    continue
                self._living[page.source] += 1
            # A clock that was set back must not make a newer version look older.
            at_ms = settled.at_ms if known is None else max(settled.at_ms, known[1] + 1)
            self._write(page, key, version, at_ms, values)
            noted.written += 1
        return noted

    def _note_owner(self, page: Page, key: str, before: str) -> None:
        """Note that this page was the last to have an entity: it ends when this one is gone, not another."""
        if before != page.url:
            self._db.execute("update entities set url=? where source=? and key=?", (page.url, page.source, key))

    def _waits(self) -> dict[str, int]:
        return dict(self._db.execute("select host, not_before_ms from hosts").fetchall())

    def _hosts(self, sources: Sequence[str]) -> list[tuple[str, str]]:
        """Return every source with each host that it has addresses of, by few steps in an index."""
        found: list[tuple[str, str]] = []
        for source in sources:
            host = ""
            while host is not None:
                (host,) = self._db.execute(
                    "select min(host) from pages where source=? and host>?", (source, host)
                ).fetchone()
                found += [] if host is None else [(source, host)]
        return found

    def _count_living(self) -> Counter[str]:
        """Return of each source how many entities are not gone; what is gone keeps its crawl time alone."""
        rows = self._db.execute("select source, count(*) from entities where version<>? group by source", (GONE,))
        return Counter(dict(rows.fetchall()))

    def _write(self, page: Page, key: str, version: str, at_ms: int, values: str | None) -> None:
        self._unsafe = True
        self._waiting += 1
        self._db.execute(
            "insert or replace into entities values (?,?,?,?,?)", (page.source, key, version, at_ms, page.url)
        )
        self._db.execute(
            'insert into outbox(source, key, crawl_time_ms, version, "values", url) values (?,?,?,?,?,?)',
            (page.source, key, at_ms, version, values, page.url),
        )

    def _add_links(self, page: Page, settled: Settled, pages_max: int) -> int:
        """Add links that are not known, up to the bound; return how many are beyond it."""
        over = 0
        for link in settled.links:
            known = self._db.execute(
                "select said_modified, sitemap, depth, gone from pages where source=? and url=?",
                (page.source, link.url),
            ).fetchone()
            if known is None:
                if not self._has_room(page.source, pages_max, settled.at_ms):
                    over += 1
                    continue
                self._pages[page.source] += 1
                self._db.execute(
                    "insert into pages(source, url, host, sitemap, depth, due_ms, said_modified, is_start) "
                    "values (?,?,?,?,?,0,?,0)",
                    (page.source, link.url, host_of(link.url), link.sitemap, page.depth + 1, link.said_modified),
                )
                continue
            said, is_sitemap, depth, gone = known
            # Of two sitemaps that name each other only one may call the other back, or they would do so for ever.
            is_changed = link.said_modified not in ("", said) and (not is_sitemap or depth > page.depth)
            if is_changed or (gone and link.url != page.url):
                self._db.execute(
                    "update pages set due_ms=0, said_modified=? where source=? and url=?",
                    (link.said_modified or said, page.source, link.url),
                )
        return over

    def _has_room(self, source: str, pages_max: int, at_ms: int) -> bool:
        """Say whether one more address may be known; one that is gone makes room, unless it is being asked for."""
        if self._pages[source] < pages_max:
            return True
        deleted = self._db.execute(
            "delete from pages where source=? and url in (select url from pages where source=? and gone > 0 "
            "and not is_start and due_ms > ? order by due_ms desc limit 1)",
            (source, source, at_ms),
        )
        self._pages[source] -= deleted.rowcount
        return deleted.rowcount > 0

    def _moved(self, page: Page, settled: Settled) -> Page:
        """Return the page under the address that it has moved to, which is known from now on; a start stays."""
        url = settled.moved_to
        stays = self._db.execute(
            "select 1 from pages where source=? and url=? and is_start", (page.source, page.url)
        ).fetchone()
        known = self._db.execute("select sitemap from pages where source=? and url=?", (page.source, url)).fetchone()
        # What is read as a sitemap here is read as a document there: each keeps its own validators.
        if not url or url == page.url or stays is not None or (known is not None and known[0] != page.sitemap):
            return page
        added = self._db.execute(
            "insert or ignore into pages(source, url, host, sitemap, depth, due_ms, is_start) values (?,?,?,?,?,0,0)",
            (page.source, url, host_of(url), page.sitemap, page.depth),
        )
        self._pages[page.source] += added.rowcount
        return msgspec.structs.replace(page, url=url, host=host_of(url))

    def _leave(self, page: Page, due_ms: int) -> list[str]:
        """Forget an address whose document has moved, unless an entity is left there: when it is gone, that ends."""
        place = (page.source, page.url)
        left = self._db.execute(
            "select 1 from entities where source=? and url=? and version<>? limit 1", (*place, GONE)
        ).fetchone()
        if left is not None:
            self._db.execute("update pages set due_ms=?, failures=0 where source=? and url=?", (due_ms, *place))
            return []
        deleted = self._db.execute("delete from pages where source=? and url=?", place)
        self._pages[page.source] -= deleted.rowcount
        return self._forget_bodies(page)

    def _forget_bodies(self, page: Page) -> list[str]:
        old = self._db.execute(
            "delete from bodies where source=? and url=? returning digest", (page.source, page.url)
        ).fetchall()
        return self._note_unneeded(digest for (digest,) in old)

    def _note_unneeded(self, digests: Iterable[str]) -> list[str]:
        """Return those that no page needs; they are noted until they are deleted, whatever becomes of this process."""
        left = sorted({digest for digest in digests if not self.has_body(digest)})
        self._db.executemany("insert or ignore into unneeded values (?, 0)", ((digest,) for digest in left))
        return left

    def _keep_body(self, page: Page, settled: Settled) -> list[str]:
        body = settled.body
        if body is None:
            return []
        self._db.execute(
            "insert or replace into bodies values (?,?,?,?,?,?)",
            (page.source, page.url, settled.at_ms, body.digest, body.base, body.content_type),
        )
        old = self._db.execute(
            "select fetched_ms, digest from bodies where source=? and url=? order by fetched_ms desc limit -1 offset ?",
            (page.source, page.url, self._bodies_per_page),
        ).fetchall()
        for fetched_ms, _ in old:
            self._db.execute(
                "delete from bodies where source=? and url=? and fetched_ms=?", (page.source, page.url, fetched_ms)
            )
        self._db.execute("delete from unneeded where digest=?", (body.digest,))
        return self._note_unneeded(digest for _, digest in old)


def host_of(url: str) -> str:
    """Return the host name of an address, lower case."""
    return urlsplit(url).hostname or ""


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))  # None at all is well, too: SQLite knows an empty list.
