"""The file of keys: what is made, what is read, what is refused."""

import base64
import stat
from hashlib import sha256
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from models.errors import ConfigError
from service.keys import Key, Keyring, new_key, presented, read_keys, write_keys

DIGEST = sha256(b"secret").hexdigest()


def keys_file(directory: Path, text: str) -> Path:
    file = directory / "keys.txt"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_key_is_kept_as_its_digest_alone(tmp_path: Path) -> None:
    secret, key = new_key("shop", ["metrics", "classify"])
    assert len(base64.urlsafe_b64decode(secret + "=")) == 32
    assert key.line() == f"shop:classify,metrics:{sha256(secret.encode()).hexdigest()}"
    write_keys(tmp_path / "secrets" / "keys.txt", [key])
    file = tmp_path / "secrets" / "keys.txt"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret not in file.read_text(encoding="utf-8")
    assert read_keys(file) == (key,)
    assert Keyring(file).find(secret) == key
    assert Keyring(file).find(secret + "x") is None


def test_comments_and_empty_lines(tmp_path: Path) -> None:
    file = keys_file(tmp_path, f"# who calls\n\nshop:classify:{DIGEST}\n")
    assert read_keys(file) == (Key("shop", frozenset({"classify"}), DIGEST),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key, nobody could call"),
        ("shop:classify\n", "line 1: a line is name:scopes:sha256"),
        (f"shop:classify:{DIGEST}:more\n", "line 1: a line is"),
        (f"Shop:classify:{DIGEST}\n", "line 1: a line is"),
        ("shop:classify:secret\n", "line 1: a line is"),
        (f"shop:root:{DIGEST}\n", "line 1: unknown scope 'root', a key has some of classify, metrics, admin"),
        (f"shop::{DIGEST}\n", "line 1: unknown scope ''"),
        (f"a:classify:{DIGEST}\n\na:classify:{DIGEST}\n", "line 3: the name 'a' is given twice"),
    ],
)
def test_broken_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_keys(keys_file(tmp_path, text))


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make the file with `secateur keys new`"):
        read_keys(tmp_path / "absent.txt")


def test_a_broken_file_changes_nothing_on_reload(tmp_path: Path) -> None:
    file = keys_file(tmp_path, f"shop:classify:{DIGEST}\n")
    keyring = Keyring(file)
    keys_file(tmp_path, "half a li")
    with pytest.raises(ConfigError):
        keyring.reload()
    assert keyring.find("secret") is not None
    keys_file(tmp_path, f"other:admin:{sha256(b'new').hexdigest()}\n")
    keyring.reload()
    assert keyring.find("secret") is None
    assert keyring.find("new") is not None


def test_bad_name() -> None:
    with pytest.raises(ConfigError, match="is not 1 to 63"):
        new_key("No spaces", ["classify"])


@pytest.mark.parametrize(
    ("headers", "secret"),
    [
        ({}, None),
        ({"authorization": "Bearer abc"}, "abc"),
        ({"authorization": "bearer abc "}, "abc"),
        ({"x-api-key": "abc"}, "abc"),
        ({"authorization": f"Basic {base64.b64encode(b'me:a:c').decode()}"}, "a:c"),
        ({"authorization": "Basic !"}, ""),
        ({"authorization": f"Basic {base64.b64encode(bytes([255])).decode()}"}, ""),
        ({"authorization": "Digest abc", "x-api-key": "abc"}, "abc"),
    ],
)
def test_where_a_request_may_bring_its_key(headers: dict[str, str], secret: str | None) -> None:
    assert presented(Headers(headers)) == secret
