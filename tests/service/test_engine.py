"""The engine with toy models whose passes the test holds back: waiting, batching, cancelling, expiring."""

import asyncio
import time

import pytest

from service.errors import ApiError
from tests.service.engines import SECONDS, Bench, bench, code


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


def test_items_of_an_answered_ticket_run_again_elsewhere() -> None:
    async def test(bench: Bench) -> None:
        first = bench.submit("0", "1 1", "2 2 2")
        await first.future
        calls = bench.encoder.calls
        control = bench.deploy("mood-control")
        again = bench.engine.submit_again(first, [2, 0], control, time.monotonic() + SECONDS)
        await again.future
        assert again.rows == [[0, 0, 3], [1, 0, 0]]
        assert bench.encoder.calls == calls
        assert bench.model.batches[-1] == [(2, 2, 2), (0,)]
        assert (again.deployment, again.request_id) == (control, "req-test")

    bench(test)


@pytest.mark.parametrize(("refusal", "expected"), [("full", "overloaded"), ("draining", "draining")])
def test_the_second_step_is_admitted_like_the_first(refusal: str, expected: str) -> None:
    async def test(bench: Bench) -> None:
        first = bench.submit("0")
        await first.future
        if refusal == "full":
            bench.engine.slots.limit_items = 0
        else:
            bench.engine.refuse()
        with pytest.raises(ApiError) as refused:
            bench.engine.submit_again(first, [0], bench.deployment, time.monotonic() + SECONDS)
        assert refused.value.code == expected
        assert bench.engine.admitted == 1

    bench(test)


def test_device_time_is_shared_out_by_tokens() -> None:
    async def test(bench: Bench) -> None:
        ticket = bench.submit("0", "1 1 1")
        await ticket.future
        one, three = ticket.items
        assert one.device_seconds > 0
        assert three.device_seconds == pytest.approx(3 * one.device_seconds)
        assert one.device_seconds + three.device_seconds == pytest.approx(one.pass_seconds)
        assert one.pass_seconds == three.pass_seconds == pytest.approx(ticket.finished_at - ticket.started_at)

    bench(test)


def test_idle_is_when_nobody_waits() -> None:
    async def test(bench: Bench) -> None:
        assert bench.engine.is_idle
        bench.model.gate.clear()
        ticket = bench.submit("0")
        assert not bench.engine.is_idle
        bench.model.gate.set()
        await ticket.future
        assert bench.engine.is_idle

    bench(test)
