"""Goal: `headrace check` says what the archive of events will take. Method: the demo project at a stated rate."""

from __future__ import annotations

import re
from pathlib import Path

from headrace.cli.tools.check import examine_project
from headrace.cli.tools.project_try import RowBytes, measure
from headrace.examples.shop.shop import PROJECT


def takes(folder: Path, rate: float) -> str:
    report = examine_project(folder, rate)
    assert report.wrong == []
    return next(iter(report.takes.values()))["archive"]


def test_the_archive_takes_so_many_bytes_a_day_and_in_its_retention(shop_dir: Path) -> None:
    found = re.fullmatch(r"([\d.]+) GB a day of events as they came, ([\d.]+) GB in 30 days", takes(shop_dir, 500))
    assert found is not None
    assert abs(float(found[2]) / float(found[1]) - 30) < 0.5
    at_rest = re.match(r"([\d.]+) MB a day", takes(shop_dir, 0.001))
    assert at_rest is not None and float(at_rest[1]) > 1, "a gateway's promises come at rest too"


def test_an_archive_that_is_off_is_said(tmp_path: Path, shop_dir: Path) -> None:
    for name in ("shop.py", "headrace.toml"):
        (tmp_path / name).write_bytes((shop_dir / name).read_bytes())
    with (tmp_path / "headrace.toml").open("a") as toml:
        toml.write("\n[archive]\nevents = false\n")
    assert takes(tmp_path, 500).startswith("off (archive.events = false)")


def test_small_records_take_more_an_event() -> None:
    sizes: list[RowBytes] = [measure(PROJECT, rows) for rows in (2, 200)]
    assert sizes[0].archived > sizes[1].archived > 50
