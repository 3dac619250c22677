"""Images over HTTP: a small V-MoE, full and pruned, beside a task that reads text, in every encoding and mistake."""

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from models.checkpoint import Checkpoint, load_checkpoint
from models.pruning.prune import prune
from service.settings import load_settings
from tests.models.tiny_vision import images, save_vision, tiny_vision
from tests.service.conftest import Harness
from tests.service.toys import ToyLoader, toy_loader

YAML = """
version: 1
models: {root: ., dtype: float32}
deployments:
  pets-full: {path: pets-full, role: full}
  pets-pruned: {path: pets-pruned, role: pruned}
  mood-full: {path: mood-full, role: full}
tasks:
  pets: {deployments: [pets-full, pets-pruned], full: pets-full, default: pets-pruned}
  mood: {deployments: [mood-full], full: mood-full}
experiments:
  half: {task: pets, mode: split, arms: [{deployment: pets-full, weight: 50}, {deployment: pets-pruned, weight: 50}]}
limits: {max_inputs: 4, max_chars: 40, max_pixels: 10000, max_body_bytes: 65536}
engine: {max_batch_tokens: 16, max_batch_items: 3}
"""
PICTURES = images(4)
TOKENS = 5


class MixedLoader(ToyLoader):
    """Real checkpoints for pets, a toy for mood."""

    def __call__(self, path: Path, device: str, dtype: str, backend: str) -> Checkpoint:
        if path.name.startswith("pets"):
            return load_checkpoint(path, device, dtype, backend)
        return super().__call__(path, device, dtype, backend)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pets")
    save_vision(folder / "pets-full", tiny_vision())
    prune(folder / "pets-full", "random", 2, folder / "pets-pruned", semantics="zero")
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Harness]:
    (folder / "secateur.yaml").write_text(YAML)
    harness = Harness(load_settings(folder / "secateur.yaml", {}), MixedLoader(toy_loader().makers))
    harness.wait_loaded()
    yield harness
    harness.close()


def encoded(picture: Any, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture.squeeze())
    image.save(stream, format, **options)
    return stream.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def post(harness: Harness, *parts: bytes, **fields: str) -> httpx.Response:
    files = [("image", ("x.png", part, "image/png")) for part in parts]
    return harness.client.post("/classify", files=files, data=fields)


def expected(folder: Path, name: str) -> list[list[float]]:
    loaded = load_checkpoint(folder / name, dtype="float32")
    rows: list[list[float]] = loaded.model.classify([loaded.encoder.encode(p).ids for p in PICTURES]).logits_BC.tolist()
    return rows


@pytest.mark.parametrize("variant", ["pets-full", "pets-pruned"])
def test_every_encoding_gives_the_logits_of_the_model(served: Harness, folder: Path, variant: str) -> None:
    files = [encoded(picture) for picture in PICTURES]
    bodies: list[list[Any]] = [
        [{"image": text(file)} for file in files],
        [text(file) for file in files],
        [f"data:image/png;base64,{text(file)}" for file in files],
    ]
    fields = {"task": "pets", "variant": variant, "activation": "none"}
    responses = [served.client.post("/classify", json={**fields, "inputs": body}) for body in bodies]
    responses.append(post(served, *files, **fields))
    for response in responses:
        assert response.status_code == 200, response.text
        data = response.json()["data"]
        assert [item["tokens"] for item in data] == [TOKENS] * 4
        np.testing.assert_allclose([item["probs"] for item in data], expected(folder, variant), rtol=1e-4, atol=1e-5)
        assert response.headers["x-variant"] == variant


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    assert list(error) == ["code", "message", "type", "param", "request_id"]
    return response.status_code, error["code"], error["param"]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


GOOD = encoded(PICTURES[0])
BOMB = (
    b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)) + chunk(b"IDAT", b"")
)
WIDE = encoded(Image.new("L", (101, 100)))
BAD_INPUTS: list[tuple[Any, str, str]] = [
    (["a lovely day"], "invalid_image", "inputs[0]"),
    ("a lovely day", "invalid_image", "inputs[0]"),
    ([text(GOOD), text(b"hello there")], "invalid_image", "inputs[1]"),
    ([{"image": "???"}], "invalid_image", "inputs[0]"),
    ({"image": text(GOOD[:60])}, "invalid_image", "inputs[0]"),
    ([{"image": text(BOMB)}], "image_too_large", "inputs[0]"),
    ([{"image": text(GOOD)}, {"image": text(WIDE)}], "image_too_large", "inputs[1]"),
    ([{"image": ""}], "empty_input", "inputs[0]"),
    ([{"image": 5}], "validation_failed", "inputs[0].image"),
    ([{"image": None}], "validation_failed", "inputs[0].image"),
    ([{}], "missing_field", "inputs[0].image"),
    ([{"image": text(GOOD), "url": "x"}], "unknown_field", "inputs[0].url"),
    ([{"image": text(GOOD)}] * 5, "too_many_inputs", "inputs"),
    ([[{"image": text(GOOD)}]], "validation_failed", "inputs[0]"),
]


