#!/usr/bin/env python3
"""The client protocol of the public suite tuf-conformance, on the engine that the agent uses to trust its updates.

``init`` lays the trusted root into the metadata folder; ``refresh`` and ``download`` are ``ota.trust.TrustedMetadata`` over HTTP.
Exit code 0 or 1; what was refused and why on stderr.  Protocol: CLIENT-CLI.md of theupdateframework/tuf-conformance.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN_PYTHON = ROOT / ".venv" / "bin" / "python"


def _with_packages() -> None:
    """Go on in the checkout's own environment where this Python lacks what is needed."""
    sys.path[:] = [str(ROOT), *(each for each in sys.path if Path(each or ".").resolve() != ROOT / "tests")]
    missing = [name for name in ("tuf", "cbor2") if importlib.util.find_spec(name) is None]
    if not missing:
        return
    if OWN_PYTHON.exists() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        os.execv(OWN_PYTHON, [str(OWN_PYTHON), str(Path(__file__).resolve()), *sys.argv[1:]])
    sys.exit(f"tuf_client: {sys.executable} has no {', '.join(missing)}: run make env in {ROOT}, or pip install 'tuf' 'cbor2'")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tuf_client", description=__doc__)
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name")
    parser.add_argument("--target-base-url")
    parser.add_argument("--target-dir", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("trusted_root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    arguments = parser.parse_args()
    needed = {"refresh": ("metadata_url",), "download": ("metadata_url", "target_name", "target_base_url", "target_dir")}
    for name in needed.get(arguments.command, ()):
        if not getattr(arguments, name):
            parser.error(f"{arguments.command} needs --{name.replace('_', '-')}")
    return arguments


def _run(arguments: argparse.Namespace) -> None:
    from ota.trust import HttpFetcher, TrustedMetadata

    if arguments.command == "init":
        arguments.metadata_dir.mkdir(parents=True, exist_ok=True)
        (arguments.metadata_dir / "root.json").write_bytes(arguments.trusted_root.read_bytes())
        return
    trusted = TrustedMetadata(arguments.metadata_dir, HttpFetcher(), bootstrap=None, base_url=arguments.metadata_url)
    trusted.refresh()
    if arguments.command == "download":
        place = trusted.download(arguments.target_name, arguments.target_base_url, arguments.target_dir)
        print(f"verified: {place}", file=sys.stderr)
    print(f"trusted: {trusted.marks}", *trusted.notes, sep="\n", file=sys.stderr)


def main() -> int:
    _with_packages()
    from edge_agent.core.errors import SlyError

    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s: %(message)s")
    try:
        _run(_arguments())
    except (SlyError, OSError) as error:
        print(f"tuf_client: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
