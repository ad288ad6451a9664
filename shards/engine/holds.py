"""When a group takes no new work, and when its weights change: decisions of the leader, sans-I/O.

A group is paused, asleep (without weights on the device), or both, or neither. One change runs at a
time, in phases:

- check: slices read pushed weights, or receive them from a trainer; requests run as usual.
- drain: requests that have started run to their end; others are held.
- settle: nothing is scheduled; results and copies in flight arrive.
- slices: every slice releases or loads weights.

So an answer is wholly of one version of the weights. Knows counts, phases and results; knows
nothing of requests, blocks, files and threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Literal

from arriero.shards.checkpoint.joined_digest import join_hashes
from arriero.shards.errors import ArrieroError, GroupFailed, InvalidRequest
from arriero.shards.protocol.trainer import AnnouncedTensor, TrainerAddress
from arriero.shards.protocol.weights import WeightsAction, WeightsCommand, WeightsResult

Mode = Literal["keep", "wait", "abort"]
MODES: tuple[Mode, ...] = ("keep", "wait", "abort")


class Gate(Enum):
    """What may be scheduled.

    Attributes:
        OPEN: everything.
        DRAIN: requests that have started.
        CLOSED: nothing.
    """

    OPEN = "open"
    DRAIN = "drain"
    CLOSED = "closed"


class Kind(StrEnum):
    """Kind of a change."""

    PAUSE = "pause"
    RESUME = "resume"
    SLEEP = "sleep"
    WAKE = "wake"
    CHECK = "check"
    PUSH = "push"
    JOIN = "join"
    ANNOUNCE = "announce"
    RECEIVE = "receive"


_BESIDE = {
    Kind.CHECK: WeightsAction.CHECK,
    Kind.PUSH: WeightsAction.CHECK,
    Kind.JOIN: WeightsAction.JOIN,
    Kind.ANNOUNCE: WeightsAction.ANNOUNCE,
    Kind.RECEIVE: WeightsAction.RECEIVE,
}
"""What slices do in the phase "check"."""
_OF_TRAINER = (Kind.JOIN, Kind.ANNOUNCE, Kind.RECEIVE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A change that an operator wants.

    Attributes:
        kind: kind of the change.
        mode: of pause and sleep: what happens to requests that have started: "keep" (they stop and
            go on later), "wait" (they end first) or "abort" (they end with an error).
        level: of sleep: 1 keeps the files of the weights in the host's page cache; 2 does not.
        sources: of check and push: what replaces tensors of the model folder; of announce and
            receive: the same, without the tensors that will come.
        trainer: of join: the group of the trainer.
        tensors: of announce and receive: what the trainer broadcasts.
        file: of announce and receive: file of the nodes that gets the tensors.
    """

    kind: Kind
    mode: Mode = "keep"
    level: int = 1
    sources: tuple[str, ...] = ()
    trainer: TrainerAddress | None = None
    tensors: tuple[AnnouncedTensor, ...] = ()
    file: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """Work of the group at one moment.

    Attributes:
        started: requests that have started and not ended.
        in_flight: plans without a result, and copies of blocks and loads of adapters under way.
    """

    started: int = 0
    in_flight: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What the engine does next.

    Attributes:
        end_all: end all requests with this error; "" for none.
        empty_cache: put started requests back into the queue, and drop every cached block.
        command: command for the slices.
        digest: digest of the weights that serve from now on; "" while they stay.
        loaded: the slices have loaded weights: experts are placed as at the start.
        done: the change has ended; with `error` nothing has changed.
        error: why the change was refused.
    """

    end_all: str = ""
    empty_cache: bool = False
    command: WeightsCommand | None = None
    digest: str = ""
    loaded: bool = False
    done: bool = False
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class HoldStatus:
    """State of a group for people and for tools.

    Attributes:
        paused: whether nothing is scheduled until a resume.
        level: level of the sleep; 0 for a group that is awake.
        change: kind and phase of the running change, such as "push: drain"; "" for none.
        sources: what replaces tensors of the model folder.
        digest: digest of the weights.
        checked: digest of the weights that were checked last; "" for none.
        whole: whether the tensors that were received last make a whole model.
        held: requests that wait for the end of a pause, a sleep or a change.
        weights_bytes, kv_bytes: bytes on the devices of all slices, as last reported; -1 before the
            first sleep or push.
    """

    paused: bool = False
    level: int = 0
    change: str = ""
    sources: tuple[str, ...] = ()
    digest: str = ""
    checked: str = ""
    whole: bool = False
    held: int = 0
    weights_bytes: int = -1
    kv_bytes: int = -1


class _Phase(StrEnum):
    CHECK = "check"
    DRAIN = "drain"
    SETTLE = "settle"
    SLICES = "slices"


@dataclass(slots=True)
class _Running:
    """The running change."""

    change: Change
    phase: _Phase
    digest: str = ""
    results: dict[int, WeightsResult] = field(default_factory=dict)
    sent: bool = False


class Holds:
    """Pause, sleep and weights of a group.

    Args:
        num_ranks: slices of the group.
        digest: digest of the weights at the start.
        sources: what replaces tensors of the model folder at the start.
    """

    def __init__(self, num_ranks: int, digest: str = "", sources: tuple[str, ...] = ()) -> None:
        self._num_ranks = num_ranks
        self._paused, self._level = False, 0
        self._digest, self._sources = digest, sources
        self._running: _Running | None = None
        self._commands = 0
        self._bytes = (-1, -1)
        self._good: tuple[tuple[str, ...], str] = ((), "")
        self._whole = False

    @property
    def gate(self) -> Gate:
        """What may be scheduled now."""
        phase = None if self._running is None else self._running.phase
        if phase in (_Phase.SETTLE, _Phase.SLICES) or self._paused or self._level:
            return Gate.CLOSED
        return Gate.DRAIN if phase is _Phase.DRAIN else Gate.OPEN

    @property
    def digest(self) -> str:
        """Digest of the weights that serve."""
        return self._digest

    @property
    def busy(self) -> bool:
        """Whether a change is running."""
        return self._running is not None

    @property
    def waits_for_slices(self) -> bool:
        """Whether commands to slices are without a result."""
        return self._running is not None and self._running.sent

    def status(self, held: int = 0) -> HoldStatus:
        """The state, with the number of held requests."""
        running = self._running
        return HoldStatus(
            paused=self._paused,
            level=self._level,
            change="" if running is None else f"{running.change.kind}: {running.phase}",
            sources=self._sources,
            digest=self._digest,
            checked=self._good[1],
            whole=self._whole,
            held=held,
            weights_bytes=self._bytes[0],
            kv_bytes=self._bytes[1],
        )

    def begin(self, change: Change, activity: Activity) -> bool:
        """Begin a change; whether it has ended at once.

        Raises:
            InvalidRequest: another change is running, or this change makes no sense now.
        """
        if self._running is not None:
            state = self.status().change
            raise InvalidRequest("change", f"the group is in the middle of {state}; try again")
        if change.kind is Kind.RESUME:
            self._paused = False
            return True
        if change.kind is Kind.WAKE:
            if not self._level:
                return True
            self._running = _Running(change, _Phase.SLICES)
            return False
        if change.kind is Kind.CHECK or change.kind in _OF_TRAINER:
            self._running = _Running(change, _Phase.CHECK)
            return False
        if change.kind is Kind.PUSH:
            self._refuse_frozen(activity)
            self._running = _Running(change, _Phase.CHECK)
            if self._good[1] and self._good[0] == change.sources:
                self._running.digest = self._good[1]
            return False
        if change.kind is Kind.SLEEP and self._level:
            if change.level > self._level:
                self._running = _Running(change, _Phase.SLICES)
                return False
            return True
        if change.kind is Kind.PAUSE and self._paused and not activity.started:
            return True
        drains = change.mode == "wait" and not self._paused and not self._level
        self._running = _Running(change, _Phase.DRAIN if drains else _Phase.SETTLE)
        return False

    def _refuse_frozen(self, activity: Activity) -> None:
        """Refuse a push while stopped requests have tokens of the weights before."""
        if (self._paused or self._level) and activity.started:
            raise InvalidRequest(
                "change",
                f"{activity.started} requests have begun and are stopped; an answer of two versions"
                " is refused: resume first, or pause with mode wait or abort",
            )

    def apply(self, result: WeightsResult) -> None:
        """Take a slice's result; results of an earlier command are ignored."""
        running = self._running
        if running is not None and running.sent and result.number == self._commands:
            running.results[result.rank] = result

    def next(self, activity: Activity) -> Step | None:
        """What the engine does now; None while the change waits. Call until None."""
        running = self._running
        if running is None:
            return None
        if running.phase in (_Phase.CHECK, _Phase.SLICES):
            return self._with_slices(running)
        change = running.change
        if running.phase is _Phase.DRAIN:
            if activity.started:
                return None
            running.phase = _Phase.SETTLE
        if change.mode == "abort" and activity.started:
            word = "paused" if change.kind is Kind.PAUSE else "put to sleep"
            return Step(end_all=f"the group was {word} by an operator, with mode abort")
        if activity.in_flight:
            return None
        if change.kind is Kind.PAUSE:
            self._paused, self._running = True, None
            return Step(done=True)
        running.phase = _Phase.SLICES
        return Step(empty_cache=True)

    def _with_slices(self, running: _Running) -> Step | None:
        change = running.change
        if running.phase is _Phase.CHECK and running.digest:  # checked by a change before
            return self._after_check(running)
        if not running.sent:
            running.sent = True
            self._commands += 1
            return Step(command=self._command(running))
        if len(running.results) < self._num_ranks:
            return None
        results = [running.results[rank] for rank in sorted(running.results)]
        running.results, running.sent = {}, False
        errors = [f"slice {r.rank}: {r.error}" for r in results if r.error]
        if change.kind in _OF_TRAINER:
            self._running = None
            self._whole = not errors and all(result.whole for result in results)
            return Step(done=True, error="; ".join(errors)[:1000])
        if running.phase is _Phase.CHECK:
            return self._checked(running, results, errors)
        if errors:  # some slices may have other weights than the others by now
            raise GroupFailed(f"{change.kind}: {'; '.join(errors)[:1000]}")
        self._bytes = sum(r.weights_bytes for r in results), sum(r.kv_bytes for r in results)
        self._running = None
        if change.kind is Kind.SLEEP:
            self._level = change.level
            return Step(done=True)
        if change.kind is Kind.WAKE:
            self._level = 0
            return Step(done=True, loaded=True)
        self._sources, self._digest = change.sources, running.digest
        return Step(done=True, digest=running.digest, loaded=True)

    def _checked(self, running: _Running, results: list[WeightsResult], errors: list[str]) -> Step:
        """Every slice has read the pushed weights."""
        shapes = {(result.shape, result.sample) for result in results}
        if not errors and len(shapes) > 1:
            errors = ["the slices read different files: copy the weights to every node"]
        if not errors:
            try:
                parts = [result.hashes or {} for result in results]
                running.digest = join_hashes(results[0].shape, parts)
            except ArrieroError as error:
                errors = [str(error)]
        if errors:
            self._running = None
            return Step(done=True, error=errors[0])
        self._good = running.change.sources, running.digest
        if running.change.kind is Kind.CHECK:
            self._running = None
            return Step(done=True)
        return self._after_check(running)

    def _after_check(self, running: _Running) -> Step:
        """The pushed weights are good: end the old weights' requests, or nothing is to do."""
        self._good = ((), "")
        if running.digest == self._digest:
            self._sources, self._running = running.change.sources, None
            return Step(done=True)
        if self._level:  # nothing is loaded: the wake loads the new weights
            self._sources, self._digest = running.change.sources, running.digest
            self._running = None
            return Step(done=True, digest=running.digest)
        running.phase = _Phase.DRAIN
        return Step()

    def _command(self, running: _Running) -> WeightsCommand:
        change, number = running.change, self._commands
        if running.phase is _Phase.CHECK:
            return WeightsCommand(
                number=number,
                action=_BESIDE[change.kind],
                sources=change.sources,
                trainer=change.trainer,
                tensors=change.tensors,
                file=change.file,
            )
        if change.kind is Kind.SLEEP:
            return WeightsCommand(
                number=number, action=WeightsAction.RELEASE, keep_on_host=change.level < 2
            )
        sources = change.sources if change.kind is Kind.PUSH else self._sources
        return WeightsCommand(number=number, action=WeightsAction.LOAD, sources=sources)
