"""Tables of Admin's status for the terminal. Knows messages and tables; knows nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from arriero.router.proto.arriero.v1 import admin_pb2 as pb

_STYLES = {
    "serving": "green",
    "starting": "yellow",
    "stopping": "yellow",
    "standby": "cyan",
    "failed": "red",
}


def status_view(status: pb.Status) -> RenderableType:
    """Gateways, models, groups and the latest failures."""
    addresses = ", ".join(gateway.address for gateway in status.gateways) or "none"
    parts: list[RenderableType] = [Text(f"gateways: {addresses}")]
    if http := [gateway.http for gateway in status.gateways if gateway.http]:
        parts.append(Text(f"HTTP: {', '.join(http)}"))
    for model in status.models:
        state = "as desired" if model.settled else "changing"
        text = f"{model.model}: {model.serving} of {model.groups} groups serve, "
        if model.spares:
            text += f"{model.standing_by} of {model.spares} spares stand by, "
        parts.append(Text(f"{text}revision {model.revision}, {state}{queue(model)}"))
    columns = ["group", "phase", "layout", "running", "waiting", "KV blocks", "output tokens"]
    mixtures = any(group.expert_loads for group in status.groups)
    table = Table(*columns, *(["expert load"] if mixtures else []))
    for group in status.groups:
        load = [f"{group.expert_imbalance:.2f} of even" if group.expert_loads else ""]
        table.add_row(
            Text(group.id or group.seat),
            Text(group.phase, style=_STYLES.get(group.phase, "")),
            group.layout,
            str(group.running),
            str(group.waiting),
            f"{group.blocks_used} of {group.blocks_total}" if group.blocks_total else "",
            str(group.output_tokens),
            *(load if mixtures else []),
        )
    parts.append(table)
    parts += [Text(f"{group.seat}: {group.text}") for group in status.groups if group.text]
    for failure in status.failures[-3:]:
        recovery = ""
        if failure.HasField("recovered_s"):
            recovery = f" (served again after {failure.recovered_s:.1f} s)"
        parts.append(Text(f"{failure.who} failed: {failure.cause}{recovery}"))
    return Group(*parts)


def queue(model: pb.ModelStatus) -> str:
    """Requests that wait in the gateways, in words; "" for none."""
    if not model.queued:
        return ""
    return f"; {model.queued} wait in gateways, {model.wait_s:.1f} s"


def experts_view(group: pb.GroupStatus) -> RenderableType:
    """The load of a group's experts, with a row per layer."""
    table = Table("layer", "tokens", "busiest experts (share of even)", "idle experts")
    for layer in group.expert_loads:
        total, count = sum(layer.tokens), len(layer.tokens)
        busiest = sorted(range(count), key=lambda e: -layer.tokens[e])[:4]
        shares = [f"{e} ({layer.tokens[e] * count / max(total, 1):.2f})" for e in busiest]
        idle = sum(tokens == 0 for tokens in layer.tokens)
        table.add_row(str(layer.layer), str(total), ", ".join(shares), f"{idle} of {count}")
    text = f"{group.id}: the busiest slice has {group.expert_imbalance:.2f} of an even share"
    return Group(Text(f"{text}; experts were moved {group.expert_moves} times"), table)
