"""Admin tokens with roles, and the role that each RPC of Admin needs.

A token is stored as a salted hash; the secret exists with its holder alone. `NEEDED` lists every
RPC; an RPC that is missing there needs the highest role. Knows tokens, roles and the fields of a
spec that only an owner may change; knows nothing of connections.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from enum import IntEnum

from arriero.cluster.hosts import kv_store
from arriero.cluster.spec.deployment import DeploymentSpec
from arriero.cluster.spec.diff import diff
from arriero.shards.errors import InvalidRequest, NotFound, PermissionDenied, Unauthenticated

STORED = "admin_tokens"
"""Name of the tokens in Ray's key-value store."""
FIRST = "up"
"""Name of the token that `arriero up` makes."""
OWNED = ("gateway.keys", "gateway.tls", "link_tls", "admin", "ray")
"""Fields of a spec with secrets and who may connect: only an owner changes them."""
MAX_TOKENS = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Role(IntEnum):
    """What a token may do; each role may do what the roles before it may do."""

    VIEW = 1
    OPERATE = 2
    OWN = 3

    @property
    def word(self) -> str:
        """The name of the role in messages."""
        return self.name.lower()

    @classmethod
    def read(cls, word: str) -> Role:
        """The role of a name.

        Raises:
            InvalidRequest: no role has the name.
        """
        for role in cls:
            if role.word == word:
                return role
        known = ", ".join(role.word for role in cls)
        raise InvalidRequest("role", f"`role`={word[:32]!r} is unknown; use one of: {known}")


NEEDED: Mapping[str, Role] = {
    "GetStatus": Role.VIEW,
    "ListEvents": Role.VIEW,
    "Why": Role.VIEW,
    "Logs": Role.VIEW,
    "Scale": Role.OPERATE,
    "Drain": Role.OPERATE,
    "Rollout": Role.OPERATE,
    "Rollback": Role.OPERATE,
    "Reload": Role.OPERATE,
    "Kv": Role.OPERATE,
    "PauseRollout": Role.OPERATE,
    "DrainNode": Role.OPERATE,
    "GetSpec": Role.VIEW,
    "Adapters": Role.OPERATE,
    "Weights": Role.OPERATE,
    "Hold": Role.OPERATE,
    "Keys": Role.OWN,
    "Tokens": Role.OWN,
    "RotateToken": Role.OWN,
}
"""The role that each RPC needs."""
NEEDED_BY_ACTION: Mapping[tuple[str, str], Role] = {
    ("Kv", "stats"): Role.VIEW,
    ("Adapters", "list"): Role.VIEW,
    ("Weights", "status"): Role.VIEW,
}
"""The role that an RPC needs for one value of its field `action`."""


def needed_role(rpc: str, action: str = "") -> Role:
    """The role that a call needs; `Role.OWN` for an RPC that no table lists."""
    return NEEDED_BY_ACTION.get((rpc, action), NEEDED.get(rpc, Role.OWN))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdminToken:
    """A stored token.

    Attributes:
        name: of the token; events and the audit log show the name.
        role: a `Role`.
        salt, hash: hexadecimal; HMAC-SHA-256 of the secret under the salt.
        created: seconds since 1970.
        expires: seconds since 1970 at which the token stops working; 0 for never.
    """

    name: str
    role: int
    salt: str
    hash: str
    created: int
    expires: float = 0.0

    @classmethod
    def of(cls, name: str, role: Role, secret: str, *, expires: float = 0.0) -> AdminToken:
        """The token to store for a secret."""
        salt = secrets.token_hex(16)
        return cls(
            name=name,
            role=role,
            salt=salt,
            hash=_hash(secret, salt),
            created=int(time.time()),
            expires=expires,
        )

    def matches(self, secret: str) -> bool:
        """Whether this is the token of a secret; in constant time."""
        return hmac.compare_digest(_hash(secret, self.salt), self.hash)

    @property
    def expired(self) -> bool:
        """Whether the token has stopped working."""
        return bool(self.expires) and time.time() >= self.expires


_caller: ContextVar[AdminToken | None] = ContextVar("admin_caller", default=None)


def set_caller(token: AdminToken) -> None:
    """Note the token of the call that the current task answers."""
    _caller.set(token)


def caller_name() -> str:
    """Name of the token whose call the current task answers; "" outside of a call."""
    token = _caller.get()
    return "" if token is None else token.name


