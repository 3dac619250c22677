"""Train on the user's own rows: a base from scratch, a classifier from a base, a pruned classifier a little further."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.errors import ConfigError
from service.cli.arguments import JsonFlag, NewDirectory
from service.cli.output import note, print_json, print_table
from service.cli.progress import progress_shown

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint


class Dtype(StrEnum):
    """How weights are stored; training itself is in float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class PoolingName(StrEnum):
    """Which token's state, or the mean of all, the head sees."""

    MEAN = "mean"
    LAST = "last"
    FIRST = "first"


DataFile = Annotated[
    Path,
    typer.Option(
        exists=True, dir_okay=False, help="Rows with text, label, optional split: .jsonl[.gz] or .csv; images: .npz."
    ),
]
DataFiles = Annotated[
    list[Path],
    typer.Option(exists=True, dir_okay=False, help="Rows to read; repeat for several corpora of texts. Images: .npz."),
]
BaseDir = Annotated[
    Path, typer.Option(exists=True, file_okay=False, help="The checkpoint to start from.", metavar="DIR")
]
TeacherDir = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="A classifier whose answers to imitate too.", metavar="DIR"),
]
HyperParameters = Annotated[
    Path | None,
    typer.Option("--config", exists=True, dir_okay=False, help="YAML with hyper-parameters.", metavar="FILE"),
]


def pretrain(
    data: DataFiles,
    out: NewDirectory,
    family: Annotated[
        str, typer.Option(help="Architecture: qwen3_moe, qwen2_moe, olmoe or mixtral; vmoe for images.")
    ] = "qwen3_moe",
    size: Annotated[str, typer.Option(help="tiny, demo or small.")] = "demo",
    tokenizer: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A tokenizer.json; default: train one.")
    ] = None,
    config: HyperParameters = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a small Mixture-of-Experts from scratch, a language model or a classifier of images; an interrupted run
    resumes.

    \b
    Example:
      secateur pretrain --data rows.csv --size tiny --out runs/base
    """
    from models.families import FAMILIES
    from models.training.config import stage_config
    from models.training.pretrain import pretrain as train
    from models.training.pretrain_images import pretrain_images

    is_vision = family in FAMILIES and FAMILIES[family].reads_images
    settings = stage_config(config, "pretrain", is_vision)
    if is_vision and (len(data) > 1 or tokenizer is not None):
        raise ConfigError(f"{family} reads images: give one --data FILE.npz, and no --tokenizer")
    with progress_shown() as progress:
        if is_vision:
            pretrain_images(data[0], out, settings, size, progress=progress)
        else:
            train(data, out, settings, family, size, tokenizer, progress)
    if as_json:
        print_json({"out": str(out), "family": family, "size": size})
    else:
        note(f"written to {out}")


def finetune(
    base: BaseDir,
    data: DataFile,
    out: NewDirectory,
    teacher: TeacherDir = None,
    pooling: Annotated[
        PoolingName | None, typer.Option(help="What the head sees of a text; default: mean. Images: as the base does.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="How to store the weights.")] = Dtype.FLOAT32,
    config: HyperParameters = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a classifier on labelled rows from a pretrained checkpoint; an interrupted run resumes.

    \b
    Example:
      secateur finetune --base runs/base --data rows.csv --out runs/full
    """
    from models.hf_config import reads_images
    from models.training.config import stage_config
    from models.training.finetune import finetune as train

    settings = stage_config(config, "finetune", reads_images(base))
    with progress_shown() as progress:
        trained = train(
            base, data, out, settings, None if pooling is None else pooling.value, teacher, dtype.value, progress
        )
    _report(trained, as_json)


def recover(
    base: BaseDir,
    data: DataFile,
    out: NewDirectory,
    teacher: TeacherDir = None,
    distill: Annotated[
        float | None, typer.Option(help="Weight of the teacher's answers; M-SMoE's recipe takes 0.2.", metavar="WEIGHT")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Softens both answers before they are compared.", metavar="T")
    ] = None,
    freeze_router: Annotated[
        bool | None,
        typer.Option("--freeze-router/--train-router", help="Default: frozen where rows share experts (tie) only."),
    ] = None,
    freeze_constants: Annotated[
        bool, typer.Option("--freeze-constants", help="Keep the vectors that stand in for cut experts.")
    ] = False,
    config: HyperParameters = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a pruned checkpoint a little on its task, so that the survivors take over; an interrupted run resumes.

    Options win over the same keys of --config.

    \b
    Example:
      secateur recover --base runs/pruned --teacher runs/full --data rows.csv --out runs/recovered
    """
    from models.hf_config import reads_images
    from models.training.config import stage_config
    from models.training.finetune import recover as train

    given: dict[str, Any] = {"distill": distill, "temperature": temperature}
    if freeze_router is not None:
        given["routers"] = "frozen" if freeze_router else "trained"
    if freeze_constants:
        given["freeze_constants"] = True
    settings = stage_config(config, "recover", reads_images(base))
    settings = replace(settings, **{key: value for key, value in given.items() if value is not None})
    with progress_shown() as progress:
        trained = train(base, data, out, settings, teacher, progress)
    _report(trained, as_json)


def _report(trained: "Checkpoint", as_json: bool) -> None:
    manifest = trained.manifest
    if manifest is None or manifest.accuracy is None:
        raise ValueError("a trained checkpoint without a manifest that says how accurate it is")
    report: dict[str, Any] = {
        "out": str(trained.path),
        "labels": list(trained.labels),
        "parameters": manifest.parameters,
        "accuracy": manifest.accuracy.child,
        "accuracy_rows": manifest.accuracy.data.rows,
        "artifact_sha256": trained.artifact_sha256,
        "training": manifest.training,
    }
    if as_json:
        print_json(report)
        return
    rows = [
        ("labels", f"{len(trained.labels)}: {', '.join(trained.labels)}"),
        ("parameters", f"{manifest.parameters:,}"),
        ("accuracy", f"{manifest.accuracy.child:.4f} on {manifest.accuracy.data.rows:,} held-out rows"),
    ]
    print_table(trained.path.name, ("", "value"), rows)
    note(f"verified and written to {trained.path}")
