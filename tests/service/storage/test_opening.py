"""What a store wants before it opens, and what it says when it does not get it."""

import stat
from pathlib import Path

import pytest

from models.errors import ConfigError
from service.metrics import Metrics
from service.sections import Storage
from service.storage.database import connect
from service.storage.store import Store
from service.storage.upgrade import upgrade
from tests.service.storage.conftest import KEY, Open, administer
from tests.service.storage.records import exposure, label, number, send


def open_file(folder: Path, key: bytes | None = None) -> Store:
    return Store.open(Storage(url=f"sqlite:///{folder}/secateur.db"), key, Metrics())


def test_an_sqlite_file_has_one_owner(tmp_path: Path) -> None:
    first = open_file(tmp_path)
    with pytest.raises(ConfigError, match=r"another process uses .*/secateur\.db: stop it, .* PostgreSQL"):
        open_file(tmp_path)
    first.close()
    open_file(tmp_path).close()


def test_a_key_is_made_once_beside_the_file(tmp_path: Path) -> None:
    first = open_file(tmp_path)
    mark = first.fingerprint("user-1")
    first.close()
    key = tmp_path / "secateur.db.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert len(bytes.fromhex(key.read_text())) == 32
    second = open_file(tmp_path)
    assert second.fingerprint("user-1") == mark
    second.close()


def test_no_key_is_made_where_one_is_given(tmp_path: Path) -> None:
    open_file(tmp_path, KEY).close()
    assert not (tmp_path / "secateur.db.key").exists()


@pytest.mark.parametrize("text", ["", "not hexadecimal", "00ff"])
def test_a_broken_key_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "secateur.db.key").write_text(text)
    with pytest.raises(
        ConfigError, match=r"secateur\.db\.key: is not a hash key: restore it, or set SECATEUR_HASH_KEY"
    ):
        open_file(tmp_path)


def test_another_key_is_refused(open_store: Open, url: str) -> None:
    open_store().close()
    with pytest.raises(ConfigError, match="SECATEUR_HASH_KEY: this database was written under another key"):
        Store.open(Storage(url=url), b"x" * 32, Metrics())
    open_store()


def test_a_newer_schema_is_refused(open_store: Open, url: str) -> None:
    open_store().close()
    engine = connect(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '99'")
    engine.dispose()
    with pytest.raises(ConfigError, match=r"a newer version wrote this database \(schema 99, this version knows \d+\)"):
        open_store()


def test_replicas_need_a_common_key() -> None:
    with pytest.raises(ConfigError, match="SECATEUR_HASH_KEY: replicas that share a PostgreSQL need a common key"):
        Store.open(Storage(url="postgresql://user@127.0.0.1:1/nothing"), None, Metrics())


def test_an_unreachable_server_is_named_without_its_password() -> None:
    with pytest.raises(ConfigError, match=r"storage\.url: .*127\.0\.0\.1:1/nothing cannot be used: ") as caught:
        Store.open(Storage(url="postgresql://user:canary@127.0.0.1:1/nothing?sslmode=disable"), KEY, Metrics())
    assert "canary" not in caught.value.message


def test_an_unwritable_folder_is_named() -> None:
    with pytest.raises(ConfigError, match=r"storage\.url: /proc/nothing/secateur\.db\.lock cannot be opened"):
        Store.open(Storage(url="sqlite:////proc/nothing/secateur.db"), None, Metrics())


def test_a_file_that_is_no_database_is_refused_and_let_go(tmp_path: Path) -> None:
    file = tmp_path / "secateur.db"
    file.write_bytes(b"something else, and long enough to be looked at\n" * 100)
    for _ in range(2):  # the second attempt would meet a lock that was kept
        with pytest.raises(ConfigError, match=r"secateur\.db cannot be used: file is not a database"):
            open_file(tmp_path)


def test_upgrading_twice_changes_nothing(open_store: Open, url: str) -> None:
    open_store().close()
    engine = connect(url)
    upgrade(engine)
    engine.dispose()


def test_a_database_without_an_encoding_of_its_own(postgres: Path, metrics: Metrics) -> None:
    administer(postgres, "CREATE DATABASE ascii TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'")
    store = Store.open(Storage(url=f"postgresql://secateur@/ascii?host={postgres}"), KEY, metrics)
    try:
        store.record(exposure("a", label="größer"))
        assert send(store, label("a", "größer")) == ("matched",)
        assert number(store, "right", "small") == 1
    finally:
        store.close()
