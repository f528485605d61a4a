"""A closed loop of streams whose answers are known from an undisturbed run. Bounded in time and in number."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from arriero.bench.client import CHAT, COMPLETIONS, Client, Reply
from arriero.bench.soak_requests import Case, difference, make_cases
from arriero.chaos.scoreboard import Outcome, Verdict, judge
from arriero.core.errors import ArrieroError

MAX_REQUESTS = 20_000
PATIENCE_S = 60.0
AWAKE_TRIES, AWAKE_PAUSE_S = 30, 0.5
REFUSED_PAUSE_S = 0.2
"""A client that was refused does not come back at once: the count of refusals should not measure how fast we ask."""


def plain_cases(count: int, seed: int, model: str, max_tokens: tuple[int, int] = (60, 240)) -> list[Case]:
    """Streams that every OpenAI-compatible server takes: completions and chats, greedy and seeded."""
    rng = random.Random(seed)
    cases = []
    for number in range(count):
        words = " ".join(rng.choice(_WORDS) for _ in range(rng.randint(5, 60)))
        ask: dict[str, Any] = {"prompt": f"{number} {words}"}
        path = COMPLETIONS
        if number % 3 == 2:
            path, ask = CHAT, {"messages": [{"role": "user", "content": f"{number} {words}"}]}
        body = {
            "model": model,
            "max_tokens": rng.randint(*max_tokens),
            "temperature": 0.0,
            "stream": True,
            "return_token_ids": True,
            **ask,
        }
        kind = "chat" if path == CHAT else "completion"
        if number % 2:
            body |= {"temperature": 1.0, "seed": rng.randrange(1 << 30)}
            kind += " seeded"
        cases.append(Case(kind=kind, path=path, body=body))
    return cases


_WORDS = (
    "llama",
    "mountain",
    "rope",
    "saddle",
    "river",
    "stone",
    "bread",
    "wind",
    "market",
    "letter",
    "bridge",
    "lamp",
)


def mixed_cases(count: int, seed: int) -> list[Case]:
    """All kinds that the soak knows, none of which hangs up: grammars, logprobs, n > 1, stop strings, penalties."""
    return [case for case in make_cases(2 * count, seed) if case.hang_up_after is None][:count]


class Load:
    """Sends cases over and over, and judges what comes back."""

    def __init__(
        self, client: Client, cases: Sequence[Case], *, concurrency: int, patience_s: float, salt: bool = False
    ) -> None:
        self._salt = salt  # every second request may not use what its like have left in prefix caches
        self._client = client
        self._cases = cases
        self._concurrency = concurrency
        self._patience_s = patience_s
        self._replies: set[Reply] = set()  # under way
        self._ended_tokens = 0
        self.outcomes: list[Outcome] = []
        self.references: list[Reply] = []
        self.num_unsteady = 0
        self._serial = itertools.count()

    @property
    def num_tokens(self) -> int:
        """That came since the load began."""
        return self._ended_tokens + sum(len(r.arrivals_s) for r in self._replies)

    async def learn(self) -> None:
        """The answer to each case, undisturbed, twice: a case whose answers differ proves nothing and is left out.

        Raises ArrieroError if the server does not even manage that.
        """
        await self._awake()
        first, second = await self._all_once(), await self._all_once()
        steady = [n for n, (a, b) in enumerate(zip(first, second, strict=True)) if difference(a, b) is None]
        self.num_unsteady = len(first) - len(steady)
        self._cases = [self._cases[n] for n in steady]
        self.references = [first[n] for n in steady]
        if not steady:
            raise ArrieroError("no request is answered alike twice: nothing can be judged (is temperature 0 ignored?)")

    async def _awake(self) -> None:
        """Routers answer before they have seen their workers: wait until a request gets through."""
        for _ in range(AWAKE_TRIES):
            reply = await self._send(self._cases[0])
            if reply.error is None:
                return
            await asyncio.sleep(AWAKE_PAUSE_S)
        raise ArrieroError(f"the server answers no request: {reply.error}")

    async def _all_once(self) -> list[Reply]:
        replies: dict[int, Reply] = {}

        async def work() -> None:
            for number in left:
                replies[number] = await self._send(self._cases[number])

        left = iter(range(len(self._cases)))
        await asyncio.gather(*[work() for _ in range(self._concurrency)])
        for number, case in enumerate(self._cases):
            verdict, detail = judge(replies[number], replies[number], hung=replies[number].ended_s is None)
            if verdict is not Verdict.WHOLE:
                raise ArrieroError(f"a request of kind {case.kind!r} fails before any fault: {detail}")
        return [replies[number] for number in range(len(self._cases))]

    async def run(self, seconds: float) -> None:
        """For so long, and until the last streams have ended."""
        deadline, self._ended_tokens = perf_counter() + seconds, 0
        numbers = itertools.islice(itertools.cycle(range(len(self._cases))), MAX_REQUESTS)

        async def work() -> None:
            while perf_counter() < deadline and (number := next(numbers, None)) is not None:
                outcome = await self._one(number)
                if not outcome.arrivals_s:
                    await asyncio.sleep(REFUSED_PAUSE_S)

        await asyncio.gather(*[work() for _ in range(self._concurrency)])

    async def _one(self, number: int) -> Outcome:
        case = self._cases[number]
        reply = await self._send(case, salted=self._salt and next(self._serial) % 2 == 1)
        verdict, detail = judge(reply, self.references[number], hung=reply.ended_s is None)
        outcome = Outcome(
            case=number,
            kind=case.kind,
            started_s=reply.started_s,
            ended_s=reply.ended_s or perf_counter(),
            verdict=verdict,
            detail=detail,
            num_tokens=reply.num_tokens,
            arrivals_s=reply.arrivals_s,
        )
        self.outcomes.append(outcome)
        return outcome

    async def _send(self, case: Case, *, salted: bool = False) -> Reply:
        """The reply; ``ended_s`` is None if it hung until patience ended."""
        body = {**case.body, "cache_salt": f"chaos{perf_counter()}"} if salted else case.body
        call = self._client.start(case.path, body)
        self._replies.add(call.reply)
        try:
            async with asyncio.timeout(self._patience_s):
                await asyncio.shield(call.finish())
        except TimeoutError:
            await call.cancel()
            call.reply.ended_s = None
        except ValueError as error:  # a line of the stream that is no JSON
            call.reply.error = f"{type(error).__name__}: {error}"
        finally:
            self._replies.discard(call.reply)
            self._ended_tokens += len(call.reply.arrivals_s)
        return call.reply