@pytest.mark.parametrize(("inputs", "code", "param"), BAD_INPUTS)
def test_bad_images_in_json(served: Harness, inputs: Any, code: str, param: str) -> None:
    response = served.client.post("/classify", json={"task": "pets", "inputs": inputs})
    assert error_of(response) == (422, code, param)


def test_bad_images_in_a_form(served: Harness) -> None:
    assert error_of(post(served, b"no image", task="pets")) == (422, "invalid_image", "image[0]")
    assert error_of(post(served, GOOD, BOMB, task="pets")) == (422, "image_too_large", "image[1]")
    assert error_of(post(served, GOOD, b"", task="pets")) == (422, "empty_input", "image[1]")
    assert error_of(post(served, *[GOOD] * 5, task="pets")) == (422, "too_many_inputs", "image")
    assert error_of(post(served, task="pets"))[0] == 415  # without a file, the client sends no form


def test_an_image_larger_than_a_body_may_be(served: Harness) -> None:
    assert error_of(post(served, GOOD + bytes(70_000), task="pets"))[:2] == (413, "body_too_large")
    response = served.client.post("/classify", json={"task": "pets", "inputs": [text(bytes(70_000))]})
    assert error_of(response)[:2] == (413, "body_too_large")


def test_texts_and_images_go_to_their_own_tasks(served: Harness) -> None:
    def classify(inputs: Any) -> httpx.Response:
        return served.client.post("/classify", json={"task": "mood", "inputs": inputs})

    assert classify("0 0 2").json()["data"][0]["label"] == "negative"
    assert error_of(classify(["0", {"image": text(GOOD)}])) == (422, "invalid_text", "inputs[1]")
    assert error_of(post(served, GOOD, task="mood")) == (422, "invalid_text", "image[0]")
    # A limit on characters is about texts: an image may be longer.
    assert error_of(classify("0" * 41)) == (422, "text_too_long", "inputs[0]")
    assert len(text(GOOD)) > 40
    assert post(served, GOOD, task="pets").status_code == 200


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"task": "nothing"}, 404, "task_not_found", "task"),
        ({}, 422, "task_required", "task"),
        ({"task": "pets", "variant": "nothing"}, 404, "variant_not_found", "variant"),
        ({"task": "pets", "colour": "red"}, 422, "unknown_field", "colour"),
        ({"task": "pets", "top_k": "0"}, 422, "validation_failed", "top_k"),
        ({"task": "pets", "top_k": "two"}, 422, "validation_failed", "top_k"),
        ({"task": "pets", "threshold": "0.5"}, 422, "validation_failed", "threshold"),
        ({"task": "pets", "threshold": "nan"}, 422, "validation_failed", "threshold"),
        ({"task": "pets", "truncate": "maybe"}, 422, "validation_failed", "truncate"),
        ({"task": "pets", "activation": "tanh"}, 422, "validation_failed", "activation"),
        ({"task": "pets", "subject": ""}, 422, "validation_failed", "subject"),
        ({"task": "pets", "inputs": "x"}, 422, "validation_failed", None),
    ],
)
def test_other_fields_of_a_form(
    served: Harness, fields: dict[str, str], status: int, code: str, param: str | None
) -> None:
    assert error_of(post(served, GOOD, **fields)) == (status, code, param)


def test_fields_of_a_form_have_the_types_of_json(served: Harness) -> None:
    fields = {"task": "pets", "variant": "full", "top_k": "2", "truncate": "true", "activation": "sigmoid"}
    answer = post(served, GOOD, **fields).json()
    assert (answer["variant"], answer["activation"], answer["data"][0]["probs"]) == ("pets-full", "sigmoid", None)
    assert len(answer["data"][0]["scores"]) == 2


def test_a_subject_stays_on_one_side_whatever_the_encoding(served: Harness) -> None:
    sides = set()
    for subject in map(str, range(12)):
        body = {"task": "pets", "inputs": [{"image": text(GOOD)}], "subject": subject}
        arms = {served.client.post("/classify", json=body).json()["experiment"]["arm"] for _ in range(2)}
        arms.add(post(served, GOOD, task="pets", subject=subject).json()["experiment"]["arm"])
        assert len(arms) == 1
        sides |= arms
    assert sides == {"pets-full", "pets-pruned"}


def test_images_are_counted_as_texts_are(served: Harness) -> None:
    names = {"task": "pets", "variant": "pets-pruned"}
    before = {
        name: served.metric(name, **labels)
        for name, labels in (
            ("requests_total", {**names, "code": "200"}),
            ("tokens_total", {**names, "kind": "real"}),
            ("routed_slots_total", names),
            ("items_total", {**names, "outcome": "ok"}),
            ("input_tokens_sum", {"task": "pets"}),
        )
    }
    assert post(served, *[GOOD] * 3, task="pets", variant="pets-pruned").json()["usage"] == {
        "prompt_tokens": 3 * TOKENS,
        "total_tokens": 3 * TOKENS,
    }
    served.runtime.publish()
    after = {
        "requests_total": served.metric("requests_total", **names, code="200"),
        "tokens_total": served.metric("tokens_total", **names, kind="real"),
        "routed_slots_total": served.metric("routed_slots_total", **names),
        "items_total": served.metric("items_total", **names, outcome="ok"),
        "input_tokens_sum": served.metric("input_tokens_sum", task="pets"),
    }
    grown = {name: after[name] - before[name] for name in after}
    assert grown == {
        "requests_total": 1,
        "tokens_total": 3 * TOKENS,
        "routed_slots_total": 3 * (TOKENS + 1) * 2,  # two choices; the last layer runs the class token alone
        "items_total": 3,
        "input_tokens_sum": 3 * TOKENS,
    }


