"""--cuda_graphs without a GPU: lengths and fixed tensors are those of a GPU, and a tape on a CPU stands in for its graphs."""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from lib.config.cli import parse
from lib.config.sections import DataConfig, ModelConfig
from lib.config.train import OptimConfig, TrainConfig, TrainingConfig
from lib.data.loader import StepBatch
from lib.errors import UserError
from lib.runtime.cpu.kernels import use_cpu_kernels
from lib.training import step, step_graphs
from lib.training.step_graphs import recorded_length, stretch
from tests.conftest import read_lines, sentences, write_csv
from tests.stepping import Experiment, build_experiment
from tests.tiny_models import any_classifier

READS = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal"}
"""Operations that give a number, or a shape, to Python: a GPU is waited for."""


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """Stands in for `Recorder` on a CPU: repeats the operations on the memory that they had, without the Python code.

    As on a GPU, recording changes nothing, numbers that Python had then are fixed, and reading one of the device fails.
    """

    def __init__(self, _: torch.device) -> None:
        super().__init__()
        self.operations: list[Any] = []
        self.own: set[int] = set()
        """The memory of results of operations of this recording, which keeps them."""
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []
        """What others own and an operation changed, and its values before."""
        self.names: set[str] = set()
        self.recordings = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        self.names.add(name)
        if name in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        arguments = function._schema.arguments
        given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
        changed = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        for tensor in tensors_in(changed):
            if memory_of(tensor) not in self.own:
                self.before.append((tensor, tensor.detach().clone()))
        given_memory = set(map(memory_of, tensors_in([*args, *kwargs.values()])))
        made = tensors_in(result := function(*args, **kwargs))
        self.own |= set(map(memory_of, made)) - given_memory
        self.operations.append((function, args, kwargs, made))
        return result

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        self.operations, self.own, self.before = [], set(), []
        try:
            with self:
                work()
        finally:
            with torch.no_grad():
                for tensor, values in reversed(self.before):
                    tensor.copy_(values)
        return functools.partial(self.replay, self.operations)

    def replay(self, operations: list[Any]) -> None:
        with torch.no_grad():
            for function, args, kwargs, made in operations:
                for place, tensor in zip(made, tensors_in(function(*args, **kwargs)), strict=True):
                    if place.data_ptr() != tensor.data_ptr():
                        place.copy_(tensor)


class Called:
    """Stands in for `Recorder` by calling the Python code again."""

    def __init__(self, _: torch.device) -> None:
        self.recordings = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        return work


@pytest.fixture(params=[Called, Tape])
def recorder(request, monkeypatch: pytest.MonkeyPatch) -> type:
    """What stands in for CUDA graphs; the norm of gradients is computed as on a GPU."""
    monkeypatch.setattr(step_graphs, "Recorder", request.param)
    monkeypatch.setattr(step, "gradient_norm", nn.utils.get_total_norm)
    use_cpu_kernels(False)
    return request.param


def experiment_of(model: Path, folder: Path, samples: int = 45, **settings: Any) -> Experiment:
    """Steps of 8 samples, the last one of an epoch shorter; texts of 5 to 40 tokens."""
    rows = [
        (" ".join([text] * (1 + 5 * (n % 9 == 0) + n % 4)), label) for n, (text, label) in enumerate(sentences(samples))
    ]
    files = {f"{role}_file": str(write_csv(folder / f"{role}.csv", rows)) for role in ("train", "validation")}
    training = TrainingConfig(**{"train_batch_size": 8, "num_train_epochs": 4, "cuda_graphs": True} | settings)
    optim = OptimConfig(learning_rate=1e-3, adam_epsilon=1e-3)
    config = TrainConfig(ModelConfig(str(model)), DataConfig(**files), optim, training=training)
    return build_experiment(config, Accelerator(cpu=True))


def weights(experiment: Experiment) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in experiment.learner.model.parameters()]).clone()


def lengths_of(experiment: Experiment) -> list[int]:
    """The padded length of each step's batch."""
    batches = experiment.plan.step_batches(experiment.batches)
    return [batch.micro_batches[0].inputs["input_ids"].shape[1] for batch in batches]


