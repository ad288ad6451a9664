"""Stop strings at the front door over an engine's outputs: steps of several tokens, or of one.

Knows outputs and text; knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.requests import OutputOptions
from arriero.router.response import Answer, TextDelta
from arriero.router.text.text_model import TextModel
from arriero.shards.engine.types import SequenceOutput
from support.frontdoor import make_card

Stopped = tuple[str, list[int], str]
"""Text and tokens that a client gets, and the stop string that ended them; "" for none."""
_STOP_CHARACTERS = 5


class StopStrings:
    """Answers with stop strings, over a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._text = TextModel(make_card(tokenizer, None, bos_token="", eos_token=""))
        self._tokenizer = tokenizer

    def check(self, steps: Iterable[Sequence[int]]) -> bool:
        """Compare steps with single tokens, for a stop string out of the middle of their text.

        Returns:
            Whether the stop string lies over the end of a step.
        """
        parts = [tuple(step) for step in steps if step]
        tokens = [token for step in parts for token in step]
        words = self._tokenizer.decode(tokens, skip_special_tokens=True)
        if len(words) < 4 * _STOP_CHARACTERS:
            return False
        middle = len(words) // 2
        stop = words[middle : middle + _STOP_CHARACTERS]
        whole = self._stream([(token,) for token in tokens], stop)
        assert self._stream(parts, stop) == whole
        ends, taken = set(), 0
        for step in parts:
            taken += len(step)
            ends.add(taken)
        return whole[2] == stop and len(whole[1]) not in ends

    def _stream(self, steps: Sequence[tuple[int, ...]], stop: str) -> Stopped:
        answer = Answer(pb.Start(request_id="r"), 1, 1, OutputOptions(stop=(stop,)), self._text)
        text, tokens, stop_string = "", [], ""
        for number, step in enumerate(steps, 1):
            reason = "length" if number == len(steps) else None
            message = answer.add(
                [SequenceOutput(request_id="r", index=0, tokens=step, finish_reason=reason)]
            )
            assert not isinstance(message, TextDelta)
            for output in () if message is None else message.outputs:
                text += output.text
                tokens += output.token_ids
                stop_string = stop_string or output.stop_string
            if answer.finished:
                break
        return text, tokens, stop_string
