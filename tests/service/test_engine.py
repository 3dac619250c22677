"""The engine with toy models whose passes the test holds back: waiting, cancelling, expiring, failing, stopping."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

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
        value = self.metrics.registry.get_sample_value(
            "secateur_items_total",
            {"task": "mood", "variant": "mood-full", "lane": "primary", "outcome": outcome},
        )
        return value or 0.0


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


def test_rows_come_back_in_order() -> None:
    async def test(bench: Bench) -> None:
        ticket = bench.submit("0 0", "1", "2 2 2", "1 2")
        await ticket.future
        assert ticket.rows == [[2, 0, 0], [0, 1, 0], [0, 0, 3], [0, 1, 1]]
        assert ticket.tokens == 8
        assert ticket.admitted_at <= ticket.tokenized_at <= ticket.started_at <= ticket.finished_at
        assert bench.engine.slots.items == 0
        assert bench.items("ok") == 4

    bench(test)


def test_a_request_may_span_batches() -> None:
    async def test(bench: Bench) -> None:
        ticket = bench.submit("0 0 0 0 0", "1 1 1 1 1", "2 2 2 2 2")
        await ticket.future
        assert ticket.rows == [[5, 0, 0], [0, 5, 0], [0, 0, 5]]
        assert [len(batch) for batch in bench.model.batches] == [1, 1, 1]

    bench(test)


def test_refused_before_tokenising() -> None:
    async def test(bench: Bench) -> None:
        bench.model.gate.clear()
        tickets = [bench.submit("0", "0", "0", "0"), bench.submit("0", "0", "0", "0")]
        await bench.entered()
        assert bench.engine.slots.items == 8
        for texts in (["0"], ["0"] * 4):
            with pytest.raises(ApiError) as refused:
                bench.submit(*texts)
            assert refused.value.code == "overloaded"
        bench.model.gate.set()
        await asyncio.gather(*(ticket.future for ticket in tickets))
        assert bench.encoder.calls == 8
        assert bench.engine.admitted == 8
        await bench.submit("0").future

    bench(test)


def test_characters_are_limited_too() -> None:
    async def test(bench: Bench) -> None:
        bench.model.gate.clear()
        first = bench.submit("0 " * 150)
        with pytest.raises(ApiError, match="too much work"):
            bench.submit("0 " * 51)
        bench.model.gate.set()
        await first.future

    bench(test)


def test_one_runs_and_one_is_formed_ahead() -> None:
    async def test(bench: Bench) -> None:
        bench.model.gate.clear()
        first = bench.submit("0")
        await bench.entered()
        # These three arrive while the first runs; the first of them is formed ahead, the others wait behind it.
        later = []
        for index in range(3):
            later.append(bench.submit("1 1 1"))
            async with asyncio.timeout(SECONDS):
                while bench.engine.counts.prefetched + bench.engine.counts.queued < index + 1:
                    await asyncio.sleep(0)
        counts = bench.engine.counts
        assert (counts.running, counts.prefetched, counts.queued, counts.tokens) == (1, 1, 2, 10)
        bench.model.gate.set()
        await asyncio.gather(first.future, *(ticket.future for ticket in later))
        # Filled up at launch: two texts of three tokens fit into eight, the third does not.
        assert [len(batch) for batch in bench.model.batches] == [1, 2, 1]

    bench(test)


def test_cancelled_while_queued_and_while_running() -> None:
    async def test(bench: Bench) -> None:
        bench.model.gate.clear()
        running = bench.submit("0")
        await bench.entered()
        ahead, queued = bench.submit("1 1 1 1 1 1"), bench.submit("2 2 2 2 2 2")
        async with asyncio.timeout(SECONDS):
            while bench.engine.counts.queued < 1:
                await asyncio.sleep(0)
        for ticket in (running, ahead, queued):
            bench.engine.cancel(ticket)
            assert code(ticket) == "client_closed"
        # The queued one is out; the one ahead leaves at launch, the running one with its batch.
        assert bench.engine.slots.items == 2
        bench.model.gate.set()
        await bench.empty()
        assert bench.items("cancelled") == 3
        assert len(bench.model.batches) == 1

    bench(test)


def test_cancelled_before_tokenising() -> None:
    async def test(bench: Bench) -> None:
        ticket = bench.submit("0")
        bench.engine.cancel(ticket)
        assert code(ticket) == "client_closed"
        await bench.empty()
        assert bench.items("cancelled") == 1

    bench(test)


def test_deadline_while_running_and_while_queued() -> None:
    async def test(bench: Bench) -> None:
        bench.model.gate.clear()
        running = bench.submit("0", seconds=0.05)
        await bench.entered()
        queued = bench.submit("1", seconds=0.05)
        for ticket in (running, queued):
            with pytest.raises(ApiError, match="deadline"):
                await ticket.future
        # The batch still runs: its slot is kept until it ends.
        assert bench.engine.slots.items >= 1
        bench.model.gate.set()
        await bench.empty()
        assert bench.items("timeout") == 2
        assert len(bench.model.batches) == 1

    bench(test)


def test_deadline_in_the_past() -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(ApiError, match="deadline"):
            await bench.submit("0", seconds=-1).future
        await bench.empty()
        assert bench.model.batches == []

    bench(test)


def test_poison_fails_alone() -> None:
    async def test(bench: Bench) -> None:
        bench.model.gate.clear()
        blocker = bench.submit("0")
        await bench.entered()
        poisoned, healthy = bench.submit("poison", "1"), bench.submit("2")
        async with asyncio.timeout(SECONDS):
            while bench.engine.counts.prefetched + bench.engine.counts.queued < 3:
                await asyncio.sleep(0)
        bench.model.gate.set()
        await asyncio.gather(blocker.future, healthy.future)
        with pytest.raises(ApiError, match="failed on this input"):
            await poisoned.future
        await bench.empty()
        assert (bench.items("failed"), bench.items("cancelled"), bench.items("ok")) == (1, 1, 2)
        assert bench.metrics.registry.get_sample_value(
            "secateur_batches_total", {"variant": "mood-full", "outcome": "retried"}
        )

    bench(test)


@pytest.mark.parametrize("word", ["nan", "inf"])
def test_non_finite_logits(word: str) -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(ApiError) as failed:
            await bench.submit("1", f"{word} 1").future
        assert failed.value.code == "invalid_output"
        value = bench.metrics.registry.get_sample_value(
            "secateur_invalid_outputs_total", {"task": "mood", "variant": "mood-full", "kind": word}
        )
        assert value == 1

    bench(test)


def test_tokenizer_failure() -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(ApiError) as failed:
            await bench.submit("0", "crash").future
        assert failed.value.code == "internal"
        await bench.empty()
        assert bench.items("failed") == 2

    bench(test)


def test_too_long_without_truncation() -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(ApiError) as failed:
            await bench.submit("0", "1 " * 9, truncate=False).future
        assert (failed.value.code, failed.value.param) == ("input_too_long", "inputs[1]")
        await bench.empty()
        assert bench.items("client_error") == 2

    bench(test)


def test_out_of_memory_lowers_the_limit() -> None:
    async def test(bench: Bench) -> None:
        await bench.submit("huge 0 0 0", "1 1 1 1").future
        await bench.submit("0 0 0", "1 1 1").future
        # Eight tokens did not fit, so batches are cut at four for a minute.
        assert [len(batch) for batch in bench.model.batches] == [2, 1, 1, 1, 1]

    bench(test)


def test_a_dead_worker_fails_everything() -> None:
    async def test(bench: Bench) -> None:
        bench.model.gate.clear()
        running = bench.submit("broken")
        await bench.entered()
        queued = [bench.submit("1 1 1 1 1"), bench.submit("2 2 2 2 2")]
        bench.model.gate.set()
        for ticket in (running, *queued):
            with pytest.raises(ApiError) as failed:
                await ticket.future
            assert failed.value.code == "engine_failed"
        assert bench.engine.failed
        await bench.empty()
        assert bench.items("failed") == 3
        with pytest.raises(ApiError) as refused:
            bench.submit("1")
        assert refused.value.code == "engine_failed"
        assert bench.metrics.registry.get_sample_value("secateur_worker_failures_total") == 1

    bench(test)


def test_a_stalled_worker_fails_everything() -> None:
    async def test(bench: Bench) -> None:
        bench.model.gate.clear()
        ticket = bench.submit("0")
        await bench.entered()
        async with asyncio.timeout(SECONDS):
            while not bench.engine.failed:
                bench.engine.check()
                await asyncio.sleep(0)
        with pytest.raises(ApiError) as failed:
            await ticket.future
        assert failed.value.code == "engine_failed"
        # The pass ends after all; its result comes too late and must change nothing.
        bench.model.gate.set()
        await bench.empty()

    bench(test, stall_seconds=0.05)


def test_an_idle_worker_is_not_stalled() -> None:
    async def test(bench: Bench) -> None:
        await bench.submit("0").future
        async with asyncio.timeout(SECONDS):
            while bench.engine.counts.running:
                await asyncio.sleep(0)
        bench.engine.check()
        assert not bench.engine.failed

    bench(test, stall_seconds=1e-9)


def test_drain_finishes_what_was_accepted() -> None:
    async def test(bench: Bench) -> None:
        bench.model.gate.clear()
        tickets = [bench.submit("0"), bench.submit("1")]
        await bench.entered()
        bench.engine.refuse()
        with pytest.raises(ApiError) as refused:
            bench.submit("2")
        assert refused.value.code == "draining"
        drain = asyncio.create_task(bench.engine.drain(SECONDS))
        bench.model.gate.set()
        await drain
        assert all(ticket.outcome == "ok" for ticket in tickets)

    bench(test)


def test_drain_gives_up() -> None:
    async def test(bench: Bench) -> None:
        bench.model.gate.clear()
        ticket = bench.submit("0")
        await bench.entered()
        bench.engine.refuse()
        await bench.engine.drain(0.01)
        assert code(ticket) == "draining"
        bench.model.gate.set()
        await bench.empty()
        assert bench.items("drained") == 1

    bench(test)


def test_stop_ends_what_is_left() -> None:
    async def main() -> None:
        bench = Bench()
        bench.engine.start()
        bench.model.gate.clear()
        tickets = [bench.submit("0"), bench.submit("1 1 1 1 1 1"), bench.submit("2 2 2 2 2 2")]
        await bench.entered()
        stop = asyncio.create_task(bench.engine.stop())
        await asyncio.wait([ticket.future for ticket in tickets])
        bench.model.gate.set()
        await stop
        assert [code(ticket) for ticket in tickets] == ["draining"] * 3
        await bench.empty()
        assert bench.items("drained") == 3

    asyncio.run(main())


def test_a_result_that_arrives_after_the_stop() -> None:
    async def main() -> None:
        bench = Bench()
        bench.engine.start()
        ticket = bench.submit("0")
        # The loop is held here, so the worker's report waits in it, and the lane is already empty.
        assert bench.model.entered.acquire(timeout=SECONDS)
        while bench.engine.counts.running:
            pass
        await bench.engine.stop()
        assert code(ticket) == "draining"
        await bench.empty()
        assert bench.items("drained") == 1

    asyncio.run(main())


def test_retry_after_follows_the_measured_rate() -> None:
    async def test(bench: Bench) -> None:
        await bench.submit("0").future
        bench.model.gate.clear()
        held = [bench.submit("0", "0", "0", "0"), bench.submit("0", "0", "0", "0")]
        await bench.entered()
        with pytest.raises(ApiError) as refused:
            bench.submit("0")
        seconds = refused.value.retry_after_seconds
        assert seconds is not None
        assert seconds > 0
        bench.model.gate.set()
        await asyncio.gather(*(ticket.future for ticket in held))

    bench(test)
