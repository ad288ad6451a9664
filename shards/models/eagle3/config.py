"""Config of an EAGLE-3 head, from the `config.json` of its folder, in both published layouts.

EAGLE-3: Li, Wei, Zhang and Zhang, "EAGLE-3: Scaling up Inference Acceleration of Large Language
Models via Training-Time Test", 2025. A head reads activations of three layers of its target, the
taps, and drafts the target's next tokens. Knows the numbers and flags of a head and what they
require of a target; knows nothing of tensors and steps.

The flat layout has the numbers of the layer at the top of the object; the layout of `speculators`
nests them in `transformer_layer_config` and has another default of `norm_before_residual`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from arriero.shards.errors import CheckpointError
from arriero.shards.files.json_file import read_json_object
from arriero.shards.layout.parts import AnyModel
from arriero.shards.model_config.dense import ModelConfig
from arriero.shards.model_config.fields import Fields

ARCHITECTURES = (
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "Eagle3Speculator",
    "Eagle3DraftModel",
)
"""Values of `architectures` in published heads."""

TapIds = Literal["entering", "leaving"]
"""What an explicit tap id i in a config means: the state that enters layer i, or the state that
leaves layer i, which is the state that enters layer i + 1."""

FLAT_TAP_IDS: TapIds = "leaving"
NESTED_TAP_IDS: TapIds = "entering"
"""Meaning of explicit ids in each layout, where the settings give none.

