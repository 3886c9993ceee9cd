"""Goal: `headrace crawl` asks where it is told to, and brings the columns that every other stage expects.

Method: the verb's choice of sources, from the demo's declaration and from files.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from headrace.cli.runtime import Runtime
from headrace.cli.stages.crawl import sources
from headrace.contract.config import Config
from headrace.contract.crawl import Crawl, Extract
from headrace.contract.errors import ConfigRejected
from headrace.contract.formats.topics import Topics
from headrace.examples.shop.shop import CATALOGUE, PROJECT


def runtime(home: Path, port_base: int | None, crawls: tuple[Crawl, ...] = PROJECT.crawls) -> Runtime:
    project = msgspec.structs.replace(PROJECT, crawls=crawls)
    return Runtime(
        project=project,
        config=Config(),
        topics=Topics(),
        brokers="b:9",
        store="file:/s",
        webhdfs=None,
        home=home,
        port_base=port_base,
        project_dir=home,
    )


def file_of(home: Path, *crawls: Crawl) -> Path:
    file = home / "sources.json"
    file.write_bytes(msgspec.json.encode(crawls))
    return file


def test_the_demos_addresses_move_with_the_ports(tmp_path: Path) -> None:
    (usual,) = sources(runtime(tmp_path, None), None)
    assert usual.sitemaps == ("http://127.0.0.1:8091/sitemap.xml",)
    (moved,) = sources(runtime(tmp_path, 30_000), None)
    assert moved.sitemaps == ("http://127.0.0.1:30022/sitemap.xml",)


def test_the_environment_fills_in_an_address_and_a_lacking_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crawl = msgspec.structs.replace(CATALOGUE, sitemaps=("http://$SHOP_HOST/sitemap.xml",))
    with pytest.raises(ConfigRejected, match="SHOP_HOST"):
        sources(runtime(tmp_path, None, (crawl,)), None)
    monkeypatch.setenv("SHOP_HOST", "shop.example")
    (filled,) = sources(runtime(tmp_path, None, (crawl,)), None)
    assert filled.all_hosts() == {"shop.example"}


def test_a_file_of_the_same_columns_takes_the_place_of_the_projects(tmp_path: Path) -> None:
    other = msgspec.structs.replace(CATALOGUE, sitemaps=(), start=("http://127.0.0.1:1/",), every_ms=1_000)
    assert sources(runtime(tmp_path, None), file_of(tmp_path, other)) == [other]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"joins": "author_id"},
        {"fields": {"music": Extract(at="music")}},
        {"fields": {"music": Extract(at="music"), "price": Extract(at="price", type="int64")}},
    ],
    ids=["name", "joined field", "a field less", "another type"],
)
def test_a_file_of_other_columns_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigRejected, match="bring these"):
        sources(runtime(tmp_path, None), file_of(tmp_path, msgspec.structs.replace(CATALOGUE, **changes)))


def test_a_file_that_is_no_list_of_sources_is_refused(tmp_path: Path) -> None:
    for text in ("", "{}", '[{"name": 1}]'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigRejected, match=r"bad\.json"):
            sources(runtime(tmp_path, None), tmp_path / "bad.json")
    with pytest.raises(ConfigRejected, match="declares no crawls"):
        sources(runtime(tmp_path, None, ()), None)
