"""Who may join: an instance says with its first message what it is, and must fit those that are there already."""

from __future__ import annotations

import msgspec

from arriero import __version__


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The part of vLLM's ready message, with arriero's additions, that instances must agree in."""

    vllm_version: str
    model: str
    dtype: str
    cache_dtype: str
    block_size: int
    world_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    max_model_len: int
    arriero_version: str = "of another kind"  #: instances of earlier versions do not say


LIKE_THE_OTHERS = (
    "model",
    "dtype",
    "cache_dtype",
    "block_size",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "world_size",
)
"""A request could not move to, or be continued by, an instance that differs in these."""

_decoder = msgspec.msgpack.Decoder(Identity)


class Membership:
    """Compares instances with the first that has joined."""

    def __init__(self) -> None:
        self._first: Identity | None = None
        self._max_model_len: int | None = None  # what requests may have, once clients were told

    def serve(self, max_model_len: int) -> None:
        """Clients are told from now on that requests may have ``max_model_len`` tokens."""
        self._max_model_len = max_model_len

    def refusal(self, payload: bytes) -> str | None:
        """Why an instance whose first message is ``payload`` may not join; None if it may."""
        try:
            identity = _decoder.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return f"its ready message ({len(payload)} bytes) cannot be read: {error}"
        if identity.arriero_version != __version__:
            return (
                f"it runs arriero {identity.arriero_version}, and the front end {__version__}: install the same version"
            )
        if self._max_model_len is not None and identity.max_model_len < self._max_model_len:
            return (
                f"it takes {identity.max_model_len} tokens, and requests may have {self._max_model_len}: "
                "give it more memory, or start a new server with a smaller --max-model-len"
            )
        self._first = self._first or identity
        return _difference(identity, self._first)


def _difference(new: Identity, first: Identity) -> str | None:
    if _minor(new.vllm_version) != _minor(first.vllm_version):
        return (
            f"it runs vLLM {new.vllm_version}, and the others {first.vllm_version}: "
            "only the patch version may differ, start a new server for another one"
        )
    for name in LIKE_THE_OTHERS:
        ours, theirs = getattr(new, name), getattr(first, name)
        if ours != theirs:
            return f"its {name} is {ours!r}, that of the others {theirs!r}: start a new server for other settings"
    return None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
