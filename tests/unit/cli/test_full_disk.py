"""Goal: a disk that is full or read-only is named in a line, whatever verb meets it; other errors of files keep their
traceback. Method: a verb whose work raises."""

from __future__ import annotations

import errno

import pytest

from headrace.cli.main import main
from headrace.cli.stages import crawl


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
