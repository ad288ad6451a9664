"""API keys: creation, storage as hashes in a file, and comparison in constant time.

A key is `arr-<id>-<secret>`: the id selects the entry, the secret is 256 random bits. Nobody can
guess 256 random bits, so a slow hash would protect no better than a fast hash, and would let
callers waste the gateway's time. An entry holds a salt and the HMAC-SHA-256 of the secret under the
salt. The file is YAML; the gateway reads the file again after a change.

Knows keys and the file; knows nothing of the rights of a tenant.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from arriero.shards.errors import NotFound, SpecError, Unauthenticated

log = logging.getLogger(__name__)

_KEY = re.compile(r"arr-([0-9a-f]{12})-([0-9a-f]{64})")
_FIELDS = {"id": str, "tenant": str, "salt": str, "hash": str, "created": int, "note": str}
_FIELDS |= {"expires": int, "models": list}
_MAY_LACK = ("note", "expires", "models")
_HINT = "send `authorization: Bearer arr-…`; `arriero keys add` makes a key"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyEntry:
    """A stored key.

    Attributes:
        id: selects the entry; not secret.
        tenant: tenant of the key.
        salt, hash: hexadecimal; HMAC-SHA-256 of the secret under the salt.
        created: seconds since 1970.
        note: words for people.
        expires: seconds since 1970 at which the key stops working; 0 for never.
        models: ids of the models that the key may use; empty for all.
    """

    id: str
    tenant: str
    salt: str
    hash: str
    created: int
    note: str = ""
    expires: int = 0
    models: tuple[str, ...] = ()


def make_key(tenant: str, note: str = "", models: Iterable[str] = ()) -> tuple[str, KeyEntry]:
    """A new key for its holder alone, and the entry to store."""
    key_id, secret, salt = (secrets.token_hex(size) for size in (6, 32, 16))
    entry = KeyEntry(
        id=key_id,
        tenant=tenant,
        salt=salt,
        hash=_hash(secret, salt),
        created=int(time.time()),
        note=note,
        models=tuple(models),
    )
    return f"arr-{key_id}-{secret}", entry


def rotated(old: KeyEntry, overlap_s: float) -> tuple[str, KeyEntry, KeyEntry | None]:
    """A new key that replaces an old key.

    Args:
        old: entry of the old key.
        overlap_s: seconds for which the old key still works.

    Returns:
        The new key; the entry of the new key; the entry of the old key with its expiry, None
        without an overlap.
    """
    key, entry = make_key(old.tenant, old.note, old.models)
    if not overlap_s:
        return key, entry, None
    until = math.ceil(time.time() + overlap_s)
    return key, entry, replace(old, expires=min(until, old.expires or until))


class Keys:
    """Looks up the entry of a key."""

    def __init__(self, entries: Mapping[str, KeyEntry]) -> None:
        self._entries = entries
        _, self._dummy = make_key("")

    def entry(self, authorization: str) -> KeyEntry:
        """The entry of a caller's key.

        Args:
            authorization: value of the header `authorization`; "" for none.

        Raises:
            Unauthenticated: the header holds no valid key.
        """
        if not authorization:
            raise Unauthenticated(f"an API key is needed; {_HINT}")
        kind, _, key = authorization.partition(" ")
        match = _KEY.fullmatch(key.strip()) if kind.lower() == "bearer" else None
        if match is None:
            raise Unauthenticated(f"the `authorization` header holds no API key; {_HINT}")
        # An unknown id takes the same time as a known id.
        entry = self._entries.get(match[1], self._dummy)
        if not hmac.compare_digest(_hash(match[2], entry.salt), entry.hash):
            raise Unauthenticated("the API key is unknown or revoked; use a valid key")
        if entry.expires and time.time() >= entry.expires:
            raise Unauthenticated("the API key was replaced and has expired; use the new key")
        return entry


class KeyFile:
    """Keys in a file that is read again after a change.

    If the changed file cannot be read, the old keys stay and the log gets an error.

    Args:
        path: the file.

    Raises:
        SpecError: the file cannot be read now.

    Attributes:
        keys: the keys as last read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self.keys = Keys(read_keys(path))

    def refresh(self) -> None:
        """Read the file if its metadata changed."""
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self.keys = Keys(read_keys(self._path))
        except SpecError as error:
            log.error("the old API keys stay in use: %s", error)


