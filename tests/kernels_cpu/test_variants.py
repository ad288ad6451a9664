"""Which variant of the library is loaded: by the CPU's flags, by name, and never amx unasked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from arriero.kernels.cpu import library


@pytest.fixture
def every_flag(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that runs every variant, all of them built; loading gives the name alone."""
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(library, "cpu_flags", lambda: set().union(*library._FLAGS.values()))
    monkeypatch.setattr(library, "find", lambda variant: Path(f"_{variant}.so"))
    monkeypatch.setattr(library, "Library", lambda variant, path: variant)
    monkeypatch.delenv("ARRIERO_CPU_VARIANT", raising=False)
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.mark.usefixtures("every_flag")
def test_amx_is_loaded_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.runnable() == list(library.VARIANTS)
    assert library.load() == "avx512bf16"
    assert library.load("amx") == "amx"
    library.load.cache_clear()
    monkeypatch.setenv("ARRIERO_CPU_VARIANT", "amx")
    assert library.load() == "amx"


def test_a_variant_needs_every_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    for name, flags in library._FLAGS.items():
        monkeypatch.setattr(library, "cpu_flags", lambda flags=flags: set(flags))
        assert library.runnable()[0] == name
        for flag in flags:
            monkeypatch.setattr(library, "cpu_flags", lambda left=flags - {flag}: left)
            assert name not in library.runnable()


@pytest.mark.usefixtures("every_flag")
def test_registers_that_linux_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant named but not granted: the reason, and what to do."""

    def refuse(variant: str, path: Path) -> None:
        raise OSError(f"{path.name}: no registers")

    monkeypatch.setattr(library, "Library", refuse)
    with pytest.raises(RuntimeError, match=r"amx: _amx\.so: no registers"):
        library.load("amx")
