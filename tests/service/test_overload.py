"""Two hundred clients against a queue of sixteen: every request ends, with 200 or 429, and the counts agree."""

import asyncio

import httpx

from benchmarks.overload import drive
from tests.service.conftest import SECONDS, Start
from tests.service.toys import toy_loader

CLIENTS = 200
LOAD_SECONDS = 2.0


def test_overload(start: Start) -> None:
    harness = start(toy_loader())
    tally = asyncio.run(drive(harness.server.url, CLIENTS, LOAD_SECONDS, [{"inputs": ["0 0", "1"]}]))
    counts = tally.statuses
    assert tally.broken == 0
    assert set(counts) == {200, 429}
    assert harness.metric("inflight_items") == 0
    for code in counts:
        assert harness.metric("requests_total", code=str(code)) == counts[code]
        assert harness.metric("http_requests_total", route="/classify", code=str(code)) == counts[code]
    assert harness.metric("rejected_total", reason="overloaded") == counts[429]
    assert harness.metric("items_total", outcome="ok") == harness.metric("items_total") == 2 * counts[200]
    assert harness.metric("request_duration_seconds_count") == counts[200]
    assert harness.metric("batch_items_sum") == 2 * counts[200]
    # Refused requests never met the tokenizer.
    assert harness.loader.encoder("mood-full").calls == 2 * counts[200]


def test_exactly_the_limit_is_accepted(start: Start) -> None:
    harness = start(toy_loader())
    model = harness.loader.model("mood-full")
    model.gate.clear()

    async def main() -> list[int]:
        async with httpx.AsyncClient(base_url=harness.server.url, timeout=SECONDS, trust_env=False) as http:
            held = [asyncio.create_task(http.post("/classify", json={"inputs": ["0"] * 4})) for _ in range(4)]
            async with asyncio.timeout(SECONDS):
                while harness.runtime.engine.slots.items < 16:
                    await asyncio.sleep(0)
            refused = await http.post("/classify", json={"inputs": "0"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
            assert 1 <= int(refused.headers["retry-after"]) <= 30
            model.gate.set()
            return [response.status_code for response in await asyncio.gather(*held)]

    assert asyncio.run(main()) == [200] * 4
    assert harness.classify("0").status_code == 200
