"""`secateur keys`: a key is shown once; the file is what a server reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.keys import Keyring


def test_new_list_remove(run_cli: Callable[..., Any], tmp_path: Path) -> None:
    file = str(tmp_path / "secrets" / "keys.txt")
    secret = run_cli("keys", "new", "shop", "--keys-file", file).out.strip()
    made = run_cli(
        "keys", "new", "ops", "--keys-file", file, "--scope", "admin", "--scope", "metrics", "--json"
    ).document
    assert made["scopes"] == ["admin", "metrics"]
    keyring = Keyring(Path(file))
    assert [key.name for key in keyring.keys] == ["shop", "ops"]
    for name, key in (("shop", secret), ("ops", made["key"])):
        found = keyring.find(key)
        assert found is not None
        assert found.name == name
    assert run_cli("keys", "list", "--keys-file", file, "--json").document == [
        {"name": "shop", "scopes": ["classify"]},
        {"name": "ops", "scopes": ["admin", "metrics"]},
    ]
    assert "shop  classify" in run_cli("keys", "list", "--keys-file", file).out
    run_cli("keys", "remove", "shop", "--keys-file", file)
    assert Keyring(Path(file)).find(secret) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new", "ops"], "has a key named 'ops' already"),
        (["new", "Ops!"], "'Ops!' is not 1 to 63"),
        (["new", "other", "--scope", "root"], "unknown scope 'root'"),
        (["remove", "shop"], "has no key named 'shop', it has ops"),
        (["remove", "ops"], "the only key of"),
    ],
)
def test_what_is_refused(run_cli: Callable[..., Any], tmp_path: Path, arguments: list[str], message: str) -> None:
    file = str(tmp_path / "keys.txt")
    run_cli("keys", "new", "ops", "--keys-file", file)
    before = Path(file).read_text(encoding="utf-8")
    ran = run_cli("keys", *arguments, "--keys-file", file)
    assert ran.code == 2
    assert message in ran.err
    assert Path(file).read_text(encoding="utf-8") == before