def check_spec(before: DeploymentSpec, after: DeploymentSpec) -> None:
    """Refuse a change of secrets by a caller who is no owner.

    Raises:
        PermissionDenied: a field of `OWNED` differs, and the caller's role is lower.
    """
    token = _caller.get()
    if token is None or token.role >= Role.OWN:
        return
    fields = [
        change.field
        for change in diff(before, after)
        if any(change.field == owned or change.field.startswith(f"{owned}.") for owned in OWNED)
    ]
    if fields:
        raise PermissionDenied(
            f"`{'`, `'.join(fields)}`: the admin token {token.name!r} has the role "
            f"{Role(token.role).word}; a change of keys and certificates needs the role own"
        )


class AdminTokens:
    """All tokens of a deployment.

    Args:
        first: token of `arriero up`, for the first start.
        load: reads the stored tokens; None when none are stored.
        save: stores the tokens.
    """

    def __init__(
        self,
        first: AdminToken,
        load: Callable[[], Sequence[AdminToken] | None],
        save: Callable[[tuple[AdminToken, ...]], None],
    ) -> None:
        self._save = save
        stored = load()
        self._tokens: tuple[AdminToken, ...] = (first,) if stored is None else tuple(stored)

    @classmethod
    def stored(cls, first: AdminToken) -> AdminTokens:
        """The tokens in Ray's key-value store."""
        return cls(
            first,
            lambda: kv_store.get(STORED, tuple[AdminToken, ...]),
            lambda tokens: kv_store.put(STORED, tokens),
        )

    def entries(self) -> list[AdminToken]:
        """The tokens that work now."""
        return [token for token in self._tokens if not token.expired]

    def find(self, authorization: str) -> AdminToken:
        """The token of a call.

        Args:
            authorization: value of the metadata `authorization`; "" for none.

        Raises:
            Unauthenticated: the metadata hold no valid token.
        """
        kind, _, secret = authorization.partition(" ")
        match = None
        for token in self._tokens:  # all of them, so that the time tells nothing
            if token.matches(secret) and kind.lower() == "bearer" and not token.expired:
                match = token
        if match is None:
            raise Unauthenticated("metadata `authorization: Bearer TOKEN` is not an admin token")
        return match

    def add(self, name: str, role: Role, lifetime_s: float) -> tuple[str, AdminToken]:
        """Make a token; returns the secret, which is stored nowhere, and the token.

        Args:
            name: a new name.
            role: of the token.
            lifetime_s: seconds until the token expires; 0 for never.

        Raises:
            InvalidRequest: the name is malformed or in use, or there are too many tokens.
        """
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                "name", f"`name`={name[:64]!r}: use 1 to 64 letters, digits, dots, dashes or _"
            )
        if any(token.name == name for token in self.entries()):
            raise InvalidRequest(
                "name", f"`name`={name!r} is in use; revoke that token first, or choose another"
            )
        if len(self.entries()) >= MAX_TOKENS:
            raise InvalidRequest("name", f"there are {MAX_TOKENS} tokens, the limit; revoke some")
        if lifetime_s < 0:
            raise InvalidRequest("lifetime_s", f"`lifetime_s`={lifetime_s:g} must be 0 or more")
        secret = secrets.token_urlsafe(32)
        expires = time.time() + lifetime_s if lifetime_s else 0.0
        token = AdminToken.of(name, role, secret, expires=expires)
        self._set([*self.entries(), token])
        return secret, token

    def revoke(self, name: str) -> AdminToken:
        """Remove a token.

        Raises:
            NotFound: no token has the name.
            InvalidRequest: without the token nobody would own the deployment.
        """
        revoked = [token for token in self.entries() if token.name == name]
        if not revoked:
            raise NotFound(f"no admin token {name[:64]!r}; `arriero admin-token list` shows them")
        rest = [token for token in self.entries() if token.name != name]
        if not any(token.role == Role.OWN and not token.expires for token in rest):
            raise InvalidRequest(
                "name",
                f"`name`={name!r} is the last token with the role own that does not expire; add "
                "another before",
            )
        self._set(rest)
        return revoked[-1]

    def rotate(self, name: str, overlap_s: float) -> str:
        """Replace a token's secret; the old secret works for `overlap_s` seconds more."""
        until = time.time() + overlap_s
        secret, tokens = secrets.token_urlsafe(32), []
        for token in self.entries():
            if token.name != name:
                tokens.append(token)
            elif overlap_s:
                tokens.append(replace(token, expires=min(until, token.expires or until)))
        current = [token for token in self.entries() if token.name == name][-1]
        expires = current.expires
        tokens.append(AdminToken.of(name, Role(current.role), secret, expires=expires))
        self._set(tokens)
        return secret

    def _set(self, tokens: Iterable[AdminToken]) -> None:
        tokens = tuple(tokens)
        self._save(tokens)  # first: a token that is lost with the process must not be shown
        self._tokens = tokens


def _hash(secret: str, salt: str) -> str:
    return hmac.new(bytes.fromhex(salt), secret.encode(), hashlib.sha256).hexdigest()
