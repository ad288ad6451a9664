"""Prompt Guard 2: how likely a text tries to take over a model (injection, jailbreak).

A classifier of Hugging Face (DeBERTa-v2), run through transformers, which `arriero[guard]`
installs; an optional check beside the guard models that groups serve. Knows the classifier; knows
nothing of requests and policies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from arriero.router.guards.text_windows import split_windows, whole_score
from arriero.shards.errors import CheckpointError, SpecError, Unavailable

MALICIOUS = ("malicious", "jailbreak", "injection")
"""Labels of attacks; the last label where a config names its labels LABEL_0, LABEL_1."""


class PromptGuard:
    """A classifier in this process.

    Args:
        path: folder with config.json, weights and tokenizer.
        batch: windows that are computed together.
        threads: CPU threads; None leaves torch's number.

    Raises:
        SpecError: transformers is not installed.
        CheckpointError: the folder holds no classifier.
    """

    def __init__(self, path: str, *, batch: int = 8, threads: int | None = None) -> None:
        if not (Path(path) / "config.json").is_file():  # transformers would take it for a Hub name
            raise CheckpointError(
                f"{path}: no classifier of prompts: no config.json; copy the folder of Prompt Guard"
                " 2 to this node"
            )
        try:
            import transformers  # an optional part; only this class needs it
        except ImportError as error:
            raise SpecError(
                f"Prompt Guard needs transformers ({error}); pip install 'arriero[guard]'"
            ) from error
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            library: Any = transformers  # its functions lack types
            self._tokenizer = library.AutoTokenizer.from_pretrained(path, local_files_only=True)
            classifier = library.AutoModelForSequenceClassification
            model = classifier.from_pretrained(path, dtype=torch.float32, local_files_only=True)
            self._model = model.eval()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: no classifier of prompts: {error}") from error
        self._batch = batch
        self._attacks = _attack_rows(self._model.config.id2label)
        most = int(self._model.config.max_position_embeddings)
        self._size = most - 2  # the two special tokens of `_with_specials`

    def scores(self, texts: Sequence[str], limit_s: float = math.inf) -> list[float]:
        """Probability of an attack for each text, 0 to 1; a long text has its worst window's.

        Args:
            texts: the texts.
            limit_s: seconds after which the computation ends.

        Raises:
            Unavailable: the computation took longer than `limit_s`.
        """
        deadline_s = time.monotonic() + limit_s
        return [self._score(text, deadline_s) for text in texts]

    def _score(self, text: str, deadline_s: float) -> float:
        ids = self._tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"]
        overlap = min(64, self._size // 4)
        windows = split_windows(ids, size=self._size, overlap=overlap)
        found: list[float] = []
        for start in range(0, len(windows), self._batch):
            if time.monotonic() > deadline_s:
                raise Unavailable("the texts are too long to be scored in time; send shorter texts")
            rows = [self._with_specials(window) for window in windows[start : start + self._batch]]
            batch = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            with torch.inference_mode():
                logits = self._model(**batch).logits.float()
            found += logits.softmax(-1)[:, self._attacks].sum(-1).tolist()
        return whole_score(found)

    def _with_specials(self, window: Sequence[int]) -> list[int]:
        begin, end = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        return [begin, *window, end]


def _attack_rows(labels: dict[int, str]) -> list[int]:
    """Rows of the logits whose labels mean an attack."""
    named = [row for row, label in labels.items() if label.lower() in MALICIOUS]
    return named or [max(labels)]