def eager_steps(experiment: Experiment) -> list[tuple[float, float]]:
    """(loss, gradient norm) of all steps, without graphs, on the batches in the shapes that graphs pad them to."""
    found, longest = [], int(experiment.plan.lengths.max())
    for batch in experiment.plan.step_batches(experiment.batches):
        (micro,) = batch.micro_batches
        length = recorded_length(micro.inputs["input_ids"].shape[1], longest)
        stretched = stretch(micro, 8, length, experiment.learner.inner_model.config.pad_token_id)
        found.append(experiment.step(StepBatch([stretched], batch.num_samples, batch.weight)))
    return found


def test_losses_and_weights_equal_those_of_eager_steps_at_the_same_padding(recorder, roberta, tmp_path):
    """With dropout: a replay draws what the step draws by its own seed, and has its learning rate."""
    eager = experiment_of(roberta, tmp_path, cuda_graphs=False)
    wanted = eager_steps(eager)
    assert len(wanted) == 24
    assert sum(batch.num_samples < 8 for batch in eager.plan.step_batches(eager.batches)) == 4

    graphed = experiment_of(roberta, tmp_path)
    found = graphed.train()
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(weights(graphed), weights(eager), atol=1e-6, rtol=0)

    graphs = graphed.learner.graphs
    occurring = {recorded_length(length, graphs.longest) for length in lengths_of(graphed)}
    assert len(occurring) >= 3
    assert graphs.batches.keys() == occurring
    assert graphs.recorder.recordings == len(graphs.replays) <= len(occurring)
    for length, batch in graphs.batches.items():
        assert batch.micro_batches[0].inputs["input_ids"].shape == (8, length)


def test_padding_and_filled_rows_change_nothing_without_dropout(recorder, roberta_without_dropout, tmp_path):
    plain = experiment_of(roberta_without_dropout, tmp_path, cuda_graphs=False)
    wanted = plain.train()
    graphed = experiment_of(roberta_without_dropout, tmp_path)
    torch.testing.assert_close(torch.tensor(graphed.train()), torch.tensor(wanted), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights(graphed), weights(plain), atol=1e-5, rtol=0)


