"""An engine over toy models, inside a running loop, for the tests of its modules."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from service.deployments import Deployment, State
from service.engine import Engine
from service.errors import ApiError
from service.metrics import Metrics
from service.schemas import Query
from service.sections import EngineSettings, Limits
from service.ticket import Ticket
from tests.service.toys import ToyEncoder, ToyModel, toy_checkpoint

SECONDS = 30


class Bench:
    """An engine, its metrics and one deployment, inside a running loop."""

    def __init__(self, **engine: Any) -> None:
        limits = Limits(max_inputs=4, max_queue_items=8, max_queue_chars=400)
        self.metrics = Metrics()
        settings = EngineSettings(max_batch_tokens=8, max_batch_items=4, **engine)
        self.engine = Engine(limits, settings, self.metrics)
        self.model = ToyModel()
        self.encoder = ToyEncoder()
        self.deployment = self.deploy("mood-full")

    def deploy(self, name: str) -> Deployment:
        loaded = toy_checkpoint(model=self.model, encoder=self.encoder)
        return Deployment(name, "mood", "full", Path(name), 8, State.READY, loaded=loaded)

    def submit(self, *texts: str, seconds: float = SECONDS, truncate: bool = True) -> Ticket:
        query = Query(list(texts), truncate=truncate)
        return self.engine.submit(self.deployment, query, time.monotonic() + seconds, "req-test")

    async def entered(self) -> None:
        """Wait until a pass has begun."""
        assert await asyncio.get_running_loop().run_in_executor(None, self.model.entered.acquire, True, SECONDS)

    async def empty(self) -> None:
        """Wait until no slot is held; every report from a thread is one turn of the loop."""
        async with asyncio.timeout(SECONDS):
            while self.engine.slots.items:
                await asyncio.sleep(0)

    def items(self, outcome: str) -> float:
        lanes = [("mood-full", "primary"), ("mood-control", "cascade")]
        names = [{"task": "mood", "variant": variant, "lane": lane, "outcome": outcome} for variant, lane in lanes]
        counted = [self.metrics.registry.get_sample_value("secateur_items_total", labels) for labels in names]
        return sum(value or 0.0 for value in counted)


def bench(test: Callable[[Bench], Awaitable[None]], **engine: Any) -> None:
    """Run a test inside a loop, stop the engine, and check the identity."""

    async def main() -> None:
        bench = Bench(**engine)
        bench.engine.start()
        try:
            await test(bench)
        finally:
            bench.model.gate.set()
            await bench.engine.stop()
            await bench.empty()
        outcomes = ("ok", "failed", "cancelled", "timeout", "drained", "client_error")
        assert bench.engine.admitted == sum(bench.items(outcome) for outcome in outcomes)

    asyncio.run(main())


def code(ticket: Ticket) -> str:
    error = ticket.future.exception()
    assert isinstance(error, ApiError)
    return error.code
