"""API keys: made here, kept as hashes in a file, and compared without telling how close one came.

A key is `arr-<id>-<secret>`: the id finds the entry, the secret is 256 random bits. Such a secret
cannot be guessed, so a slow hash would protect nothing that a fast one does not, and would let
anybody burn the gateway's time; each entry holds a salt and the HMAC-SHA-256 of the secret under
it. The file is YAML, and is read again whenever it changes.

Knows keys and the file; knows nothing of what a tenant may do.
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
_FIELDS |= {"expires": int}
_MAY_LACK = ("note", "expires")
_HINT = "send `authorization: Bearer arr-…`; `arriero keys add` makes a key"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyEntry:
    """A key as it is kept.

    Attributes:
        id: finds the entry; no secret.
        tenant: whose key it is.
        salt, hash: hexadecimal; HMAC-SHA-256 of the secret under the salt.
        created: seconds since 1970.
        note: words for people.
        expires: seconds since 1970 from when it is refused; 0 for never.
    """

    id: str
    tenant: str
    salt: str
    hash: str
    created: int
    note: str = ""
    expires: int = 0


def make_key(tenant: str, note: str = "") -> tuple[str, KeyEntry]:
    """A new key, which only its holder will have, and the entry to keep."""
    key_id, secret, salt = (secrets.token_hex(size) for size in (6, 32, 16))
    entry = KeyEntry(
        id=key_id,
        tenant=tenant,
        salt=salt,
        hash=_hash(secret, salt),
        created=int(time.time()),
        note=note,
    )
    return f"arr-{key_id}-{secret}", entry


def rotated(old: KeyEntry, overlap_s: float) -> tuple[str, KeyEntry, KeyEntry | None]:
    """A key in place of another.

    Args:
        old: the key from before.
        overlap_s: how long that one is still taken.

    Returns:
        The new key; its entry; and what is left of the old one's, None where nothing is.
    """
    key, entry = make_key(old.tenant, old.note)
    if not overlap_s:
        return key, entry, None
    until = math.ceil(time.time() + overlap_s)
    return key, entry, replace(old, expires=min(until, old.expires or until))


class Keys:
    """Entries to look keys up in."""

    def __init__(self, entries: Mapping[str, KeyEntry]) -> None:
        self._entries = entries
        _, self._nobody = make_key("")

    def tenant(self, authorization: str) -> str:
        """The tenant of a caller.

        Args:
            authorization: what the header of that name holds; "" for none.

        Raises:
            Unauthenticated: it names no key of ours.
        """
        if not authorization:
            raise Unauthenticated(f"an API key is needed; {_HINT}")
        kind, _, key = authorization.partition(" ")
        found = _KEY.fullmatch(key.strip()) if kind.lower() == "bearer" else None
        if found is None:
            raise Unauthenticated(f"the `authorization` header holds no API key; {_HINT}")
        # An unknown id costs what a known one does.
        entry = self._entries.get(found[1], self._nobody)
        if not hmac.compare_digest(_hash(found[2], entry.salt), entry.hash):
            raise Unauthenticated("the API key is not known, or was revoked")
        if entry.expires and time.time() >= entry.expires:
            raise Unauthenticated("the API key was replaced, and its time is over")
        return entry.tenant


class KeyFile:
    """Keys in a file, read again when it changes.

    A file that cannot be read later on leaves the keys as they were, with an error in the log.

    Args:
        path: the file.

    Raises:
        SpecError: it cannot be read now.

    Attributes:
        keys: as of the last reading.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = _stamp(path)
        self.keys = Keys(read_keys(path))

    def refresh(self) -> None:
        """Read the file if it changed; costs one look at its metadata."""
        try:
            stamp = _stamp(self._path)
            if stamp == self._seen:
                return
            self._seen = stamp
            self.keys = Keys(read_keys(self._path))
        except SpecError as error:
            log.error("the API keys stay as they were: %s", error)


def read_keys(path: Path) -> dict[str, KeyEntry]:
    """The entries of a key file, by id.

    Raises:
        SpecError: it is not there, or is no such file: path, entry, field.
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


def add_key(path: Path, tenant: str, note: str = "") -> str:
    """Add a key to the file, which is made if it is not there; gives the key, kept nowhere else.

    Raises:
        SpecError: the file cannot be read.
    """
    key, entry = make_key(tenant, note)
    change_keys(path, [entry], [])
    return key


def revoke_key(path: Path, key_id: str) -> KeyEntry:
    """Take a key out of the file.

    Raises:
        SpecError: the file cannot be read.
        NotFound: no key has the id.
    """
    entry = _one(path, key_id)
    change_keys(path, [], [key_id])
    return entry


def rotate_key(path: Path, key_id: str, overlap_s: float) -> tuple[str, KeyEntry]:
    """Put a key in the place of another; gives it, and its entry. See `rotated`.

    Raises:
        SpecError: the file cannot be read.
        NotFound: no key has the id.
    """
    key, entry, old = rotated(_one(path, key_id), overlap_s)
    put = [entry] if old is None else [entry, old]
    change_keys(path, put, [key_id] if old is None else [])
    return key, entry


def change_keys(path: Path, put: Iterable[KeyEntry], drop: Iterable[str]) -> None:
    """Put entries into the file, in place of those with their ids, and take others out.

    Those whose time is over go too. Safe to do twice.

    Raises:
        SpecError: the file cannot be read.
    """
    with _changing(path) as entries:
        entries |= {one.id: one for one in put}
        now_s = time.time()
        over = [one.id for one in entries.values() if one.expires and one.expires < now_s]
        for key_id in (*drop, *over):
            entries.pop(key_id, None)


def _one(path: Path, key_id: str) -> KeyEntry:
    entries = read_keys(path)
    if key_id not in entries:
        raise NotFound(f"{path} holds no key {key_id!r}; `arriero keys list` shows them")
    return entries[key_id]


@contextmanager
def _changing(path: Path) -> Iterator[dict[str, KeyEntry]]:
    """The entries, written back at the end; one writer at a time, and readers see whole files."""
    lock = path.with_name(f".{path.name}.lock")
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        entries = read_keys(path) if path.exists() else {}
        yield entries
        text = yaml.safe_dump({"keys": [asdict(one) for one in entries.values()]}, sort_keys=False)
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
    return KeyEntry(**given)


def _hash(secret: str, salt: str) -> str:
    return hmac.new(bytes.fromhex(salt), bytes.fromhex(secret), hashlib.sha256).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}; `arriero keys add` makes the file") from None
    return status.st_ino, status.st_mtime_ns, status.st_size