def test_what_the_service_says_about_the_task(served: Harness) -> None:
    info = served.client.get("/info").json()
    assert info["tasks"]["pets"]["reads"] == "image"
    assert info["tasks"]["mood"]["reads"] == "text"
    assert info["limits"]["max_pixels"] == 10_000
    deployment = served.client.get("/deployments/pets-pruned").json()
    assert (deployment["experts_kept"], deployment["experts_total"]) == ([2, 0, 2], [4, 0, 4])
    assert deployment["memory_saved"]["bytes"] > 0
    body = served.client.get("/openapi.json").json()["paths"]["/classify"]["post"]["requestBody"]["content"]
    assert list(body) == ["application/json", "multipart/form-data"]
    assert body["multipart/form-data"]["schema"]["required"] == ["image"]


def form(*parts: bytes, end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + end


IMAGE_PART = (
    b'Content-Disposition: form-data; name="image"; filename="name=\\"task\\".png"\r\nContent-Type: image/png\r\n\r\n'
    + GOOD
)
TASK_PART = b"content-disposition: form-data; name=task\r\n\r\npets"
FORMS: list[tuple[bytes, int, str]] = [
    (form(IMAGE_PART, TASK_PART), 200, ""),
    (b"preamble\r\n" + form(IMAGE_PART), 400, "invalid_form"),
    (form(IMAGE_PART, TASK_PART, end=b"--b--"), 200, ""),
    (form(IMAGE_PART, TASK_PART, end=b""), 400, "invalid_form"),
    (b"", 400, "invalid_form"),
    (b"--b--", 422, "missing_field"),
    (form(TASK_PART), 422, "missing_field"),
    (form(b"no headers"), 400, "invalid_form"),
    (form(b'Content-Disposition: attachment; name="image"\r\n\r\nx'), 400, "invalid_form"),
    (form(b"Content-Disposition: form-data\r\n\r\nx"), 400, "invalid_form"),
    (
        form(b'Content-Disposition: form-data; name="image"\r\nContent-Transfer-Encoding: base64\r\n\r\nx'),
        400,
        "invalid_form",
    ),
    (form(b"x: " + b"y" * 5000 + b'\r\nContent-Disposition: form-data; name="image"\r\n\r\nx'), 400, "invalid_form"),
    (form(IMAGE_PART, TASK_PART, TASK_PART), 422, "validation_failed"),
    (form(IMAGE_PART, b'Content-Disposition: form-data; name="task"\r\n\r\n\xff'), 422, "invalid_text"),
    (form(*[TASK_PART] * 40), 400, "invalid_form"),
]


@pytest.mark.parametrize(("body", "status", "code"), FORMS)
def test_forms(served: Harness, body: bytes, status: int, code: str) -> None:
    response = served.client.post(
        "/classify", content=body, headers={"content-type": "multipart/form-data; boundary=b"}
    )
    assert response.status_code == status, response.text
    if code:
        assert response.json()["error"]["code"] == code


@pytest.mark.parametrize(
    "value", ["multipart/form-data", "multipart/form-data; boundary=", f"multipart/form-data; boundary={'b' * 71}"]
)
def test_a_form_says_its_boundary(served: Harness, value: str) -> None:
    response = served.client.post("/classify", content=form(IMAGE_PART), headers={"content-type": value})
    assert error_of(response)[:2] == (415, "unsupported_media_type")


def test_forms_are_for_classify_alone(served: Harness) -> None:
    for path in ("/v1/classify", "/predict"):
        response = served.client.post(path, files={"image": GOOD})
        assert error_of(response)[:2] == (415, "unsupported_media_type")


def test_the_other_shapes_take_base64(served: Harness) -> None:
    inputs = text(GOOD)
    v1 = served.client.post("/v1/classify?task=pets", json={"input": inputs, "use_activation": False}).json()
    assert v1["usage"]["prompt_tokens"] == TOKENS
    assert len(served.client.post("/predict?task=pets", json={"inputs": [inputs, inputs]}).json()) == 2


def test_nothing_of_an_image_comes_out(served: Harness) -> None:
    canary = "canary7f3a"
    bodies = [{"task": "pets", "inputs": [canary]}, {"task": "pets", "inputs": [{"image": canary}]}]
    for body in bodies:
        assert canary not in served.client.post("/classify", json=body).text
    assert canary not in post(served, canary.encode(), task="pets").text
    assert json.dumps(canary) not in served.client.get("/metrics").text
