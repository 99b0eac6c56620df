"""Research ideas in ten lines: a copy of train.py with a changed loop runs on one and on two processes."""

import difflib
from pathlib import Path

import pytest

from tests.conftest import ROOT, Command, results_of
from tests.resuming import run_flags

Changes = list[tuple[str, str]]

R_DROP = [
    (
        """\
    logits = compute_logits(learner.model, micro_batch.inputs)
    losses = learner.objective.loss(logits, micro_batch.labels)
""",
        """\
    first, second = (compute_logits(learner.model, micro_batch.inputs) for _ in range(2))  # two masks of dropout
    losses = sum(learner.objective.loss(logits, micro_batch.labels) for logits in (first, second)) / 2
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    losses = losses + ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2  # KL(p, q) + KL(q, p)
""",
    )
]
"""Liang et al. 2021: two passes whose predictions should agree. Without dropout they do, and nothing changes."""

EMA = [
    ("import torch\n", "import torch\nfrom torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn\n"),
    (
        "    state = learner.state\n    with run.guard",
        """\
    state, inner = learner.state, learner.inner_model
    ema = AveragedModel(inner, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    with run.guard""",
    ),
    (
        "                train_step(learner, batch, config)\n",
        "                train_step(learner, batch, config)\n                ema.update_parameters(inner)\n",
    ),
    (
        "                    scores, _ = ",
        """\
                    trained = {name: tensor.clone() for name, tensor in inner.state_dict().items()}
                    inner.load_state_dict(ema.module.state_dict())
                    scores, _ = """,
    ),
    (
        "                        run.save_best(learner, tokenizer)\n",
        """\
                        run.save_best(learner, tokenizer)
                    inner.load_state_dict(trained)
""",
    ),
]
"""An exponential moving average of the weights is evaluated and exported. With a decay of 0 it is the weights."""


def changed_script(path: Path, changes: Changes, **constants: float) -> Path:
    """A copy of train.py with these changes, at most ten lines of them."""
    before = after = (ROOT / "train.py").read_text()
    for old, new in changes:
        assert after.count(old) == 1, old
        after = after.replace(old, new)
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    assert sum(line.startswith("+ ") for line in lines) <= 10
    for name, value in constants.items():
        after = after.replace(name, str(value))
    path.write_text(after)
    return path


@pytest.mark.parametrize(
    ("changes", "neutral", "effective"),
    [(R_DROP, {}, {}), pytest.param(EMA, {"DECAY": 0.0}, {"DECAY": 0.9}, marks=pytest.mark.slow)],
    ids=["R-Drop", "EMA"],
)
def test_loop_is_changed_in_ten_lines(
    run: Command, roberta: Path, roberta_without_dropout: Path, tmp_path: Path, changes, neutral, effective
) -> None:
    """A change without effect gives the results of train.py, on two processes as well; one with effect gives others."""

    def scores(script: object, name: str, model: Path, processes: int) -> dict[str, float]:
        env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        flags = [*run_flags(tmp_path, model), "--adam_epsilon", "1e-2", "--output_dir", tmp_path / name]
        found = results_of(run(script, *flags, processes=processes, env=env))
        assert found["run/num_processes"] == processes
        return {key: value for key, value in found.items() if key.startswith(("eval/", "test/"))}

    script = changed_script(tmp_path / "train.py", changes, **neutral)
    plain = scores("train.py", "plain", roberta_without_dropout, 1)
    assert scores(script, "neutral", roberta_without_dropout, 2) == pytest.approx(plain, abs=1e-5)
    script = changed_script(tmp_path / "train.py", changes, **effective)
    model = roberta if changes is R_DROP else roberta_without_dropout
    assert scores(script, "effective", model, 1)["test/loss"] != pytest.approx(plain["test/loss"], abs=1e-4)
