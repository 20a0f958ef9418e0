"""How documents come to python-tuf: from a mapping that is here already, or over HTTP, each within its time.

Rules: python-tuf enforces every length; what breaks off or drips is a ``DownloadError`` of its own, never a stranger's exception.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from typing import cast

import urllib3
from tuf.api import exceptions as tuf
from tuf.api.metadata import Timestamp
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.urllib3_fetcher import Urllib3Fetcher

MAX_DOCUMENT_BYTES = 5_000_000
"""Of any metadata document, whatever length is signed for it."""
HTTP_TIMEOUT_S = 30
HTTP_LIMIT_S = 600
"""For one document or target, however it drips."""


class Offered(FetcherInterface):
    """Documents that are here already, by name: ``timestamp``, ``3.snapshot``, ``3.targets``, ``2.root``."""

    def __init__(self, documents: Mapping[str, bytes]) -> None:
        self._documents = documents

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.rpartition("/")[2].removesuffix(".json")
        if name not in self._documents:
            raise tuf.DownloadHTTPError(f"{name} is not offered", 404)
        return iter((self._documents[name],))


class HttpFetcher(FetcherInterface):
    """Documents over HTTP or HTTPS (by the system's certificates), each within ``limit_s``."""

    def __init__(self, limit_s: float = HTTP_LIMIT_S) -> None:
        self._inner = Urllib3Fetcher(socket_timeout=HTTP_TIMEOUT_S, app_user_agent="slyos-edge")
        self._limit_s = limit_s

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self._chunks(url, cast("Generator[bytes, None, None]", self._inner.fetch(url)))

    def _chunks(self, url: str, chunks: Generator[bytes, None, None]) -> Iterator[bytes]:
        end_s = time.monotonic() + self._limit_s
        try:
            with closing(chunks):
                for chunk in chunks:
                    if time.monotonic() > end_s:
                        raise tuf.SlowRetrievalError(f"{url} takes longer than {self._limit_s:g} s")
                    yield chunk
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise tuf.DownloadError(f"{url} broke off: {error}") from error


class Watched(FetcherInterface):
    """Any fetcher; it shows each root before that counts, and keeps the timestamp that came."""

    def __init__(self, inner: FetcherInterface, before_root: Callable[[bytes], None]) -> None:
        self._inner, self._before_root = inner, before_root
        self.timestamp = b""

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self._inner.fetch(url)

    def download_bytes(self, url: str, max_length: int) -> bytes:
        data = super().download_bytes(url, min(max_length, MAX_DOCUMENT_BYTES))
        if url.endswith(".root.json"):
            self._before_root(data)
        if url.endswith(f"/{Timestamp.type}.json"):
            self.timestamp = data
        return data
