"""Look after the database of experiments: what is in it, its schema, and old rows."""

from dataclasses import asdict
from typing import Annotated

import typer

from service.cli.arguments import JsonFlag
from service.cli.output import note, print_json, print_table, size
from service.cli.serve import ConfigFile

app = typer.Typer(help="Look after the database of experiments.", no_args_is_help=True)


@app.command("info")
def info(config: ConfigFile = None, as_json: JsonFlag = False) -> None:
    """Print the schema, the rows of each table and the oldest record. The service may be running.

    \b
    Example:
      secateur storage info --config secateur.yaml
    """
    from service.settings import load_settings
    from service.storage.upkeep import describe

    found = describe(load_settings(config, {}).storage.url)
    if as_json:
        print_json(asdict(found))
        return
    print_table(
        f"{found.url}, schema {found.schema or 'none'}, {size(found.bytes)}, oldest record {found.oldest or 'none'}",
        ("table", "rows"),
        [(name, f"{rows:,}") for name, rows in found.rows.items()],
    )
    if found.schema != found.newest:
        note(f"this version writes schema {found.newest}: the service upgrades when it starts")


@app.command("upgrade")
def upgrade(config: ConfigFile = None) -> None:
    """Bring the database to this version's schema, as the service does when it starts. Make a copy of it first.

    \b
    Example:
      secateur storage upgrade --config secateur.yaml
    """
    from service.settings import load_settings
    from service.storage.owner import owned
    from service.storage.upgrade import newest
    from service.storage.upgrade import upgrade as apply

    with owned(load_settings(config, {}).storage.url) as engine:
        apply(engine)
    note(f"schema {newest()}")


@app.command("prune")
def prune(
    config: ConfigFile = None,
    days: Annotated[int | None, typer.Option(min=0, help="Default: storage.retention_days.", metavar="DAYS")] = None,
) -> None:
    """Delete the rows of items and labels older than so many days. Counts, curves and steps stay.

    The service does this by itself while it runs. An SQLite file must not be in use.

    \b
    Example:
      secateur storage prune --days 30 --config secateur.yaml
    """
    import time

    from service.settings import load_settings
    from service.storage.owner import owned
    from service.storage.retention import forget
    from service.storage.upgrade import upgrade as apply

    storage = load_settings(config, {}).storage
    kept = storage.retention_days if days is None else days
    with owned(storage.url) as engine:
        apply(engine)
        deleted = forget(engine, time.time() - 86_400 * kept)
    note(f"{deleted:,} rows deleted")
