"""A tiny DeBERTa-v2 classifier in Prompt Guard's form that condemns texts with a marked word.

The weights are set by hand: attention goes from every token to the marked word, the word fills a
dimension of the hidden state at the first token, and the classifier reads that dimension.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

MARK = "jailbreak"
CONTEXT = 512
"""Tokens that the classifier reads at once, as Prompt Guard 2; a word between spaces is a token."""
_HIDDEN = 16
_STRENGTH = 100.0


def write_marked_classifier(folder: Path) -> Path:
    """Write the classifier; returns the folder.

    A window of a text with `MARK` has a score near 1, other windows have a score near 0.
    """
    import transformers

    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: number for number, word in enumerate([*specials, MARK])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )
    wrapped.save_pretrained(folder)
    config = transformers.DebertaV2Config(
        vocab_size=len(vocabulary),
        hidden_size=_HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=_HIDDEN,
        max_position_embeddings=CONTEXT,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        id2label={0: "benign", 1: "malicious"},
        label2id={"benign": 0, "malicious": 1},
    )
    model = transformers.DebertaV2ForSequenceClassification(config)
    with torch.no_grad():
        _set_weights(model, vocabulary[MARK])
    model.save_pretrained(folder)
    return folder


def _set_weights(model: torch.nn.Module, mark: int) -> None:
    """Dimension 0 means the marked word, dimension 1 any other token."""
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "LayerNorm.weight" in name else 0.0)
    words = model.get_parameter("deberta.embeddings.word_embeddings.weight")
    words[:, 1] = 1.0
    words[mark] = torch.eye(_HIDDEN)[0]
    attention = "deberta.encoder.layer.0.attention"
    model.get_parameter(f"{attention}.self.query_proj.bias")[0] = _STRENGTH
    model.get_parameter(f"{attention}.self.key_proj.weight")[0, 0] = _STRENGTH
    model.get_parameter(f"{attention}.self.value_proj.weight")[0, 0] = 1.0
    model.get_parameter(f"{attention}.output.dense.weight")[0, 0] = _STRENGTH
    model.get_parameter("pooler.dense.weight")[0, 0] = 1.0
    model.get_parameter("classifier.weight")[1, 0] = 20.0
    model.get_parameter("classifier.bias")[0] = 20.0
