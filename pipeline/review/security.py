"""The door of the review page: this machine only, one-time links, and nothing that another site could trigger."""

from __future__ import annotations

import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
MAX_BODY_BYTES = 65_536

# `Referrer-Policy: no-referrer` would make browsers send `Origin: null` with our own forms.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI middleware: lets a request through only from this machine, with a session, and from our own pages.

    A token opens one session and is spent. The session is a random cookie that scripts cannot read and
    other sites cannot send.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens) -> None:
        self.app = app
        self.tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        answer = self._refusal(scope) if scope["type"] == "http" else PlainTextResponse("Not here.", 403)
        await (answer or self.app)(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> Response | None:
        """What to answer instead of the page, or None to let the request through."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _host_name(host) not in LOOPBACK:
            return PlainTextResponse("This page answers to 127.0.0.1 only.", 403)
        if scope["method"] not in ("GET", "HEAD"):
            refused = _foreign_post(headers, host)
            if refused:
                return refused
        signed_in = self.tokens.is_session(_cookie(headers, self.tokens.cookie))
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        token = dict(query).get("token")
        if token is not None and scope["method"] == "GET":
            return self._enter(scope, query, token, signed_in)
        if signed_in:
            return None
        return PlainTextResponse("Open the link that `medmicn review` printed; each link opens one browser.", 403)

    def _enter(self, scope: Scope, query: list[tuple[str, str]], token: str, signed_in: bool) -> Response:
        """Trade a token for a session cookie, and take it out of the address."""
        session = None if signed_in else self.tokens.spend(token)
        if session is None and not signed_in:
            return PlainTextResponse("This link was used already, or is not from this run of `medmicn review`.", 403)
        rest = urlencode([(k, v) for k, v in query if k != "token"])
        # A path that begins with two slashes would be another host's address.
        path = "/" + quote(scope["path"].lstrip("/"))
        response = RedirectResponse(path + (f"?{rest}" if rest else ""), status_code=303)
        if session is not None:
            response.set_cookie(self.tokens.cookie, session, httponly=True, samesite="strict", path="/")
        return response


class Tokens:
    """Unspent tokens and open sessions of one server."""

    def __init__(self, token: str) -> None:
        self._unspent = {token}
        self._sessions: set[str] = set()
        # Cookies are shared by all ports of a host: two servers must not throw each other's sessions away.
        self.cookie = f"medmicn_{secrets.token_hex(4)}"

    def issue(self) -> str:
        """A fresh token, for one more browser."""
        token = secrets.token_urlsafe(32)
        self._unspent.add(token)
        return token

    def spend(self, token: str) -> str | None:
        """A new session for a token that was not used yet, else None."""
        match = next((t for t in self._unspent if secrets.compare_digest(t.encode(), token.encode())), None)
        if match is None:
            return None
        self._unspent.discard(match)
        session = secrets.token_urlsafe(32)
        self._sessions.add(session)
        return session

    def is_session(self, session: str | None) -> bool:
        """Whether a cookie's value is an open session."""
        return session is not None and any(secrets.compare_digest(s.encode(), session.encode()) for s in self._sessions)


def _host_name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _foreign_post(headers: Headers, host: str) -> Response | None:
    if headers.get("origin") != f"http://{host}":
        return PlainTextResponse("Changes are taken from this page's own forms only.", 403)
    length = headers.get("content-length", "")
    if not length.isdigit():
        return PlainTextResponse("Say how long the request is.", 411)
    if int(length) > MAX_BODY_BYTES:
        return PlainTextResponse(f"At most {MAX_BODY_BYTES} bytes.", 413)
    return None


def _cookie(headers: Headers, name: str) -> str | None:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return None
    return found.value if found else None


def _with_headers(send: Send) -> Send:
    async def send_guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            # Pages show medical images and corrections: they belong in no cache, and are never stale.
            headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return send_guarded
