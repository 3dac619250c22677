"""The demo: where it is, and how to make it again."""

from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.arguments import JsonFlag
from service.cli.output import interval, note, percent, print_json, print_table
from service.cli.progress import progress_shown

app = typer.Typer(
    help="The demo models: build them again, find their configuration, see what they were measured at.",
    no_args_is_help=True,
)


@app.command("build")
def build(
    out: Annotated[Path, typer.Option(help="The directory to fill; finished parts are kept.", metavar="DIR")] = Path(
        "runs/demo"
    ),
    task: Annotated[
        list[str] | None, typer.Option(help="Only this task and what it needs; repeat for several.", metavar="NAME")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rows and steps: see the chain run in minutes.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Pretrain, fine-tune, prune, recover and measure the demo from the vendored rows; a second call goes on.

    \b
    Example:
      secateur demo build --out runs/demo
    """
    from service.demo import build_demo

    with progress_shown() as progress:
        results = build_demo(out, quick, task or (), progress)
    if as_json:
        print_json({"out": str(out), "quick": quick, "tasks": results})
        return
    for name, variants in results.items():
        full = variants["full"]
        print_table(
            f"{name}, {full['rows']:,} test rows, 95 % intervals in brackets",
            ("variant", "accuracy", "change against full", "macro-F1", "parameters", "removed"),
            [_variant_row(name, variant, full["parameters"]) for name, variant in variants.items()],
        )
    note(f"written to {out}; serve it: secateur serve --config {out / 'secateur.yaml'}")


@app.command("path")
def path(as_json: JsonFlag = False) -> None:
    """Cut the demo's children if they are missing, and print where its configuration is.

    \b
    Example:
      secateur demo path
    """
    from service.demo import ensure_demo

    with progress_shown() as progress:
        config = ensure_demo(progress)
    if as_json:
        print_json({"config": str(config)})
    else:
        typer.echo(config)


@app.command("results")
def results() -> None:
    """Print what the shipped demo was measured at, as the Markdown table of the README.

    \b
    Example:
      secateur demo results
    """
    from service.demo_results import results_table

    typer.echo(results_table(), nl=False)


def _variant_row(name: str, variant: dict[str, Any], full_parameters: int) -> tuple[str, ...]:
    against = variant.get("against_full")
    return (
        name,
        interval(variant["accuracy"], variant["accuracy_interval"]),
        interval(against["difference"], against["difference_interval"]) if against else "-",
        f"{variant['macro_f1']:.3f}",
        f"{variant['parameters']:,}",
        percent(full_parameters - variant["parameters"], full_parameters),
    )
