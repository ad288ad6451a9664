"""Can this folder be served? All that would stop a group or a gateway later, told at once.

One function for `arriero up`, `rollout` and `models verify`, so that what one passes the others
take: config and weights' headers as `verify` reads them, the text side as a gateway builds it, and
for a deployment the mesh and sizes as a group's leader decides them. Knows folders and settings;
knows nothing of clusters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.shards.errors import ArrieroError, CheckpointError, SpecError

if TYPE_CHECKING:
    from arriero.cluster.spec.model import ModelSpec
    from arriero.router.text.model_card import ModelCard
    from arriero.shards.checkpoint.reader import Checkpoint
    from arriero.shards.checkpoint.verify import Report, VerifyProgress
    from arriero.shards.layout.parts import AnyModel

MOST_PROBLEMS = 20
"""Told of one folder; the rest is counted."""


def check_models(models: Iterable[ModelSpec]) -> None:
    """Refuse a deployment of which a group or a gateway could not start.

    Models at a URL are looked at where they are fetched.

    Raises:
        CheckpointError: a folder is not what it should be: file, defect and remedy.
        SpecError: the mesh or a size does not fit the model.
    """
    from arriero.shards.checkpoint.remote import is_url

    for model in models:
        if not is_url(model.path):
            check_settings(model, Path(model.path))
            refuse(check_folder(Path(model.path)), model.name)


def check_opened(opened: Checkpoint, model: ModelSpec) -> None:
    """The same of one model whose headers are read, at a URL perhaps, on the machine it is on.

    Raises:
        CheckpointError: as above.
        SpecError: as above.
    """
    check_settings(model, opened.path)
    if told := text_problems(opened.path):
        raise CheckpointError(f"model `{model.name}`: {'; '.join(told)}")
    opened.check_whole()


def check_folder(
    folder: Path, deep: bool = False, progress: VerifyProgress | None = None
) -> Report:
    """All that is wrong with a model folder: weights, config and text files.

    Args:
        folder: where it is.
        deep: also read every byte of the weights.
        progress: told of the bytes read by a deep look.
    """
    problems = text_problems(folder)  # first: torch, which weights need, takes seconds to load
    from arriero.shards.checkpoint.verify import verify

    report = verify(folder, deep=deep, progress=progress)
    known = set(report.problems)
    more = tuple(one for one in problems if one not in known)
    return replace(report, problems=report.problems + more)


def check_settings(model: ModelSpec, folder: Path) -> None:
    """Refuse settings of a model that its numbers do not allow.

    Raises:
        CheckpointError: the folder's config cannot be read, or its weights are quantized already.
        SpecError: a field that cannot be.
    """
    from arriero.shards.checkpoint.formats.describe import describe
    from arriero.shards.layout.resolve import MAX_DEFAULT_KV_BYTES, resolve

    numbers, scheme = describe(folder)
    if scheme is not None and model.quantization is not None:
        raise CheckpointError(
            f"{folder}: `quantization`={model.quantization!r}: the weights are quantized already "
            f"({scheme.method}); leave `quantization` out"
        )
    if model.kernels is not None:
        from arriero.kernels.select import BACKENDS

        if model.kernels not in BACKENDS:
            raise SpecError(
                f"model `{model.name}`: `kernels`={model.kernels!r} is none of"
                f" {', '.join(BACKENDS)}; leave it out for the best one"
            )
    devices = ("cpu", "cuda") if model.device == "auto" else (model.device,)
    refused: list[SpecError] = []
    for device in devices:
        config = model.group_config(device)
        if config.kv_bytes is None and config.num_blocks is None:
            # groups may be on machines with more memory than this one has
            config = replace(config, kv_bytes=MAX_DEFAULT_KV_BYTES)
        try:
            resolve(config, numbers)
        except SpecError as error:
            refused.append(error)
    if len(refused) == len(devices):
        raise SpecError(f"model `{model.name}`: {refused[0]}")


def refuse(report: Report, name: str = "") -> None:
    """Raise what a report found.

    Args:
        report: of a folder.
        name: of the model, where it has one.

    Raises:
        CheckpointError: lists the first problems and counts the rest.
    """
    if report.ok:
        return
    listed = "; ".join(report.problems[:MOST_PROBLEMS])
    more = len(report.problems) - MOST_PROBLEMS
    who = f"model `{name}`: " if name else ""
    told = listed + (f"; and {more} more" if more > 0 else "")
    where = "" if str(report.path) in listed else f"{report.path}: "
    raise CheckpointError(f"{who}{where}{told}")


def text_problems(folder: Path) -> tuple[str, ...]:
    """Why a gateway could not speak for the model of a folder; empty where it can.

    A config that cannot be read is told by what reads weights.
    """
    from arriero.router.text.text_model import TextModel
    from arriero.shards.checkpoint.formats.describe import describe

    try:
        numbers, _ = describe(folder)
    except CheckpointError:
        return ()
    if told := _no_tokenizer(folder):
        return (told,)
    try:
        TextModel(text_card(folder, numbers))
    except ArrieroError as error:
        return (_with_place(folder, str(error)),)
    except Exception as error:  # a defect that has no words yet must not pass for a good folder
        return (f"{folder}: its text side cannot be built: {type(error).__name__}: {error}",)
    return ()


def text_card(folder: Path, numbers: AnyModel) -> ModelCard:
    """The card of a folder's model as far as its text side goes.

    Raises:
        CheckpointError: a text file is missing or not what it must be.
    """
    from arriero.router.text.model_card import ModelCard
    from arriero.shards.model_config.llama4 import Llama4Config

    vision = numbers.vision if isinstance(numbers, Llama4Config) else None
    return ModelCard.from_folder(
        folder,
        model=folder.name,
        group="",
        layout="",
        digest="",
        max_model_len=numbers.max_position_embeddings,
        vocab_size=numbers.vocab_size,
        bos_token_id=numbers.bos_token_id,
        eos_token_ids=numbers.eos_token_ids,
        max_sequences=1,
        image_tile=0 if vision is None else vision.image_size,
        image_features=0 if vision is None else vision.features_per_tile,
    )


def _no_tokenizer(folder: Path) -> str:
    """What to do about a folder without tokenizer.json; "" where there is one."""
    file = folder / "tokenizer.json"
    if file.exists() or file.is_symlink():
        return ""
    there = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]
    if not there:
        return f"{file}: missing; fetch it beside the weights (`arriero models pull ORG/NAME`)"
    return (
        f"{file}: missing, and {there[0]} is not read; write it with transformers:"
        f" AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )


def _with_place(folder: Path, text: str) -> str:
    return text if str(folder) in text else f"{folder}: {text}"
