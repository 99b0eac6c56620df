"""Pretends to be train.py for the tests of sweeps, in milliseconds: evaluates every second step, pauses and resumes.

    pretended_run.py FOLDER SCORE UNTIL LOG

The score of step n is SCORE * n / 8; a score below 0 fails. Each start and each step is a line of LOG.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lib.errors import UserError
from lib.runtime.lock import FolderLock

STEPS = 8


def main(folder: Path, score: float, until: int, log: Path) -> int:
    try:
        FolderLock(folder).take()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seen = [int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*")]
    for step in range(max(seen, default=0) + 1, STEPS + 1):
        if score < 0 and step == 3:
            print("error: too little memory for this test", file=sys.stderr)
            return 2
        if step > until:
            return 75
        with log.open("a") as file:
            file.write(f"{folder.name} {step}\n")
        if step % 2 == 0:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "eval/accuracy": abs(score) * step / STEPS}) + "\n")
        time.sleep(0.01)
        (folder / "checkpoints" / f"step-{step}").mkdir(parents=True)
    draft = folder / f".{os.getpid()}"
    scores = {"eval/accuracy": score, "test/accuracy": score, "baselines/most frequent answer/accuracy": 0.05}
    draft.write_text(json.dumps({"steps": STEPS, "train_seconds": 1.0} | scores))
    draft.replace(folder / "results.json")
    return 0


if __name__ == "__main__":
    out, wanted, pause, lines = sys.argv[1:]
    sys.exit(main(Path(out), float(wanted), int(pause), Path(lines)))
