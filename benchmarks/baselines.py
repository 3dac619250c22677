"""What a linear model on TF-IDF features reaches on the demo's tasks: the baseline the README compares with.

    python -m benchmarks.baselines [--json FILE]

Trains on the train rows, reports the test rows; nothing is tuned. Features: words and word pairs (characters 1-3 for
`language`), sublinear counts, minimum document count 2, at most 60,000. Model: logistic regression with C = 10, or the
same loss by stochastic gradient (alpha 1e-5) above 20,000 rows. Tasks of images have no words and are left out.
"""

import argparse
import json
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.metrics import f1_score

from models.dataset import read_rows
from models.evaluate import wilson
from service.demo import TASKS

FEATURES = {"language": {"analyzer": "char", "ngram_range": (1, 3)}}
WORDS = {"analyzer": "word", "ngram_range": (1, 2)}
MANY_ROWS = 20_000


def baseline(name: str, data: Path) -> dict[str, object]:
    """Accuracy with its Wilson interval and macro-F1 on the test rows."""
    train, test = read_rows(data, "train"), read_rows(data, "test")
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=60_000, **FEATURES.get(name, WORDS))
    model = (
        SGDClassifier(loss="log_loss", alpha=1e-5, random_state=0)
        if len(train) > MANY_ROWS
        else LogisticRegression(C=10, max_iter=2000)
    )
    model.fit(vectorizer.fit_transform([row.text for row in train]), [row.label for row in train])
    truth = [row.label for row in test]
    predictions = model.predict(vectorizer.transform([row.text for row in test])).tolist()
    right = sum(p == t for p, t in zip(predictions, truth, strict=True))
    return {
        "rows": len(test),
        "accuracy": right / len(test),
        "accuracy_interval": wilson(right, len(test)),
        "macro_f1": float(f1_score(truth, predictions, average="macro")),
    }


def main() -> None:
    """Print a line per task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    results = {task.name: baseline(task.name, task.data) for task in TASKS if task.data.suffix != ".npz"}
    for name, figures in results.items():
        print(
            f"{name:10} accuracy {figures['accuracy']:.4f}  macro-F1 {figures['macro_f1']:.4f}  {figures['rows']} rows"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
