"""Bring a database to this version's schema, by the numbered steps under migrations/."""

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from models.errors import ConfigError
from service.storage.database import writing

MIGRATIONS = Path(__file__).parent / "migrations"
# Alembic tells of every step at level info.
QUIET = logging.WARNING


def newest() -> str:
    """The number of the schema that this version writes."""
    return _script().get_current_head() or ""


def current(connection: Connection) -> str | None:
    """The number of the schema of a database, None if it is empty."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(engine: Engine, target: str = "head") -> None:
    """Apply what is missing, all or nothing; one process at a time. Raises ConfigError if the database is newer."""
    logging.getLogger("alembic").setLevel(QUIET)
    with writing(engine) as connection:
        found = current(connection)
        known = {step.revision for step in _script().walk_revisions()}
        if found is not None and found not in known:
            raise ConfigError(
                f"storage.url: a newer version wrote this database (schema {found}, this version knows {newest()}): "
                "run that version, or give another database"
            )
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, target)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


def _script() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())
