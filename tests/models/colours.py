"""A task that tiny models learn in seconds: three classes of sentences, told apart by one word."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from models.training.config import FINETUNE_DEFAULTS

COLOURS = {"warm": ("red", "orange", "ember"), "cold": ("blue", "ice", "frost"), "grey": ("ash", "stone", "lead")}
QUICK = replace(
    FINETUNE_DEFAULTS,
    epochs=6,
    min_steps=1,
    batch_tokens=256,
    learning_rate=1e-2,
    token_split=0.05,
    dropout=0.0,
    label_smoothing=0.0,
)


def write_rows(file: Path) -> Path:
    """240 rows; every fourth is a test row, every twelfth a dev row."""
    generator = np.random.default_rng(0)
    lines = []
    for number in range(240):
        label = list(COLOURS)[number % 3]
        noise = [f"thing{generator.integers(0, 20)}" for _ in range(4)]
        noise.insert(int(generator.integers(0, 5)), str(generator.choice(COLOURS[label])))
        split = "test" if number % 4 == 3 else "dev" if number % 12 == 0 else "train"
        lines.append(json.dumps({"text": " ".join(noise), "label": label, "split": split}))
    file.write_text("\n".join(lines) + "\n")
    return file
