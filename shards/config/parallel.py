"""How a group divides its model over ranks.

Knows axes, ranks and the limits that a model's sizes set; knows nothing of devices and of the parts
that each rank gets (`shards/layout/`).
"""

from __future__ import annotations

from dataclasses import dataclass

from arriero.shards.errors import SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class RankCoordinates:
    """Position of a rank in the mesh of its group, each axis from 0."""

    stage: int
    dp_rank: int
    tp_rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """The mesh of a group: `pp` stages of `dp` x `tp` ranks.

    Rank = (stage * dp + dp rank) * tp + tp rank. A rank runs in one slice.

    Attributes:
        tp: slices of a stage that share the attention of a sequence (tensor parallel).
        pp: pipeline stages.
        dp: data-parallel ranks of attention (mixtures of experts only): a stage has `dp` times
            `tp` slices, and each `tp` of the slices have sequences of their own.
        ep: parts of each layer's experts; divides `dp` * `tp`; None means a part for each slice of
            a stage.
        tp_shares: relative size of each tp rank's share; None is as even as the heads allow.
        layer_split: layers of each stage; None splits by cost.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int | None = None
    tp_shares: tuple[float, ...] | None = None
    layer_split: tuple[int, ...] | None = None

    def __str__(self) -> str:
        text = f"TP{self.tp}"
        if self.dp > 1:
            text += f"xDP{self.dp}"
        if self.pp > 1:
            text += f"xPP{self.pp}"
        if self.ep is not None:
            text += f" EP{self.ep}"
        return text

    @property
    def stage_size(self) -> int:
        """Number of ranks of a stage."""
        return self.tp * self.dp

    @property
    def world_size(self) -> int:
        """Number of ranks of the group, and of its slices."""
        return self.stage_size * self.pp

    @property
    def num_expert_parts(self) -> int:
        """`ep`, with None resolved."""
        return self.stage_size if self.ep is None else self.ep

    def coordinates(self, rank: int) -> RankCoordinates:
        """The position of a rank."""
        return RankCoordinates(
            stage=rank // self.stage_size,
            dp_rank=self.dp_rank_of(rank),
            tp_rank=rank % self.tp,
        )

    def dp_rank_of(self, rank: int) -> int:
        """The data-parallel rank of a rank."""
        return rank // self.tp % self.dp

    def check(self) -> None:
        """Refuse a mesh that no model can have.

        Raises:
            SpecError: names the field, its value and the limit.
        """
        for axis, size in (("tp", self.tp), ("pp", self.pp), ("dp", self.dp)):
            if size < 1:
                raise SpecError(f"`{axis}`={size} must be at least 1")
        _check_entries("tp_shares", self.tp_shares, "tp", self.tp, "numbers")
        _check_entries("layer_split", self.layer_split, "pp", self.pp, "counts")

    def check_fits(self, *, num_layers: int, num_heads: int, num_experts: int) -> None:
        """Refuse a mesh that does not fit a model.

        Args:
            num_layers: layers of the model.
            num_heads: query heads of a layer.
            num_experts: routed experts of a layer; 0 for a dense model.

        Raises:
            SpecError: names the field, its value and the limit.
        """
        limits = (
            ("tp", self.tp, num_heads, "query heads"),
            ("pp", self.pp, num_layers, "layers"),
        )
        for axis, size, limit, unit in limits:
            if not 1 <= size <= limit:
                raise SpecError(f"`{axis}`={size} must be 1 to {limit}, the model's {unit}")
        self.check()
        if self.layer_split is not None and sum(self.layer_split) != num_layers:
            raise SpecError(
                f"`layer_split`={self.layer_split} adds up to {sum(self.layer_split)}; it must add "
                f"up to {num_layers}, the model's layers"
            )
        if num_experts:
            self._check_experts(num_experts)
        elif self.dp != 1 or self.ep not in (None, 1):
            raise SpecError(
                f"`dp`={self.dp}, `ep`={self.ep}: a dense model has no experts to spread; set both "
                "to 1 and use more groups instead"
            )

    def _check_experts(self, num_experts: int) -> None:
        if self.dp > 1 and self.ep not in (None, self.stage_size):
            raise SpecError(
                f"`ep`={self.ep}: with `dp`={self.dp} experts are dealt to all {self.stage_size} "
                "slices of a stage; leave `ep` out"
            )
        parts = self.num_expert_parts
        if parts < 1 or self.stage_size % parts or parts > num_experts:
            raise SpecError(
                f"`ep`={parts} must divide the {self.stage_size} ranks of a stage (dp * tp) and be "
                f"at most {num_experts}, the model's experts"
            )


def _check_entries(
    field: str, values: tuple[float, ...] | None, axis: str, size: int, kind: str
) -> None:
    """Refuse a field that does not have a positive entry for each part of an axis."""
    if values is None:
        return
    if len(values) != size:
        raise SpecError(
            f"`{field}` has {len(values)} entries for {axis}={size}; give {size} positive {kind}"
        )
    if min(values) <= 0:
        raise SpecError(f"`{field}`={values} must be {size} positive {kind}")
