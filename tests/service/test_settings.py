"""Every rule of the configuration has an example that breaks it."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

import service
from models.errors import ConfigError
from service.settings import Settings, configured_path, hash_key, load_settings
from tests.service.toys import TOY_CONFIG

EXPERIMENT: dict[str, Any] = {
    "task": "mood",
    "mode": "split",
    "arms": [{"deployment": "mood-full", "weight": 50}, {"deployment": "mood-pruned", "weight": 50}],
}


ARMS: list[dict[str, Any]] = [{"deployment": "mood-full"}, {"deployment": "mood-pruned"}]
SHADOW = EXPERIMENT | {"mode": "shadow", "arms": ARMS}
CASCADE = SHADOW | {"mode": "cascade", "threshold": 0.9}


def with_second_arm(deployment: str, weight: float) -> dict[str, Any]:
    return EXPERIMENT | {"arms": [EXPERIMENT["arms"][0], {"deployment": deployment, "weight": weight}]}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "secateur.yaml"
    file.write_text(TOY_CONFIG, encoding="utf-8")
    return file


def edited(config: Path, change: dict[str, Any]) -> Path:
    """Write the document with some dotted keys set."""
    document = yaml.safe_load(TOY_CONFIG)
    for path, value in change.items():
        *parents, last = path.split(".")
        node = document
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    config.write_text(yaml.safe_dump(document), encoding="utf-8")
    return config


def test_file_is_read(config: Path) -> None:
    settings = load_settings(config, {})
    assert settings.limits.max_inputs == 8
    assert settings.engine.stall_seconds == 60
    assert settings.tasks["mood"].default_name == "mood-full"
    assert settings.tasks["mood"].required_names == ["mood-full"]
    assert settings.model_path("mood-pruned") == config.parent / "models" / "mood-pruned"


def test_precedence(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_LIMITS__MAX_INPUTS", "4")
    monkeypatch.setenv("SECATEUR_SERVER__PORT", "9000")
    settings = load_settings(config, {"server": {"port": 9001}})
    assert settings.limits.max_inputs == 4
    assert settings.limits.max_chars == 400
    assert settings.server.port == 9001


def test_path_may_come_from_the_environment(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CONFIG", str(config))
    assert configured_path() == config
    assert load_settings(None, {}).version == 1


def test_no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECATEUR_CONFIG", raising=False)
    with pytest.raises(ConfigError, match=r"pass --config FILE or set SECATEUR_CONFIG"):
        load_settings(None, {})


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SECATEUR_LIMIT__MAX_INPUTS", "4", "SECATEUR_LIMIT__MAX_INPUTS: unknown key 'limit', .* 'limits'"),
        ("SECATEUR_LIMITS__MAX_INPUT", "4", "limits: unknown key 'max_input', .* 'max_inputs'"),
        ("SECATEUR_LIMITS__MAX_INPUTS", "many", r"limits.max_inputs \(set by SECATEUR_LIMITS__MAX_INPUTS\)"),
        ("SECATEUR_LIMITS__MAX_INPUTS", "[", "not valid YAML"),
        ("SECATEUR_PORT", "1", "SECATEUR_PORT: unknown key"),
    ],
)
def test_bad_variable(config: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        load_settings(config, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limit": {}}, "unknown key 'limit', the nearest known key is 'limits'"),
        ({"limits.max_input": 3}, "limits: unknown key 'max_input', the nearest known key is 'max_inputs'"),
        ({"tasks.mood.fulll": "x"}, "tasks.mood: unknown key 'fulll', the nearest known key is 'full'"),
        ({"admin": {"enable": True}}, "admin: unknown key 'enable', the nearest known key is 'enabled'"),
        ({"limits.max_inputs": "8"}, "limits.max_inputs: Input should be a valid integer"),
        ({"limits.max_inputs": 8.0}, "limits.max_inputs: Input should be a valid integer"),
        ({"limits.max_inputs": True}, "limits.max_inputs: Input should be a valid integer"),
        ({"limits.max_inputs": 0}, "limits.max_inputs: Input should be greater"),
        ({"version": 2}, "version: Input should be 1"),
        ({"auth.mode": "key"}, "auth.mode: Input should be 'open' or 'keys'"),
        ({"auth.mode": "keys"}, "auth: keys_file belongs to mode `keys`, which needs it"),
        ({"auth.keys_file": "keys.txt"}, "auth: keys_file belongs to mode `keys`"),
        ({"storage.url": "mysql://host/name"}, "storage.url: must be sqlite:///FILE or postgresql"),
        ({"storage.url": "sqlite://"}, "storage.url: must be sqlite:///FILE"),
        ({"storage.url": "somewhere"}, "storage.url: not a database URL"),
        ({"storage.url": "postgresql://user@host:port/name"}, "storage.url: not a database URL"),
        ({"storage.queue_events": 0}, "storage.queue_events"),
        ({"engine.shadow_queue_items": 0}, "engine.shadow_queue_items"),
        ({"server.port": 65536}, "server.port"),
        ({"models.dtype": "int8"}, "models.dtype"),
        ({"models.device": "tpu"}, "models.device"),
        ({"models.backend": "fast"}, "models.backend: Input should be 'auto', 'reference', 'cpu' or 'triton'"),
        ({"logging.level": "loud"}, "logging.level"),
        ({"server.host": "0.0.0.0"}, "not a loopback address: set auth.mode explicitly"),
        ({"limits.max_inputs": 17}, "max_inputs exceeds limits.max_queue_items"),
        ({"limits.max_queue_chars": 3000}, "max_queue_chars is too small"),
        ({"limits.max_body_bytes": 1023}, "limits.max_body_bytes"),
        ({"default_task": "nothing"}, "default_task: no task is named 'nothing'"),
        ({"deployments.Mood": {"path": "x", "role": "full"}}, "a name is 1 to 63"),
        ({"deployments.auto": {"path": "x", "role": "full"}}, "the name 'auto' is reserved"),
        ({"deployments.other": {"path": "x", "role": "full"}}, "other must belong to exactly one task, .* 0"),
        ({"tasks.topics.deployments": ["topics-full", "mood-pruned"]}, "must belong to exactly one task, .* 2"),
        ({"deployments.mood-full.path": "/etc"}, "must be relative to models.root"),
        ({"deployments.mood-full.path": "a/../../b"}, "must not contain '..'"),
        ({"deployments.mood-full.role": "half"}, "deployments.mood-full.role"),
        ({"tasks.mood.deployments": ["mood-full", "mood-pruned", "ghost"]}, "no deployment is named 'ghost'"),
        ({"tasks.mood.deployments": ["mood-full", "mood-pruned", "mood-full"]}, "names a deployment twice"),
        ({"deployments.mood-pruned.role": "full"}, "exactly one deployment with role full, it has 2"),
        ({"deployments.mood-full.role": "pruned"}, "exactly one deployment with role full, it has 0"),
        ({"tasks.mood.full": "mood-pruned"}, "'mood-pruned' does not have role full"),
        ({"tasks.mood.default": "topics-full"}, "tasks.mood.default: 'topics-full' is not a deployment of this task"),
        ({"tasks.mood.fallback": "topics-full"}, "tasks.mood.fallback"),
        ({"tasks.mood.required": ["topics-full"]}, "tasks.mood.required"),
        ({"tasks.mood.slo_ms": 0}, "tasks.mood.slo_ms"),
        (
            {"experiments.e": EXPERIMENT | {"mode": "ab"}},
            "experiments.e.mode: Input should be 'split', 'shadow' or 'casc",
        ),
        ({"experiments.e": EXPERIMENT | {"mode": "shadow"}}, "experiments.e.arms: a shadow has no weights"),
        ({"experiments.e": SHADOW | {"mode": "split"}}, "experiments.e.arms: each arm of a split needs a weight"),
        ({"experiments.e": SHADOW | {"mode": "cascade"}}, "experiments.e.threshold: a cascade needs one"),
        ({"experiments.e": SHADOW | {"threshold": 0.9}}, "experiments.e.threshold: .* only a cascade has one"),
        ({"experiments.e": SHADOW | {"confidence": {}}}, "experiments.e.confidence: a shadow has none"),
        ({"experiments.e": CASCADE | {"confidence": {"kind": "dispersion"}}}, "kind dispersion needs weights"),
        ({"experiments.e": CASCADE | {"confidence": {"weights": {"variance": 1.0}}}}, "only it has them"),
        ({"experiments.e": CASCADE | {"confidence": {"weights": {"entropy": 1.0}}}}, "Input should be 'variance' or"),
        ({"experiments.e": EXPERIMENT | {"sample": 50}}, "experiments.e.sample: a split has none"),
        ({"experiments.e": SHADOW | {"margin": 0.0}}, "experiments.e.margin"),
        ({"experiments.e": SHADOW | {"ramp": {"steps": [5, 5]}}}, "experiments.e.ramp.steps must rise"),
        ({"experiments.e": SHADOW | {"guardrail": {"error_rate": 1}}}, "experiments.e.guardrail.error_rate"),
        (
            {"experiments.e": SHADOW | {"arms": [ARMS[0] | {"role": "candidate"}, ARMS[1]]}},
            "experiments.e.arms: give one arm the role control and the other the role candidate",
        ),
        ({"experiments.e": EXPERIMENT | {"task": "x"}}, "experiments.e.task: no task is named 'x'"),
        ({"experiments.e": EXPERIMENT | {"arms": EXPERIMENT["arms"][:1]}}, "experiments.e.arms"),
        ({"experiments.e": EXPERIMENT | {"traffic": 12.345}}, "at most two decimals"),
        ({"experiments.e": EXPERIMENT | {"traffic": 101}}, "experiments.e.traffic"),
        ({"experiments.e": EXPERIMENT, "experiments.f": EXPERIMENT}, "experiments.f: .* already has a running"),
        (
            {"experiments.e": with_second_arm("mood-pruned", 49)},
            "the weights must sum to exactly 100",
        ),
        (
            {"experiments.e": with_second_arm("mood-full", 50)},
            "experiments.e.arms names a deployment twice",
        ),
        (
            {"experiments.e": with_second_arm("topics-full", 50)},
            "'topics-full' is not a deployment of 'mood'",
        ),
    ],
)
def test_broken_rule(config: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(edited(config, change), {})


def test_paused_experiment_may_stand_beside_a_running_one(config: Path) -> None:
    change = {"experiments.e": EXPERIMENT, "experiments.f": EXPERIMENT | {"state": "paused"}}
    assert set(load_settings(edited(config, change), {}).experiments) == {"e", "f"}


def test_roles_of_arms(config: Path) -> None:
    swapped = [ARMS[0] | {"role": "candidate"}, ARMS[1] | {"role": "control"}]
    change = {"experiments.e": SHADOW, "experiments.f": SHADOW | {"arms": swapped, "state": "paused"}}
    settings = load_settings(edited(config, change), {})
    assert settings.roles(settings.experiments["e"]) == ("mood-full", "mood-pruned")
    assert settings.roles(settings.experiments["f"]) == ("mood-pruned", "mood-full")


def test_relative_paths_start_at_the_file(config: Path) -> None:
    keys = {"auth.mode": "keys", "auth.keys_file": "secrets/keys.txt"}
    settings = load_settings(edited(config, keys), {})
    assert settings.auth.keys_file == str(config.parent / "secrets" / "keys.txt")
    assert settings.storage.url == f"sqlite:///{config.parent}/secateur.db"
    absolute = load_settings(edited(config, {"storage.url": "sqlite:////var/lib/secateur.db"}), {})
    assert absolute.storage.url == "sqlite:////var/lib/secateur.db"


def test_hash_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hash_key() is None
    monkeypatch.setenv("SECATEUR_HASH_KEY", "k" * 32)
    assert hash_key() == b"k" * 32
    monkeypatch.setenv("SECATEUR_HASH_KEY", "k" * 31)
    with pytest.raises(ConfigError, match="SECATEUR_HASH_KEY must have at least 32 bytes"):
        hash_key()


def test_explicit_mode_allows_any_address(config: Path) -> None:
    load_settings(edited(config, {"server.host": "0.0.0.0", "auth.mode": "open"}), {})


def test_link_out_of_the_root(config: Path) -> None:
    outside = config.parent / "outside"
    outside.mkdir()
    (config.parent / "models").mkdir()
    (config.parent / "models" / "mood-full").symlink_to(outside)
    with pytest.raises(ConfigError, match=r"deployments.mood-full.path leaves models.root"):
        load_settings(config, {})


def test_repeated_key(config: Path) -> None:
    config.write_text(TOY_CONFIG + "version: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line .*: the key 'version' is given twice"):
        load_settings(config, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2]", "must hold a mapping"), ("a: [", "not valid YAML"), ("a: !!python/name:os.system", "not valid YAML")],
)
def test_unusable_file(config: Path, text: str, message: str) -> None:
    config.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_settings(config, {})


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(tmp_path / "absent.yaml", {})


def test_settings_are_frozen(config: Path) -> None:
    settings = load_settings(config, {})
    with pytest.raises(ValueError, match="frozen"):
        settings.version = 1  # type: ignore[misc]
    assert isinstance(settings, Settings)


def test_nothing_else_reads_the_environment() -> None:
    assert service.__file__ is not None
    readers = {
        file.name
        for file in Path(service.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute | ast.Name)
        and (node.attr if isinstance(node, ast.Attribute) else node.id) in ("environ", "getenv", "environb")
    }
    assert readers == {"settings.py"}
