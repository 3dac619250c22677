"""The bare forward pass against `transformers` with grouped expert products, on one random checkpoint.

Both sides classify the same sequences of mixed length; ours starts from Python lists (packing is timed), theirs from
tensors that are already padded. Runs alternate A/B/A/B over several batches, and the ratio printed is the median of
the paired ratios, so that a busy machine slows both. Nothing is timed unless the logits agree.

    python -m benchmarks.forward [--threads 2] [--json FILE]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from models.config import LayerShape, ModelConfig
from models.decoder import MoEClassifier
from models.hf_config import parse_config, read_json
from models.weights import DTYPES, load_weights, weight_files

PAD = 0
POINTS = {"1x64": (1, 64), "8x64": (8, 64), "32x64": (32, 64)}
SHORTEST, LONGEST = 8, 128
# A random model's bf16 logits differ from its float32 logits by what rounding flips in the routers, so ours may err
# this many times more than transformers' own bf16 run does, and float32 is held to an absolute bound.
BF16_ERROR_RATIO = 1.5
FLOAT32_ERROR = 1e-4

Sequences = list[list[int]]
Run = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One point of one dtype: medians in milliseconds; ratio > 1 means ours is faster."""

    dtype: str
    point: str
    system: str
    first_ms: float
    median_ms: float
    ratio_to_ours: float
    relative_error: float


def batches(count: int, mean: int, number: int, vocab_size: int, generator: torch.Generator) -> list[Sequences]:
    """`number` batches of `count` sequences, lengths in 8..128 with exactly the given mean."""
    result = []
    for _ in range(number):
        lengths = [mean] * count
        for i in range(0, count - 1, 2):  # spread pairs apart, so that the total stays
            shift = int(torch.randint(0, min(mean - SHORTEST, LONGEST - mean) + 1, (1,), generator=generator))
            lengths[i], lengths[i + 1] = mean - shift, mean + shift
        result.append([torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths])
    return result


def padded(sequences: Sequences) -> dict[str, torch.Tensor]:
    longest = max(map(len, sequences))
    return {
        "input_ids": torch.tensor([s + [PAD] * (longest - len(s)) for s in sequences]),
        "attention_mask": torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences]),
    }


