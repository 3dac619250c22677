"""The three request shapes, and the one Query they all become. Nothing is coerced, unknown fields are refused."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.errors import ERRORS, ApiError
from service.multipart import Part
from service.prediction import Activation
from service.sections import Limits


@dataclass(frozen=True)
class Picture:
    """An image as it came: the bytes of a file, or base64 of them. Its length is what it takes in a queue."""

    data: bytes | str = field(repr=False)

    def __len__(self) -> int:
        return len(self.data)


# A string is what the task reads: a text, or base64 of an image.
Input = str | Picture


@dataclass(frozen=True)
class Query:
    """What a request asks, whatever its shape. field: the name under which its inputs came; is_batch: as a list.

    variant: `auto`, `full` or a deployment of the task. model: a deployment or task by one name, or None.
    max_tokens: cut texts here if the model would read more; None: at the model's length.
    """

    inputs: Sequence[Input]
    field: str = "inputs"
    is_batch: bool = False
    task: str | None = None
    variant: str = "auto"
    model: str | None = None
    top_k: int | None = None
    activation: Activation | None = None
    threshold: float | None = None
    truncate: bool = True
    max_tokens: int | None = None
    subject: str | None = None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


def _no_token_ids(value: Any) -> Any:
    flat = value[0] if isinstance(value, list) and value and isinstance(value[0], list) else value
    if isinstance(flat, list) and flat and all(type(item) is int for item in flat):
        raise PydanticCustomError("token_ids_not_supported", "token ids are not accepted, send text")
    return _as_list(value)


def _no_pairs(value: Any) -> Any:
    if not isinstance(value, list):
        return _as_list(value)
    if any(isinstance(item, list) and len(item) > 1 for item in value):
        raise PydanticCustomError("pairs_not_supported", "text pairs are not supported, send a flat list of texts")
    return [item[0] if isinstance(item, list) and item else item for item in value]


def _no_nul(value: str) -> str:
    if "\x00" in value:
        raise PydanticCustomError("nul", "must not contain NUL")
    return value


def _no_surrogates(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("invalid_text", "has a lone surrogate, which is not a character") from None
    return value


Text = Annotated[str, AfterValidator(_no_surrogates)]
Subject = Annotated[Text, Field(min_length=1, max_length=256), AfterValidator(_no_nul)]


class Body(BaseModel):
    """A JSON object with exactly these fields, typed as JSON types them."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class ImageBody(Body):
    """An image among the inputs: base64 of a PNG, JPEG or WebP file, bare or as a data: URI."""

    image: str


def _tag(value: Any) -> str:
    return IMAGE_TAG if isinstance(value, dict | ImageBody) else TEXT_TAG


# Names that pydantic puts into the path of an error; no part of the document has them.
TEXT_TAG, IMAGE_TAG, LIST_TAG = "#text", "#image", "#list"
Given = Annotated[Annotated[Text, Tag(TEXT_TAG)] | Annotated[ImageBody, Tag(IMAGE_TAG)], Discriminator(_tag)]


class ClassifyRequest(Body):
    """`POST /classify`. `input` is an alias of `inputs`, `model` of `variant` (a deployment or a task)."""

    inputs: Annotated[
        list[Given], BeforeValidator(_as_list, json_schema_input_type=str | ImageBody | list[str | ImageBody])
    ]
    task: str | None = None
    variant: str = "auto"
    model: str | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    activation: Activation | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    truncate: bool = True
    subject: Subject | None = None

    @model_validator(mode="before")
    @classmethod
    def _aliases(cls, data: Any) -> Any:
        if isinstance(data, dict) and "variant" in data and "model" in data:
            raise PydanticCustomError("both_names", "variant and model are the same field, send one")
        if not isinstance(data, dict) or "input" not in data:
            return data
        if "inputs" in data:
            raise PydanticCustomError("both_inputs", "inputs and input are the same field, send one")
        return {"inputs" if key == "input" else key: value for key, value in data.items()}

    def query(self, task: str | None) -> Query:
        if task is not None:
            raise ApiError("validation_failed", "name the task in the body", "task")
        return Query(
            [given if isinstance(given, str) else Picture(given.image) for given in self.inputs],
            task=self.task,
            variant=self.variant,
            model=self.model,
            top_k=self.top_k,
            activation=self.activation,
            threshold=self.threshold,
            truncate=self.truncate,
            subject=self.subject,
        )


class NoOps(Body):
    """Fields that other servers know and that mean nothing here."""

    user: Any = None
    priority: Any = None
    cache_salt: Any = None
    padding: Any = None


class ClassifyV1Request(NoOps):
    """`POST /v1/classify`, the shape of vLLM and SGLang."""

    input: Annotated[list[Text], BeforeValidator(_no_token_ids, json_schema_input_type=str | list[str])]
    model: str | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _not_zero(cls, tokens: int | None) -> int | None:
        if tokens == 0:
            raise PydanticCustomError("validation_failed", "must be a number of tokens, or -1 for the model's length")
        return None if tokens == -1 else tokens

    def query(self, task: str | None) -> Query:
        activation: Activation | None = "none" if self.use_activation is False else None
        return Query(
            self.input,
            field="input",
            task=task,
            model=self.model,
            activation=activation,
            max_tokens=self.truncate_prompt_tokens,
        )


