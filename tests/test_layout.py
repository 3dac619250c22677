"""The shape of the house: who may import whom, and what may not be in it."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "models", "service")
# Imports go one way. What each package may take from our own.
MAY_IMPORT = {"kernels": {"kernels"}, "models": {"models", "kernels"}, "service": {"service", "models", "kernels"}}
# The environment is read once, at start, by one file.
READS_ENVIRONMENT = {"service/settings.py"}
# An adapter for those who have it; nobody else pays for it.
IMPORTS_TRANSFORMERS = {"kernels/hf_experts.py"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}
UNSAFE_ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("pickle", "load"),
    ("pickle", "loads"),
    ("pickle", "Unpickler"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
}

SOURCES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
EVERYTHING = SOURCES + sorted(
    path.relative_to(ROOT) for folder in ("tests", "benchmarks", ".ci") for path in (ROOT / folder).rglob("*.py")
)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who imports whom"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def attributes(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name, attribute) of every `name.attribute` in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.value.id, node.attr


@pytest.mark.parametrize("name", PACKAGES)
def test_top_level_name_is_ours(name: str) -> None:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).is_relative_to(ROOT)
    # Hugging Face publishes a distribution that is called `kernels`; beside us, each would be imported for the other.
    foreign = set(packages_distributions().get(name, [])) - {"secateur"}
    assert not foreign, f"a foreign distribution owns '{name}': run `pip uninstall {' '.join(sorted(foreign))}`"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_from_service_to_models_to_kernels(path: Path) -> None:
    ours = {name.split(".")[0] for name in imported_names(tree_of(path))} & set(PACKAGES)
    assert ours <= MAY_IMPORT[path.parts[0]]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_transformers_is_an_oracle_and_never_imported_at_run_time(path: Path) -> None:
    tree = tree_of(path)
    if path.as_posix() in IMPORTS_TRANSFORMERS:  # inside its functions only, when a caller asks
        tree = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
    assert "transformers" not in {name.split(".")[0] for name in imported_names(tree)}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_the_environment_is_read_in_one_place(path: Path) -> None:
    names = {attribute for _, attribute in attributes(tree_of(path))}
    names |= {name.split(".")[-1] for name in imported_names(tree_of(path))}
    reads = names & {"environ", "environb", "getenv", "getenvb"}
    assert not reads or path.as_posix() in READS_ENVIRONMENT


def dangers(tree: ast.Module) -> list[str]:
    """What in a file could run code that came as data."""
    found = [f"import {name}" for name in imported_names(tree) if name.split(".")[0] in UNSAFE_MODULES]
    found += [f"{name}.{attribute}" for name, attribute in attributes(tree) if (name, attribute) in UNSAFE_ATTRIBUTES]
    safe = {"yaml.SafeLoader"} | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in UNSAFE_BUILTINS:
            found.append(called)
        if called in ("yaml.load", "yaml.load_all"):
            loaders = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "Loader"]
            loaders += [ast.unparse(argument) for argument in node.args[1:]]
            if len(loaders) != 1 or not set(loaders) <= safe:
                found.append(called)
    return found


@pytest.mark.parametrize("path", EVERYTHING, ids=str)
def test_nothing_can_run_code_that_came_as_data(path: Path) -> None:
    # A test may write a hostile file; nothing may read one.
    allowed = {"import pickle", "torch.save"} if path.parts[0] == "tests" else set()
    assert set(dangers(tree_of(path))) <= allowed


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["import pickle"]),
        ("def f():\n from joblib import load", ["import joblib", "import joblib.load"]),
        ("import pickle as p\npickle.loads(b'')", ["import pickle", "pickle.loads"]),
        ("torch.load('x')", ["torch.load"]),
        ("eval('1')", ["eval"]),
        ("model.eval()", []),
        ("yaml.load(x)", ["yaml.load"]),
        ("yaml.load(x, Loader=yaml.Loader)", ["yaml.load"]),
        ("yaml.load(x, Loader=yaml.SafeLoader)", []),
        ("class L(yaml.SafeLoader): pass\nyaml.load(x, L)", []),
        ("class L(yaml.Loader): pass\nyaml.load(x, L)", ["yaml.load"]),
    ],
)
def test_dangers_are_seen(source: str, found: list[str]) -> None:
    assert dangers(ast.parse(source)) == found


FAMILIES = [path for path in SOURCES if path.parts[:2] == ("models", "families") and path.name != "__init__.py"]


@pytest.mark.parametrize("path", FAMILIES, ids=str)
def test_a_family_is_a_table_without_control_flow(path: Path) -> None:
    branches = (ast.If, ast.IfExp, ast.For, ast.While, ast.Match, ast.Try, ast.Lambda)
    assert not [node for node in ast.walk(tree_of(path)) if isinstance(node, branches)]


def test_the_layout_rules_look_at_files() -> None:
    assert {path.parts[0] for path in SOURCES} == set(PACKAGES)
    assert len(FAMILIES) >= 4


def test_no_package_marker_under_tests() -> None:
    # With one, `import kernels` would find tests/kernels.
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_kernels_has_no_version() -> None:
    # transformers looks for this attribute to tell whether the foreign distribution is there.
    names = {node.id for node in ast.walk(tree_of(Path("kernels/__init__.py"))) if isinstance(node, ast.Name)}
    assert "__version__" not in names


def test_constraints_pin_versions_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 and "+" not in pin[1] and "@" not in pin[0] for pin in pins)
    names = {name.lower().replace("_", "-") for name, _ in pins}
    assert len(names) == len(pins)
    assert "kernels" not in names
    assert {"torch", "fastapi", "typer", "pytest", "transformers"} <= names
