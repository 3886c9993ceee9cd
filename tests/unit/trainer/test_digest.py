"""Goal: equal states have equal digests, of either kind, and one other bit anywhere gives another. Method: states of
real learners with their rows in another order, taken apart, and changed in each array."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from trainer_world import PROJECT, TOPICS, learnt

from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.snapshot import decode_manifest, encode_manifest
from headrace.kernels.row_sums import row_sum
from headrace.replay.as_trained import as_trained
from headrace.trainer.model.digest import SHA256, SUM, State, digest, parts


def state_of() -> dict[str, np.ndarray]:
    return dict(learnt(1)[1].learner.state())


def shuffled(state: State) -> dict[str, np.ndarray]:
    out = dict(state)
    order = np.random.default_rng(1).permutation(len(state["table.0.keys"]))
    for name in ("keys", "values", "optimizer", "last_s"):
        out[f"table.0.{name}"] = state[f"table.0.{name}"][order]
    return out


@pytest.mark.parametrize("kind", [SHA256, SUM])
def test_the_order_of_rows_does_not_matter_and_each_bit_does(kind: str):
    state = state_of()
    found = digest(state, kind)
    assert digest(shuffled(state), kind) == found and len(found) == 64
    for name, array in state.items():
        if not array.size:
            continue
        changed = np.ascontiguousarray(array).copy()
        changed.view(np.uint8).reshape(-1)[-1] ^= 1
        assert digest({**state, name: changed}, kind) != found, name
    fewer = {
        n: a[1:] if n.startswith("table.0.") and len(a) == len(state["table.0.keys"]) else a for n, a in state.items()
    }
    assert digest(fewer, kind) != found


def test_parts_tell_which_table_differs_and_add_up():
    state = state_of()
    whole = parts(state)
    assert set(whole.to_text()) == {"table.0.keys", "rest"}
    halves = [
        row_sum(*(state[f"table.0.{name}"][at] for name in ("keys", "last_s", "optimizer", "values")))
        for at in (slice(0, 17), slice(17, None))
    ]
    assert halves[0] + halves[1] == whole.tables["table.0.keys"]
    other = parts({**state, "step": state["step"] + 1})
    assert other.tables == whole.tables and other.rest != whole.rest


def test_a_kind_that_is_not_known_is_refused():
    with pytest.raises(ConfigRejected, match="update Headrace"):
        digest({}, "sum256")


def test_a_run_that_was_published_with_the_first_kind_is_replayed_by_it():
    world, trainer = learnt(2)
    records = world.log.partitions(TOPICS.model)[0]
    newest = decode_manifest(records[-1].value or b"")
    assert newest.digest_kind == SUM and newest.digest == trainer.learner.digest()
    new = as_trained(PROJECT, TOPICS, world.log.reader(), None)
    assert new.equal is True and new.digest_kind == SUM and new.differs == ()
    old = {"digest": digest(trainer.learner.state(), SHA256), "digest_kind": "", "digest_parts": {}, "format": 1}
    records[-1] = msgspec.structs.replace(records[-1], value=encode_manifest(msgspec.structs.replace(newest, **old)))
    again = as_trained(PROJECT, TOPICS, world.log.reader(), None)
    assert again.equal is True and again.digest_kind == SHA256 and again.digest == old["digest"]


def test_a_replay_that_differs_names_the_parts():
    world, _ = learnt(2)
    records = world.log.partitions(TOPICS.model)[0]
    newest = decode_manifest(records[-1].value or b"")
    wrong = newest.digest_parts | {"rest": "0" * 64}
    changed = msgspec.structs.replace(newest, digest="0" * 64, digest_parts=wrong)
    records[-1] = msgspec.structs.replace(records[-1], value=encode_manifest(changed))
    result = as_trained(PROJECT, TOPICS, world.log.reader(), None)
    assert result.equal is False and result.differs == ("rest",)
