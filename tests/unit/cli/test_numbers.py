"""Numbers in text that people and other programs write: plain decimal digits, whatever `int` and `float` would take."""

from __future__ import annotations

import pytest

from headrace.cli.addresses import _number
from headrace.cli.stages.shop import _rate
from headrace.contract.errors import ConfigRejected

STRANGE = ("²", "٣٠٠٠٠", "30_000", "x", "-1", "1e9")


@pytest.mark.parametrize("text", STRANGE)
def test_a_port_that_is_no_plain_number_is_refused_by_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT_BASE", text)
    with pytest.raises(ConfigRejected, match="PORT_BASE="):
        _number("PORT_BASE")


@pytest.mark.parametrize("text", [*STRANGE, "nan", "inf"])
def test_a_rate_that_is_no_plain_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigRejected, match="RATE="):
        _rate(text)
