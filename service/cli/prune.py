"""Cut a fine-tuned checkpoint's experts and show what that saved."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from models.errors import PlanError
from service.cli.arguments import (
    JsonFlag,
    NewDirectory,
    parse_bytes,
    parse_keep,
    parse_layers,
    parse_options,
    parse_protected,
)
from service.cli.output import note, percent, print_json, print_table, size
from service.cli.progress import progress_shown

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint
    from models.pruning import Option


class PruneCommand(TyperCommand):
    """`prune --help` lists the methods there are; only then is the registry, and with it torch, imported."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from models.pruning import METHODS

        lines = []
        for method in METHODS.values():
            lines.append(f"  {method.name}: {method.summary} [{', '.join(method.semantics)}]")
            lines += [f"      {_described(option)}" for option in method.options]
        # Rich reads brackets as markup unless they are escaped.
        methods = [line.replace("[", "\\[") for line in lines]
        self.help = "\n".join([self.help or "", "", "\b", "Methods:", *methods])
        super().format_help(ctx, formatter)


def _described(option: "Option") -> str:
    default = str(option.default).lower() if isinstance(option.default, bool) else option.default
    allowed = f" ({'|'.join(option.choices)})" if option.choices else ""
    return f"{option.name.replace('_', '-')}={default}{allowed} {option.help}"


def prune(
    finetuned: Annotated[Path, typer.Option(exists=True, file_okay=False, help="The checkpoint to cut.")],
    method: Annotated[str, typer.Option(help="How to choose the experts, see the list above.", metavar="METHOD")],
    out: NewDirectory,
    keep: Annotated[
        str | None,
        typer.Option(
            help="Experts per layer: a count (8), a ratio (0.5), or a count for each layer (4,8).",
            metavar="COUNT|RATIO|LIST",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Instead of --keep: as many experts as fit into so many stored bytes.", metavar="BYTES"),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="uniform: every layer alike; global: layers share one total by score; default: the method's.",
            metavar="NAME",
        ),
    ] = None,
    exempt: Annotated[str, typer.Option(help="Layers that keep every expert: 0,3.", metavar="LAYERS")] = "",
    protect: Annotated[
        str, typer.Option(help="Experts that stay, each by itself: layer:expert,...", metavar="PAIRS")
    ] = "",
    pretrained: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="What fine-tuning started from.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Task rows to calibrate on: .jsonl[.gz], .csv, .npz"),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="Statistics of a calibration: reused if there, else written.", metavar="FILE"
        ),
    ] = None,
    semantics: Annotated[
        str | None,
        typer.Option(
            help="What a cut expert's router row means: one of those in brackets above, the first by default.",
            metavar="NAME",
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="A setting of the method, see above; repeatable.", metavar="NAME=VALUE")
    ] = None,
    max_class_loss: Annotated[
        float | None,
        typer.Option(help="Refuse if a class loses more recall on the dev rows: 0.02 is two points.", metavar="SHARE"),
    ] = None,
    allow_lower_k: Annotated[
        bool, typer.Option("--allow-lower-k", help="Allow fewer experts than each token chooses.")
    ] = False,
    ignore_super_experts: Annotated[
        bool, typer.Option("--ignore-super-experts", help="Let experts with outsize activations be cut.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="For methods that draw.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Cut experts out of a fine-tuned checkpoint; the child is verified before it appears.

    \b
    Example:
      secateur prune --method router-norm-change \\
        --finetuned demo/checkpoints/language/full \\
        --pretrained demo/checkpoints/base --keep 8 --out runs/language-8
    """
    if (keep is None) == (budget is None):
        raise PlanError("give one of --keep and --budget")
    wanted = parse_bytes(budget) if budget is not None else parse_keep(keep or "")
    excepted, protected, options = parse_layers(exempt), parse_protected(protect), parse_options(option or ())
    from models.pruning.allocate import Budget, Rules
    from models.pruning.prune import prune as cut

    with progress_shown() as progress:
        child = cut(
            finetuned,
            method,
            Budget(int(wanted)) if budget is not None and isinstance(wanted, int) else wanted,
            out,
            pretrained=pretrained,
            data=data,
            semantics=semantics,
            seed=seed,
            options=options,
            rules=Rules(allocation, excepted, protected, allow_lower_k, keep_super=not ignore_super_experts),
            stats=stats,
            max_class_loss=max_class_loss,
            progress=progress,
        )
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
    if report["accuracy"] is not None:
        _print_accuracy(report["accuracy"])
    for line in _forecasts(report):
        note(line)
    note(f"verified and written to {out}")


def _print_accuracy(accuracy: dict[str, Any]) -> None:
    """Parent and child on the dev rows, the whole and the class that lost most."""
    rows = [("accuracy", accuracy["parent"], accuracy["child"])]
    if accuracy["classes"]:
        worst = max(accuracy["classes"], key=lambda found: found["parent"] - found["child"])
        rows.append((f"worst class: {worst['label']}", worst["parent"], worst["child"]))
    print_table(
        f"on {accuracy['data']['rows']} rows of {accuracy['data']['name']}, {accuracy['agreement']:.3f} of them alike",
        ("", "parent", "child", "lost"),
        [(name, f"{before:.3f}", f"{after:.3f}", f"{before - after:.3f}") for name, before, after in rows],
    )


def _forecasts(report: dict[str, Any]) -> list[str]:
    """What the calibration data says of choices whose expert was cut; nothing where none can meet one."""
    lines = []
    for layer, (kept, lost) in enumerate(zip(report["kept_slots"], report["lost_tokens"], strict=True)):
        if kept is not None and kept < 1:
            tokens = f", and {100 * lost:.1f} % of tokens lose all" if lost is not None else ""
            lines.append(f"layer {layer}: {100 * (1 - kept):.1f} % of choices meet a cut expert{tokens}")
    return lines


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
        "kept_slots": [layer.kept_slots for layer in manifest.layers],
        "lost_tokens": [layer.lost_tokens for layer in manifest.layers],
        "accuracy": manifest.accuracy.model_dump() if manifest.accuracy else None,
        "artifact_sha256": child.artifact_sha256,
    }


def _change(before: int, after: int, show: Any) -> tuple[str, str, str]:
    return show(before), show(after), percent(before - after, before)
