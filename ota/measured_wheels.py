"""What boards measure once they run the agent of these wheels: its code, and the interpreter libraries among them.

Rules: wheels are read, never installed; digests are those of ``attest.measure`` over the same files on a board.
"""

from __future__ import annotations

import zipfile
from collections import defaultdict
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from edge_agent.attest.measure import DISTRIBUTIONS, PACKAGES, is_shared_object, set_digest
from edge_agent.core.errors import RefusedError
from edge_agent.store.files import reaching
from ota.charter import References

WHEEL_SUFFIX = ".whl"


def references_of_wheels(files: Mapping[str, Path]) -> References:
    """Of the wheels among ``files``. Raises ``RefusedError`` for one that is none, ``UnavailableError`` if it cannot be read."""
    code: dict[str, bytes] = {}
    libraries: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
    for path in (path for name, path in files.items() if name.endswith(WHEEL_SUFFIX)):
        try:
            with reaching(path), zipfile.ZipFile(path) as wheel:
                for name in wheel.namelist():
                    package = name.split("/")[0].removesuffix(".libs")
                    if package in PACKAGES and name.endswith(".py"):
                        code[name] = sha256(wheel.read(name)).digest()
                    elif package in DISTRIBUTIONS and is_shared_object(name):
                        libraries[package][name] = sha256(wheel.read(name)).digest()
        except zipfile.BadZipFile as error:
            raise RefusedError(f"wheel {path.name}", str(error), "a ZIP archive", "pack the agent anew") from error
    return References(
        code=frozenset({set_digest(code)}) if code else frozenset(),
        libraries=frozenset(set_digest(each) for each in libraries.values()),
    )
