"""Goal: variants are declared like the recipe, and each has names of its own. Method: declarations, right and wrong."""

from __future__ import annotations

import msgspec
import pytest
from trainer_world import PROJECT

from headrace.contract.checks.names import VARIANTS_MAX
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.topics import Topics
from headrace.contract.project import Project, Recipe

WIDE = msgspec.structs.replace(PROJECT.recipe, dim=12)


def with_(**variants: Recipe) -> Project:
    return msgspec.structs.replace(PROJECT, variants={name.replace("_", "-"): r for name, r in variants.items()})


def test_a_variant_is_the_project_with_its_recipe_and_a_model_of_its_own() -> None:
    both = with_(wide_2=WIDE).checked()
    view = both.of_variant("wide-2").checked()
    assert (both.model, view.model, view.name) == ("small", "small.wide-2", "small")
    assert view.recipe is WIDE and not view.variants and both.row_dim == 12 and PROJECT.row_dim == 4
    assert Topics().of("small") == Topics()
    own = Topics(3).of(view.model)
    assert (own.steps, own.deltas) == ("steps-small.wide-2.g3", "deltas-small.wide-2.g3")
    assert own.samples == Topics(3).samples and own.model == Topics(3).model
    with pytest.raises(ConfigRejected, match="variant 'wide' is not declared; there are: 'wide-2'"):
        both.of_variant("wide")
    with pytest.raises(ConfigRejected, match="Declare it where the project is made"):
        PROJECT.of_variant("wide")


@pytest.mark.parametrize(
    ("variants", "at", "says"),
    [
        ({"Wide": WIDE}, "variants['Wide']", "begin with a-z or 0-9"),
        ({"a.b": WIDE}, "variants['a.b']", "and go on with these"),
        ({"a_b": WIDE}, "variants['a_b']", "and `-`"),
        ({"w": PROJECT.recipe}, "variants['w']", "the project's own recipe"),
        ({"w": msgspec.structs.replace(WIDE, task="order")}, "variants['w']", "variant 'w': .*is not a declared task"),
        ({"w": msgspec.structs.replace(WIDE, slot_dims={"x": 2})}, "variants['w']", "slot_dims"),
        ({"w": "deepfm"}, "variants['w']", "a declaration"),
        ({f"v{n}": msgspec.structs.replace(WIDE, dim=n + 1) for n in range(VARIANTS_MAX + 1)}, "variants", "at most"),
    ],
)
def test_what_is_wrong_in_a_variant_is_told_with_its_name(variants: dict, at: str, says: str) -> None:
    found = msgspec.structs.replace(PROJECT, variants=variants).faults()
    assert [fault for fault in found if fault.at.startswith(at)], found
    with pytest.raises(ConfigRejected, match=says):
        raise next(fault for fault in found if fault.at.startswith(at))
