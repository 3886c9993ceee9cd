"""Fixtures that every kind of test shares."""

from __future__ import annotations

from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data beside the checkout; without it, the tests that need it are skipped by name."""
    folder = CHECKOUT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no data: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def shop_dir() -> Path:
    """The demo project's folder."""
    return CHECKOUT / "examples" / "shop"
