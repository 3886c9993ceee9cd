"""Goal: tags share a spool fairly. Method: a server that leaves one tag unacked, as a gateway behind a ceiling does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from acking_gateway import AckingGateway
from gateway_world import eventually

from headrace.contract.errors import Overloaded
from headrace.sender import Sender


def _record(number: int) -> dict[str, Any]:
    return {"event_id": number, "pad": "x" * 500}


def test_a_tag_that_is_not_taken_neither_delays_others_nor_fills_their_spool(tmp_path: Path) -> None:
    with AckingGateway({"shop.bad"}) as gateway:
        sender = Sender("shop", port=gateway.port, spool_dir=tmp_path, spool_bytes_max=200_000, window=4)
        bad = 0
        with pytest.raises(Overloaded, match=r"of tag shop\.bad"):
            for _ in range(10_000):
                sender.emit("bad", _record(bad))
                bad += 1
        assert 0.5 < bad * 540 / 200_000 < 0.8, "three quarters of the spool at most"
        # Three times what the spool still has room for: good events come and go beside it.
        for number in range(300):
            sender.emit("good", _record(number))
            if number % 20 == 19:
                eventually(lambda: sender.unacked == bad, "good ones are acked")
        assert len(gateway.ids("shop.good")) == 300
        eventually(lambda: sender.held_tags == ["shop.bad"], "it is known which one waits")
        eventually(lambda: sender.unacked == bad, "only the bad ones wait")
        gateway.shut.clear()
        assert sender.flush(30)
        assert gateway.ids("shop.bad") == set(range(bad)) and sender.held_tags == []
        assert max(gateway.got.values()) == 1
        sender.close()
    assert list(tmp_path.rglob("*.seg")) == []


def test_any_thread_may_emit(tmp_path: Path) -> None:
    def work(number: int) -> None:
        for nth in range(250):
            sender.emit(f"tag{nth % 3}", {"event_id": f"{number}-{nth}"})
            if nth % 100 == 99:
                assert sender.flush(20)

    with AckingGateway() as gateway:
        sender = Sender("", port=gateway.port, spool_dir=tmp_path, chunk_bytes=500)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        sender.close(timeout=20)
        assert len(gateway.got) == 8 * 250 and set(gateway.got.values()) == {1} and sender.last_error is None
    assert list(tmp_path.rglob("*.seg")) == []


def test_many_tags_need_few_files(tmp_path: Path) -> None:
    with AckingGateway() as gateway:
        sender = Sender("", port=gateway.port, spool_dir=tmp_path)
        for turn in range(3):
            for number in range(150):
                sender.emit(f"tag{number}", {"event_id": turn})
            assert sender.flush(20)
        assert len(gateway.got) == 450 and set(gateway.got.values()) == {1}
        assert len(list(tmp_path.rglob("*.seg"))) <= 65, "those of idle tags are removed"
        sender.close()


def test_a_spool_that_syncs_keeps_and_sends(tmp_path: Path) -> None:
    with AckingGateway() as gateway:
        with Sender("shop", port=gateway.port, spool_dir=tmp_path, fsync=True) as sender:
            for number in range(50):
                sender.emit("good", _record(number))
            assert sender.flush(20)
        assert len(gateway.got) == 50
