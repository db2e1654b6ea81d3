"""Who may ask: allowed host names, same origin, and the token when one is set.

A page on another site must not be able to drive a lab that listens on loopback: the Host header has to be one
of ours (DNS rebinding), and a request that names another Origin is refused (cross-site request). With a token
set (ATTNLAB_TOKEN) every request but the health check needs it, as `Authorization: Bearer` or as the cookie
that the sign-in form sets. The cookie holds a digest, never the token.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, quote, urlsplit

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from attnlab_storage import settings

COOKIE = "attnlab_session"
LOGIN_PATH = "/sign-in"
OPEN_PATHS = ("/api/v1/health",)
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "testserver")
MAX_FORM_BYTES = 4096

# Gradio's pages start from inline scripts and build gr.HTML's script with Function, hence the two unsafe-*;
# connect-src, img-src and form-action are what keeps data from leaving.
CONTENT_POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
SECURITY_HEADERS = (
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def is_loopback(host: str) -> bool:
    """True for localhost and loopback addresses."""
    name = host.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_bind(host: str) -> None:
    """Refuse to listen where others can reach without a token.

    Raises:
        ValueError: `host` is not a loopback address and ATTNLAB_TOKEN is not set.
    """
    if not is_loopback(host) and not settings.api_token():
        raise ValueError(
            "host must be a loopback address (127.0.0.1, ::1, localhost) unless ATTNLAB_TOKEN is set, "
            f"got {host!r}: anyone who reaches the page could queue work on this machine"
        )


def guard_from_settings() -> Guard:
    """The guard that the environment asks for."""
    return Guard(token=settings.api_token(), hosts=settings.web_hosts())


@dataclass(frozen=True)
class Guard:
    """The rules: `hosts` are host names beside loopback; with a token and no `hosts`, any host will do."""

    token: str | None = None
    hosts: tuple[str, ...] = ()

    def install(self, app: FastAPI) -> None:
        """Put the rules in front of everything that `app` serves."""
        app.add_middleware(_GuardMiddleware, guard=self)

    def host_allowed(self, host: str) -> bool:
        """Whether a Host header names us. A rebound name carries no cookie of ours, so a token is enough."""
        name = _host_name(host)
        if name in LOOPBACK_NAMES or name in self.hosts:
            return True
        return bool(self.token) and not self.hosts

    def origin_allowed(self, origin: str | None, host: str) -> bool:
        """Whether a request's Origin is ours (scripts outside a browser send none)."""
        return origin is None or (origin != "null" and urlsplit(origin).netloc.lower() == host.lower())

    def session(self) -> str:
        """What the cookie holds."""
        return hmac.new((self.token or "").encode(), b"attnlab session", hashlib.sha256).hexdigest()

    def signed_in(self, headers: dict[str, str]) -> bool:
        """Whether the bearer token or the cookie is right (always, when no token is set)."""
        if not self.token:
            return True
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(value.strip().encode(), self.token.encode()):
            return True
        cookie = _cookie(headers.get("cookie", ""))
        return bool(cookie) and hmac.compare_digest(cookie.encode(), self.session().encode())


class _GuardMiddleware:
    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self.app = app
        self.guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        send = _with_security_headers(send)
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await _answer(send, refusal[0], {"error": refusal[1]})
        elif self.guard.token and scope["path"] == LOGIN_PATH:
            await self._sign_in(scope, receive, send)
        elif scope["path"] not in OPEN_PATHS and not self.guard.signed_in(headers):
            await self._ask_to_sign_in(scope, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if path not in OPEN_PATHS and not self.guard.host_allowed(host):
            return 400, f"Host must be a name of this server, got {host!r}; add it to ATTNLAB_WEB_HOSTS"
        if not self.guard.origin_allowed(headers.get("origin"), host):
            return 403, f"Origin must be this server, got {headers['origin']!r}"
        return None

    async def _ask_to_sign_in(self, scope: Scope, send: Send) -> None:
        wants_page = "text/html" in dict(scope["headers"]).get(b"accept", b"").decode("latin-1")
        if scope.get("method") == "GET" and wants_page:
            target = scope["path"] + (f"?{scope['query_string'].decode()}" if scope["query_string"] else "")
            await _redirect(send, f"{LOGIN_PATH}?next={quote(target, safe='')}")
            return
        await _answer(
            send, 401, {"error": "a token is required: send Authorization: Bearer <ATTNLAB_TOKEN> or sign in"}
        )

    async def _sign_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = parse_qs(scope["query_string"].decode("latin-1"))
        target = _own_path(query.get("next", ["/"])[0])
        if scope["method"] != "POST":
            await _page(send, 200, target, "")
            return
        form = parse_qs((await _body(receive)).decode("utf-8", "replace"))
        given = form.get("token", [""])[0]
        assert self.guard.token is not None
        if not hmac.compare_digest(given.encode(), self.guard.token.encode()):
            await _page(send, 403, target, "That is not the token.")
            return
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookie = f"{COOKIE}={self.guard.session()}; Path=/; HttpOnly; SameSite=Lax; Max-Age=2592000{secure}"
        await _redirect(send, target, ((b"set-cookie", cookie.encode()),))


def _host_name(host: str) -> str:
    """The host without its port, lower case."""
    name = host.lower()
    if name.startswith("["):
        return name.partition("]")[0] + "]"
    return name.partition(":")[0]


def _cookie(header: str) -> str:
    try:
        morsel = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _own_path(target: str) -> str:
    """`target` when it stays on this server, else the front page."""
    parts = urlsplit(target)
    own = (
        target.startswith("/")
        and not target.startswith(("//", "/\\"))
        and not parts.scheme
        and not parts.netloc
    )
    return target if own and target.isprintable() else "/"


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body") or len(body) > MAX_FORM_BYTES:
            return body[:MAX_FORM_BYTES]


def _with_security_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message["headers"]}
            message["headers"] = [
                *message["headers"],
                *((name, value) for name, value in SECURITY_HEADERS if name not in present),
            ]
        await send(message)

    return wrapped


async def _respond(send: Send, status: int, headers: tuple[tuple[bytes, bytes], ...], body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


async def _answer(send: Send, status: int, document: dict[str, str]) -> None:
    await _respond(send, status, ((b"content-type", b"application/json"),), json.dumps(document).encode())


async def _redirect(send: Send, target: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    await _respond(send, 303, ((b"location", quote(target, safe="/?&=%:,").encode()), *headers), b"")


async def _page(send: Send, status: int, target: str, problem: str) -> None:
    from attnlab_webui import pieces, theme

    notice = pieces.notice(problem, "error") if problem else ""
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>Sign in · attnlab</title>'
        f'<style>{theme.sign_in_css()}</style><main class="at-sign-in">'
        f'<h1>attnlab</h1>{notice}<form method="post" action="{LOGIN_PATH}?next={quote(target, safe="")}">'
        '<label>Token <input type="password" name="token" autocomplete="current-password" autofocus required>'
        "</label><button>Sign in</button></form><p>The token is the server's ATTNLAB_TOKEN.</p></main></html>"
    )
    await _respond(send, status, ((b"content-type", b"text/html; charset=utf-8"),), page.encode())
