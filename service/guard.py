"""Who may pass: one pure ASGI layer before routing that denies by default. Only the probes need no key."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service import keys
from service.errors import ApiError
from service.keys import Keyring, presented
from service.middleware import exchange_of

# A supervisor has no key, and what it learns is public: that the service lives, and which deployments are ready.
PROBES = frozenset({"/livez", "/readyz", "/health"})
CHANGING = frozenset({"PUT", "PATCH", "DELETE"})
CHALLENGE = {"www-authenticate": 'Bearer, Basic realm="secateur"'}


def scope_of(method: str, path: str) -> keys.Scope | None:
    """What a key needs for a request, known or not; None for the probes."""
    if path in PROBES and method in ("GET", "HEAD"):
        return None
    if path == "/metrics":
        return "metrics"
    is_change = method in CHANGING or (method == "POST" and path.startswith("/deployments"))
    return "admin" if is_change and path.startswith(("/deployments", "/experiments")) else "classify"


class Guard:
    """Lets requests through that bring a key with the scope of their route. Raises ApiError, which the edge renders."""

    def __init__(self, app: ASGIApp, keyring: Keyring) -> None:
        self._app = app
        self._keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        needed = scope_of(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if needed is not None:
            secret = presented(Headers(scope=scope))
            if secret is None:
                raise ApiError("missing_key", "send a key: Authorization: Bearer KEY, or X-API-Key", headers=CHALLENGE)
            key = self._keyring.find(secret)
            if key is None:
                raise ApiError("invalid_key", "the key is not known", headers=CHALLENGE)
            exchange_of(scope).fields["key"] = key.name
            if needed not in key.scopes:
                raise ApiError("insufficient_scope", f"the key lacks the scope {needed}")
        await self._app(scope, receive, send)