class PredictParameters(Body):
    """The `parameters` of a Hugging Face inference request."""

    function_to_apply: Activation | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None


class PredictRequest(NoOps):
    """`POST /predict`, the shape of TEI and Hugging Face inference. A list is a batch, never a pair."""

    inputs: Annotated[list[Text], BeforeValidator(_no_pairs, json_schema_input_type=str | list[str] | list[list[str]])]
    model: str | None = None
    raw_scores: bool = False
    truncate: bool = True
    parameters: PredictParameters = PredictParameters()

    @model_validator(mode="after")
    def _one_activation(self) -> Self:
        if self.raw_scores and self.parameters.function_to_apply not in (None, "none"):
            raise PydanticCustomError("contradiction", "raw_scores contradicts parameters.function_to_apply")
        return self

    def query(self, task: str | None) -> Query:
        return Query(
            self.inputs,
            task=task,
            model=self.model,
            top_k=self.parameters.top_k,
            activation="none" if self.raw_scores else self.parameters.function_to_apply,
            truncate=self.truncate,
        )


FORM_IMAGE = "image"
Shape = ClassifyRequest | ClassifyV1Request | PredictRequest
Shaped = TypeVar("Shaped", bound=BaseModel)
# Pydantic's error types that have a code of their own; the custom types above are codes already.
_CODES = {"missing": "missing_field", "extra_forbidden": "unknown_field"}


def parse(shape: type[Shape], document: Any, task: str | None) -> Query:
    """Check a parsed JSON document against a shape; `task` comes from the query string.

    Raises ApiError (422) for the first problem.
    """
    query = validated(shape, document).query(task)
    return replace(query, is_batch=isinstance(document.get(query.field), list))


def validated(shape: type[Shaped], document: Any) -> Shaped:
    """Check a parsed JSON document against any shape. Raises ApiError (422) for the first problem."""
    try:
        return shape.model_validate(document)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
    kind = problem["type"]
    code = _CODES.get(kind, kind if kind in ERRORS else "validation_failed")
    message = f"unknown field, the fields are {', '.join(shape.model_fields)}" if code == "unknown_field" else None
    raise ApiError(code, message or problem["msg"], _path(problem["loc"]) or None)


def parse_form(parts: Sequence[Part]) -> Query:
    """Check the parts of a form against `/classify`: `image`, once or more, and the other fields as text.

    Raises ApiError (422) for the first problem.
    """
    images = [Picture(part.content) for part in parts if part.name == FORM_IMAGE]
    fields: dict[str, Any] = {}
    for part in parts:
        if part.name == FORM_IMAGE:
            continue
        if part.name in fields or part.name in ("inputs", "input"):
            raise ApiError("validation_failed", f"send inputs as parts named {FORM_IMAGE}, and other fields once")
        fields[part.name] = _read_field(part)
    if not images:
        raise ApiError("missing_field", f"the form has no part named {FORM_IMAGE}", FORM_IMAGE)
    query = parse(ClassifyRequest, {**fields, "inputs": []}, None)
    return replace(query, inputs=images, field=FORM_IMAGE, is_batch=True)


def _read_field(part: Part) -> Any:
    """A field's text as the type that JSON would have given it; what cannot be read is refused as text later."""
    try:
        text = part.content.decode()
    except UnicodeDecodeError:
        raise ApiError("invalid_text", "a field of the form is not UTF-8") from None
    if part.name == "top_k" and re.fullmatch("[0-9]{1,9}", text):
        return int(text)
    if part.name == "threshold" and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,17})?", text):
        return float(text)
    return {"true": True, "false": False}.get(text, text) if part.name == "truncate" else text


def check_inputs(query: Query, limits: Limits) -> None:
    """Refuse a request whose inputs are too many or empty. Raises ApiError (422)."""
    if not query.inputs:
        raise ApiError("empty_inputs", f"{query.field} is empty", query.field)
    if len(query.inputs) > limits.max_inputs:
        raise ApiError("too_many_inputs", f"{query.field} has more than {limits.max_inputs} items", query.field)
    for index, given in enumerate(query.inputs):
        param = f"{query.field}[{index}]"
        if not given or (isinstance(given, str) and given.isspace()):
            raise ApiError("empty_input", f"{param} is empty", param)


def check_kind(query: Query, reads: Literal["text", "image"], limits: Limits) -> None:
    """Refuse images where texts are read, and texts that are too long; whether bytes are an image, decoding will tell.

    Raises ApiError (422).
    """
    if reads == "image":
        return
    for index, given in enumerate(query.inputs):
        param = f"{query.field}[{index}]"
        if isinstance(given, Picture):
            raise ApiError("invalid_text", f"{param} is an image, the task reads text", param)
        if len(given) > limits.max_chars:
            raise ApiError("text_too_long", f"{param} has more than {limits.max_chars} characters", param)


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if part in (TEXT_TAG, IMAGE_TAG, LIST_TAG):
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
