"""Seconds to the first step with few and with many rows: at the first start, and at a second one with prepared data.

    python benchmarks/start.py                               1,000 and 1,000,000 rows, three times each
    python benchmarks/start.py --rows 1000 200000 --repeats 5

Each start is a process of its own, `python train.py --train_file FILE`, from its begin until the first line of
metrics.jsonl; then it is killed. The validation split is held out by the script. The tokenizer's own time is that of its
backend, which encodes the same texts on all cores and keeps nothing. Times are medians with the smallest and the largest.
"""

import argparse
import csv
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from lib.config.sections import ModelConfig  # noqa: E402
from lib.data.sources import load_movie_reviews  # noqa: E402
from lib.evaluation.tables import format_table  # noqa: E402
from lib.model.load import load_tokenizer  # noqa: E402

CHUNK = 4000
MAX_LENGTH = 128
"""The default of --max_length."""


def write_rows(path: Path, rows: int) -> None:
    """A csv file of random passages of 5 to 36 words from the movie reviews, with one of three labels: 125 bytes a row."""
    words = " ".join(
        itertools.chain.from_iterable(split["text"] for split in load_movie_reviews("five").values())
    ).split()
    draw = np.random.default_rng(0)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        for start, size, label in draw.integers((0, 5, 0), (len(words) - 40, 37, 3), (rows, 3)):
            writer.writerow((" ".join(words[start : start + size]), ("bad", "fair", "good")[label]))


def first_step(file: Path, folder: Path) -> tuple[float, float]:
    """Seconds until the first step of a new run is logged, and the peak of resident memory in GiB."""
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable,
        "train.py",
        "--train_file",
        str(file),
        "--output_dir",
        str(output),
        "--logging_steps",
        "1",
    ]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
    started = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        metrics = output / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        if process.poll() is not None:
            raise SystemExit(f"train.py ended before its first step:\n{(folder / 'log.txt').read_text()}")
        process.send_signal(signal.SIGKILL)
        usage = os.wait4(process.pid, 0)[2]
    return seconds, usage.ru_maxrss / 2**20


def tokenizer_seconds(file: Path) -> float:
    """Seconds that the tokenizer's backend takes for the texts of `file` on all cores."""
    tokenizer = load_tokenizer(ModelConfig())
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(MAX_LENGTH)
    seconds = 0.0
    with file.open(encoding="utf-8", newline="") as opened:
        texts = (row["text"] for row in csv.DictReader(opened))
        while chunk := list(itertools.islice(texts, CHUNK)):
            started = time.perf_counter()
            backend.encode_batch(chunk)
            seconds += time.perf_counter() - started
    return seconds


def spread(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "start")
    options = parser.parse_args()
    table = [
        ["rows", "first start (s)", "second start (s)", "tokenizer alone (s)", "peak first (GiB)", "peak second (GiB)"]
    ]
    first: dict[int, list[float]] = {}
    second: dict[int, list[float]] = {}
    alone: dict[int, list[float]] = {}
    for rows in options.rows:
        folder = options.folder / str(rows)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "train.csv"
        if not file.exists():
            write_rows(file, rows)
        measured = []
        for _ in range(options.repeats):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            measured.append((*first_step(file, folder), *first_step(file, folder)))
        first[rows], first_peak, second[rows], second_peak = (list(values) for values in zip(*measured, strict=True))
        alone[rows] = [tokenizer_seconds(file) for _ in range(options.repeats)]
        times = [spread(values) for values in (first[rows], second[rows], alone[rows])]
        table.append([f"{rows:,}", *times, spread(first_peak, 2), spread(second_peak, 2)])
    print(format_table(table))
    few, many = options.rows[0], options.rows[-1]
    ratio = statistics.median(second[many]) / statistics.median(second[few])
    added = statistics.median(first[many]) - statistics.median(first[few])
    cores = len(os.sched_getaffinity(0))
    print(f"second start, {many:,} rows to {few:,}: {ratio:.2f}")
    print(
        f"first start, what {many:,} rows add to the tokenizer's own time: {added / statistics.median(alone[many]):.2f}"
    )
    print(f"{cores} cores, n = {options.repeats}; median (smallest to largest)")


if __name__ == "__main__":
    main()