def test_tape_finds_what_a_graph_would_repeat(monkeypatch, roberta, tmp_path):
    """The stand-in is as strict as a GPU: without the seed, or the rates of each step, losses or weights differ."""
    monkeypatch.setattr(step_graphs, "Recorder", Tape)
    monkeypatch.setattr(step, "gradient_norm", nn.utils.get_total_norm)
    use_cpu_kernels(False)
    right = experiment_of(roberta, tmp_path)
    losses = right.train()
    for name, broken in [
        ("seed_everything", lambda *key: None),
        ("StepGraphs.rates_on_device", lambda self, capturable=False: __import__("contextlib").nullcontext()),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(f"lib.training.step_graphs.{name}", broken)
            wrong = experiment_of(roberta, tmp_path)
            others = wrong.train()
        assert not torch.allclose(weights(wrong), weights(right), atol=1e-6), name
        assert others != losses, name


def test_same_step_replays_the_same_numbers_and_another_step_others(recorder, roberta, tmp_path):
    experiment = experiment_of(roberta, tmp_path)
    batch = next(iter(experiment.plan.step_batches(experiment.batches)))
    learner = experiment.learner
    for _ in range(2):  # warmed up, then recorded
        experiment.step(batch)
    update = functools.partial(train.update_weights, learner, experiment.config)
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    losses = []
    for number in (7, 7, 8):
        learner.model.load_state_dict(before)
        learner.state.step = number
        losses.append(learner.graphs.run(update, batch, learner.state)[0].item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_recorded_step_reads_nothing_and_its_tensors_stay_where_they_are(kind, implementation, monkeypatch, tmp_path):
    """The tape raises where a step reads a number; from one step to the next, only values change."""
    monkeypatch.setattr(step_graphs, "Recorder", Tape)
    monkeypatch.setattr(step, "gradient_norm", nn.utils.get_total_norm)
    use_cpu_kernels(False)
    folder = any_classifier(kind, tmp_path / "model")
    experiment = experiment_of(folder, tmp_path, num_train_epochs=2)
    learner = experiment.learner
    learner.inner_model.config._attn_implementation = implementation
    places: dict[int, list[int]] = {}
    for batch in experiment.plan.step_batches(experiment.batches):
        experiment.step(batch)
        for length, static in learner.graphs.batches.items():
            (micro,) = static.micro_batches
            tensors = [*micro.inputs.values(), micro.labels, micro.weights, static.weight]
            tensors += [*learner.graphs.rates, learner.graphs.loss, learner.graphs.norm, *learner.model.parameters()]
            now = [tensor.data_ptr() for tensor in tensors]
            assert places.setdefault(length, now) == now
    assert learner.graphs.recorder.recordings >= 2
    assert "_fused_adamw_" in learner.graphs.recorder.names
    assert all(type(group["lr"]) is float for group in learner.optimizer.optimizer.param_groups)


def fail_while_recording(monkeypatch, learner, fail: Callable[[torch.Tensor], None], longest: int = 0) -> None:
    """Have `fail` called with the loss of each micro-batch of `longest` tokens or more that is being recorded."""
    original = train.forward_backward

    def forward_backward(learner, micro_batch, *arguments):
        loss = original(learner, micro_batch, *arguments)
        if learner.graphs.recording and micro_batch.inputs["input_ids"].shape[1] >= longest:
            fail(loss)
        return loss

    monkeypatch.setattr(train, "forward_backward", forward_backward)


def no_memory(_: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_end(_: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory") from RuntimeError("operation failed due to a previous error")


@pytest.mark.parametrize("fail", [torch.Tensor.item, no_end])
def test_step_that_cannot_be_recorded_ends_the_run_with_the_reason(fail, monkeypatch, roberta, tmp_path):
    """Also where memory was too short and the recording could not be ended."""
    monkeypatch.setattr(step_graphs, "Recorder", Tape)
    monkeypatch.setattr(step, "gradient_norm", nn.utils.get_total_norm)
    experiment = experiment_of(roberta, tmp_path)
    fail_while_recording(monkeypatch, experiment.learner, fail)
    advice = r"Leave --cuda_graphs out, and add --allow_changes to go on with this run"
    with pytest.raises(UserError, match=rf"--cuda_graphs: a step cannot be recorded.*\n.*{advice}"):
        experiment.train()
    assert experiment.learner.state.micro_batch_positions is None
    assert not experiment.learner.graphs.recording


@pytest.mark.parametrize("longest", [0, 24])
def test_length_that_memory_is_too_short_to_record_is_run_by_python_with_equal_numbers(
    longest, monkeypatch, caplog, roberta, tmp_path
):
    """With dropout, and a line for each such length; the others are replayed."""
    monkeypatch.setattr(step_graphs, "Recorder", Tape)
    monkeypatch.setattr(step, "gradient_norm", nn.utils.get_total_norm)
    use_cpu_kernels(False)
    eager = experiment_of(roberta, tmp_path, cuda_graphs=False)
    wanted = eager_steps(eager)
    graphed = experiment_of(roberta, tmp_path)
    learner = graphed.learner
    fail_while_recording(monkeypatch, learner, no_memory, longest)
    original, shapes = train.compute_logits, []

    def compute_logits(model, inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        return original(model, inputs)

    monkeypatch.setattr(train, "compute_logits", compute_logits)
    found = graphed.train()
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(weights(graphed), weights(eager), atol=1e-6, rtol=0)
    graphs = learner.graphs
    failed = {length for length, replay in graphs.replays.items() if replay is None}
    assert failed == {length for length in graphs.replays if length >= longest}
    assert bool(failed)
    assert longest == 0 or failed < graphs.replays.keys()
    assert {rows for rows, _ in shapes} == {8}
    assert {length for _, length in shapes} == graphs.batches.keys()
    said = [record.getMessage() for record in caplog.records if "too little memory to record" in record.getMessage()]
    assert len(said) == len(failed) == len({line for line in said if "8 texts of" in line})
    assert learner.state.micro_batch_positions is None
    assert all(p.grad is None for p in learner.model.parameters())


def test_first_error_of_a_recording_is_raised_and_the_stream_is_that_of_before(monkeypatch):
    """Its end fails after a call that is not allowed, and leaves its own stream the current one."""
    streams = ["current"]

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            self.before = streams[-1]
            streams.append(self.name)

        def __exit__(self, *_: Any) -> None:
            streams.append(self.before)

    class Recording(Stream):
        def __init__(self, graph: Any, pool: Any, stream: str, **_: Any) -> None:
            super().__init__(stream)

        def __exit__(self, *error: Any) -> None:
            if error[0] is not None:
                raise RuntimeError("operation failed due to a previous error during capture")
            super().__exit__()

    class Graph:
        def register_generator_state(self, _: Any) -> None:
            pass

        def replay(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    recorder = step_graphs.Recorder.__new__(step_graphs.Recorder)
    recorder.generator, recorder.pool, recorder.stream = (None, None, "side")

    def work() -> None:
        assert streams[-1] == "side"
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted") as raised:
        recorder.record(work)
    assert "previous error" in str(raised.value.__cause__)
    assert streams[-1] == "current"
    recorder.record(lambda: None)()
    assert streams[-1] == "current"


def test_step_that_does_not_fit_in_memory_is_made_in_smaller_micro_batches_from_then_on(
    monkeypatch, caplog, roberta, tmp_path
):
    monkeypatch.setattr(step_graphs, "Recorder", Called)
    experiment = experiment_of(roberta, tmp_path, num_train_epochs=2)
    original, shapes = train.compute_logits, []

    def limited(model, inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        if inputs["input_ids"].numel() > 8 * 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(model, inputs)

    monkeypatch.setattr(train, "compute_logits", limited)
    found = experiment.train()
    assert len(found) == 12
    assert all(rows * length <= 8 * 16 for rows, length in shapes[-4:])
    state, graphs = experiment.learner.state, experiment.learner.graphs
    assert state.micro_batch_positions is not None
    assert all(8 * length <= state.micro_batch_positions for length in graphs.replays)
    long = next(batch for batch in experiment.plan.step_batches(experiment.batches)).micro_batches[0]
    few = [stretch(long, 8, 24, 1).split(48)[0]]  # it fits, but not once it is filled with rows
    assert graphs.length_of(few, few[0].positions) is None
    assert graphs.length_of(few, 8 * few[0].inputs["input_ids"].shape[1]) is not None
    said = [record.getMessage() for record in caplog.records if "--cuda_graphs" in record.getMessage()]
    assert len(said) == len(set(said)) == 2  # of the run's limit, and of the other one
    longest = max(length for length in graphs.lengths() if 8 * length <= state.micro_batch_positions)
    assert f"at most {state.micro_batch_positions} positions" in said[0]
    assert f"steps of texts of more than {longest} tokens" in said[0]


def test_limit_of_a_resumed_run_that_leaves_nothing_to_record_is_said_once(monkeypatch, caplog, roberta, tmp_path):
    monkeypatch.setattr(step_graphs, "Recorder", Called)
    experiment = experiment_of(roberta, tmp_path, num_train_epochs=1)
    experiment.learner.state.micro_batch_positions = 63  # as from a checkpoint
    experiment.train()
    assert not experiment.learner.graphs.batches
    said = [record.getMessage() for record in caplog.records if "--cuda_graphs" in record.getMessage()]
    assert len(said) == 1
    assert "at most 63 positions" in said[0]
    assert "no step is recorded" in said[0]


def test_lengths_are_near():
    for length in range(1, 513):
        found = recorded_length(length, 512)
        assert length <= found < length + max(8, length / 4 + 1)
        assert found % 8 == 0
        assert recorded_length(found, 512) == found
        assert recorded_length(length, 100) == (min(found, 100) if length <= 100 else length)


def test_few_lengths_cover_all_texts():
    assert len({recorded_length(length, 112) for length in range(1, 113)}) == 11
    assert len({recorded_length(length, 512) for length in range(1, 513)}) == 20


def test_what_cannot_be_recorded_is_said_and_runs_as_without_the_flag(monkeypatch, roberta, tmp_path):
    monkeypatch.setattr(step_graphs, "Recorder", Called)
    several = experiment_of(roberta, tmp_path, per_device_train_batch_size=3)
    assert "several micro-batches" in several.learner.graphs.describe(in_windows=False)
    several.train()
    assert not several.learner.graphs.batches

    modern = experiment_of(any_classifier("modernbert", tmp_path / "modern"), tmp_path)
    assert "makes its own mask of attention" in modern.learner.graphs.describe(in_windows=False)

    plain = experiment_of(roberta, tmp_path)
    assert "one for each padded length" in plain.learner.graphs.describe(in_windows=False)
    assert "windows" in plain.learner.graphs.describe(in_windows=True)
    accelerator = plain.learner.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu")
    assert "fp16" in dataclasses.replace(plain.learner).graphs.describe(in_windows=False)
    accelerator.scaler = None
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    assert "several processes" in plain.learner.graphs.find_reason()


def test_without_the_flag_nothing_is_padded_or_kept(roberta, tmp_path):
    experiment = experiment_of(roberta, tmp_path, cuda_graphs=False, num_train_epochs=1)
    experiment.train()
    graphs = experiment.learner.graphs
    assert (graphs.records, graphs.recorder, graphs.batches, graphs.replays) == (False, None, {}, {})


def test_flag_is_refused_without_a_gpu(run, roberta, tmp_path):
    write_csv(tmp_path / "train.csv", sentences(16))
    flags = ["--model", roberta, "--train_file", "train.csv", "--report_to", "none", "--cuda_graphs"]
    done = run("train.py", *flags, code=2)
    assert "--cuda_graphs records work of a GPU, and none is used here; leave it out" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("other", ["--compile", "--gradient_checkpointing", "--load_in 8bit --adapter lora"])
def test_flag_is_refused_beside_what_cannot_be_recorded(other):
    with pytest.raises(UserError, match=rf"--cuda_graphs .*{other.split()[0]}$"):
        parse(TrainConfig, ["--cuda_graphs", *other.split()])


def test_resumed_run_is_equal_bit_by_bit(recorder, call, monkeypatch, roberta, tmp_path):
    """The script itself, resumed after some steps: it records anew, and goes on as if it had never stopped."""
    monkeypatch.setattr("lib.runtime.accelerator.check_graphs", lambda _: None)
    rows = [(" ".join([text] * (1 + n % 5)), label) for n, (text, label) in enumerate(sentences(44))]
    write_csv(tmp_path / "train.csv", rows)
    words = "--bs 8 --epochs 4 --lr 1e-3 --report_to none --save_steps 13 --save_total_limit 9 --logging_steps 1"
    words += " --cuda_graphs --mixed_precision no --cpu_kernels False"
    flags = ("--model", roberta, "--train_file", "train.csv", *words.split())
    done = call("train.py", *flags, "--output_dir", "whole")
    assert "one for each padded length that occurs" in done.stdout
    copy = tmp_path / "resumed" / "checkpoints" / "step-13"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-13", copy)
    call("train.py", *flags, "--output_dir", "resumed")
    losses = [
        [line["train/loss"] for line in read_lines(tmp_path / n / "metrics.jsonl") if "train/loss" in line]
        for n in ("whole", "resumed")
    ]
    assert (len(losses[0]), len(losses[1])) == (20, 7)
    assert losses[0][13:] == losses[1]
    whole, resumed = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed


@pytest.mark.parametrize("frozen", ["backbone", "1"])
def test_head_on_cached_features_is_recorded_and_layers_above_cached_ones_are_not(
    frozen, recorder, call, monkeypatch, roberta_without_dropout, tmp_path
):
    monkeypatch.setattr("lib.runtime.accelerator.check_graphs", lambda _: None)
    write_csv(tmp_path / "train.csv", sentences(44))
    flags = ("--model", roberta_without_dropout, "--train_file", "train.csv", "--bs", 8, "--epochs", 3, "--lr", 1e-3)
    flags += ("--freeze", frozen, "--report_to", "none", "--logging_steps", 1, "--mixed_precision", "no")
    flags += ("--cpu_kernels", "False")
    losses = []
    for name, more in (("plain", ()), ("graphs", ("--cuda_graphs",))):
        done = call("train.py", *flags, *more, "--output_dir", name)
        assert ("the part above the cached layers makes its own mask" in done.stderr) == (
            frozen == "1" and name == "graphs"
        )
        losses.append(
            [line["train/loss"] for line in read_lines(tmp_path / name / "metrics.jsonl") if "train/loss" in line]
        )
    assert len(losses[0]) == 15
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