By the sources of the trainers: NVIDIA's Model-Optimizer and SpecForge keep the output of the layers
that they name, by default 1, N / 2 - 1 and N - 4, and publish flat heads; SGLang reads ids so.
`speculators` gives its ids to vLLM, which keeps the input of a layer, by default of 2, N / 2 and
N - 3; its id N is the output of the last layer. Both defaults are the same three states. Therefore
ids that name these states in either meaning mean these states: heads were converted to the other
layout with their ids. AngelSlim's flat heads have the ids of both meanings under two names.
The wrong meaning costs drafts, never tokens.
"""

_TAPS = "eagle_aux_hidden_state_layer_ids"
_LEAVING_TAPS = "aux_hidden_states_layer_ids"
"""AngelSlim's name of the ids of layers whose output the head reads."""
_NUM_TAPS = 3
_MOST_TAPS = 16
_MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Eagle3Config:
    """An EAGLE-3 head.

    Attributes:
        layer: numbers of the head's layer; `layer.vocab_size` is the target's.
        draft_vocab_size: tokens that the head can draft; rows of its `lm_head`.
        target_hidden_size: hidden size of the target, the columns of a tap.
        tap_ids: explicit ids of the taps; None for the default layers.
        tap_meaning: meaning of explicit ids by the layout.
        norm_before_residual: the residual of the layer is the normed feature.
        norm_before_fc: all taps together are normed before `fc`, by `input_norm`.
        fc_norm: each tap is normed before `fc`, by `fc_norm.0` and so on.
        norm_output: the next step of a chain reads the normed output.
    """

    layer: ModelConfig
    draft_vocab_size: int
    target_hidden_size: int
    tap_ids: tuple[int, ...] | None
    tap_meaning: TapIds = FLAT_TAP_IDS
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False

    @classmethod
    def from_folder(cls, folder: Path) -> Eagle3Config:
        """Read the config.json of a head's folder.

        Raises:
            CheckpointError: the file is missing, malformed, or of another model.
        """
        file = folder / "config.json"
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing; give the folder of an EAGLE-3 head")
        return cls.from_dict(read_json_object(file, _MAX_CONFIG_BYTES), source=str(file))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], *, source: str = "config.json") -> Eagle3Config:
        """A head's config from the object of config.json.

        Raises:
            CheckpointError: a missing or malformed field, another architecture, or a setting that
                changes the computation in an unsupported way.
        """
        read = Fields(settings, source)
        _check_kind(read)
        nested = read.get("transformer_layer_config")
        if nested is not None and not isinstance(nested, Mapping):
            raise read.wrong("transformer_layer_config", nested, "an object")
        layer = _layer(Fields(settings if nested is None else nested, source))
        more = read.get("eagle_config")
        flags = Fields({**(more if isinstance(more, Mapping) else {}), **settings}, source)
        before = "norm_before_residual"
        default = nested is not None
        draft_vocab_size = read.size("draft_vocab_size", layer.vocab_size)
        if draft_vocab_size > layer.vocab_size:
            raise read.wrong(
                "draft_vocab_size",
                draft_vocab_size,
                f"at most `vocab_size`={layer.vocab_size}, the target's",
            )
        return cls(
            layer=layer,
            draft_vocab_size=draft_vocab_size,
            target_hidden_size=read.size("target_hidden_size", layer.hidden_size),
            tap_ids=_tap_ids(flags),
            tap_meaning=_tap_meaning(flags, FLAT_TAP_IDS if nested is None else NESTED_TAP_IDS),
            norm_before_residual=default if flags.get(before) is None else flags.flag(before),
            norm_before_fc=flags.flag("norm_before_fc"),
            fc_norm=flags.flag("fc_norm"),
            norm_output=flags.flag("norm_output"),
        )

    @property
    def num_taps(self) -> int:
        """Number of taps."""
        return _NUM_TAPS if self.tap_ids is None else len(self.tap_ids)

    @property
    def tap_columns(self) -> int:
        """Columns of all taps together, the inputs of `fc`."""
        return self.num_taps * self.target_hidden_size

    def taps(self, num_layers: int, meaning: TapIds | None = None) -> tuple[int, ...]:
        """The layers of the target whose input the head reads.

        Args:
            num_layers: layers of the target; as a tap, the output of the last layer.
            meaning: meaning of explicit ids; None for that of the layout, or for the default taps
                where the ids name these in either meaning. The default taps enter layers 2, N / 2
                and N - 3.

        Raises:
            CheckpointError: the target has no such layer.
        """
        taps: tuple[int, ...] = (2, num_layers // 2, num_layers - 3)
        spelled = taps, tuple(tap - 1 for tap in taps)
        if self.tap_ids is not None and (meaning is not None or self.tap_ids not in spelled):
            leaving = (meaning or self.tap_meaning) == "leaving"
            taps = tuple(i + leaving for i in self.tap_ids)
        if not all(0 <= k <= num_layers for k in taps) or len(set(taps)) < len(taps):
            ids = "the default taps" if self.tap_ids is None else f"`{_TAPS}`={list(self.tap_ids)}"
            raise CheckpointError(
                f"{ids} do not fit a target of {num_layers} layers: an EAGLE-3 head needs "
                f"{self.num_taps} different layers; use the head of this target"
            )
        return taps

    def check_target(self, target: AnyModel, source: str) -> None:
        """Check that the head belongs to a model.

        Args:
            target: the model for which the head drafts.
            source: the head's folder, for errors.

        Raises:
            CheckpointError: vocabulary or hidden size differ; both numbers are named.
        """
        for name, own, wanted in (
            ("vocab_size", self.layer.vocab_size, target.vocab_size),
            ("target_hidden_size", self.target_hidden_size, target.hidden_size),
        ):
            if own != wanted:
                raise CheckpointError(
                    f"{source}: `{name}`={own} of the EAGLE-3 head, but the target has {wanted}; "
                    "use the head of this target"
                )


def _check_kind(read: Fields) -> None:
    names = read.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if name not in ARCHITECTURES and read.get("speculators_model_type") != "eagle3":
        raise CheckpointError(
            f"{read.source}: architecture {str(name)[:200]!r} is no EAGLE-3 head; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    form = read.get("quantization_config")
    if form and (
        not isinstance(form, Mapping) or form.get("quant_algo") or form.get("config_groups")
    ):
        raise read.wrong("quantization_config", form, "empty: quantized heads are not supported")
    for name in ("fc_bias", "bias", "parallel_drafting", "tie_word_embeddings"):
        # a tied head is allowed only where the vocabularies are the same; the tensors decide
        if name != "tie_word_embeddings" and read.get(name):
            raise read.wrong(name, read.get(name), "false: not supported for EAGLE-3 heads")


def _layer(read: Fields) -> ModelConfig:
    """Numbers of the layer."""
    values = dict(read.values)
    if values.get("intermediate_size_mlp"):  # heads of Llama 4 repeat the target's fields
        values["intermediate_size"] = values["intermediate_size_mlp"]
    layer = ModelConfig.from_fields(
        Fields(values | {"torch_dtype": values.get("torch_dtype") or "bfloat16"}, read.source),
        None,
        ARCHITECTURES[0],
    )
    if layer.num_layers != 1:
        raise read.wrong("num_hidden_layers", layer.num_layers, "1: a head has one layer")
    if layer.sliding_window is not None:
        raise read.wrong("sliding_window", layer.sliding_window, "null for an EAGLE-3 head")
    return layer


def _tap_ids(read: Fields) -> tuple[int, ...] | None:
    ids = read.get(_TAPS)
    if ids is None:
        return None
    whole = isinstance(ids, list) and all(isinstance(i, int) and i is not True for i in ids)
    if not whole or not 1 <= len(ids) <= _MOST_TAPS:
        raise read.wrong(_TAPS, ids, f"a list of 1 to {_MOST_TAPS} numbers of layers")
    return tuple(ids)


def _tap_meaning(flags: Fields, of_layout: TapIds) -> TapIds:
    """Meaning of explicit ids: that of the layout, unless the head also has the other ids."""
    ids, leaving = flags.get(_TAPS), flags.get(_LEAVING_TAPS)
    both = isinstance(ids, list) and isinstance(leaving, list) and ids != leaving
    return "entering" if both else of_layout
