"""Train with several seeds, and set mean and spread beside the majority class and TF-IDF with logistic regression.

    python benchmarks/seeds.py                                   seeds 0 1 2 of the default run
    python benchmarks/seeds.py --seeds 0 1 2 3 4 -- --lr 1e-4    any flags of train.py after --

Runs that are finished already are read, not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.config.cli import parse_cli  # noqa: E402
from lib.config.train import TrainConfig  # noqa: E402
from lib.data.load import Data, load_data  # noqa: E402
from lib.evaluation.report import row_texts  # noqa: E402
from lib.evaluation.tables import format_table  # noqa: E402
from lib.model.load import load_tokenizer  # noqa: E402
from lib.run.record import run_folder  # noqa: E402


def baselines(data: Data) -> dict[str, float]:
    """Test accuracy of the majority class, and of logistic regression on TF-IDF of words and word pairs.

    The regularisation is chosen on the validation split.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts = {
        split: [" ".join(t) if isinstance(t, list) else t for t in row_texts(data.texts[split])] for split in data.texts
    }
    labels = {split: list(tokens["labels"]) for split, tokens in data.tokens.items()}
    majority = Counter(labels["train"]).most_common(1)[0][0]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit(texts["train"])
    features = {split: vectorizer.transform(texts[split]) for split in texts}
    models = [LogisticRegression(C=c, max_iter=2000).fit(features["train"], labels["train"]) for c in (0.3, 1, 3, 10)]
    best = max(models, key=lambda model: model.score(features["validation"], labels["validation"]))
    return {
        "majority class": sum(label == majority for label in labels["test"]) / len(labels["test"]),
        "TF-IDF + logistic regression": best.score(features["test"], labels["test"]),
    }


def train(seed: int, flags: list[str]) -> dict:
    """Results of one run, through the real command."""
    arguments = [*flags, "--seed", str(seed)]
    results = run_folder(parse_cli(TrainConfig, arguments)) / "results.json"
    if not results.exists():
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(ROOT / "train.py")]
        subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)
    return json.loads(results.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("flags", nargs="*", help="flags of train.py, after --")
    options = parser.parse_args()
    runs = [train(seed, options.flags) for seed in options.seeds]
    config = parse_cli(TrainConfig, options.flags)
    rows = [["", "validation accuracy", "test accuracy", "test f1_macro", "minutes of training"]]
    for seed, run in zip(options.seeds, runs, strict=True):
        scores = [f"{run[key]:.4f}" for key in ("eval/accuracy", "test/accuracy", "test/f1_macro")]
        rows.append([f"seed {seed}", *scores, f"{run['train_seconds'] / 60:.1f}"])
    if len(runs) > 1:
        columns = [[run[key] for run in runs] for key in ("eval/accuracy", "test/accuracy", "test/f1_macro")]
        spread = [f"{statistics.mean(column):.4f} ± {statistics.stdev(column):.4f}" for column in columns]
        rows.append(["mean ± standard deviation", *spread, ""])
    for name, accuracy in baselines(load_data(config.data, load_tokenizer(config.model))).items():
        rows.append([name, "", f"{accuracy:.4f}", "", ""])
    print(format_table(rows))
    print(f"{runs[0]['run/device']}, precision {runs[0]['run/mixed_precision']}, n = {len(runs)} seeds")


if __name__ == "__main__":
    main()
