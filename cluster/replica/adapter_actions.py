"""Arguments and answer of a leader's action on the adapters of the group.

Knows values; knows nothing of the work behind them (see `adapter_admin`) or of callers.
"""

from __future__ import annotations

from dataclasses import dataclass

ACTION = "adapters"


@dataclass(frozen=True, kw_only=True, slots=True)
class WantedAdapter:
    """An adapter that all groups of a model shall serve beside the listed adapters.

    Attributes:
        name: model id for clients.
        path: folder on every node.
        version: counts up when the files are to be read again.
    """

    name: str
    path: str
    version: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterArguments:
    """Arguments of the action.

    Attributes:
        wanted: all adapters beside the listed ones; others are removed. None changes nothing.
        prepare: an adapter to be loaded by every slice, and not yet shown to gateways. The next
            `wanted` shows the adapter, or drops it. Goes without `wanted`; the report has this
            adapter alone.
    """

    wanted: tuple[WantedAdapter, ...] | None = None
    prepare: WantedAdapter | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupAdapter:
    """An adapter of a group.

    Attributes:
        name: model id for clients.
        digest: digest of settings and weights; "" for an adapter that the group cannot serve.
        in_slot: whether the adapter is on the device now.
        error: why the group does not serve the adapter; "" where it does.
    """

    name: str
    digest: str = ""
    in_slot: bool = False
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterReport:
    """The adapters of a group after the action, listed ones included."""

    adapters: tuple[GroupAdapter, ...] = ()
