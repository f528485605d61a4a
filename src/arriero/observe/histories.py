"""What happened to each request: for `arriero explain`. Bounded in its events, and in the number that have ended."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from arriero.core.config import HistoryConfig
from arriero.core.types import RequestId

FIRST = 4
"""Events of a request that are kept whatever comes later: how it was dispatched."""

BEGINNINGS = frozenset({"reject", "queue", "dispatch"})
"""One of these is the first event of each request."""


@dataclass(slots=True)
class History:
    """The events of one request, oldest first."""

    request_id: RequestId
    client_id: str = ""  #: the id that its client knows
    events: list[dict[str, Any]] = field(default_factory=list)
    num_left_out: int = 0  #: in the middle, where there were too many
    has_ended: bool = False


class Histories:
    """Of all live requests, and of the last ones that ended."""

    def __init__(self, config: HistoryConfig) -> None:
        self._config = config
        self._live: dict[RequestId, History] = {}
        self._ended: OrderedDict[RequestId, History] = OrderedDict()

    def add(self, event: dict[str, Any]) -> None:
        """Hear of an event (see :meth:`EventLog.listen`)."""
        request_id = event.get("request") or event.get("request_id")
        if request_id is None:
            return
        history = self._ended.get(request_id) or self._live.get(request_id)
        if history is None:
            if event["event"] not in BEGINNINGS:  # of a request that is forgotten
                return
            history = self._live[request_id] = History(request_id)
        history.client_id = event.get("client_id") or history.client_id
        history.events.append(event)
        if len(history.events) > self._config.events_per_request:
            del history.events[min(FIRST, len(history.events) - 2)]
            history.num_left_out += 1
        if event["event"] == "finish":
            self._end(history)

    def _end(self, history: History) -> None:
        history.has_ended = True
        if self._live.pop(history.request_id, None) is not None:
            self._ended[history.request_id] = history
            while len(self._ended) > self._config.ended_requests:
                self._ended.popitem(last=False)

    def get(self, request_id: RequestId) -> History:
        """Its history. Raises KeyError if nothing is known of it (any more)."""
        return self._live.get(request_id) or self._ended[request_id]

    def client_ids(self) -> Mapping[RequestId, str]:
        """All requests that something is known of: request id -> client's id."""
        return {h.request_id: h.client_id for known in (self._ended, self._live) for h in known.values()}
