"""What may be in the image and how it is described; building it is `make test-containers`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
TOOLS = Path(sys.executable).parent
LAST_STAGE = DOCKERFILE.rsplit("\nFROM ", 1)[1]


def run(*command: str | Path) -> None:
    if not Path(command[0]).exists():
        pytest.skip(f"{Path(command[0]).name} is not installed")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_is_content() -> None:
    run(TOOLS / "hadolint", "--no-color", "--failure-threshold", "warning", "Dockerfile")


def test_shellcheck_is_content() -> None:
    run(TOOLS / "shellcheck", *sorted((ROOT / "docker").glob("*.sh")))


def test_the_front_end_is_the_built_in_one() -> None:
    assert not re.search(r"^#\s*syntax=", DOCKERFILE, re.MULTILINE)


def test_base_images_have_a_version() -> None:
    stages = set(re.findall(r" AS (\S+)", DOCKERFILE)) | {"scratch", "runtime-${DEVICE}"}
    bases = set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) - stages
    assert bases == {"python:${PYTHON}-slim-bookworm"}


def test_the_last_stage_installs_nothing_and_runs_as_a_number() -> None:
    assert re.findall(r"^USER (.*)$", LAST_STAGE, re.MULTILINE) == ["10001:10001"]
    assert not re.search(r"\b(pip|apt-get|curl)\b", LAST_STAGE)
    assert "STOPSIGNAL SIGTERM" in LAST_STAGE
    check = json.loads(LAST_STAGE.split("HEALTHCHECK", 1)[1].split("CMD ", 1)[1].splitlines()[0])
    assert check[0] == "python"
    assert "/readyz" in check[-1]


def test_dependencies_come_before_the_source() -> None:
    stage = DOCKERFILE.split("AS dependencies", 1)[1].split("\nFROM ", 1)[0]
    assert re.findall(r"^COPY (.*)$", stage, re.MULTILINE) == ["pyproject.toml constraints.txt ./"]


def test_only_what_runs_is_sent_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule[1:].split("/")[0] for rule in rules if rule.startswith("!")}
    assert let_in == {"constraints.txt", "pyproject.toml", "LICENSE", "docker", "kernels", "models", "service", "demo"}
    # Rows to train on and models made by the build stay out.
    assert not [rule for rule in rules if rule.startswith("!demo/data")]
    assert "demo/checkpoints/*/pruned" in rules
