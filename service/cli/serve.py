"""Start the service, or check what it would be started with."""

from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.arguments import JsonFlag
from service.cli.output import print_json
from service.cli.progress import progress_shown

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="YAML file; default: SECATEUR_CONFIG, else the demo.", metavar="FILE"
    ),
]


def serve(
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on, over the configuration's.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port, 0 for a free one.")] = None,
) -> None:
    """Serve the deployments of a configuration; without one, the demo.

    \b
    Example:
      secateur serve --config secateur.yaml --port 9000
    """
    from service.cli.greeting import greet_when_ready
    from service.server import run
    from service.settings import configured_path, load_settings

    chosen = config or configured_path() or _prepared_demo()
    settings = load_settings(chosen, _overrides(host, port))
    if settings.server.port:  # a port that the system chooses is in the log
        greet_when_ready(settings)
    run(settings)


def check_config(config: ConfigFile = None, as_json: JsonFlag = False) -> None:
    """Check a configuration and print what is in effect: defaults, file and environment merged, no secrets.

    \b
    Example:
      secateur check-config --config secateur.yaml
    """
    import yaml

    from service.demo import CONFIG
    from service.settings import configured_path, load_settings
    from service.storage.database import shown

    settings = load_settings(config or configured_path() or CONFIG, {})
    document = settings.model_dump(mode="json")
    document["storage"]["url"] = shown(settings.storage.url)
    if as_json:
        print_json(document)
    else:
        typer.echo(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), nl=False)


def _prepared_demo() -> Path:
    from service.demo import ensure_demo

    with progress_shown() as progress:
        return ensure_demo(progress)


def _overrides(host: str | None, port: int | None) -> dict[str, Any]:
    server = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    return {"server": server} if server else {}
