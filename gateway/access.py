"""Who may ask: request ids, the Host and Origin checks of an open loopback service, and API keys.

It stands before every route, so that nothing is reached without it, and answers what escapes from them: an unexpected
exception becomes a fixed problem. What a route does is not its business.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
from collections.abc import Mapping
from urllib.parse import urlsplit

import grpc
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.problems import ProblemError, error_response, internal
from knowledge_engine.errors import Reason
from knowledge_engine.settings import Settings, is_loopback

HEALTH_PATH = "/api/v1/health"
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,63}")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_LOG = logging.getLogger(__name__)


class Access:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._keys = [key.encode() for key in settings.keys.values()]
        self._loopback_only = settings.anonymous and not settings.allow_anonymous
        self._origins = frozenset(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, receive, send_with_id)
        except ProblemError as refusal:
            await error_response(refusal, request_id)(scope, receive, send_with_id)
        except Exception:
            _LOG.exception("request %s failed unexpectedly", request_id)
            if started:
                raise
            await internal(request_id)(scope, receive, send_with_id)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if self._loopback_only:
            self._check_host(headers)
            if scope["method"] not in _SAFE_METHODS:
                self._check_origin(headers)
        elif self._keys and scope["path"] != HEALTH_PATH:
            self._check_key(headers)

    def _check_host(self, headers: Headers) -> None:
        """A page of another site can make its own name resolve to this machine (DNS rebinding); its Host betrays it."""
        if not _is_loopback_authority(headers.get("host", "")):
            raise ProblemError(
                403,
                grpc.StatusCode.PERMISSION_DENIED,
                Reason.HOST_REFUSED,
                "without API keys only requests to localhost are answered; set KNOWLEDGE_API_KEYS, or "
                "KNOWLEDGE_ALLOW_ANONYMOUS=true to serve everyone",
            )

    def _check_origin(self, headers: Headers) -> None:
        """A browser lets any page send some requests here unasked; its Origin says which page it is."""
        origin = headers.get("origin")
        if origin is None or origin in self._origins or "*" in self._origins:
            return
        if not _is_loopback_authority(origin.partition("://")[2]):
            raise ProblemError(
                403,
                grpc.StatusCode.PERMISSION_DENIED,
                Reason.ORIGIN_REFUSED,
                "this origin may not change anything here; name it in KNOWLEDGE_ALLOWED_ORIGINS",
            )

    def _check_key(self, headers: Headers) -> None:
        given = api_key(headers)
        if not given:
            raise _unauthenticated(
                Reason.API_KEY_MISSING, "send an API key: `Authorization: Bearer KEY` or `X-API-Key`"
            )
        # Every key is compared, so that the time taken tells nothing.
        matches = [hmac.compare_digest(key, given.encode("utf-8", "surrogateescape")) for key in self._keys]
        if not any(matches):
            raise _unauthenticated(Reason.API_KEY_INVALID, "this API key is not known here")


def api_key(headers: Mapping[str, str]) -> str:
    """The caller's key, empty when none was sent."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()


def _unauthenticated(reason: Reason, detail: str) -> ProblemError:
    return ProblemError(401, grpc.StatusCode.UNAUTHENTICATED, reason, detail, headers={"WWW-Authenticate": "Bearer"})


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def _is_loopback_authority(authority: str) -> bool:
    """Whether `host[:port]` names this machine."""
    try:
        split = urlsplit(f"//{authority}")
        return split.netloc == authority and split.username is None and is_loopback(split.hostname or "")
    except ValueError:
        return False
