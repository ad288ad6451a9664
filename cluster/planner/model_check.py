"""Can a model folder be served? Lists at once all problems that would stop a group or a gateway.

`arriero up`, `rollout` and `models verify` use the same checks and so agree: config and headers of
the weights as `verify` reads them, tokenizer and template as a gateway loads them, and for a
deployment the mesh and sizes as the leader of a group decides them. Knows folders and settings;
knows nothing of clusters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.cluster.planner.cut_files import cut_files
from arriero.shards.errors import ArrieroError, CheckpointError, SpecError

if TYPE_CHECKING:
    from arriero.cluster.spec.model import ModelSpec
    from arriero.router.text.model_card import ModelCard
    from arriero.shards.checkpoint.reader import Checkpoint
    from arriero.shards.checkpoint.verify import Report, VerifyProgress
    from arriero.shards.config.group import GroupConfig
    from arriero.shards.layout.parts import AnyModel

MOST_PROBLEMS = 20
"""Largest number of problems of a folder that an error lists; the error counts the others."""


def check_models(models: Iterable[ModelSpec]) -> None:
    """Refuse a deployment in which a group or a gateway could not start.

    Models at a URL are checked on the machine that fetches the model.

    Raises:
        CheckpointError: a folder has a defect; the error names file, defect and remedy.
        SpecError: the mesh or a size does not fit the model.
    """
    from arriero.shards.checkpoint.remote import is_url

    local = [model for model in models if not is_url(model.path)]
    for model in local:
        check_settings(model, Path(model.path))
    for model in local:  # first all that is quick: the import of torch takes seconds
        folder = Path(model.path)
        _raise([*cut_files(folder), *text_problems(folder)], folder, model.name)
    for model in local:
        from arriero.shards.checkpoint.verify import verify

        raise_problems(verify(Path(model.path)), model.name)
        check_adapters(model)
        check_drafter(model)


def check_known_sizes(models: Iterable[ModelSpec]) -> None:
    """Check settings and lengths of files of the models that this machine has; needs no torch.

    The whole check comes later and reads any folder.

    Raises:
        CheckpointError: see `check_settings`.
        SpecError: see `check_settings`.
    """
    from arriero.shards.checkpoint.remote import is_url

    for model in models:
        folder = Path(model.path)
        if not is_url(model.path) and (folder / "config.json").is_file():
            check_settings(model, folder)
            _raise(cut_files(folder), folder, model.name)


def check_adapters(model: ModelSpec) -> None:
    """Refuse adapters that do not fit the model or its slots; reads settings, headers and digests.

    Raises:
        CheckpointError: names the adapter, the file and the remedy.
    """
    if model.adapters:
        from arriero.shards.adapters.adapter import open_adapters
        from arriero.shards.adapters.reader import AdapterReader
        from arriero.shards.checkpoint.formats.describe import describe

        numbers, _ = describe(Path(model.path))
        config = model.group_config("cpu")
        listed = open_adapters(config, numbers)
        if config.adapter_slots is not None:
            AdapterReader(config.adapter_slots, numbers, listed)


def check_drafter(model: ModelSpec) -> None:
    """Refuse a draft model or an EAGLE-3 head that cannot draft for the model; reads headers.

    Raises:
        CheckpointError: names the folder, the defect and the remedy.
    """
    speculation = model.speculation.config()
    if not speculation.in_slices or speculation.model_path is None:
        return
    folder = Path(speculation.model_path)
    if speculation.kind == "draft":
        from arriero.shards.checkpoint.verify import verify

        raise_problems(verify(folder), model.name)
        return
    from arriero.shards.checkpoint.tensor_folder import TensorFolder
    from arriero.shards.models.eagle3.check import check_head
    from arriero.shards.models.eagle3.config import Eagle3Config

    check_head(TensorFolder.of(folder), Eagle3Config.from_folder(folder))


def check_checkpoint(checkpoint: Checkpoint, model: ModelSpec) -> None:
    """Check a model with headers that are read already, perhaps from a URL, as `check_models` does.

    Raises:
        CheckpointError: see `check_models`.
        SpecError: see `check_models`.
    """
    check_settings(model, checkpoint.path)
    if problems := text_problems(checkpoint.path):
        raise CheckpointError(f"model `{model.name}`: {'; '.join(problems)}")
    checkpoint.check_whole()


def check_folder(
    folder: Path, deep: bool = False, progress: VerifyProgress | None = None
) -> Report:
    """All problems of a model folder: weights, config and text files.

    Args:
        folder: the model folder.
        deep: also read every byte of the weights.
        progress: is called with the bytes read so far when `deep`.
    """
    problems = text_problems(folder)  # first: weights need torch, and torch takes seconds to load
    from arriero.shards.checkpoint.verify import verify

    report = verify(folder, deep=deep, progress=progress)
    known = set(report.problems)
    more = tuple(problem for problem in problems if problem not in known)
    return replace(report, problems=report.problems + more)


def check_settings(model: ModelSpec, folder: Path) -> None:
    """Refuse settings that do not fit the sizes of a model, or kernels that do not exist.

    Raises:
        CheckpointError: the folder's config cannot be read, or the weights are quantized already.
        SpecError: a field has a value that does not fit.
    """
    check_sizes(model, folder)
    if model.kernels is not None:
        from arriero.kernels.registry import BACKENDS

        if model.kernels not in BACKENDS:
            raise SpecError(
                f"model `{model.name}`: `kernels`={model.kernels!r} is none of"
                f" {', '.join(BACKENDS)}; leave it out for the best one"
            )


def check_sizes(model: ModelSpec, folder: Path) -> None:
    """Refuse a mesh or a size that does not fit the config of a model. Needs no torch.

    Raises:
        CheckpointError: the folder's config cannot be read, or the weights are quantized already.
        SpecError: a field has a value that does not fit.
    """
    from arriero.shards.checkpoint.formats.describe import describe
    from arriero.shards.layout.resolve import MAX_DEFAULT_KV_BYTES, resolve

    numbers, scheme = describe(folder)
    if scheme is not None and model.quantization is not None:
        raise CheckpointError(
            f"{folder}: `quantization`={model.quantization!r}: the weights are quantized already "
            f"({scheme.method}); leave `quantization` out"
        )
    if scheme is None and model.quantization is None and model.activation_dtype is not None:
        raise SpecError(
            f"model `{model.name}`: `activation_dtype`={model.activation_dtype} needs int8 or int4 "
            "weights; set `quantization`, or use a checkpoint of such weights"
        )
    devices = ("cpu", "cuda") if model.device == "auto" else (model.device,)
    errors: list[SpecError] = []
    for device in devices:
        config = model.group_config(device)
        if config.kv_bytes is None and config.num_blocks is None:
            # Groups may run on machines with more memory than this machine.
            config = replace(config, kv_bytes=MAX_DEFAULT_KV_BYTES)
        try:
            resolve(config, numbers)
            _check_drafter_sizes(config, numbers)
        except SpecError as error:
            errors.append(error)
    if len(errors) == len(devices):
        raise SpecError(f"model `{model.name}`: {errors[0]}")


def _check_drafter_sizes(config: GroupConfig, numbers: AnyModel) -> None:
    """Refuse a drafter of another model, or one that the mesh cannot cut.

    A drafter that this machine lacks passes: `check_drafter` comes later and refuses it.
    """
    from arriero.cluster.planner.drafter_bytes import KvForm, read_drafter
    from arriero.shards.layout.families import parts_of

    path = config.speculation.model_path
    if path is None or not (Path(path) / "config.json").is_file():
        return
    drafter = read_drafter(config, numbers)
    if drafter is not None:
        kv = KvForm(block_size=config.block_size, dtype=config.cache_dtype, kernels="reference")
        for part in parts_of(numbers, config):
            drafter.on_rank(part, config, kv)


def raise_problems(report: Report, name: str = "") -> None:
    """Raise an error if a report lists problems.

    Args:
        report: report of a folder.
        name: name of the model; "" for none.

    Raises:
        CheckpointError: lists the first problems and counts the rest.
    """
    _raise(report.problems, report.path, name)


def _raise(problems: Sequence[str], folder: Path, name: str) -> None:
    if not problems:
        return
    listed = "; ".join(problems[:MOST_PROBLEMS])
    more = len(problems) - MOST_PROBLEMS
    model = f"model `{name}`: " if name else ""
    rest = f"; and {more} more" if more > 0 else ""
    where = "" if str(folder) in listed else f"{folder}: "
    raise CheckpointError(f"{model}{where}{listed}{rest}")


def text_problems(folder: Path) -> tuple[str, ...]:
    """Why a gateway could not serve the model of a folder; empty where a gateway could.

    A config that cannot be read is no text problem: the check of the weights reports the config.
    """
    from arriero.router.text.text_model import TextModel
    from arriero.shards.checkpoint.formats.describe import describe

    try:
        numbers, _ = describe(folder)
    except CheckpointError:
        return ()
    if problem := _no_tokenizer(folder):
        return (problem,)
    try:
        TextModel(text_card(folder, numbers))
    except ArrieroError as error:
        return (_with_folder(folder, str(error)),)
    except Exception as error:  # a defect without an error of ours must not pass for a good folder
        reason = f"{type(error).__name__}: {error}"
        return (f"{folder}: tokenizer or chat template cannot be loaded: {reason}",)
    return ()


def text_card(folder: Path, numbers: AnyModel) -> ModelCard:
    """The model card of a folder with the fields that the gateway's text model needs.

    Raises:
        CheckpointError: a text file is missing or not valid.
    """
    from arriero.router.text.model_card import ModelCard
    from arriero.shards.families.registry import family_of

    vision = family_of(numbers).vision(numbers)
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
    """Problem and remedy of a folder without tokenizer.json; "" where the file exists."""
    file = folder / "tokenizer.json"
    if file.exists() or file.is_symlink():
        return ""
    others = [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]
    if not others:
        return f"{file}: missing; fetch it beside the weights (`arriero models pull ORG/NAME`)"
    return (
        f"{file}: missing, and {others[0]} is not read; write tokenizer.json with transformers:"
        f" AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )


def _with_folder(folder: Path, text: str) -> str:
    return text if str(folder) in text else f"{folder}: {text}"
