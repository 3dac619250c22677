"""API keys: make, list and remove them. The server reads the file at start and again on SIGHUP."""

from pathlib import Path
from typing import Annotated

import typer

from service.cli.arguments import JsonFlag
from service.cli.output import print_json

app = typer.Typer(
    name="keys",
    help="API keys for `auth: {mode: keys, keys_file: FILE}`; a running server reads the file again on SIGHUP.",
    no_args_is_help=True,
)
KeysFile = Annotated[Path, typer.Option("--keys-file", help="The file of keys.", metavar="FILE", dir_okay=False)]
KeyName = Annotated[str, typer.Argument(help="A name for the log, such as the caller's.", metavar="NAME")]


@app.command("new")
def new(
    name: KeyName,
    keys_file: KeysFile,
    scope: Annotated[
        list[str] | None, typer.Option(help="What it may do: classify, metrics or admin; repeatable.", metavar="SCOPE")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a key, add its digest to the file, and print the key. It is shown this once.

    \b
    Example:
      secateur keys new shop --keys-file secrets/keys.txt --scope classify
    """
    from models.errors import ConfigError
    from service.keys import new_key, read_keys, write_keys

    keys = list(read_keys(keys_file)) if keys_file.exists() else []
    if any(key.name == name for key in keys):
        raise ConfigError(f"{keys_file} has a key named {name!r} already: choose another name, or remove it first")
    secret, key = new_key(name, scope or ["classify"])
    write_keys(keys_file, [*keys, key])
    if as_json:
        print_json({"name": name, "scopes": sorted(key.scopes), "key": secret})
    else:
        typer.echo(secret)


@app.command("list")
def show(keys_file: KeysFile, as_json: JsonFlag = False) -> None:
    """Names and scopes of the keys in a file.

    \b
    Example:
      secateur keys list --keys-file secrets/keys.txt
    """
    from service.keys import read_keys

    keys = read_keys(keys_file)
    if as_json:
        print_json([{"name": key.name, "scopes": sorted(key.scopes)} for key in keys])
    else:
        for key in keys:
            typer.echo(f"{key.name}  {', '.join(sorted(key.scopes))}")


@app.command("remove")
def remove(name: KeyName, keys_file: KeysFile) -> None:
    """Take a key out of the file.

    \b
    Example:
      secateur keys remove shop --keys-file secrets/keys.txt
    """
    from models.errors import ConfigError
    from service.keys import read_keys, write_keys

    keys = read_keys(keys_file)
    if all(key.name != name for key in keys):
        raise ConfigError(f"{keys_file} has no key named {name!r}, it has {', '.join(key.name for key in keys)}")
    if len(keys) == 1:
        raise ConfigError(f"{name!r} is the only key of {keys_file}: make its successor first, then remove it")
    write_keys(keys_file, [key for key in keys if key.name != name])
