"""Tables of Admin's status for the terminal. Knows messages and tables; knows nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Column, Table
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
    """Gateways, Prompt Guard, models, groups and the latest failures."""
    addresses = ", ".join(gateway.address for gateway in status.gateways) or "none"
    parts: list[RenderableType] = [Text(f"gateways: {addresses}")]
    if http := [gateway.http for gateway in status.gateways if gateway.http]:
        parts.append(Text(f"HTTP: {', '.join(http)}"))
    if status.HasField("prompt_guard"):
        parts.append(Text(_prompt_guard(status.prompt_guard)))
    for model in status.models:
        state = "as desired" if model.settled else "changing"
        text = f"{model.model}: {model.serving} of {model.groups} groups serve, "
        if model.spares:
            text += f"{model.standing_by} of {model.spares} spares stand by, "
        parts.append(
            Text(f"{text}revision {model.revision}, {state}{_rollout(model)}{queue(model)}")
        )
    columns = ["group", "phase", "layout", "running", "waiting", "KV blocks", "output tokens"]
    mixtures = any(group.expert_loads for group in status.groups)
    table = Table(
        Column("group", overflow="fold"), *columns[1:], *(["expert load"] if mixtures else [])
    )
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
    parts.append(nodes_view(status))
    parts += [Text(f"{group.seat}: {group.text}") for group in status.groups if group.text]
    parts += [
        Text(f"{group.id}: {accepted_length(group)} tokens of a step with drafts (share right)")
        for group in status.groups
        if group.drafts
    ]
    for failure in status.failures[-3:]:
        recovery = ""
        if failure.HasField("recovered_s"):
            recovery = f" (served again after {failure.recovered_s:.1f} s)"
        parts.append(Text(f"{failure.who} failed: {failure.cause}{recovery}"))
    return Group(*parts)


def _prompt_guard(guard: pb.PromptGuardStatus) -> str:
    """The processes of Prompt Guard, in words."""
    text = "Prompt Guard"
    if guard.HasField("running"):
        text += f": {guard.running} of {guard.replicas} processes run"
        if not guard.running:
            text += "; `on_loss` of each policy decides"
    return text + (f": {guard.text}" if guard.text else "")


def _rollout(model: pb.ModelStatus) -> str:
    """The state of a model's rollout, in words; "" for nothing to say."""
    text = "; the rollout is paused" if model.paused else ""
    if model.HasField("deadline_left_s"):
        text += f"; {model.deadline_left_s:.0f} s until the rollout is taken back"
    return text + (f"; taken back: {model.rolled_back}" if model.rolled_back else "")


def nodes_view(status: pb.Status) -> RenderableType:
    """The nodes of the cluster, with what is free and which groups are there."""
    gpus = any(node.gpus for node in status.nodes)
    table = Table(
        "node", "state", "CPUs free", *(["GPUs free"] if gpus else []), "memory", "groups"
    )
    for node in status.nodes:
        name = node.address if node.hostname in ("", node.address) else node.hostname
        state = Text("draining", style="yellow") if node.draining else Text("up", style="green")
        if node.head:
            state.append(", head", style="")
        table.add_row(
            Text(f"{name} ({node.id[:8]})"),
            state,
            f"{node.cpus_free:g} of {node.cpus:g}",
            *([f"{node.gpus_free:g} of {node.gpus:g}"] if gpus else []),
            f"{node.memory / 1e9:.1f} GB" if node.memory else "",
            Text(", ".join(node.groups)),
        )
    return table


def accepted_length(group: pb.GroupStatus) -> str:
    """Mean tokens of a row with a draft, and the share of drafted tokens that were right."""
    if not group.drafts:
        return "-"
    mean = 1 + group.accepted_tokens / group.drafts
    return f"{mean:.1f} ({group.accepted_tokens / max(1, group.drafted_tokens):.0%})"


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
