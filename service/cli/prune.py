"""Cut a fine-tuned checkpoint's experts and show what that saved."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from service.cli.arguments import JsonFlag, NewDirectory, parse_keep
from service.cli.output import note, percent, print_json, print_table, size
from service.cli.progress import progress_shown

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint


class PruneCommand(TyperCommand):
    """`prune --help` lists the methods there are; only then is the registry, and with it torch, imported."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from models.pruning import METHODS

        lines = [f"  {method.name}: {method.summary}" for method in METHODS.values()]
        self.help = "\n".join([self.help or "", "", "\b", "Methods:", *lines])
        super().format_help(ctx, formatter)


def prune(
    finetuned: Annotated[Path, typer.Option(exists=True, file_okay=False, help="The checkpoint to cut.")],
    method: Annotated[str, typer.Option(help="How to choose the experts, see the list above.", metavar="METHOD")],
    keep: Annotated[str, typer.Option(help="Experts per layer: a count (8) or a ratio (0.5).", metavar="COUNT|RATIO")],
    out: NewDirectory,
    pretrained: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="What fine-tuning started from.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Task rows to calibrate on: .jsonl[.gz] or .csv.")
    ] = None,
    semantics: Annotated[
        str | None,
        typer.Option(
            help="What a cut expert's router row means: zero or slice; default: the method's.", metavar="NAME"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="For methods that draw.")] = 0,
    allow_flat: Annotated[bool, typer.Option(help="Accept routers that fine-tuning hardly moved.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Cut experts out of a fine-tuned checkpoint; the child is verified before it appears.

    \b
    Example:
      secateur prune --method router-norm-change \\
        --finetuned demo/checkpoints/language/full \\
        --pretrained demo/checkpoints/base --keep 8 --out runs/language-8
    """
    wanted = parse_keep(keep)
    from models.pruning.prune import prune as cut

    with progress_shown() as progress:
        child = cut(finetuned, method, wanted, out, pretrained, data, semantics, seed, allow_flat, progress)
    report = _report(child)
    if as_json:
        print_json(report)
        return
    parameters, stored = report["parameters"], report["bytes"]
    print_table(
        f"{finetuned.name} cut by {report['method']}, {report['semantics']}",
        ("", "parent", "child", "removed"),
        [
            ("parameters", *_change(parameters["parent"], parameters["child"], "{:,}".format)),
            ("bytes stored", *_change(stored["parent"], stored["child"], size)),
            *(
                (f"experts, layer {layer}", *_change(total, kept, str))
                for layer, (kept, total) in enumerate(zip(report["experts_kept"], report["experts_total"], strict=True))
            ),
        ],
    )
    note(f"verified and written to {out}")


def _report(child: "Checkpoint") -> dict[str, Any]:
    manifest = child.manifest
    if manifest is None or manifest.parent is None:
        raise ValueError("a child without a manifest that names its parent")
    return {
        "out": str(child.path),
        "method": manifest.method,
        "semantics": manifest.semantics,
        "experts_kept": list(child.experts_kept),
        "experts_total": list(child.experts_total),
        "kept": [list(layer.kept) for layer in manifest.layers],
        "parameters": {"parent": manifest.parent.parameters, "child": manifest.parameters},
        "bytes": {"parent": manifest.parent.bytes, "child": manifest.bytes},
        "artifact_sha256": child.artifact_sha256,
    }


def _change(before: int, after: int, show: Any) -> tuple[str, str, str]:
    return show(before), show(after), percent(before - after, before)
