"""vLLM's engine client over a cluster."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest

from arriero.core.errors import UnavailableError

pytest.importorskip("vllm")

from vllm.pooling_params import PoolingParams
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from arriero.frontend.requests import LiveRequest
from arriero.vllm.client import ClusterClient, facts_of
from arriero.vllm.compat import GracefulHTTPError

CONFIG: Any = SimpleNamespace(cache_config=SimpleNamespace(block_size=16, enable_prefix_caching=True))


class NoInstances:
    """A cluster in which nothing is ready."""

    fail: Callable[[LiveRequest, str], bool]

    def __init__(self) -> None:
        self.links, self.instances, self.intake = self, self, self
        self.client_index = 0

    def __iter__(self) -> Any:
        return iter(())

    def ready_ids(self) -> list[int]:
        return []

    async def admit(self, *_: Any) -> None:
        raise UnavailableError("no instance is ready")


def pooling_request(request_id: str) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        external_req_id=request_id,
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=None,
        pooling_params=PoolingParams(task="embed"),
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


@pytest.mark.asyncio
async def test_a_lost_pooling_request_ends_with_an_error_that_vllms_output_handler_survives() -> None:
    """An output without an embedding would fail an assertion there, and with it the whole server."""
    cluster = NoInstances()
    client = ClusterClient(None, cluster)  # type: ignore[arg-type]
    processor = client.output_processor = OutputProcessor(tokenizer=None, log_stats=False)
    request = pooling_request("r")
    queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, "r")
    processor.add_request(request, None, None, 0, queue)
    assert cluster.fail(LiveRequest(facts_of(request, 16), request, 0, "r", 0.0), "all instances are gone")
    with pytest.raises(GracefulHTTPError, match="all instances are gone"):
        await queue.get()
    assert not processor.has_unfinished_requests()


@pytest.mark.asyncio
async def test_a_request_that_finds_no_instance_gets_503_and_is_forgotten_by_the_output_processor() -> None:
    """Else it would count as unfinished, against the queue's limit, for as long as the server lives."""
    processor = OutputProcessor(tokenizer=None, log_stats=False)
    client = ClusterClient(CONFIG, NoInstances())  # type: ignore[arg-type]
    client.output_processor = processor
    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=SamplingParams(),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    request.external_req_id = "r"
    queue = RequestOutputCollector(RequestOutputKind.CUMULATIVE, "r")
    processor.add_request(request, None, None, 0, queue)
    with pytest.raises(GracefulHTTPError, match="no instance is ready") as raised:
        await client.add_request_async(request)
    assert raised.value.http_status == HTTPStatus.SERVICE_UNAVAILABLE
    assert not processor.has_unfinished_requests()
