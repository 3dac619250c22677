"""True labels from outside: what a request may say, and whether a task knows the labels it names."""

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from service.deployments import Task
from service.documents import Document
from service.errors import ApiError
from service.prediction import MULTI_LABEL
from service.schemas import LIST_TAG, TEXT_TAG, Body, Text, validated
from service.storage.events import Feedback, FeedbackResult

MOST_ITEMS = 1000


def _tag(value: Any) -> str:
    return LIST_TAG if isinstance(value, list | tuple) else TEXT_TAG


# What a request id may be made of; ids of ours are too.
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
Truth = Annotated[Annotated[Text, Tag(TEXT_TAG)] | Annotated[list[Text], Tag(LIST_TAG)], Discriminator(_tag)]


class FeedbackItem(Body):
    """The true label of one item. id: of the answer; request_id: of the request, if one answer alone has it.

    index: which input of the request, from 0. label: a name, in multi-label tasks the list of all that are true.
    """

    id: Id | None = None
    request_id: Id | None = None
    index: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    label: Truth

    @model_validator(mode="after")
    def _names_one_answer(self) -> Self:
        if (self.id is None) is (self.request_id is None):
            raise PydanticCustomError("missing_field", "name the answer by id or by request_id, one of them")
        return self


class FeedbackRequest(Body):
    """`POST /feedback`; a single item may be sent bare. replace: a label that is there already may be another one."""

    items: Annotated[list[FeedbackItem], Field(min_length=1, max_length=MOST_ITEMS)]
    replace: bool = False


class BareFeedback(FeedbackItem):
    """One item without the list around it."""

    replace: bool = False


class FeedbackResponse(Document):
    """What became of the labels. accepted: all of them; matched: those whose answer is known; unchanged: known before.

    The others wait for their answer and are joined to it when it arrives.
    """

    accepted: int
    matched: int
    unchanged: int


def parse_feedback(document: Any) -> tuple[Sequence[FeedbackItem], bool, str]:
    """(items, replace, where the items are in the document: `items[{}]` or nothing). Raises ApiError (422)."""
    if isinstance(document, dict) and "items" not in document:
        bare = validated(BareFeedback, document)
        return [bare], bare.replace, ""
    request = validated(FeedbackRequest, document)
    return request.items, request.replace, "items[{}]"


def task_of(truth: str | Sequence[str], tasks: Iterable[Task], param: str) -> Task:
    """The first task of these that has the label, or all of the list. Raises ApiError: unknown_label, not_ready."""
    param = param.lstrip(".")
    is_list = not isinstance(truth, str)
    wanted = [truth] if isinstance(truth, str) else list(truth)
    unknown = False
    for task in tasks:
        checkpoint = task.reference
        unknown = unknown or checkpoint is None
        if checkpoint is None or checkpoint.problem_type == "regression":
            continue
        if (checkpoint.problem_type == MULTI_LABEL) is is_list and set(wanted) <= set(checkpoint.labels):
            return task
    if unknown:
        raise ApiError("not_ready", "a task's labels are not known before one of its deployments is ready")
    hint = "a list of labels is for multi-label tasks" if is_list else "multi-label tasks take a list"
    raise ApiError("unknown_label", f"the task has no such label; {hint}", param)


def kept(item: FeedbackItem, key_name: str) -> Feedback:
    """The item as it is stored: a list of labels as a sorted JSON list, each once."""
    label = item.label if isinstance(item.label, str) else json.dumps(sorted(set(item.label)), ensure_ascii=False)
    return Feedback(item.id, item.request_id, item.index, label, key_name)


def feedback_document(result: FeedbackResult) -> dict[str, int]:
    """The answer's body."""
    outcomes = result.outcomes
    return {
        "accepted": len(outcomes),
        "matched": sum(outcome in ("matched", "replaced") for outcome in outcomes),
        "unchanged": outcomes.count("unchanged"),
    }
