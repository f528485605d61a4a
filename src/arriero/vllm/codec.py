"""vLLM's own encoding of requests and outputs, for the links."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arriero.core.errors import ProtocolError
from arriero.core.types import RequestId
from arriero.vllm.compat import (
    CUSTOM_TYPE_RAW_VIEW,
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
    MsgpackDecoder,
    MsgpackEncoder,
)


class DataDecoder(MsgpackDecoder):
    """vLLM's decoder, but never unpickling or importing by name, whatever VLLM_ALLOW_INSECURE_SERIALIZATION says:
    the front end takes data from instances, and no code.
    """

    def ext_hook(self, code: int, data: memoryview) -> Any:
        """See vLLM."""
        if code != CUSTOM_TYPE_RAW_VIEW:
            raise ProtocolError(f"an instance sent something of msgpack type {code}: only tensors' bytes are taken")
        return data

    def _convert_result(self, result_type: Sequence[str], result: Any) -> Any:
        return result


class VllmCodec:
    """See :class:`arriero.frontend.links.Codec`."""

    def __init__(self) -> None:
        self._encoder = MsgpackEncoder()
        self._decoder = DataDecoder(EngineCoreOutputs)

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
