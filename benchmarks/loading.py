"""Peak memory of loading a checkpoint, as a multiple of the model's bytes at its stored dtype.

A fresh process imports everything, notes its memory, loads, and reads its high-water mark (VmHWM, which counts the
mapped pages of the file too). Linux only.

    python -m benchmarks.loading [--dtype bfloat16] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from models.checkpoint import load_checkpoint, save_checkpoint
from models.config import LayerShape, ModelConfig
from models.decoder import MoEClassifier
from models.memory import resident_bytes
from models.weights import DTYPES

LIMIT = 1.2


@dataclass(frozen=True)
class Loading:
    """Bytes are bytes; peak and resident are growth over the process before loading."""

    dtype: str
    model_bytes: int
    peak_bytes: int
    resident_bytes: int
    seconds: float

    @property
    def ratio(self) -> float:
        return self.peak_bytes / self.model_bytes


def write_checkpoint(out: Path, dtype: str, megabytes: int) -> None:
    """A random qwen3_moe checkpoint of about that size: width 512, 32 experts of width 512 in each layer."""
    width, experts, layer_bytes = 512, 32, (32 * 3 * 512 * 512 + 4 * 512 * 512) * DTYPES[dtype].itemsize
    num_layers = max(round(megabytes * 1e6 / layer_bytes), 1)
    raw = {
        "model_type": "qwen3_moe",
        "vocab_size": 1024,
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_experts": experts,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "max_position_embeddings": 512,
        "id2label": {"0": "a", "1": "b"},
    }
    config = ModelConfig(
        family="qwen3_moe",
        vocab_size=1024,
        width=width,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        expert_width=width,
        dense_width=0,
        shared_width=0,
        top_k=4,
        normalize_top_k=True,
        norm_eps=1e-6,
        rope_theta=1e4,
        max_tokens=512,
        qk_norm="head",
        qkv_bias=False,
        num_labels=2,
        pooling="last",
        layers=(LayerShape.unpruned(experts),) * num_layers,
    )
    torch.manual_seed(0)
    model = MoEClassifier(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=width**-0.5)
    tokenizer_file = out.parent / "tokenizer.json"
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(1000)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tokenizer_file))
    save_checkpoint(out, model, raw, tokenizer_file, dtype=dtype)


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure_here(path: Path, dtype: str, verify: bool) -> Loading:
    """Load in this process, which must be fresh."""
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # what the first product allocates is not the checkpoint's
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, start = memory("VmRSS"), time.perf_counter()
    checkpoint = load_checkpoint(path, dtype=dtype)
    if verify:
        checkpoint.verify()
    return Loading(
        dtype=dtype,
        model_bytes=sum(checkpoint.weight_bytes().values()),
        peak_bytes=memory("VmHWM") - before,
        resident_bytes=resident_bytes([checkpoint.model]),
        seconds=time.perf_counter() - start,
    )


def measure(path: Path, dtype: str, verify: bool) -> Loading:
    """Load in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loading", "--child", str(path), "--dtype", dtype]
    command += ["--verify"] if verify else []
    root = Path(__file__).parents[1]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return Loading(**json.loads(output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="only this stored dtype; default: float32 and bfloat16")
    parser.add_argument("--verify", action="store_true", help="also recompute the golden answers after loading")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(asdict(measure_here(args.child, args.dtype, args.verify))))
        return
    rows = []
    for dtype in [args.dtype] if args.dtype else ["float32", "bfloat16"]:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder) / "checkpoint", dtype, args.megabytes)
            row = measure(Path(folder) / "checkpoint", dtype, args.verify)
        rows.append(row)
        print(
            f"{dtype:9} model {row.model_bytes / 1e6:7.1f} MB   peak growth {row.peak_bytes / 1e6:7.1f} MB"
            f"   ratio {row.ratio:.3f} (limit {LIMIT})   resident tensors {row.resident_bytes / 1e6:7.1f} MB"
            f"   {row.seconds:.2f} s"
        )
    if args.json:
        args.json.write_text(json.dumps([{**asdict(row), "ratio": row.ratio} for row in rows], indent=1) + "\n")
    if any(row.ratio >= LIMIT for row in rows):
        raise SystemExit(f"loading peaks above {LIMIT}x of the model's bytes")


if __name__ == "__main__":
    main()
