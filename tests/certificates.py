"""Certificates made with the ``openssl`` command for one test run: a CA, brokers good and bad, a board."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.needs import needs

_CONFIG = """
[ca]
default_ca = fleet
[fleet]
new_certs_dir = {folder}
database = {folder}/index
serial = {folder}/serial
default_md = sha256
policy = anything
copy_extensions = copy
unique_subject = no
[anything]
commonName = supplied
"""


def needs_openssl() -> None:
    needs(shutil.which("openssl"), "the openssl command is not installed (apt-get install openssl)")


class Authority:
    """A CA in ``folder``; ``issue`` signs a certificate for a name over the given days."""

    def __init__(self, folder: Path) -> None:
        needs_openssl()
        folder.mkdir()
        self._issued = 0
        self._folder, self.certificate, self._key = folder, folder / "ca.pem", folder / "ca.key"
        (folder / "index").touch()
        (folder / "serial").write_text("01\n")
        (folder / "ca.cnf").write_text(_CONFIG.format(folder=folder))
        self._openssl(
            "req", "-x509", *_new_key(self._key), "-out", self.certificate, "-subj", "/CN=Fleet CA", "-days", "2",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip

    def issue(self, name: str, start: str = "", end: str = "") -> tuple[Path, Path]:
        """Certificate and key. ``start`` and ``end`` as YYYYMMDDHHMMSSZ; two days from now without them."""
        self._issued += 1
        certificate, key, request = (self._folder / f"{self._issued}-{name}{suffix}" for suffix in (".pem", ".key", ".csr"))
        host = f"subjectAltName={'IP' if name[0].isdigit() else 'DNS'}:{name}"
        self._openssl("req", *_new_key(key), "-out", request, "-subj", f"/CN={name}", "-addext", host)
        dates = ["-startdate", start, "-enddate", end] if start else ["-days", "2"]
        self._openssl(
            "ca", "-batch", "-notext", "-config", self._folder / "ca.cnf", "-cert", self.certificate, "-keyfile", self._key,
            "-in", request, "-out", certificate, *dates,
        )  # fmt: skip
        return certificate, key

    @staticmethod
    def _openssl(*arguments: object) -> None:
        done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def _new_key(path: Path) -> list[object]:
    return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", path]
