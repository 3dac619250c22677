"""The JSON objects that routes answer, as OpenAPI describes them. Responses themselves are built as plain data."""

from pydantic import BaseModel, ConfigDict

from service.prediction import Activation


class Document(BaseModel):
    """A JSON object of the API with exactly these fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Score(Document):
    """A class and its activated value."""

    label: str
    score: float


class Classified(Document):
    """The result for one input."""

    index: int
    label: str
    score: float
    labels: list[str]
    scores: list[Score]
    probs: list[float] | None
    num_classes: int
    variant: str
    tokens: int
    truncated: bool


class Usage(Document):
    """Tokens, special tokens included, after truncation."""

    prompt_tokens: int
    total_tokens: int


class ExposureDocument(Document):
    """How the request met an experiment."""

    name: str
    revision: int
    arm: str
    source: str


class ClassifyResponse(Document):
    """The answer of `POST /classify`."""

    id: str
    object: str
    created: int
    model: str
    task: str
    variant: str
    experiment: ExposureDocument | None
    activation: Activation
    data: list[Classified]
    usage: Usage


class ClassifiedV1(Document):
    """The result for one input in the shape of vLLM."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyV1Response(Document):
    """The answer of `POST /v1/classify`."""

    id: str
    object: str
    created: int
    model: str
    data: list[ClassifiedV1]
    usage: Usage


class ErrorDetail(Document):
    """Why a request failed."""

    code: str
    message: str
    type: str
    param: str | None
    request_id: str


class ErrorResponse(Document):
    """The one error dialect."""

    error: ErrorDetail
