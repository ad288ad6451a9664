"""Greedy tokens of a reference in few passes, and SmolLM2 with fewer layers.

Knows how greedy decoding is checked; knows nothing of the engine that is compared with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from arriero.shards.checkpoint.tensor_folder import TensorFolder
from support.models import write_safetensors


def greedy(
    logits_of: Callable[[list[int]], Tensor], prompt: Sequence[int], draft: Sequence[int]
) -> tuple[list[int], Tensor]:
    """The reference's own greedy continuation, as long as the draft.

    One pass over prompt and draft gives the greedy token after each position. From the first
    token on that differs from the draft, the pass's own tokens are the next draft. So the result
    is the reference's whatever the draft says; a right draft only saves passes.

    Args:
        logits_of: the reference: logits [T, V] of a sequence of T tokens.
        prompt: token ids.
        draft: guesses of the tokens that follow, at least one.

    Returns:
        The tokens, and the logits [tokens, V] that chose each.
    """
    tokens = list(draft)
    while True:
        logits = logits_of([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        best = logits.argmax(-1).tolist()
        if best == tokens:
            return tokens, logits
        right = next(i for i, token in enumerate(tokens) if token != best[i])
        tokens = tokens[:right] + best[right:]


def first_layers(source: Path, target: Path, num_layers: int) -> None:
    """Write a checkpoint folder of the first layers of a dense one, without a tokenizer."""
    target.mkdir(parents=True)
    settings = json.loads((source / "config.json").read_text())
    settings["num_hidden_layers"] = num_layers
    (target / "config.json").write_text(json.dumps(settings))
    folder = TensorFolder.of(source)

    def stays(name: str) -> bool:
        _, _, layer = name.partition(".layers.")
        return not layer or int(layer.split(".")[0]) < num_layers

    tensors = {name: folder.tensor(name) for name in folder.names if stays(name)}
    write_safetensors(target / "model.safetensors", tensors)
