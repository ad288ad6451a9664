"""What a client has of a call: enough to have the rest of it from another gateway.

Knows messages; knows nothing of connections.
"""

from __future__ import annotations

from arriero.router.proto.arriero.v1 import inference_pb2 as pb


class ResumeState:
    """Takes in a call's messages.

    Attributes:
        finished: the last one came.
    """

    def __init__(self) -> None:
        self.finished = False
        self._start: pb.Start | None = None
        self._samples: dict[int, pb.ResumedSample] = {}

    @property
    def begun(self) -> bool:
        """Whether anything came."""
        return self._start is not None

    def take(self, message: pb.GenerateResponse) -> pb.GenerateResponse:
        """Note a message; gives it back."""
        if message.HasField("start") and self._start is None:
            self._start = message.start
        for one in message.outputs:
            sample = self._samples.get(one.index)
            if sample is None:
                sample = self._samples[one.index] = pb.ResumedSample(index=one.index)
            sample.token_ids.extend(one.token_ids)
            sample.finished |= one.finish_reason != pb.FINISH_REASON_UNSPECIFIED
        self.finished |= message.HasField("usage")
        return message

    def fill(self, request: pb.GenerateRequest | pb.ChatRequest) -> None:
        """Have a request go on after what was received."""
        if self._start is None:
            return  # nothing came: it is sent again as it is
        request.sampling.seed = self._start.seed
        request.resumed.Clear()
        request.resumed.weights = self._start.weights
        request.resumed.samples.extend(self._samples.values())
