"""Messages between leader and slices about the weights of a group: check, receive, release, load.

The leader decides. A command travels on the channel of the plans, behind all plans so far: so a
slice releases and loads weights between two steps. All other actions run in a thread beside the
steps.
Knows the contents of a message; knows nothing of files and tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from arriero.shards.protocol.trainer import AnnouncedTensor, TrainerAddress


class WeightsAction(StrEnum):
    """What a slice does with weights.

    Attributes:
        CHECK: read the files of `sources` beside the steps, and report their digest.
        JOIN: join the broadcast group of a trainer.
        ANNOUNCE: compare the tensors that will come with the model and with the free memory.
        RECEIVE: receive the tensors from the trainer, into `file`.
        RELEASE: give the memory of weights and KV cache back.
        LOAD: load the weights of `sources` and an empty KV cache, in place of those before.
    """

    CHECK = "check"
    JOIN = "join"
    ANNOUNCE = "announce"
    RECEIVE = "receive"
    RELEASE = "release"
    LOAD = "load"

    @property
    def between_steps(self) -> bool:
        """Whether no step may run meanwhile."""
        return self in (WeightsAction.RELEASE, WeightsAction.LOAD)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsCommand:
    """A command to every slice.

    Attributes:
        number: number of the command; results repeat it.
        action: what the slice does.
        sources: folders and files whose tensors replace those of the model folder, in order.
        keep_on_host: of RELEASE: whether the files stay in the host's page cache.
        trainer: of JOIN: the group to join.
        tensors: of ANNOUNCE and RECEIVE: what the trainer broadcasts, in this order.
        file: of ANNOUNCE and RECEIVE: file of the node that gets the tensors.
    """

    number: int
    action: WeightsAction
    sources: tuple[str, ...] = ()
    keep_on_host: bool = True
    trainer: TrainerAddress | None = None
    tensors: tuple[AnnouncedTensor, ...] = ()
    file: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsResult:
    """The end of a command on one rank.

    Attributes:
        rank: rank that reports.
        number: number of the command.
        error: why the weights are refused; "" after success.
        shape: of CHECK: digest of settings, names, dtypes and shapes.
        sample: of CHECK: digest of bytes of each tensor; with `shape`, equal on all ranks that read
            the same files.
        hashes: of CHECK: digests of whole tensors by place in the sorted names; each tensor is on
            one rank.
        whole: of RECEIVE: the folder of `file` holds every tensor of the model.
        weights_bytes: bytes of weights on the device after the command.
        kv_bytes: bytes of the KV cache on the device after the command.
    """

    rank: int
    number: int
    error: str = ""
    shape: str = ""
    sample: str = ""
    hashes: dict[int, bytes] | None = None
    whole: bool = False
    weights_bytes: int = 0
    kv_bytes: int = 0
