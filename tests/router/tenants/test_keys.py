"""Keys in a file: replaced with an overlap, and refused once it is over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from arriero.router.tenants.keys import Keys, add_key, change_keys, read_keys, rotate_key
from arriero.shards.errors import NotFound, SpecError, Unauthenticated


def test_a_rotated_key_is_taken_for_a_while(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    old = add_key(path, "acme", "the shop")
    old_id = old.split("-")[1]
    new, entry = rotate_key(path, old_id, 3600)
    entries = read_keys(path)
    assert (entry.tenant, entry.note, entry.expires) == ("acme", "the shop", 0)
    keys = Keys(entries)
    assert {keys.entry(f"Bearer {one}").tenant for one in (old, new)} == {"acme"}

    over = replace(entries[old_id], expires=1)
    with pytest.raises(Unauthenticated, match="has expired"):
        Keys({**entries, old_id: over}).entry(f"Bearer {old}")
    rotate_key(path, old_id, 7200)  # an overlap is never made longer
    assert read_keys(path)[old_id].expires == entries[old_id].expires
    change_keys(path, [over], [])  # and what is over leaves the file
    assert old_id not in read_keys(path)
    with pytest.raises(NotFound, match="keys list"):
        rotate_key(path, old_id, 0)


def test_a_key_can_be_cut_off_at_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    old = add_key(path, "acme")
    new, _ = rotate_key(path, old.split("-")[1], 0)
    keys = Keys(read_keys(path))
    assert keys.entry(f"Bearer {new}").tenant == "acme"
    with pytest.raises(Unauthenticated, match="revoked"):
        keys.entry(f"Bearer {old}")


def test_an_expiry_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    add_key(path, "acme")
    path.write_text(path.read_text().replace("expires: 0", "expires: never"))
    with pytest.raises(SpecError, match=r"`keys\[0\].expires` must be a int"):
        read_keys(path)
