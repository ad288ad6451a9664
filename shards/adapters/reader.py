"""Opens adapters for a group's slots: only within the folder of adapters, only what slots can hold.

Leader and slices open an adapter through a reader before any decision depends on the contents.
Knows paths, ranks and modules; knows nothing of slots' contents and of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arriero.shards.adapters.adapter import Adapter
from arriero.shards.adapters.bank_plan import adapted_modules, slot_modules
from arriero.shards.adapters.root import check_regular, check_root
from arriero.shards.config.adapters import AdapterSlots
from arriero.shards.errors import CheckpointError
from arriero.shards.families.registry import family_of
from arriero.shards.layout.parts import AnyModel


class AdapterReader:
    """Opens the adapters of a group.

    Args:
        slots: room for adapters.
        model: config of the model.
        listed: the listed adapters, already open.
        model_path: folder of the model; "" refuses adapters with a copy of the model's tables.

    Raises:
        CheckpointError: a listed adapter does not fit the slots.
    """

    def __init__(
        self,
        slots: AdapterSlots,
        model: AnyModel,
        listed: Sequence[Adapter],
        model_path: str = "",
    ) -> None:
        self._slots, self._model_path = slots, model_path
        self._modules = adapted_modules(family_of(model).modules(model, True))
        changed = {name for adapter in listed for name in adapter.names}
        self._covered = slot_modules(self._modules, changed)
        for adapter in listed:
            check_root(adapter.folder.path, slots.root)
            self._check_room(adapter)

    def open(self, path: str) -> Adapter:
        """Read settings and headers of an adapter, and check that a slot can hold it.

        Raises:
            CheckpointError: the path is outside of the root, the folder holds no adapter of the
                model, or a slot cannot hold the adapter; the text names the field or the tensor.
        """
        folder = Path(path)
        check_root(folder, self._slots.root)
        check_regular(folder)
        adapter = Adapter.open(folder, self._modules, self._model_path)
        self._check_room(adapter)
        return adapter

    def _check_room(self, adapter: Adapter) -> None:
        where, most = adapter.folder.path, self._slots.max_rank
        if adapter.rank > most:
            raise CheckpointError(
                f"{where}: rank {adapter.rank} exceeds `max_adapter_rank`={most}; raise it in the "
                "spec, or train an adapter of a lower rank"
            )
        missing = [name for name in adapter.names if name not in self._covered]
        if missing:
            raise CheckpointError(
                f"{where}: {missing[0]!r} is not covered by `adapter_slots`; list an adapter of "
                "routed experts in the spec, so that slots cover them"
            )
