"""vLLM's own encoding of requests and outputs, for the links."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arriero.core.types import RequestId
from arriero.vllm.compat import EngineCoreOutput, EngineCoreOutputs, FinishReason, MsgpackDecoder, MsgpackEncoder


class VllmCodec:
    """See :class:`arriero.frontend.links.Codec`."""

    def __init__(self) -> None:
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)

    def encode(self, obj: Any) -> Sequence[Any]:
        """Frames; tensors travel as frames of their own."""
        return self._encoder.encode(obj)  # type: ignore[no-any-return]

    def decode_outputs(self, frames: Sequence[Any]) -> Any:
        """An ``EngineCoreOutputs``."""
        return self._decoder.decode(frames)

    def is_self_contained(self, request: Any) -> bool:
        """Not if a multimodal input is named only, since the front end has sent it before."""
        return all(feature.data is not None for feature in request.mm_features or ())

    def error_outputs(self, engine_index: int, request_ids: Sequence[RequestId]) -> Any:
        """Outputs that end requests with FinishReason.ERROR, which clients see as HTTP 500."""
        outputs = [EngineCoreOutput(r, [], finish_reason=FinishReason.ERROR) for r in request_ids]
        return EngineCoreOutputs(engine_index=engine_index, outputs=outputs, finished_requests=set(request_ids))
