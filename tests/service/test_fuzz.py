"""Whatever JSON a client sends, the service answers it: never 5xx, and always in one of its two forms."""

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service.conftest import Harness

# Words that tell a toy to fail are not what is tested here.
text = st.text(max_size=30).filter(lambda value: not any(c.isascii() and c.isalpha() for c in value))
scalar = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | text
value = st.recursive(scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=3))
KEYS = (
    *("inputs", "input", "task", "variant", "model", "top_k", "activation", "threshold", "truncate", "subject"),
    *("use_activation", "user", "raw_scores", "parameters", "padding"),
)
texts = st.lists(text, min_size=1, max_size=3)
field = value | texts | st.sampled_from(["mood", "topics", "full", "mood-pruned", "sigmoid", "none"])
body = st.dictionaries(st.sampled_from(KEYS), field, max_size=5) | value


@given(st.sampled_from(["/classify", "/v1/classify", "/predict"]), body)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json(harness: Harness, path: str, body: Any) -> None:
    content = json.dumps(body)
    response = harness.client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404, 413, 422), response.text
    if response.status_code != 200:
        assert list(response.json()["error"]) == ["code", "message", "type", "param", "request_id"]


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(harness: Harness, content: bytes) -> None:
    response = harness.client.post("/classify", content=content, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
