"""Received messages of a call, for the request that resumes the call at another gateway.

Knows messages; knows nothing of connections.
"""

from __future__ import annotations

from arriero.router.proto.arriero.v1 import inference_pb2 as pb


class ResumeState:
    """Collects a call's messages.

    Attributes:
        finished: the last message was received.
    """

    def __init__(self) -> None:
        self.finished = False
        self._start: pb.Start | None = None
        self._samples: dict[int, pb.ResumedSample] = {}

    @property
    def started(self) -> bool:
        """Whether a message was received."""
        return self._start is not None

    def add(self, message: pb.GenerateResponse) -> pb.GenerateResponse:
        """Add a message; returns the same message."""
        if message.HasField("start") and self._start is None:
            self._start = message.start
        for output in message.outputs:
            sample = self._samples.get(output.index)
            if sample is None:
                sample = self._samples[output.index] = pb.ResumedSample(index=output.index)
            sample.token_ids.extend(output.token_ids)
            sample.finished |= output.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        self.finished |= message.HasField("usage")
        return message

    def fill(self, request: pb.GenerateRequest | pb.ChatRequest) -> None:
        """Make a request continue after the received messages."""
        if self._start is None:
            return  # without a message, the request is sent again unchanged
        request.sampling.seed = self._start.seed
        request.resumed.Clear()
        request.resumed.weights = self._start.weights
        request.resumed.samples.extend(self._samples.values())
