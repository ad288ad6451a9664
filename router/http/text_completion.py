"""A text completion as the OpenAI API's JSON, whole or event by event.

Knows the JSON of the API; knows nothing of sending.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arriero.router.http import safety
from arriero.router.http.responses import (
    DONE,
    REASONS,
    Json,
    TextEvents,
    answer_head,
    event,
    usage,
)
from arriero.router.http.spelling import TextOffsets, spell, spell_id, spell_unique
from arriero.router.http.token_fields import TokenFields, fingerprint, whole_fingerprint
from arriero.router.proto.arriero.v1 import inference_pb2 as pb
from arriero.router.response import Message, TextDelta
from arriero.router.text.tokenizer import Tokenizer


class TextCompletion:
    """The JSON of a text completion, of one prompt or several.

    Args:
        model: id of the model.
        tokenizer: spells tokens.
        n: samples of each prompt; sample k of prompt p is choice p * n + k.
        echo: texts of the prompts to return ("" for a prompt of token ids); None for no echo.
        skip_special: leave special tokens out of prompts of token ids.
        prompt_only: return the echo without output.
        with_usage: end a stream with the usage.
        head: common fields of the chunks; None for a new answer.
        tokens: what the answer shows of its tokens; None for nothing.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        *,
        n: int,
        echo: Sequence[str] | None,
        skip_special: bool,
        prompt_only: bool = False,
        with_usage: bool = False,
        head: Json | None = None,
        tokens: TokenFields | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens or TokenFields()
        self._with_usage = with_usage
        self._n = n
        self._prompt_only = prompt_only
        self._echo = echo
        self._skip_special = skip_special
        self._starts: dict[int, pb.Start] = {}
        self._offsets: dict[int, TextOffsets] = {}
        self.head: Json = head or answer_head("cmpl", "text_completion", model)
        self._texts: dict[int, TextEvents] = {}

    def encoded(self, number: int, message: Message) -> bytes:
        """As `events`, encoded as server-sent events."""
        if isinstance(message, TextDelta):
            index = number * self._n + message.index
            if index in self._offsets and not self._tokens.ids:
                return self._text(number).make(index, message.text)
            message = message.to_wire()
        return b"".join(map(event, self.events(number, message)))

    def _text(self, number: int) -> TextEvents:
        if number not in self._texts:
            self._texts[number] = TextEvents(
                self._head(number), ',"text":', ',"logprobs":null,"finish_reason":null}'
            )
        return self._texts[number]

    def _head(self, number: int) -> Json:
        """Fields of the chunks of a prompt's answer."""
        start = self._starts.get(number)
        return self.head if start is None else self.head | fingerprint(start.weights)

    def events(self, number: int, message: pb.GenerateResponse) -> list[Json]:
        """Chunks of a stream: a chunk for each sample in `message`."""
        if message.HasField("start"):
            self._starts[number] = message.start
            self._texts.pop(number, None)
        head = self._head(number)
        chunks = [head | {"choices": [self._choice(number, output)]} for output in message.outputs]
        return safety.on_last(chunks, message)

    def end(self, usages: Sequence[pb.Usage]) -> bytes:
        """The chunk with the usage, if wanted, and the end of the stream."""
        chunk = self.head | {"choices": [], "usage": self._usage(usage(*usages))}
        return (event(chunk) if self._with_usage else b"") + DONE

    def failed(self, error: Json) -> bytes:
        """The event of an error, which ends the stream."""
        return event(error)

    def whole(self, messages: Sequence[tuple[int, pb.GenerateResponse]]) -> Json:
        """The sum of the messages as a whole completion."""
        counted = usage(*(message.usage for _, message in messages if message.HasField("usage")))
        choices: dict[int, Json] = {}
        for number, message in messages:
            for chunk in self.events(number, message):
                (part,) = chunk["choices"]
                before = choices.setdefault(part["index"], part)
                if before is part:
                    continue
                before["text"] += part["text"]
                if self._tokens.ids:
                    before["token_ids"] += part["token_ids"]
                before["finish_reason"] = part["finish_reason"]
                if before["logprobs"] is None:
                    before["logprobs"] = part["logprobs"]
                elif part["logprobs"] is not None:
                    for name, values in part["logprobs"].items():
                        before["logprobs"][name] += values
        ordered = [choices[i] for i in sorted(choices)]
        head = self.head | whole_fingerprint(list(self._starts.values()))
        head |= safety.of_messages(messages)
        return head | {"choices": ordered, "usage": self._usage(counted)}

    def _usage(self, counted: Json) -> Json:
        if not self._prompt_only:
            return counted
        return counted | {"completion_tokens": 0, "total_tokens": counted["prompt_tokens"]}

    def _choice(self, number: int, output: pb.Output) -> Json:
        index = number * self._n + output.index
        text = "" if self._prompt_only else output.text
        rows = [] if self._prompt_only else list(output.logprobs)
        reason = REASONS.get(output.finish_reason)
        prompt_columns = None
        ids: Json = {}
        if self._tokens.ids:
            ids["token_ids"] = [] if self._prompt_only else list(output.token_ids)
        if index not in self._offsets:
            prompt_text = ""
            if self._tokens.ids:
                ids["prompt_token_ids"] = list(self._starts[number].prompt_token_ids)
            if self._echo is not None:
                start = self._starts[number]
                prompt_text = self._echo[number] or self._decode(start.prompt_token_ids)
                single_token = len(start.prompt_token_ids) == 1 and bool(output.logprobs)
                if start.prompt_logprobs or single_token:
                    prompt_columns = self._prompt_logprobs(number, start)
            text = prompt_text + text
            self._offsets[index] = self._text_offsets(self._skip_special, len(prompt_text))
        columns = self._logprobs(rows, self._offsets[index]) if rows else None
        if prompt_columns is not None:
            columns = {
                name: values + (columns or {}).get(name, [])
                for name, values in prompt_columns.items()
            }
        return {
            "index": index,
            "text": text,
            "logprobs": columns,
            "finish_reason": "length" if self._prompt_only and reason else reason,
            **ids,
        }

    def _prompt_logprobs(self, number: int, start: pb.Start) -> dict[str, list[Any]]:
        # A text prompt is returned unchanged, without the special tokens that the tokenizer added.
        skip_special = self._skip_special or bool(self._echo and self._echo[number])
        offsets = self._text_offsets(skip_special)
        first = start.prompt_token_ids[0]
        return self._logprobs(start.prompt_logprobs, offsets, first)

    def _logprobs(
        self,
        rows: Sequence[pb.PositionLogprobs],
        offsets: TextOffsets,
        first: int | None = None,
    ) -> dict[str, list[Any]]:
        """The columns of a choice's `logprobs`.

        Args:
            rows: log-probabilities of the choice's tokens, in order.
            offsets: text offsets, continued with the tokens.
            first: first token of the prompt, which has no log-probability; None for no prompt.
        """
        vocabulary, as_ids = self._tokenizer.vocabulary, self._tokens.as_ids
        columns: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }

        def add(token: int, logprob: float | None, top: Json | None) -> None:
            columns["tokens"].append(spell_id(token) if as_ids else spell(vocabulary, token))
            columns["token_logprobs"].append(logprob)
            columns["top_logprobs"].append(top)
            columns["text_offset"].append(offsets.add(token))

        if first is not None:
            add(first, None, None)
        for row in rows:
            ids = [entry.token_id for entry in row.top]
            names = list(map(spell_id, ids)) if as_ids else spell_unique(vocabulary, ids)
            values = (entry.logprob for entry in row.top)
            add(row.chosen.token_id, row.chosen.logprob, dict(zip(names, values, strict=True)))
        return columns

    def _text_offsets(self, skip_special: bool, num_before: int = 0) -> TextOffsets:
        return TextOffsets(
            self._tokenizer.vocabulary, skip_special=skip_special, num_before=num_before
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special=self._skip_special)