def write_checkpoint(out: Path, args: argparse.Namespace) -> None:
    """A random qwen3_moe classifier, as `transformers` writes it, stored in bfloat16 so both dtypes share weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForSequenceClassification

    torch.manual_seed(args.seed)
    config = Qwen3MoeConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=max(args.width // 128, 1),
        head_dim=64,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        moe_intermediate_size=args.expert_width,
        norm_topk_prob=True,
        max_position_embeddings=2 * LONGEST,
        initializer_range=args.width**-0.5,
        pad_token_id=PAD,
        num_labels=8,
    )
    Qwen3MoeForSequenceClassification(config).to(torch.bfloat16).save_pretrained(out)


def load_theirs(path: Path, dtype: torch.dtype, implementation: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, experts_implementation=implementation)
    return model.eval()


def load_ours(path: Path, dtype: torch.dtype) -> MoEClassifier:
    model = MoEClassifier(parse_config(read_json(path / "config.json")), dtype)
    load_weights(model, weight_files(path))
    return model.requires_grad_(False).eval()


def half_of(model: MoEClassifier, semantics: str) -> MoEClassifier:
    """Every second expert removed: `slice` cuts the router too, `zero` keeps its rows and skips the lost ones."""
    kept = list(range(0, model.config.layers[0].num_experts, 2))
    route = tuple(e // 2 if e % 2 == 0 else -1 for e in range(2 * len(kept)))
    shape = LayerShape.unpruned(len(kept)) if semantics == "slice" else LayerShape(len(kept), route)
    config = ModelConfig(**{**vars(model.config), "layers": (shape,) * model.config.num_layers})
    pruned, whole = MoEClassifier(config, model.dtype), dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in pruned.named_parameters():
            parameter.copy_(whole[name] if whole[name].shape == parameter.shape else whole[name][kept])
    return pruned.requires_grad_(False).eval()


def measure(systems: Mapping[str, Run], number: int, repeats: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """First-call seconds, and steady seconds of every system in the same order of batches, alternating."""
    first, steady = {}, {name: [] for name in systems}  # type: dict[str, float], dict[str, list[float]]
    for name, run in systems.items():
        first[name] = timed(run, 0)
    for repeat in range(repeats + 1):
        for batch in range(number):
            for name, run in systems.items():
                seconds = timed(run, batch)
                if repeat:  # the first round warms up
                    steady[name].append(seconds)
    return first, steady


def timed(run: Run, batch: int) -> float:
    start = time.perf_counter()
    run(batch)
    return time.perf_counter() - start


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.float() - expected).norm() / expected.norm())


def check(ours: float, theirs: float, dtype: str, point: str) -> None:
    """The gate in front of every timing. Raises SystemExit if our logits are wrong."""
    bound = FLOAT32_ERROR if dtype == "float32" else BF16_ERROR_RATIO * theirs
    if not ours <= bound:
        raise SystemExit(f"{dtype} {point}: our logits are off by {ours:.2e}, bound {bound:.2e}: nothing is timed")


def compare(path: Path, args: argparse.Namespace) -> list[Row]:
    rows = []
    generator = torch.Generator().manual_seed(args.seed)
    inputs = {p: batches(*POINTS[p], args.batches, args.vocab_size, generator) for p in args.points}
    truth = expected_logits(path, inputs)
    for dtype in args.dtypes:
        kind = DTYPES[dtype]
        ours = load_ours(path, kind)
        models: dict[str, Any] = {"ours": ours}
        models |= {f"transformers {name}": load_theirs(path, kind, name) for name in args.rivals}
        models |= {f"ours, half, {name}": half_of(ours, name) for name in args.pruned}
        for point, sequences in inputs.items():
            systems = {name: runner(model, sequences) for name, model in models.items()}
            rows += point_rows(dtype, point, systems, truth[point], args.repeats)
            for row in rows[-len(systems) :]:
                print(format_row(row), flush=True)
    return rows


def point_rows(
    dtype: str, point: str, systems: Mapping[str, Run], truth: Sequence[torch.Tensor], repeats: int
) -> list[Row]:
    first, steady = measure(systems, len(truth), repeats)
    outputs = {name: torch.cat([run(i) for i in range(len(truth))]) for name, run in systems.items()}
    errors = {name: relative(output, torch.cat(list(truth))) for name, output in outputs.items()}
    rival = min(error for name, error in errors.items() if name.startswith("transformers"))
    check(errors["ours"], rival, dtype, point)
    return [
        Row(
            dtype,
            point,
            name,
            first[name] * 1e3,
            statistics.median(seconds) * 1e3,
            statistics.median(s / o for s, o in zip(seconds, steady["ours"], strict=True)),
            errors[name],
        )
        for name, seconds in steady.items()
    ]


def expected_logits(path: Path, inputs: Mapping[str, list[Sequences]]) -> dict[str, list[torch.Tensor]]:
    """What transformers answers in float32 with its plain loop over experts: the truth for every column."""
    model = load_theirs(path, torch.float32, "eager")
    runs = {point: runner(model, sequences) for point, sequences in inputs.items()}
    return {point: [run(i).float() for i in range(len(inputs[point]))] for point, run in runs.items()}


def runner(model: Any, sequences: list[Sequences]) -> Run:
    if isinstance(model, MoEClassifier):
        return lambda i: model.classify(sequences[i]).logits_BC
    tensors = [padded(batch) for batch in sequences]

    def run(i: int) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(**tensors[i]).logits
        return logits

    return run


def format_row(row: Row) -> str:
    return (
        f"{row.dtype:9} {row.point:6} {row.system:24} first {row.first_ms:8.1f} ms   median {row.median_ms:8.2f} ms"
        f"   time / ours {row.ratio_to_ours:5.2f}   error {row.relative_error:.1e}"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--expert-width", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5, help="rounds over the batches, after one warm-up round")
    parser.add_argument("--batches", type=int, default=4, help="different batches per point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--points", nargs="+", default=list(POINTS), choices=list(POINTS))
    parser.add_argument("--rivals", nargs="+", default=["grouped_mm", "eager"])
    parser.add_argument("--pruned", nargs="*", default=["slice", "zero"], choices=["slice", "zero"])
    parser.add_argument("--json", type=Path, help="write the rows here too")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        write_checkpoint(path, args)
        rows = compare(path, args)
    setting = {key: value for key, value in vars(args).items() if key != "json"}
    setting |= {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    worst = min(row.ratio_to_ours for row in rows if row.system == "transformers grouped_mm")
    print(f"smallest lead over transformers grouped_mm: {worst:.2f}x")


if __name__ == "__main__":
    main()
