"""What calibration costs: seconds to collect each group of statistics, over those of a plain forward pass.

Both run the same rows in the same batches through every token of every layer; rounds alternate, and the ratio is the
median of paired ratios, so that a busy machine slows both. Core must stay within 1.5 times the plain pass.

    python -m benchmarks.calibration demo/checkpoints/icd10/full demo/data/icd10.jsonl.gz [--threads 1] [--json FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from models.batches import by_length
from models.checkpoint import load_checkpoint
from models.dataset import label_ids, read_rows, split_rows, stratified
from models.pruning.calibrate import BATCH_TOKENS, calibrate
from models.pruning.stats import DATA_GROUPS, Core

LIMIT = 1.5


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint = load_checkpoint(args.checkpoint)
    model = checkpoint.model
    rows = stratified(split_rows(read_rows(args.data))[0], args.rows)
    sequences, labels = [checkpoint.encoder.encode(row.text).ids for row in rows], label_ids(rows, checkpoint.labels)
    tokens = sum(map(len, sequences))

    @torch.inference_mode()
    def plain() -> None:
        for batch in by_length(sequences, BATCH_TOKENS):
            model.hidden(model.pack([sequences[i] for i in batch]))

    ratios: dict[str, float] = {}
    for groups in ((Core,), *((Core, group) for group in DATA_GROUPS if group is not Core)):
        plain()
        pairs = [
            (seconds(plain), seconds(partial(calibrate, model, sequences, groups, labels))) for _ in range(args.repeats)
        ]
        name = "+".join(group.__name__ for group in groups)
        ratios[name] = statistics.median(counted / bare for bare, counted in pairs)
        rate = tokens / statistics.median(counted for _, counted in pairs)
        print(f"{name:14} {rate:10,.0f} tokens/s   time / plain pass {ratios[name]:5.2f}")
    if args.json:
        args.json.write_text(
            json.dumps({"tokens": tokens, "threads": args.threads, "time_over_plain": ratios}, indent=1) + "\n"
        )
    if ratios["Core"] > LIMIT:
        raise SystemExit(f"Core takes more than {LIMIT} times a plain pass")


if __name__ == "__main__":
    main()
