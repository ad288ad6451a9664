"""tokenizer.json and tokenizer_config.json from GGUF metadata.

Knows byte-level BPE (`tokenizer.ggml.model` = gpt2) and the text split of each tokenizer family;
knows nothing of weights. A wrong split lowers quality without an error, so a family that is not
in the table is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from arriero.shards.checkpoint.gguf_header import GgufFile
from arriero.shards.errors import CheckpointError
from arriero.shards.families.family import TokenSplit

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_TEMPLATE = "tokenizer.chat_template"
_AGAIN = "fetch the file again"
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

# The split of Llama 3: contractions, words with a leading mark, up to three digits.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# The split of GPT-4o and Llama 4: a new word at capitals; a contraction stays with the word.
GPT4O_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Names that converters write for the same split (llama.cpp, src/llama-vocab.cpp).
_WHOLE_WORDS = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
)
"""Llama 3's split; a whole word in the vocabulary is one token, whatever the merges give."""
LLAMA3_FAMILIES = (*_WHOLE_WORDS, "smaug-bpe", "dbrx")
"""Llama 3's split."""
_GPT2_FAMILIES = (
    "default",
    "gpt-2",
    "phi-2",
    "jina-es",
    "jina-de",
    "jina-v2-es",
    "jina-v2-de",
    "gigachat",
    "a.x-4.0",
    "mellum",
    "modern-bert",
    "exaone4",
)
_GPT4O_FAMILIES = ("gpt-4o", "llama4", "kanana2")
FAMILIES = (*LLAMA3_FAMILIES, *_GPT2_FAMILIES, *_GPT4O_FAMILIES, "smollm")


def family_of(file: GgufFile) -> str:
    """Name of the tokenizer family in the file's metadata."""
    return str(file.metadata.get("tokenizer.ggml.pre", "default"))


def _split(family: str, splits: Mapping[str, TokenSplit]) -> pre_tokenizers.PreTokenizer | None:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if family in _GPT2_FAMILIES:
        return plain
    if family == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, plain])
    patterns = {
        **dict.fromkeys(LLAMA3_FAMILIES, LLAMA3_SPLIT),
        **dict.fromkeys(_GPT4O_FAMILIES, GPT4O_SPLIT),
        **{name: split.pattern for name, split in splits.items()},
    }
    pattern = patterns.get(family)
    if pattern is not None:
        words = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, bytes_only])
    return None


def build_tokenizer(
    file: GgufFile, splits: Mapping[str, TokenSplit] = MappingProxyType({})
) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and the object of tokenizer_config.json.

    Args:
        file: the file.
        splits: further splits of the text, by tokenizer family.

    Raises:
        CheckpointError: an unsupported kind of tokenizer, or malformed metadata.
    """
    meta = file.metadata
    model = meta.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.model={str(model)[:100]!r} is not supported; supported: "
            "gpt2 (byte-level BPE); convert the original checkpoint with its tokenizer.json"
        )
    family = family_of(file)
    split = _split(family, splits)
    if split is None:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre={family[:100]!r} is not supported (a wrong split of "
            f"text gives wrong tokens); supported: {', '.join((*FAMILIES, *splits))}; convert the "
            "original checkpoint with its tokenizer.json"
        )
    tokens = _strings(file, "tokenizer.ggml.tokens")
    kinds = meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.token_type must be a list of {len(tokens)} "
            f"numbers, one for each token; {_AGAIN}"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens lists a token twice; {_AGAIN}")
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(file, vocab), ignore_merges=family in _WHOLE_WORDS)
    )
    if family in splits and splits[family].normalizes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    special = [tokens[i] for i, kind in enumerate(kinds) if kind in (_UNKNOWN, _CONTROL)]
    user = [tokens[i] for i, kind in enumerate(kinds) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in user])
    settings = _settings(file, tokens)
    adds_bos = family in _WHOLE_WORDS or (
        family in LLAMA3_FAMILIES and settings.get("bos_token") == "<|begin_of_text|>"
    )
    _add_template(file, tokenizer, settings, vocab, add_bos_by_default=adds_bos)
    return tokenizer, settings


def special_token(file: GgufFile, role: str, num_tokens: int) -> int | None:
    """Id of a special token ("bos", "eos", "eot", "eom", "unknown", "padding"), None if not set."""
    key = f"tokenizer.ggml.{role}_token_id"
    index = file.metadata.get(key)
    if index is None or (isinstance(index, int) and 0 <= index < num_tokens):
        return index
    if role in ("padding", "unknown") and index in (-1, 2**32 - 1):
        return None  # some converters write "none" this way
    raise CheckpointError(f"{file.path}: {key}={index!r} must be a token id below {num_tokens}")


def _settings(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for role, name in _ROLES.items():
        index = special_token(file, name, len(tokens))
        if index is not None:
            settings[f"{role}_token"] = tokens[index]
    length = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    if isinstance(length, int):
        settings["model_max_length"] = length
    templates = _templates(file)
    if list(templates) == ["default"]:
        settings["chat_template"] = templates["default"]
    elif templates:
        settings["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items()
        ]
    return settings


def _templates(file: GgufFile) -> dict[str, str]:
    """Chat templates by name; the template without a name is "default"."""
    templates = {}
    for key, value in file.metadata.items():
        if key.startswith(_TEMPLATE) and key[len(_TEMPLATE) :][:1] in ("", ".") and value:
            name = key[len(_TEMPLATE) + 1 :] or "default"
            if not isinstance(value, str):
                raise CheckpointError(f"{file.path}: {key} must be a string; {_AGAIN}")
            templates[name] = value
    return templates


def _add_template(
    file: GgufFile,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    vocab: dict[str, int],
    *,
    add_bos_by_default: bool,
) -> None:
    """Let the tokenizer add the begin and end tokens if the file says so."""
    before = after = ""
    specials = []
    if file.metadata.get("tokenizer.ggml.add_bos_token", add_bos_by_default):
        before = settings.get("bos_token", "")
    if file.metadata.get("tokenizer.ggml.add_eos_token", False):
        after = settings.get("eos_token", "")
    for token in (before, after):
        if token:
            specials.append((token, vocab[token]))
    if specials:
        single = [part for part in (before, "$A", after) if part]
        pair = [*single, *(f"{part}:1" if part != "$A" else "$B:1" for part in single)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=specials
        )


def _strings(file: GgufFile, key: str) -> list[str]:
    values = file.metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{file.path}: {key} must be a list of strings; {_AGAIN}")
    return values


def _merges(file: GgufFile, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for line in _strings(file, "tokenizer.ggml.merges"):
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(
                f"{file.path}: tokenizer.ggml.merges: {line[:100]!r} does not join two tokens "
                f"into a third; {_AGAIN}"
            )
        merges.append((left, right))
    return merges