def read_keys(path: Path) -> dict[str, KeyEntry]:
    """The entries of a key file, by id.

    Raises:
        SpecError: the file is missing or malformed; the error names path, entry and field.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}; `arriero keys add` makes the file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not YAML: {' '.join(str(error).split())[:200]}") from None
    listed = data.get("keys") if isinstance(data, dict) and set(data) == {"keys"} else None
    if not isinstance(listed, list):
        raise SpecError(f"{path}: a key file is a mapping with the one list `keys`")
    entries: dict[str, KeyEntry] = {}
    for number, given in enumerate(listed):
        entry = _entry(str(path), f"keys[{number}]", given)
        if entry.id in entries:
            raise SpecError(f"{path}: `keys[{number}].id`={entry.id!r} occurs twice; keep one")
        entries[entry.id] = entry
    return entries


def add_key(path: Path, tenant: str, note: str = "", models: Iterable[str] = ()) -> str:
    """Add a key to the file; creates a missing file. Returns the key, which is stored nowhere else.

    Args:
        path: the file.
        tenant: tenant of the key.
        note: words for people.
        models: ids of the models that the key may use; empty for all.

    Raises:
        SpecError: the file cannot be read.
    """
    key, entry = make_key(tenant, note, models)
    change_keys(path, [entry], [])
    return key


def revoke_key(path: Path, key_id: str) -> KeyEntry:
    """Remove a key from the file.

    Raises:
        SpecError: the file cannot be read.
        NotFound: no key has this id.
    """
    entry = _find(path, key_id)
    change_keys(path, [], [key_id])
    return entry


def rotate_key(path: Path, key_id: str, overlap_s: float) -> tuple[str, KeyEntry]:
    """Replace a key; returns the new key and its entry. See `rotated`.

    Raises:
        SpecError: the file cannot be read.
        NotFound: no key has this id.
    """
    key, entry, old = rotated(_find(path, key_id), overlap_s)
    put = [entry] if old is None else [entry, old]
    change_keys(path, put, [key_id] if old is None else [])
    return key, entry


def change_keys(path: Path, put: Iterable[KeyEntry], drop: Iterable[str]) -> None:
    """Add or replace entries by id, and remove entries by id; expired entries go too.

    Safe to call twice.

    Raises:
        SpecError: the file cannot be read.
    """
    with _changing(path) as entries:
        entries |= {entry.id: entry for entry in put}
        now_s = time.time()
        expired = [
            entry.id for entry in entries.values() if entry.expires and entry.expires < now_s
        ]
        for key_id in (*drop, *expired):
            entries.pop(key_id, None)


def _find(path: Path, key_id: str) -> KeyEntry:
    entries = read_keys(path)
    if key_id not in entries:
        raise NotFound(f"{path} holds no key {key_id!r}; `arriero keys list` shows them")
    return entries[key_id]


@contextmanager
def _changing(path: Path) -> Iterator[dict[str, KeyEntry]]:
    """The entries, written back at the end; a lock admits one writer, readers see whole files."""
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = read_keys(path) if path.exists() else {}
        yield entries
        text = yaml.safe_dump(
            {"keys": [asdict(entry) for entry in entries.values()]}, sort_keys=False
        )
        partial = path.with_name(f".{path.name}.new")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def _entry(path: str, at: str, given: Any) -> KeyEntry:  # noqa: ANN401
    if not isinstance(given, dict):
        raise SpecError(f"{path}: `{at}` is a {type(given).__name__}, not a mapping")
    for name in given:
        if name not in _FIELDS:
            raise SpecError(f"{path}: `{at}.{str(name)[:64]}`: no such field")
    for name, kind in _FIELDS.items():
        if name not in given and name not in _MAY_LACK:
            raise SpecError(f"{path}: `{at}.{name}` is needed")
        if name in given and not isinstance(given[name], kind):
            raise SpecError(
                f"{path}: `{at}.{name}` must be a {kind.__name__}; quote it if it is text"
            )
    for name, size in (("id", 12), ("salt", 32), ("hash", 64)):
        if not re.fullmatch(f"[0-9a-f]{{{size}}}", given[name]):
            raise SpecError(f"{path}: `{at}.{name}` must be {size} hexadecimal digits")
    models = given.get("models", [])
    if not all(isinstance(model, str) and model for model in models):
        raise SpecError(f"{path}: `{at}.models` must be a list of the ids of models")
    return KeyEntry(**{**given, "models": tuple(models)})


def _hash(secret: str, salt: str) -> str:
    return hmac.new(bytes.fromhex(salt), bytes.fromhex(secret), hashlib.sha256).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}; `arriero keys add` makes the file") from None
    return status.st_ino, status.st_mtime_ns, status.st_size
