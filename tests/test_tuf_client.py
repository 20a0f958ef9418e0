"""The executable for the suite tuf-conformance, as a process against a real HTTP server: what is right, and what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edge_agent.core.errors import UnavailableError
from ota.trust import HttpFetcher, TrustedMetadata
from tests.tuf_repository import ONLINE, ROOT, TufRepository

CLIENT = Path(__file__).with_name("tuf_client.py")
LIMIT_S = 60
CONTENT = b"sixteen weights."
NAME = "releases/faces/3/model.tflite"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class Site:
    """A repository, served; and a client's two folders."""

    def __init__(self, folder: Path) -> None:
        self.repository = TufRepository()
        self.repository.add(NAME, CONTENT)
        self.repository.publish(*ONLINE)
        self.served, self.metadata, self.downloads = folder / "served", folder / "metadata", folder / "downloads"
        self.trusted_root = folder / "trusted.json"
        self.trusted_root.write_bytes(self.repository.documents["1.root"])
        self.repository.write(self.served)
        self.url = ""

    def target_file(self) -> Path:
        return next(self.served.glob("targets/releases/faces/3/*.model.tflite"))

    def run(self, command: str, *more: str, client: Path = CLIENT, interpreter: tuple[str, ...] = ()) -> tuple[int, str]:
        """The exit code and stderr."""
        options = {
            "init": (str(self.trusted_root),),
            "refresh": (),
            "download": (),
        }[command]
        before = ["--metadata-dir", str(self.metadata)]
        if command != "init":
            before += ["--metadata-url", f"{self.url}/metadata"]
        if command == "download":
            name, *_ = more or (NAME,)
            before += ["--target-name", name, "--target-base-url", f"{self.url}/targets", "--target-dir", str(self.downloads)]
        start = interpreter or (sys.executable,)
        done = subprocess.run(
            [*start, str(client), *before, command, *options], capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert not done.stdout
        return done.returncode, done.stderr

    def kept(self) -> dict[str, int]:
        return {path.name: json.loads(path.read_bytes())["signed"]["version"] for path in self.metadata.glob("*.json")}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site.served))
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def test_init_refresh_and_download_over_http(site: Site) -> None:
    assert site.run("init") == (0, "")
    assert site.run("refresh")[0] == 0
    assert site.kept() == {"root.json": 1, "timestamp.json": 2, "snapshot.json": 2, "targets.json": 2}
    assert site.run("download")[0] == 0
    assert [path.read_bytes() for path in site.downloads.iterdir()] == [CONTENT]


def test_download_refreshes_first_and_what_is_held_is_not_fetched_again(site: Site) -> None:
    site.run("init")
    assert site.run("download")[0] == 0
    site.target_file().unlink()
    assert site.run("download")[0] == 0
    next(site.downloads.iterdir()).write_bytes(b"something else")
    assert site.run("download")[0] == 1


def test_a_new_root_and_new_versions_are_followed(site: Site) -> None:
    site.run("init")
    assert site.run("refresh")[0] == 0
    site.repository.rotate(ROOT)
    site.repository.publish(*ONLINE)
    site.repository.write(site.served)
    assert site.run("refresh")[0] == 0
    assert site.kept() == {"root.json": 2, "timestamp.json": 3, "snapshot.json": 3, "targets.json": 3}


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"!", CONTENT[::-1]])
def test_a_target_that_was_changed_is_not_kept(site: Site, content: bytes) -> None:
    site.run("init")
    site.target_file().write_bytes(content)
    code, words = site.run("download")
    assert code == 1 and "tuf_client: update metadata" in words
    assert not list(site.downloads.iterdir())


def test_a_target_that_nobody_signed_for_is_not_fetched(site: Site) -> None:
    site.run("init")
    code, words = site.run("download", "releases/faces/4/model.tflite")
    assert code == 1 and "not in the fleet's metadata" in words


def test_a_lower_version_is_refused_and_said(site: Site) -> None:
    site.run("init")
    older = site.served.with_name("older")
    shutil.copytree(site.served, older)
    site.repository.publish(*ONLINE)
    site.repository.write(site.served)
    assert site.run("refresh")[0] == 0
    shutil.copytree(older, site.served, dirs_exist_ok=True)
    code, words = site.run("refresh")
    assert code == 1 and "version" in words
    assert site.kept()["timestamp.json"] == 3


def test_a_client_without_a_root_or_a_server_says_so(site: Site) -> None:
    code, words = site.run("refresh")
    assert code == 1 and "No such file" in words
    site.run("init")
    site.url = "http://127.0.0.1:9"
    code, words = site.run("refresh")
    assert code == 1 and "tried again later" in words


def test_a_server_that_drips_is_left(site: Site, tmp_path: Path) -> None:
    fetcher = HttpFetcher(limit_s=-1)
    trusted = TrustedMetadata(
        tmp_path / "tuf", fetcher, bootstrap=site.trusted_root.read_bytes(), base_url=f"{site.url}/metadata"
    )
    with pytest.raises(UnavailableError, match="takes longer"):
        trusted.refresh()


def test_an_unsigned_root_is_refused_before_anything_is_asked_for(site: Site) -> None:
    document = json.loads(site.trusted_root.read_bytes())
    document["signatures"] = document["signatures"][:1]
    site.trusted_root.write_text(json.dumps(document))
    site.run("init")
    site.url = "http://127.0.0.1:9"
    code, words = site.run("refresh")
    assert code == 1 and "signatures" in words


def test_it_is_executable_and_finds_its_packages_from_where_it_lies(site: Site, tmp_path: Path) -> None:
    """By a Python without them: in the checkout's environment if there is one, else with one clear line."""
    assert CLIENT.stat().st_mode & 0o111 == 0o111
    copy = tmp_path / "checkout" / "tests" / "tuf_client.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(CLIENT, copy)
    bare = (sys.executable, "-I", "-S")
    code, words = site.run("init", client=copy, interpreter=bare)
    assert code == 1 and "has no tuf" in words and words.count("\n") == 1

    python = tmp_path / "checkout" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={CLIENT.parents[1]} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for command in ("init", "refresh", "download"):
        assert site.run(command, client=copy, interpreter=bare)[0] == 0
    assert [path.read_bytes() for path in site.downloads.iterdir()] == [CONTENT]
