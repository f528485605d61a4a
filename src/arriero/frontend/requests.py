"""The requests in the front end's care: where each runs, and the token log.

The token log holds every output token that was passed on to the client. With it and the original
message a request can be continued on any instance, and no token is delivered twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from arriero.core.errors import ConflictError, NotFoundError, ProtocolError
from arriero.core.types import Dispatchable, InstanceId, RequestId


@dataclass(slots=True)
class LiveRequest:
    """A request that has not ended."""

    facts: Dispatchable
    message: Any  #: the original request, as the codec encodes it
    route: InstanceId | None  #: the one instance whose outputs count; None while it waits for one
    external_id: str
    arrived_s: float
    tokens: list[int] = field(default_factory=list)  #: the token log
    last_token_s: float = 0.0
    num_moves: int = 0
    paused_s: float = 0.0  #: sum of the pauses that moves caused
    pause_since_s: float | None = None  #: last token before the move that has not shown a token yet

    @property
    def request_id(self) -> RequestId:
        return self.facts.request_id


class RequestTable:
    """All live requests by id."""

    def __init__(self) -> None:
        self._requests: dict[RequestId, LiveRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(list(self._requests.values()))

    def add(self, request: LiveRequest) -> None:
        """Take a request into care."""
        if request.request_id in self._requests:
            raise ProtocolError(f"request {request.request_id} is live already")
        self._requests[request.request_id] = request

    def get(self, request_id: RequestId) -> LiveRequest | None:
        """The request, if it is live."""
        return self._requests.get(request_id)

    def pop(self, request_id: RequestId) -> LiveRequest | None:
        """End the care for a request."""
        return self._requests.pop(request_id, None)

    def routed_to(self, instance: InstanceId) -> list[LiveRequest]:
        """Requests whose tokens come from ``instance``."""
        return [r for r in self._requests.values() if r.route == instance]

    def find(self, name: str) -> list[LiveRequest]:
        """Requests called ``name``: the internal id, the id that the client knows (with n > 1 several sequences
        share it), or the beginning of one client's id. Raises NotFoundError, or ConflictError if that is ambiguous.
        """
        found = find_ids(name, {r.request_id: r.external_id for r in self._requests.values()})
        if not found:
            raise NotFoundError(
                f"request {name!r} is not running: it has ended, or the id is wrong (see GET /requests)"
            )
        return [self._requests[request_id] for request_id in found]


def find_ids(name: str, external_ids: Mapping[RequestId, str]) -> list[RequestId]:
    """Those of the requests (internal id -> external id) that :meth:`RequestTable.find` means by ``name``.

    Raises ConflictError if ``name`` begins several clients' ids.
    """
    if name in external_ids:
        return [name]
    clients = {request_id: _client_ids(external) for request_id, external in external_ids.items()}
    found = [request_id for request_id, ids in clients.items() if name in ids]
    if not found and (beginning := name.rstrip("…")):
        found = [request_id for request_id, ids in clients.items() if ids[-1].startswith(beginning)]
        if len({clients[request_id][-1] for request_id in found}) > 1:
            raise ConflictError(f"{len(found)} requests begin with {name!r}: give more of the id")
    return found


def _client_ids(external_id: str) -> tuple[str, str, str]:
    """What a client may call a request: "cmpl-7" is known inside as "cmpl-7-0" (prompt 0), and its sequences as
    "0_cmpl-7-0", "1_cmpl-7-0". The client's own id comes last.
    """
    of_all_sequences = re.sub(r"^\d+_", "", external_id)
    return external_id, of_all_sequences, re.sub(r"-\d+$", "", of_all_sequences)
