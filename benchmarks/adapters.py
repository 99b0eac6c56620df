"""Full fine-tuning, a head alone, and adapters on the same data: accuracy, trained share, size on disk, time.

    python benchmarks/adapters.py                                         five methods, seeds 0 1 2, minilm + movie_reviews
    python benchmarks/adapters.py --methods lora pfeiffer --seeds 0 1
    python benchmarks/adapters.py -- --max_train_samples 2000             any flags of train.py after --

Each method has its own learning rate, as each needs another; all else is the same. Runs that are finished already are
read, not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib.evaluation.tables import format_table  # noqa: E402

METHODS = {
    "full": ["--lr", "5e-5"],
    "head": ["--freeze", "backbone", "--lr", "5e-2"],
    "pfeiffer": ["--adapter", "bottleneck", "--adapter_placement", "pfeiffer", "--lr", "1e-3"],
    "houlsby": ["--adapter", "bottleneck", "--adapter_placement", "houlsby", "--lr", "1e-3"],
    "lora": ["--adapter", "lora", "--lr", "1e-3"],
}
SHARED = ["--dataset", "movie_reviews", "--dataset_config", "binary", "--report_to", "none"]
WEIGHTS = (".safetensors", ".bin")


def train(method: str, seed: int, folder: Path, flags: list[str]) -> dict:
    """Results of one run through the real command, with the size of the weights it left in MB (10^6 bytes)."""
    out = folder / f"{method}-s{seed}"
    if not (out / "results.json").exists():
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(ROOT / "train.py")]
        settings = [*SHARED, *METHODS[method], *flags, "--seed", str(seed), "--output_dir", str(out)]
        subprocess.run([*command, *settings], check=True, stdout=subprocess.DEVNULL)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    sizes = [path.stat().st_size for path in (out / "model").iterdir() if path.suffix in WEIGHTS]
    return results | {"megabytes": sum(sizes) / 1e6}


def row(method: str, runs: list[dict]) -> list[str]:
    """One line of the table: mean and, of two seeds or more, standard deviation of each number."""
    share = runs[0]["run/trainable_parameters"] / runs[0]["run/parameters"]
    rate = METHODS[method][METHODS[method].index("--lr") + 1]
    return [
        method,
        rate,
        mean_and_spread([run["eval/accuracy"] for run in runs], 4),
        mean_and_spread([run["test/accuracy"] for run in runs], 4),
        f"{share:.3%}",
        f"{runs[0]['megabytes']:.2f}",
        mean_and_spread([run["train_seconds"] for run in runs], 0),
        str(len(runs)),
    ]


def mean_and_spread(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("outputs/adapters"), help="where the runs go")
    parser.add_argument("flags", nargs="*", help="flags of train.py, after --")
    options = parser.parse_args()
    runs: dict[str, list[dict]] = {method: [] for method in options.methods}
    for seed in options.seeds:  # seed by seed, so that a table cut short compares all methods
        for method in options.methods:
            runs[method].append(train(method, seed, options.folder, options.flags))
    header = ["method", "learning rate", "validation accuracy", "test accuracy", "trained", "MB", "seconds", "seeds"]
    print(format_table([header, *(row(method, runs[method]) for method in options.methods)]))
    first = runs[options.methods[0]][0]
    print(
        f"{first['run/device']}, precision {first['run/mixed_precision']}; flags: {' '.join(options.flags) or 'none'}"
    )


if __name__ == "__main__":
    main()
