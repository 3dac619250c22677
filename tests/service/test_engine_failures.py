"""How an engine fails and stops: bad items, lack of memory, a dead or stalled worker, drains."""

import asyncio
import time

import pytest

from service.errors import ApiError
from tests.service.engines import SECONDS, Bench, bench, code


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


@pytest.mark.parametrize(("texts", "lacked"), [(("huge", "0"), True), (("0", "1"), False)])
def test_a_lack_of_memory_is_noted(texts: tuple[str, ...], lacked: bool) -> None:
    async def test(bench: Bench) -> None:
        began = time.monotonic()
        await bench.submit(*texts).future
        assert (bench.engine.out_of_memory_at >= began) is lacked

    bench(test)
