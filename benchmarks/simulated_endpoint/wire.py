"""Just enough HTTP, with the ways to break it."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import re
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .names import MAX_BODY_BYTES


@dataclass(frozen=True)
class HttpRequest:
    """One request as it came."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


class Reply(NamedTuple):
    """One response as it goes out."""

    status: int
    body: bytes
    headers: Mapping[str, str] = {}
    content_type: str = "application/json"

    def head(self) -> bytes:
        """Status line and headers, up to the body."""
        reason = http.client.responses.get(self.status, "")
        named = {"content-type": self.content_type, "content-length": str(len(self.body)), **self.headers}
        lines = [f"HTTP/1.1 {self.status} {reason}", *(f"{k}: {v}" for k, v in named.items() if v)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def reply(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A JSON response."""
    return Reply(status, json.dumps(content, ensure_ascii=False).encode(), headers or {})


_TEXT_START = b'"content": "'
_MEGABYTE = 2**20


class HangUp(Exception):
    """Nothing more is sent on this connection."""


class Wire:
    """One connection, with the means to misuse it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def request(self) -> HttpRequest | None:
        """The next request; None when the caller is done."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            method, target, headers = _read_head(head)
            n_bytes = int(headers.get("content-length", "0"))
        except asyncio.IncompleteReadError:
            return None
        except (ValueError, asyncio.LimitOverrunError) as error:
            raise HangUp from error
        if "transfer-encoding" in headers or n_bytes > MAX_BODY_BYTES:
            await self.send(reply({"error": {"message": "Send a body of known and moderate length."}}, 413))
            raise HangUp
        if headers.get("expect", "").lower() == "100-continue":
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await self._reader.readexactly(n_bytes) if n_bytes else b""
        path, _, query = target.partition("?")
        pairs = (pair.partition("=") for pair in query.split("&") if pair)
        return HttpRequest(method, _plain_path(path), {k: v for k, _, v in pairs}, headers, body)

    @property
    def is_abandoned(self) -> bool:
        """Whether the caller has closed the connection."""
        return self._reader.at_eof() or self._writer.is_closing()

    async def send(self, response: Reply) -> None:
        """A whole response."""
        self._writer.write(response.head() + response.body)
        await self._writer.drain()

    async def send_part(self, response: Reply) -> None:
        """A response of which only half the body comes."""
        self._writer.write(response.head() + response.body[: len(response.body) // 2])
        await self._writer.drain()
        await asyncio.sleep(0.02)

    async def send_huge(self, response: Reply, megabytes: float) -> None:
        """A response whose text begins with megabytes of nonsense, sent one at a time."""
        start = response.body.find(_TEXT_START)
        start = len(response.body) if start < 0 else start + len(_TEXT_START)
        n_blocks = max(1, round(megabytes))
        n_bytes = len(response.body) + n_blocks * _MEGABYTE
        head = response._replace(headers={**response.headers, "content-length": str(n_bytes)}).head()
        self._writer.write(head + response.body[:start])
        for _ in range(n_blocks):
            self._writer.write(b"x" * _MEGABYTE)
            await self._writer.drain()
        self._writer.write(response.body[start:])
        await self._writer.drain()

    async def dribble(self, response: Reply, interval_s: float) -> None:
        """A response that comes byte by byte and never ends."""
        headers = {**response.headers, "transfer-encoding": "chunked", "content-length": ""}
        self._writer.write(response._replace(headers=headers).head())
        for byte in itertools.chain(response.body[:-1], itertools.repeat(0x20)):
            self._writer.write(b"1\r\n%c\r\n" % byte)
            await self._writer.drain()
            await asyncio.sleep(interval_s)
            if self.is_abandoned:
                break

    def reset(self) -> None:
        """Break the connection so that the caller sees a reset, not an end."""
        raw = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


def _read_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    """Method, target and headers; raises `ValueError` for what is no HTTP."""
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first.split(" ", 2)
    return method, target, {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}


def _plain_path(path: str) -> str:
    """The path as OpenAI names it, also for Azure's deployments."""
    return re.sub(r"^/openai(/deployments/[^/]+)?(/v1)?/", "/v1/", path)
