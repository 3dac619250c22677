"""The cascade: the candidate answers every item first, and the control those of which the candidate is not sure.

Both answer inside the one request: the same engine, the same token ids, the same deadline.
"""

import time
from collections.abc import Awaitable, Callable

from service.answers import Served
from service.deployments import Deployment, default_activation
from service.engine import Engine
from service.errors import ApiError, ClientClosedError
from service.prediction import ACTIVATIONS
from service.sections import ExperimentSettings
from service.statistics.confidence import confidence
from service.ticket import Ticket

Wait = Callable[[Ticket], Awaitable[None]]
# Kept back from the control's time, for the candidate's answer to leave before the deadline.
ANSWER_SECONDS = 0.005


async def cascade(
    engine: Engine, ticket: Ticket, control: Deployment, experiment: ExperimentSettings, wait: Wait
) -> tuple[list[Served], float]:
    """Answer the doubtful items of a candidate's finished ticket by the control.

    Where the control is not ready, has no room, fails or is late, the candidate's answer stands as `fallback`. Returns
    what answered each item, and when the last pass ended on the engine's clock. Raises ClientClosedError.
    """
    doubtful = _doubtful(ticket, experiment)
    again = await _ask(engine, ticket, control, doubtful, wait) if doubtful else None
    served = [
        Served(ticket.deployment, row, item.device_seconds, "accepted")
        for item, row in zip(ticket.items, ticket.rows, strict=True)
    ]
    for place, index in enumerate(doubtful):
        first, row = served[index], again.rows[place] if again else []
        seconds = first.device_seconds + (again.items[place].device_seconds if again else 0)
        if row:
            served[index] = Served(control, row, seconds, "escalated")
        else:
            served[index] = Served(first.deployment, first.row, seconds, "fallback")
    return served, max(ticket.finished_at, again.finished_at if again else 0.0)


def _doubtful(ticket: Ticket, experiment: ExperimentSettings) -> list[int]:
    """The items whose confidence is below the threshold; a number has none, so regressions are all the control's."""
    checkpoint = ticket.deployment.checkpoint
    if checkpoint.problem_type == "regression":
        return [item.index for item in ticket.items]
    activate = ACTIVATIONS[default_activation(checkpoint)]
    sure = [confidence(activate(row), checkpoint.problem_type, experiment.confidence) for row in ticket.rows]
    return [index for index, value in enumerate(sure) if value < (experiment.threshold or 0)]


async def _ask(engine: Engine, ticket: Ticket, control: Deployment, indices: list[int], wait: Wait) -> Ticket | None:
    deadline = ticket.deadline - ANSWER_SECONDS
    if not control.is_ready or time.monotonic() >= deadline:
        return None
    try:
        again = engine.submit_again(ticket, indices, control, deadline)
    except ApiError:
        return None
    try:
        await wait(again)
    except ClientClosedError:
        raise
    except ApiError:
        pass  # its rows that are there count
    return again
