"""What is in effect: the configuration, what operators made of it, what survives a restart, what other replicas did."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError
from service.errors import ApiError
from service.experiments.control import Control, config_hash
from service.experiments.document import ExperimentPatch
from service.metrics import Metrics
from service.settings import Settings
from service.storage.events import ExposureEvent
from service.storage.store import Store
from tests.service.experiments.live import split
from tests.service.toys import toy_settings

Make = Callable[..., Settings]


@pytest.fixture
def settings(tmp_path: Path) -> Make:
    """The toy configuration with the split `exp`, some of its keys given."""

    def make(**fields: Any) -> Settings:
        return toy_settings(tmp_path, experiments=split(**fields))

    return make


@pytest.fixture
def store(settings: Make) -> Iterator[Store]:
    store = Store.open(settings().storage, None, Metrics())
    yield store
    store.close()


def patch(control: Control, **fields: Any) -> None:
    control.patch("exp", ExperimentPatch(**fields))


def steps(store: Store, revision: int = 1) -> list[tuple[str, str, str]]:
    return [(step.actor, step.action, step.detail) for step in store.steps("exp", revision)]


def test_the_configuration_holds_at_first(settings: Make, store: Store) -> None:
    control = Control(settings(traffic=20), store)
    assert control.experiments == settings(traffic=20).experiments
    assert control.winners == {}
    assert steps(store) == [("operator", "configured", "running, 20 % at 0 units")]


def test_without_experiments_there_is_nothing_to_control(tmp_path: Path) -> None:
    control = Control(toy_settings(tmp_path), None)
    assert (control.experiments, control.winners) == ({}, {})


def test_a_ramp_starts_at_its_first_step(settings: Make, store: Store) -> None:
    assert Control(settings(ramp={}), store).experiments["exp"].traffic == 5


def test_a_ramp_starts_where_the_file_says(settings: Make, store: Store) -> None:
    assert Control(settings(ramp={}, traffic=30), store).experiments["exp"].traffic == 30


def test_operators_outlive_a_restart(settings: Make, store: Store) -> None:
    control = Control(settings(traffic=20), store)
    patch(control, traffic=35, state="paused")
    for seen in (control, Control(settings(traffic=20), store)):
        assert (seen.experiments["exp"].traffic, seen.experiments["exp"].state) == (35, "paused")
    assert steps(store)[1:] == [("operator", "paused", "35 % at 0 units")]


def test_a_later_edit_of_the_file_counts(settings: Make, store: Store) -> None:
    patch(Control(settings(traffic=20), store), traffic=35)
    assert Control(settings(traffic=50), store).experiments["exp"].traffic == 50
    assert Control(settings(traffic=50), store).experiments["exp"].traffic == 50
    assert [action for _, action, _ in steps(store)] == ["configured", "traffic", "configured"]


ANALYSIS = {
    "margin": {"margin": 0.02},
    "alpha": {"alpha": 0.1},
    "salt": {"salt": "other"},
    "weights": {"arms": [{"deployment": "mood-full", "weight": 40}, {"deployment": "mood-pruned", "weight": 60}]},
    "order": {"arms": [{"deployment": "mood-pruned", "weight": 50}, {"deployment": "mood-full", "weight": 50}]},
    "roles": {
        "arms": [
            {"deployment": "mood-full", "weight": 50, "role": "candidate"},
            {"deployment": "mood-pruned", "weight": 50, "role": "control"},
        ]
    },
}


@pytest.mark.parametrize("fields", ANALYSIS.values(), ids=ANALYSIS)
def test_another_analysis_needs_another_revision(settings: Make, store: Store, fields: dict[str, Any]) -> None:
    Control(settings(), store)
    with pytest.raises(ConfigError, match="raise revision"):
        Control(settings(**fields), store)
    assert Control(settings(**fields, revision=2), store).experiments["exp"].revision == 2
    assert len(steps(store, 2)) == 1


def test_what_only_guards_may_change(settings: Make, store: Store) -> None:
    Control(settings(), store)
    Control(settings(guardrail={"error_rate": 0.2}, salt="exp"), store)


def test_a_revision_cannot_go_back(settings: Make, store: Store) -> None:
    Control(settings(revision=3), store)
    with pytest.raises(ConfigError, match=r"experiments\.exp\.revision: 2 is past, the database has revision 3"):
        Control(settings(revision=2), store)


def test_the_hash_has_a_part_for_the_analysis_and_one_for_the_start(settings: Make) -> None:
    def parts(**fields: Any) -> list[str]:
        return config_hash(settings(**fields), "exp").split(".")

    assert parts()[0] == parts(traffic=10)[0] != parts(margin=0.2)[0]
    assert parts()[1] == parts(margin=0.2)[1] != parts(traffic=10)[1]


def test_a_winner_ends_the_experiment_and_answers(settings: Make, store: Store) -> None:
    control = Control(settings(), store)
    patch(control, winner="mood-pruned")
    assert (control.experiments["exp"].state, control.winners) == ("stopped", {"mood": "mood-pruned"})
    with pytest.raises(ApiError) as caught:
        patch(control, state="running")
    assert caught.value.code == "revision_required"
    patch(control, winner="mood-full")  # a promotion may be regretted
    assert Control(settings(traffic=3), store).winners == {"mood": "mood-full"}
    again = Control(settings(revision=2), store)
    assert (again.experiments["exp"].state, again.winners) == ("running", {})


def test_a_guardrail_sends_all_to_the_fallback_until_someone_resumes(tmp_path: Path, store: Store) -> None:
    tasks = {"mood": {"default": "mood-pruned"}}
    control = Control(toy_settings(tmp_path, experiments=split(), tasks=tasks), store)
    control.pause("exp", "guardrail", "it fails")
    assert (control.experiments["exp"].state, control.winners) == ("paused", {"mood": "mood-full"})
    assert steps(store)[-1] == ("guardrail", "paused", "it fails; mood-full answers the task")
    patch(control, state="running")
    assert control.winners == {}


def test_the_refuge_is_never_the_candidate(tmp_path: Path, store: Store) -> None:
    tasks = {"mood": {"fallback": "mood-pruned"}}
    control = Control(toy_settings(tmp_path, experiments=split(), tasks=tasks), store)
    control.pause("exp", "ramp", "it is inferior")
    assert control.winners == {"mood": "mood-full"}


def test_advance_takes_the_next_step(settings: Make, store: Store) -> None:
    control = Control(settings(ramp={"steps": [5, 40, 100]}), store)
    seen = []
    for _ in range(2):
        patch(control, advance=True)
        seen.append(control.experiments["exp"].traffic)
    assert seen == [40, 100]
    with pytest.raises(ApiError, match="last step"):
        patch(control, advance=True)


REFUSED = {
    "nothing": ({}, "validation_failed", None),
    "false is nothing": ({"advance": False}, "validation_failed", None),
    "no ramp": ({"advance": True}, "validation_failed", "advance"),
    "two wishes": ({"advance": True, "traffic": 3}, "validation_failed", "advance"),
    "three decimals": ({"traffic": 0.125}, "validation_failed", "traffic"),
    "stranger": ({"winner": "topics-full"}, "validation_failed", "winner"),
    "winner and more": ({"winner": "mood-full", "traffic": 3}, "validation_failed", "winner"),
}


@pytest.mark.parametrize(("fields", "code", "param"), REFUSED.values(), ids=REFUSED)
def test_a_refused_patch_changes_nothing(
    settings: Make, store: Store, fields: dict[str, Any], code: str, param: str | None
) -> None:
    control = Control(settings(), store)
    with pytest.raises(ApiError) as caught:
        patch(control, **fields)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert control.experiments == settings().experiments
    assert len(steps(store)) == 1


def test_an_unknown_experiment(settings: Make, store: Store) -> None:
    with pytest.raises(ApiError) as caught:
        Control(settings(), store).patch("nothing", ExperimentPatch(state="paused"))
    assert caught.value.code == "experiment_not_found"


def two(tmp_path: Path, **states: str) -> Settings:
    (fields,) = split().values()
    return toy_settings(tmp_path, experiments={name: {**fields, "state": state} for name, state in states.items()})


def test_a_task_has_one_running_experiment(tmp_path: Path, store: Store) -> None:
    control = Control(two(tmp_path, one="running", other="paused"), store)
    with pytest.raises(ApiError) as caught:
        control.patch("other", ExperimentPatch(state="running"))
    assert (caught.value.code, caught.value.param) == ("validation_failed", "state")
    control.patch("one", ExperimentPatch(state="paused"))
    control.patch("other", ExperimentPatch(state="running"))
    assert control.experiments["other"].state == "running"


def test_the_file_starts_an_experiment_over_one_that_an_operator_started(tmp_path: Path, store: Store) -> None:
    first = Control(two(tmp_path, one="paused"), store)
    first.patch("one", ExperimentPatch(state="running"))
    control = Control(two(tmp_path, one="paused", other="running"), store)
    assert {name: found.state for name, found in control.experiments.items()} == {"one": "paused", "other": "running"}


def test_replicas_see_each_other(settings: Make, store: Store) -> None:
    here, there = Control(settings(), store), Control(settings(), store)
    patch(here, traffic=10)
    assert there.experiments["exp"].traffic == 100
    there.poll()
    assert there.experiments["exp"].traffic == 10
    patch(here, state="paused")
    patch(there, traffic=20)  # does not undo the pause it has not seen
    here.poll()
    assert (here.experiments["exp"].state, here.experiments["exp"].traffic) == ("paused", 20)


def test_a_replica_of_an_older_revision_keeps_its_own(settings: Make, store: Store) -> None:
    old = Control(settings(traffic=10), store)
    Control(settings(traffic=40, revision=2), store)
    old.poll()
    assert (old.experiments["exp"].revision, old.experiments["exp"].traffic) == (1, 10)


def test_steps_say_how_many_units_there_were(settings: Make, store: Store) -> None:
    control = Control(settings(), store)
    for number in range(3):
        store.record(exposure(f"cls_{number}", unit=f"u{number % 2}"))
    store.close()
    again = Store.open(settings().storage, None, Metrics())
    control = Control(settings(), again)
    patch(control, traffic=50)
    assert steps(again)[-1] == ("operator", "traffic", "50 % at 2 units")
    again.close()


def exposure(id: str, unit: str) -> ExposureEvent:
    """An answered item of the candidate's arm."""
    return ExposureEvent(
        id=id,
        item=0,
        request_id=id,
        at=1.0,
        experiment="exp",
        revision=1,
        unit=unit,
        intended="mood-pruned",
        served="mood-pruned",
        source="subject",
        status=200,
        label="neutral",
        score=0.5,
        tokens=1,
        queue_ms=1.0,
        infer_ms=1.0,
        total_ms=2.0,
        device_ms=1.0,
        fingerprint="f",
    )
