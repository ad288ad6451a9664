"""A tokenizer from GGUF metadata, as tokenizer.json and tokenizer_config.json.

Knows byte-level BPE (`tokenizer.ggml.model` = gpt2) and how each family splits text before it;
knows nothing of weights. A wrong split costs quality without any error, so a family that is not
in the table is refused.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from arriero.shards.checkpoint.gguf_header import GgufFile
from arriero.shards.errors import CheckpointError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

# As Llama 3's tokenizer splits: contractions, words with one leading mark, up to three digits.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(family: str) -> pre_tokenizers.PreTokenizer | None:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if family in ("gpt-2", "default"):
        return plain
    if family == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, plain])
    if family == "llama-bpe":
        words = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated", invert=False)
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, bytes_only])
    return None


def build_tokenizer(file: GgufFile) -> tuple[Tokenizer, dict[str, Any]]:
    """Make the tokenizer and the object of tokenizer_config.json.

    Raises:
        CheckpointError: a kind of tokenizer that is not supported, or malformed metadata.
    """
    meta = file.metadata
    model = meta.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.model={model!r} is not supported; supported: gpt2 "
            "(byte-level BPE)"
        )
    family = meta.get("tokenizer.ggml.pre", "default")
    split = _split(family)
    if split is None:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre={str(family)[:100]!r} is not supported; supported: "
            "default, gpt-2, llama-bpe, smollm"
        )
    tokens = _strings(file, "tokenizer.ggml.tokens")
    kinds = meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.token_type must be a list of {len(tokens)}, one a token"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens holds a token twice")
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(file, vocab), ignore_merges=family == "llama-bpe")
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    special = [tokens[i] for i, kind in enumerate(kinds) if kind in (_UNKNOWN, _CONTROL)]
    user = [tokens[i] for i, kind in enumerate(kinds) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(one, normalized=False) for one in special])
    tokenizer.add_tokens([AddedToken(one, normalized=False) for one in user])
    settings = _settings(file, tokens)
    _add_template(file, tokenizer, settings, vocab, add_bos_by_default=family == "llama-bpe")
    return tokenizer, settings


def special_token(file: GgufFile, role: str, num_tokens: int) -> int | None:
    """Id of a special token ("bos", "eos", "eot", "eom", "unknown", "padding"), if it is set."""
    key = f"tokenizer.ggml.{role}_token_id"
    index = file.metadata.get(key)
    if index is None or (isinstance(index, int) and 0 <= index < num_tokens):
        return index
    raise CheckpointError(f"{file.path}: {key}={index!r} must be below {num_tokens} tokens")


def _settings(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for role, name in _ROLES.items():
        index = special_token(file, name, len(tokens))
        if index is not None:
            settings[f"{role}_token"] = tokens[index]
    length = file.metadata.get("llama.context_length")
    if isinstance(length, int):
        settings["model_max_length"] = length
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return settings


def _add_template(
    file: GgufFile,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    vocab: dict[str, int],
    *,
    add_bos_by_default: bool,
) -> None:
    """Make encoding add the begin token (and the end token) where the file says so."""
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
        single = [one for one in (before, "$A", after) if one]
        pair = [*single, *(f"{one}:1" if one != "$A" else "$B:1" for one in single)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=specials
        )


def _strings(file: GgufFile, key: str) -> list[str]:
    values = file.metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise CheckpointError(f"{file.path}: {key} must be a list of strings")
    return values


def _merges(file: GgufFile, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for line in _strings(file, "tokenizer.ggml.merges"):
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(
                f"{file.path}: tokenizer.ggml.merges: {line[:100]!r} does not join two tokens "
                "into a third"
            )
        merges.append((left, right))
    return merges
