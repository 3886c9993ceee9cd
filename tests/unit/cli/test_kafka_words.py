"""Goal: an error of Kafka reaches a terminal in words, with the address and what to do, and so does a full disk.
Method: a port that nobody has, and the real client; a verb whose work raises.
"""

from __future__ import annotations

import errno
import socket
from argparse import Namespace
from pathlib import Path

import confluent_kafka as ck
import pytest

from headrace.cli.kafka_words import in_words
from headrace.cli.main import main
from headrace.cli.stages import crawl

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "shop"


@pytest.mark.parametrize(
    "error",
    [
        ck.KafkaError(ck.KafkaError._TRANSPORT),
        ck.KafkaError(ck.KafkaError.TOPIC_AUTHORIZATION_FAILED, 'no "x" for you'),
    ],
    ids=lambda error: error.name(),
)
def test_the_clients_notation_is_taken_out(error: ck.KafkaError) -> None:
    raw = f"topic 'events' was not created: {ck.KafkaException(error)}"
    said = in_words(raw, Namespace(brokers="10.0.0.1:9092"))
    assert "KafkaError{" in raw and "KafkaError{" not in said and error.name() in said
    assert said.startswith("topic 'events' was not created: ") and "10.0.0.1:9092" in said
    assert in_words("the lake is locked.", Namespace()) == "the lake is locked."


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_broker_that_is_away_is_told_with_its_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{nobody.getsockname()[1]}"
        words = ["dead-letters", "list", "--project", str(EXAMPLE), "--brokers", at, "--home", str(tmp_path)]
        assert main([*words, "--store", f"file:{tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert "KafkaError{" not in said and "val=" not in said
    assert f"The brokers are {at}." in said and "headrace doctor" in said and "HEADRACE_BROKERS" in said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_takes_no_more_is_a_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refused(_: object) -> int:
        raise OSError(number, "no more", "/state/x")

    monkeypatch.setattr(crawl, "main", refused)
    assert main(["crawl"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("headrace crawl: ") and "/state/x" in said and "Free the disk" in said


def test_another_error_of_a_file_is_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> int:
        raise FileNotFoundError(errno.ENOENT, "no such file", "/state/x")

    monkeypatch.setattr(crawl, "main", missing)
    with pytest.raises(FileNotFoundError):
        main(["crawl"])
