"""`secateur recover`: its options reach the training, and the manifest."""

from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import Ran, Toy

HYPER = "epochs: 1\nmin_steps: 1\nmax_tokens: 8\ndistill: 0.9\nrouters: frozen\n"


def test_options_win_over_the_file_and_are_recorded(
    run_cli: Callable[..., Ran], toy: Toy, rows_file: Path, tmp_path: Path
) -> None:
    cut, config = tmp_path / "cut", tmp_path / "hyper.yaml"
    config.write_text(HYPER)
    assert run_cli("prune", "--finetuned", toy.finetuned, "--method", "random", "--keep", 2, "--out", cut).code == 0
    common = ("recover", "--base", cut, "--data", rows_file, "--teacher", toy.finetuned, "--config", config, "--json")

    plain = run_cli(*common, "--out", tmp_path / "plain").document["training"]["recovery"]
    assert plain["frozen"] == ["w_router_ED"]
    assert (plain["config"]["distill"], plain["config"]["temperature"]) == (0.9, 2.0)
    assert plain["teacher"] == "finetuned"

    options = ("--distill", 0.2, "--temperature", 3, "--train-router", "--freeze-constants")
    changed = run_cli(*common, *options, "--out", tmp_path / "changed").document["training"]["recovery"]
    assert changed["frozen"] == ["const_CD"]
    assert (changed["config"]["distill"], changed["config"]["temperature"]) == (0.2, 3.0)

    frozen = run_cli(*common, "--freeze-router", "--out", tmp_path / "frozen").document["training"]["recovery"]
    assert frozen["router_movement"] == [0.0, 0.0]


def test_a_temperature_of_nothing_is_refused(
    run_cli: Callable[..., Ran], toy: Toy, rows_file: Path, tmp_path: Path
) -> None:
    result = run_cli(
        "recover", "--base", toy.finetuned, "--data", rows_file, "--temperature", 0, "--out", tmp_path / "out"
    )
    assert result.code == 2
    assert "temperature is 0.0, must be positive" in result.err
