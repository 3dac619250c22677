"""A process that serves toy models: `python -m tests.service.toy_server CONFIG`. The word `slow` takes a while."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from models.classifier import Output
from service.server import run
from service.settings import load_settings
from tests.service.toys import OTHER, ToyLoader, ToyModel, toy_checkpoint


class SlowModel(ToyModel):
    """Takes 0.3 seconds for a pass that holds an unknown word."""

    def classify(self, sequences: Sequence[Sequence[int]]) -> Output:
        if any(OTHER in ids for ids in sequences):
            time.sleep(0.3)
        return super().classify(sequences)


if __name__ == "__main__":
    slow = ToyLoader({"mood-full": lambda: toy_checkpoint(model=SlowModel())})
    run(load_settings(Path(sys.argv[1]), {}), slow)
