"""Bodies of the paths that change weights, in the shapes of vLLM.

Knows fields and limits; knows nothing of groups and tensors.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

MOST_TENSORS = 200_000
_Name = Annotated[str, Field(max_length=512)]
_Shape = Annotated[list[NonNegativeInt], Field(max_length=16)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class InitInfo(_Body):
    """The broadcast group of a trainer, which is rank 0.

    Attributes:
        master_address, master_port: of the trainer's `TCPStore`.
        rank_offset: rank of the first slice.
        world_size: the trainer and all slices (`/get_world_size` counts them).
        timeout_s: longest wait for the other ranks, and for one tensor, in seconds.
        packed: several tensors in one broadcast; only false is possible.
    """

    master_address: Annotated[str, Field(min_length=1, max_length=253)]
    master_port: Annotated[int, Field(ge=1, le=65535)]
    rank_offset: Annotated[int, Field(ge=1, le=1 << 20)] = 1
    world_size: Annotated[int, Field(ge=2, le=1 << 20)]
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 120.0
    packed: Literal[False] = False


class UpdateInfo(_Body):
    """Tensors that the trainer broadcasts, in this order.

    Attributes:
        names: of whole tensors of the model folder.
        dtype_names: of torch, such as "bfloat16".
        shapes: of whole tensors.
        packed: several tensors in one broadcast; only false is possible.
    """

    names: Annotated[list[_Name], Field(min_length=1, max_length=MOST_TENSORS)]
    dtype_names: list[Annotated[str, Field(max_length=64)]]
    shapes: list[_Shape]
    packed: Literal[False] = False

    @model_validator(mode="after")
    def _same_lengths(self) -> Self:
        counts = len(self.names), len(self.dtype_names), len(self.shapes)
        if len(set(counts)) > 1:
            raise ValueError(
                "names, dtype_names and shapes have {}, {} and {} entries; give one for each "
                "tensor".format(*counts)
            )
        return self


class InitBody(_Body):
    """Body of `/init_weight_transfer_engine`."""

    init_info: InitInfo


class StartBody(_Body):
    """Body of `/start_weight_update`.

    Attributes:
        is_checkpoint_format: names and shapes are those of the model folder; only true is possible.
        update_info: tensors to compare with the model at once.
    """

    is_checkpoint_format: Literal[True] = True
    update_info: UpdateInfo | None = None


class UpdateBody(_Body):
    """Body of `/update_weights`: either `path` or `update_info`.

    Attributes:
        path: checkpoint folder, or a folder or file with some tensors, on every node.
        update_info: tensors that the trainer broadcasts now.
        model: the model; may be left out where only one is served.
    """

    path: str = ""
    update_info: UpdateInfo | None = None
    model: str = ""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.path) == (self.update_info is not None):
            raise ValueError("give either `path` or `update_info`")
        return self


class FinishBody(_Body):
    """Body of `/finish_weight_update`.

    Attributes:
        weight_version: the trainer's name of the version, for the history of the deployment.
    """

    weight_version: Annotated[str, Field(max_length=128)] | int | None = None
