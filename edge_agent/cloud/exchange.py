"""One HTTP request to the cloud over a connection of its own, and its answer as it comes.

Owns the socket.  Rules: every wait has a limit and every length a bound; closing it, at any point, ends the connection at once;
no redirect is followed, for it would carry the token elsewhere; nothing that the endpoint sent is in an error but its status and
an error code, because an endpoint may echo the token.  h11 reads and writes HTTP/1.1; certificates are those that OpenSSL
trusts on this board.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus

import h11

from edge_agent.cloud.endpoint import Endpoint, EndpointError

CONNECT_S = 10.0
ADDRESS_S, MAX_ADDRESSES = 2.5, 4
"""How long one address of a name is tried while there are others, and how many are."""
HEAD_S = 60.0
"""From the request to the head of its answer."""
SILENT_S = 60.0
"""Between two pieces of a body that say something."""
ERROR_BODY_S = 5.0
MAX_HEAD_BYTES = 32 * 2**10
MAX_ERROR_BYTES = 16 * 2**10
MAX_RETRY_S = 86_400
READ_BYTES = 16 * 2**10
ERROR_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
TURN_AT_FAULT = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY)
"""Refusals of one turn, which say nothing of the next one."""
REMEDIES: Mapping[int, str] = {
    HTTPStatus.UNAUTHORIZED: "look at [cloud] token_file",
    HTTPStatus.FORBIDDEN: "look at [cloud] token_file, and at what it may use",
    HTTPStatus.NOT_FOUND: "look at [cloud] url and model",
}


@dataclass(frozen=True, slots=True)
class Head:
    status: int
    kind: str
    """The media type, without parameters."""
    retry_s: int


class Exchange:
    """A connection that was made. ``ask`` once, then ``read`` until it gives nothing. All raise ``EndpointError``."""

    def __init__(self, endpoint: Endpoint, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._endpoint, self._reader, self._writer = endpoint, reader, writer
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)

    async def ask(self, method: str, path: str, body: bytes = b"") -> Head:
        """Send the request; the head of its answer."""
        headers = [("Host", self._endpoint.authority), ("Connection", "close"), ("User-Agent", "slyos-edge")]
        if self._endpoint.token:
            headers.append(("Authorization", f"Bearer {self._endpoint.token}"))
        if body:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        request = h11.Request(method=method, target=f"{self._endpoint.path}{path}", headers=headers)
        sent = [self._http.send(each) for each in (request, h11.Data(body), h11.EndOfMessage())]
        with _told(f"no answer began within {HEAD_S:g} s"):
            async with asyncio.timeout(HEAD_S):
                self._writer.write(b"".join(filter(None, sent)))
                await self._writer.drain()
                return await self._head()

    async def read(self, limit_s: float) -> bytes:
        """Some bytes of the body; none at its end."""
        with _told("it fell silent in the middle of its answer"):
            async with asyncio.timeout(limit_s):
                event = await self._event()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def refusal(self, head: Head) -> EndpointError:
        """What an answer that is not 200 stands for, with the error's code if it has one."""
        code = await self._code()
        known = {each.value: each.phrase.lower() for each in HTTPStatus}
        reason = f"its endpoint {self._endpoint.authority} answered {head.status} {known.get(head.status, '')}".rstrip()
        reason += f" ({code})" if code else ""
        if head.status in TURN_AT_FAULT:
            return EndpointError(reason, of_turn=True)
        if 300 <= head.status < 400:
            return EndpointError(f"{reason}: no redirect is followed", "give [cloud] url the address that it leads to")
        return EndpointError(reason, REMEDIES.get(head.status, ""), head.retry_s)

    async def _head(self) -> Head:
        while not isinstance(event := await self._event(), h11.Response):
            pass
        headers = {bytes(name): bytes(value).decode("latin-1") for name, value in event.headers}
        retry = headers.get(b"retry-after", "")
        retry_s = min(int(retry), MAX_RETRY_S) if retry.isascii() and retry.isdecimal() and len(retry) < 10 else 0
        return Head(event.status_code, headers.get(b"content-type", "").partition(";")[0].strip().lower(), retry_s)

    async def _code(self) -> str:
        body = b""
        with suppress(EndpointError, TimeoutError):
            async with asyncio.timeout(ERROR_BODY_S):
                while len(body) <= MAX_ERROR_BYTES and (more := await self.read(ERROR_BODY_S)):
                    body += more
        try:
            error = json.loads(body)["error"]
            code = error.get("code") or error.get("type")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return ""
        token = self._endpoint.token
        fits = isinstance(code, str) and ERROR_CODE.fullmatch(code) and not (token and (token in code or code in token))
        return str(code) if fits else ""

    async def _event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(READ_BYTES))
        return event

    async def close(self) -> None:
        self._writer.transport.abort()
        with suppress(OSError):
            await self._writer.wait_closed()


@asynccontextmanager
async def connected(endpoint: Endpoint) -> AsyncIterator[Exchange]:
    """A new connection, closed at the end. Raises ``EndpointError`` if there is none."""
    with _told(f"{endpoint.authority} did not take a connection within {CONNECT_S:g} s"):
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await _open(endpoint)
    exchange = Exchange(endpoint, reader, writer)
    try:
        yield exchange
    finally:
        await exchange.close()


async def _open(endpoint: Endpoint) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """By one address after the other, the two families in turn (RFC 8305, section 4), so that a dead one costs its share only.

    Not by asyncio's own race (``happy_eyeballs_delay``): called off when it is won, it forgets an open socket (3.11 to 3.13).
    """
    context = ssl.create_default_context() if endpoint.tls else None
    name = endpoint.host if endpoint.tls else None
    found = await asyncio.get_running_loop().getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    *first, last = _in_turn([(family, str(address[0])) for family, _, _, _, address in found])
    for family, address in first:
        with suppress(OSError):  # TimeoutError is one
            async with asyncio.timeout(ADDRESS_S):
                return await asyncio.open_connection(address, endpoint.port, family=family, ssl=context, server_hostname=name)
    return await asyncio.open_connection(last[1], endpoint.port, family=last[0], ssl=context, server_hostname=name)


def _in_turn(addresses: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """At most ``MAX_ADDRESSES``, the families taking turns, each in its own order."""
    places: dict[int, int] = {}
    ranked = []
    for family, address in addresses:
        places[family] = places.get(family, 0) + 1
        ranked.append((places[family], family, address))
    return [(family, address) for _, family, address in sorted(ranked, key=lambda each: each[0])][:MAX_ADDRESSES]


@contextmanager
def _told(late: str) -> Iterator[None]:
    """Tells what the network throws as ``EndpointError``; ``late`` is said of a time limit."""
    try:
        yield
    except TimeoutError:
        raise EndpointError(late) from None
    except ssl.SSLCertVerificationError as error:
        remedy = "SSL_CERT_FILE can name a CA of your own"
        raise EndpointError(f"its certificate is not trusted: {error.verify_message}", remedy) from None
    except ssl.SSLError as error:
        raise EndpointError(f"no TLS with it: {(error.reason or 'unknown').lower()}") from None
    except socket.gaierror:
        raise EndpointError("its name is not known here", "look at [cloud] url, and at the network") from None
    except OSError as error:
        raise EndpointError(f"the network failed: {(error.strerror or 'no connection').lower()}") from None
    except h11.RemoteProtocolError:
        raise EndpointError("what it sent is not HTTP, or ended too soon") from None
