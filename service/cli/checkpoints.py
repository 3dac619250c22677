"""Look at a checkpoint: what it holds, and what it answers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.errors import DataError
from service.cli.arguments import CheckpointDir, JsonFlag
from service.cli.output import note, percent, print_json, print_table, size

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint


def classify(
    checkpoint: CheckpointDir,
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="The texts to classify, or the files of images.")
    ],
    top_k: Annotated[int, typer.Option(min=1, help="Scores to show per input; 1 shows the label alone.")] = 3,
    as_json: JsonFlag = False,
) -> None:
    """Label texts or images with a checkpoint, without a server.

    \b
    Example:
      secateur classify demo/checkpoints/language/full "Der Eintrag wurde gespeichert"
    """
    _check_inputs(inputs)
    from models.checkpoint import load_checkpoint
    from service.prediction import DEFAULT_ACTIVATION, DEFAULT_THRESHOLD, predict

    loaded = load_checkpoint(checkpoint)
    sources = [_image_file(file) for file in inputs] if loaded.encoder.reads == "image" else inputs
    encoded = [loaded.encoder.encode(source) for source in sources]
    for number, item in enumerate(encoded, start=1):
        if not len(item.ids):
            raise DataError(f"INPUT {number} has no tokens in the vocabulary of {checkpoint.name}")
    output = loaded.model.classify([item.ids for item in encoded])
    activation = DEFAULT_ACTIVATION[loaded.problem_type]
    data = []
    for index, (item, logits) in enumerate(zip(encoded, output.logits_BC.tolist(), strict=True)):
        found = predict(logits, loaded.problem_type, activation, DEFAULT_THRESHOLD)
        scores = [{"label": loaded.labels[i], "score": found.values[i]} for i in found.order[:top_k]]
        data.append(
            {
                "index": index,
                "label": loaded.labels[found.label],
                "score": found.values[found.label],
                "labels": [loaded.labels[i] for i in found.labels],
                "scores": scores,
                "num_classes": len(loaded.labels),
                "tokens": len(item.ids),
                "truncated": item.truncated,
            }
        )
    if as_json:
        print_json({"checkpoint": loaded.path.name, "activation": activation, "data": data})
        return
    for given, answer in zip(inputs, data, strict=True):
        cut = f", cut to {answer['tokens']} tokens" if answer["truncated"] else ""
        print_table(f"{given[:60]!r}{cut}", ("label", "score"), _score_rows(answer))


def inspect(
    checkpoint: CheckpointDir,
    verify: Annotated[
        bool, typer.Option(help="Recompute the golden answers of the manifest; exit 1 if one is off.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show parameters, bytes, experts per layer and the manifest of a checkpoint.

    \b
    Example:
      secateur inspect demo/checkpoints/spam/full --verify
    """
    from models.checkpoint import load_checkpoint

    loaded = load_checkpoint(checkpoint)
    if verify:
        loaded.verify()
    if as_json:
        print_json({**_facts(loaded), "verified": verify and loaded.manifest is not None})
        return
    _print_facts(loaded)
    if verify:
        note("verified" if loaded.manifest else "nothing to verify: the checkpoint has no secateur.json")


def _check_inputs(inputs: list[str]) -> None:
    for number, given in enumerate(inputs, start=1):
        if not given.strip():
            raise DataError(f"INPUT {number} is empty: give at least one character that is not white space")
        if any("\ud800" <= character <= "\udfff" for character in given):
            raise DataError(f"INPUT {number} is not valid UTF-8")


def _image_file(name: str) -> bytes:
    file = Path(name)
    if not file.is_file():
        raise DataError(f"{name} is not a file: this checkpoint reads images, give PNG, JPEG or WebP files")
    return file.read_bytes()


def _score_rows(answer: dict[str, Any]) -> list[tuple[str, str]]:
    return [(entry["label"], f"{entry['score']:.4f}") for entry in answer["scores"]]


def _facts(loaded: "Checkpoint") -> dict[str, Any]:
    from models.memory import num_parameters

    parts = loaded.weight_bytes()
    return {
        "checkpoint": loaded.path.name,
        "family": loaded.model.config.family,
        "problem_type": loaded.problem_type,
        "labels": list(loaded.labels),
        "reads": loaded.encoder.reads,
        "max_tokens": loaded.encoder.max_tokens,
        "top_k": loaded.model.config.top_k,
        "stored_dtype": loaded.stored_dtype,
        "parameters": num_parameters(loaded.model),
        "resident_bytes": sum(parts.values()),
        "resident_bytes_by_part": parts,
        "experts_kept": list(loaded.experts_kept),
        "experts_total": list(loaded.experts_total),
        "artifact_sha256": loaded.artifact_sha256,
        "tokenizer_sha256": loaded.tokenizer_sha256,
        "manifest": loaded.manifest.model_dump(mode="json") if loaded.manifest else None,
    }


def _print_facts(loaded: "Checkpoint") -> None:
    facts, manifest = _facts(loaded), loaded.manifest
    about = [
        ("family", facts["family"]),
        ("problem type", facts["problem_type"]),
        ("labels", f"{len(loaded.labels)}: {', '.join(loaded.labels)}"),
        ("parameters", f"{facts['parameters']:,}"),
        ("bytes in memory", size(facts["resident_bytes"])),
        ("stored as", facts["stored_dtype"]),
        ("method", manifest.method if manifest else "no secateur.json"),
        ("semantics", manifest.semantics if manifest else "-"),
        ("sha256", facts["artifact_sha256"]),
    ]
    if manifest and manifest.parent:
        about.append(("parent", f"{manifest.parent.name}, {manifest.parent.parameters:,} parameters"))
    if manifest and manifest.accuracy:
        parent = "" if manifest.accuracy.parent is None else f", parent {manifest.accuracy.parent:.4f}"
        about.append(("accuracy", f"{manifest.accuracy.child:.4f} on {manifest.accuracy.data.rows:,} rows{parent}"))
    print_table(loaded.path.name, ("", "value"), about)
    parts = facts["resident_bytes_by_part"]
    print_table(
        "bytes in memory by part",
        ("part", "bytes", "share"),
        [(part, size(count), percent(count, facts["resident_bytes"])) for part, count in parts.items()],
    )
    print_table("experts", ("layer", "kept", "of", "which"), _layer_rows(loaded))
    forms = [(str(i), str(s.compression)) for i, s in enumerate(loaded.model.config.layers) if s.compression]
    if forms:
        print_table("compressed experts", ("layer", "what their matrices keep"), forms)


def _layer_rows(loaded: "Checkpoint") -> list[tuple[str, ...]]:
    kept = [" ".join(map(str, layer.kept)) for layer in loaded.manifest.layers] if loaded.manifest else None
    counts = zip(loaded.experts_kept, loaded.experts_total, strict=True)
    return [
        (str(index), str(count), str(total), kept[index] if kept else "all")
        for index, (count, total) in enumerate(counts)
    ]
