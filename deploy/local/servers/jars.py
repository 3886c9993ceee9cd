"""Kafka's and Hadoop's jars: fetched from Maven artifacts by jgo, held against versions and SHA-256 in jars.json."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from headrace.contract.errors import InvariantBroken, Unavailable
from headrace.deploy.local.servers.java import Java

PINS = Path(__file__).with_name("jars.json")


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The class path of one server: what jgo is asked for, and every jar that must come of it with its SHA-256."""

    endpoint: str
    bytes: int
    jars: dict[str, str]


def read_pins() -> dict[str, Bundle]:
    """Return the bundles of jars.json by name: `kafka`, `hdfs`."""
    return msgspec.json.decode(PINS.read_bytes(), type=dict[str, Bundle])


def ensure_jars(folder: Path, java: Java, say: Callable[[str], None]) -> dict[str, Path]:
    """Return the folder of each bundle's jars, fetched where they lack, each jar checked against its digest.

    A broken download goes on where it stopped: jgo keeps what is whole in ~/.m2. One process fetches, others wait for
    it. Raises `Unavailable` when the artifacts cannot be fetched, `InvariantBroken` when what came is not what is
    pinned.
    """
    found: dict[str, Path] = {}
    for name, bundle in read_pins().items():
        target = folder / name
        if wrong_jars(target, bundle):
            with _alone(folder):
                _fetch_missing(name, target, bundle, java, say)
        found[name] = target
    return found


def _fetch_missing(name: str, target: Path, bundle: Bundle, java: Java, say: Callable[[str], None]) -> None:
    if not wrong_jars(target, bundle):
        return  # Another process has fetched them meanwhile.
    say(f"jars of {name}: fetching {len(bundle.jars)} files, {bundle.bytes / 1e6:.0f} MB, from Maven artifacts")
    fetch(target, bundle, java)
    say(f"jars of {name}: {len(bundle.jars)} files, all with the pinned SHA-256")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from fetching into `folder` meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".fetching").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def wrong_jars(folder: Path, bundle: Bundle) -> list[str]:
    """Return the names that are missing in `folder`, surplus, or not of the pinned digest."""
    have = {path.name: path for path in folder.glob("*.jar")}
    surplus = have.keys() - bundle.jars.keys()
    return sorted(surplus) + sorted(n for n, sha in bundle.jars.items() if n not in have or digest(have[n]) != sha)


def fetch(target: Path, bundle: Bundle, java: Java) -> None:
    """Resolve the bundle with jgo and put its jars into `target`, all or none."""
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    # jgo takes up no folder of links that another process left half made; whole files it has in ~/.m2.
    links = target.parent / "jgo"
    shutil.rmtree(links, ignore_errors=True)
    for jar in resolve(bundle.endpoint, links, java):
        shutil.copyfile(jar, part / jar.name)
    wrong = wrong_jars(part, bundle)
    if wrong:
        raise InvariantBroken(
            f"{bundle.endpoint}: {', '.join(wrong[:5])} {'and more ' if len(wrong) > 5 else ''}are not what "
            f"{PINS.name} pins. A mirror may serve other files; nothing was installed. Evidence: {part}."
        )
    shutil.rmtree(target, ignore_errors=True)
    part.replace(target)


def resolve(endpoint: str, cache: Path, java: Java) -> list[Path]:
    """Return the jars that jgo finds for `endpoint`."""
    # jgo looks for a Java on the PATH and would fetch one of its own where it finds none.
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(java.path).parent}{os.pathsep}{before}"
    logging.getLogger("jgo").setLevel(logging.ERROR)
    try:
        import jgo

        return [Path(jar) for jar in jgo.build(endpoint, cache_dir=cache, update=False).all_jars]
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        raise Unavailable(
            f"jgo could not fetch {endpoint}: {error}. Look at the network and proxy settings; run it again, whole "
            "files are kept."
        ) from error
    finally:
        os.environ["PATH"] = before


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pin(endpoints: dict[str, str], cache: Path, java: Java) -> bytes:
    """Return a jars.json for `endpoints`: how the file was made, and is made again for new versions."""
    pins = {}
    for name, endpoint in endpoints.items():
        jars = sorted(resolve(endpoint, cache, java), key=lambda jar: jar.name)
        size = sum(jar.stat().st_size for jar in jars)
        pins[name] = Bundle(endpoint, size, {jar.name: digest(jar) for jar in jars})
    return msgspec.json.format(msgspec.json.encode(pins), indent=2) + b"\n"


if __name__ == "__main__":
    # python -m headrace.deploy.local.servers.jars CACHE: write jars.json again after changing an endpoint in it.
    from headrace.deploy.local.servers.java import find_java

    endpoints = {name: bundle.endpoint for name, bundle in read_pins().items()}
    PINS.write_bytes(pin(endpoints, Path(sys.argv[1]), find_java()))
