"""Goal: `headrace rollback` says what is wrong with a call, and what to do. Method: its parts, and what people type."""

from __future__ import annotations

import pytest
from rollback_world import fed, go_back, gone_on, stands

from headrace.cli.tools.asked import parse_time_ms, shown_time
from headrace.cli.tools.models.rollback import _line, _time_or_version
from headrace.contract.errors import ConfigRejected
from headrace.trainer.commit.rollback import Standing, chosen


@pytest.mark.parametrize("text", ["yesterday", "2026-11-25", "2026-11-25T01:00", "25.11.2026", ""])
def test_what_is_no_time_with_a_zone_is_refused(text):
    with pytest.raises(ConfigRejected, match=r"write (it so: )?2026-11-25|Z for UTC|write it so"):
        parse_time_ms(text)


def test_a_time_or_a_version_is_taken():
    assert _time_or_version("2026-11-25T01:00Z") == (1_795_568_400_000, "")
    assert _time_or_version("2026-11-25T02:00+01:00") == (1_795_568_400_000, "")
    assert _time_or_version("r019aba-17") == (None, "r019aba-17")
    assert shown_time(1_795_568_400_000) == "2026-11-25T01:00:00Z" and shown_time(0) == "-"


def test_the_newest_place_that_knows_nothing_later_is_chosen():
    world = fed(1)
    gone_on(world, 16)
    found = stands(world)
    places = found.on_path()
    for place in places:
        at_ms = place.manifest.meta.event_ms
        newest = next(each for each in places if each.manifest.meta.event_ms <= at_ms)
        assert chosen(found, at_ms=at_ms) is newest
    assert chosen(found, at_ms=None, version=places[-1].version) is places[-1]
    assert _line(places[0]).startswith(f"{places[0].version}: events up to 1970-01-01T00:16:")


def test_what_there_is_not_is_told_with_the_next_step():
    world = fed(1)
    with pytest.raises(ConfigRejected, match=r"no checkpoint to go back to.*rollback --list.*train repair"):
        chosen(Standing("", (), ()), at_ms=None)
    gone_on(world, 12)
    found = stands(world)
    with pytest.raises(ConfigRejected, match=r"every checkpoint that is kept knows events later.*rollback --list"):
        chosen(found, at_ms=1)
    with pytest.raises(ConfigRejected, match=r"no checkpoint r1-9 of this recipe"):
        chosen(found, at_ms=None, version="r1-9")
    with pytest.raises(ConfigRejected, match=r"no checkpoint of run r1 to go back to"):
        chosen(found, at_ms=2**50, run="r1")


def test_a_checkpoint_that_lacks_a_part_is_no_place():
    world = fed(1)
    _, place = gone_on(world, 12)
    part = max(place.manifest.parts(), key=lambda each: each.name)
    lost = [p for p in stands(world).places if part in p.manifest.parts()]
    del world.blobs.objects[f"checkpoints/small/parts/{part.name}"]
    assert lost and not {p.version for p in lost} & {p.version for p in stands(world).places}


def test_places_of_a_run_that_was_left_are_found_by_its_name():
    world = fed(1)
    left, place = gone_on(world, 16)
    go_back(world, place, "r9")
    assert stands(world).on_path()[0].version == place.version
    assert stands(world).on_path(left.run_id)[0].stored.step > place.stored.step
