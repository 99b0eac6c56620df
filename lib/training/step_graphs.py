"""--cuda_graphs: the work of a whole step on a GPU is recorded once for each padded length, then replayed without Python.

StepGraphs   runs a step: eagerly, recorded or replayed
stretch      a micro-batch padded to a fixed shape
Recorder     PyTorch's CUDA graphs

Written from PyTorch's documentation ("CUDA Graphs", "Whole-network capture"); not yet run on a GPU. What surrounds the
recording itself runs on a CPU in the tests.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import nn

from lib.data.loader import MicroBatch, StepBatch
from lib.errors import UserError, first_line
from lib.model.masks import reads_ready_mask, with_ready_mask
from lib.model.sharding import is_sharded
from lib.runtime.memory import is_out_of_memory
from lib.runtime.seeds import seed_everything
from lib.runtime.watchdog import beat
from lib.training.plan import Plan
from lib.training.state import State

logger = logging.getLogger(__name__)

Update = Callable[[StepBatch], tuple[torch.Tensor, torch.Tensor]]
"""Changes the weights by one step on a batch; returns its summed loss and its gradient norm, on the device."""

OWN_MASK = "makes its own mask of attention, and that a recorded step makes the same one is not proven yet"
"""Why steps of other models than those of `reads_ready_mask` are not recorded: within a recording, transformers takes
another way there, without looking for padding."""

LENGTHS_PER_DOUBLING = 4
"""Lengths that are recorded between one and the double of it, for texts of more than 64 tokens; for others, multiples of 8."""


def recorded_length(length: int, longest: int) -> int:
    """`length` rounded up to one that is recorded: 8, 16, ..., 64, 80, 96, 112, 128, 160, ...; `longest` at most.

    11 lengths for texts of up to 112 tokens, 20 up to 512; in the mean, 10 % more positions.
    """
    step = max(8, 2 ** ((length - 1).bit_length() - 1) // LENGTHS_PER_DOUBLING)
    return max(length, min(-(-length // step) * step, longest))


def stretch(micro_batch: MicroBatch, rows: int, length: int, pad_token_id: int) -> MicroBatch:
    """The same samples in the shape (rows, length): with padding on the right, and copies of the first one of weight 0.

    A row of padding alone would have no token to read, and a loss that is not finite.
    """
    width, missing = micro_batch.inputs["input_ids"].shape[1], rows - len(micro_batch)

    def longer(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim != 2 or tensor.shape[1] != width:
            return tensor
        return nn.functional.pad(tensor, (0, length - width), value=pad_token_id if name == "input_ids" else 0)

    def more(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])])

    inputs = {name: more(longer(name, tensor)) for name, tensor in micro_batch.inputs.items()}
    weights = nn.functional.pad(micro_batch.weights, (0, missing))
    return MicroBatch(inputs, more(micro_batch.labels), weights)


class Recorder:
    """Records work of a GPU once, to be repeated without the Python code that asked for it.

    All recordings share one pool of memory: none reads what another one left there, so that they may be repeated in any
    order. Warm-up and recording take the same side stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.cuda.default_generators[device.index or 0]
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do the work on the side stream, where libraries make what they keep before anything is recorded."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work without doing it; what is returned does it, with random numbers of the generator's seed then.

        Raises the first error of `work`. Its cause is the error of the recording's end, if that failed as well: then this
        process cannot go on with the GPU. The current stream is that of before in any case.
        """
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        first: Exception | None = None
        try:
            # Other threads, which pin batches or write checkpoints, may ask the driver for memory meanwhile. Where its end
            # fails, `torch.cuda.graph` leaves its stream the current one.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
            ):
                try:
                    work()
                except Exception as error:
                    first = error
                    raise
        except Exception as error:
            if first is None or first is error:
                raise
            raise first from error  # after a forbidden call the end says only that the recording is void
        return graph.replay


class StepGraphs:
    """Runs the steps of a learner; with `--cuda_graphs` each is padded to a recorded length, and replayed.

    Of each length, the first step is made as always, but in the fixed shape and on the side stream; the second is recorded,
    then replayed. What a recording reads or writes keeps its place in memory: weights and moments, the tensors of the
    batch, learning rates, loss and norm. What it cannot hold, `reason` says, or a step is made as always. Where memory is too
    short to record a length, all its steps are made as the first one, so that no number changes.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any, plan: Plan) -> None:
        self.accelerator, self.model, self.plan = accelerator, model, plan
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.rows = min(plan.config.train_batch_size, len(plan.lengths))
        self.longest = int(plan.lengths.max(initial=1))
        self.reason = self.find_reason() if plan.config.cuda_graphs else ""
        """Why no step can be recorded; empty where nothing is in the way."""
        self.batches: dict[int, StepBatch] = {}
        """By length, the tensors that the steps of that length read."""
        self.replays: dict[int, Callable[[], None] | None] = {}
        """By length, what replays a step; None: memory was too short to record it."""
        self.said_limit: int | None = None
        """The limit of positions that the log names."""
        self.recorder: Any = None
        self.recording = False
        """Whether a step is being recorded: it must not be tried again."""
        if self.records:
            self.recorder = Recorder(accelerator.device)
            self.pad_token_id = accelerator.unwrap_model(model).config.pad_token_id or 0
            self.rates = [torch.zeros((), device=accelerator.device) for _ in self.optimizer.param_groups]
            self.loss, self.norm = (torch.zeros((), device=accelerator.device) for _ in range(2))

    @property
    def records(self) -> bool:
        """Whether steps are recorded."""
        return self.plan.config.cuda_graphs and not self.reason

    def find_reason(self) -> str:
        """What of this run cannot be recorded, in words; empty if all of it can."""
        if self.accelerator.num_processes > 1 or is_sharded(self.model):
            return "several processes agree within each step"
        if self.accelerator.scaler is not None:
            return "the loss scale of fp16 is decided by the CPU"
        if self.plan.micro_batch_size < self.rows:
            return "a step has several micro-batches"
        if not reads_ready_mask(self.model):
            return f"this model {OWN_MASK}"
        return ""

    def describe(self, in_windows: bool) -> str:
        """What becomes of `--cuda_graphs`, in words; `in_windows`: long texts take several rows."""
        reason = self.reason or ("texts are divided into windows by the CPU" if in_windows else "")
        if reason:
            return f"none, every step is run by Python: {reason}"
        count = len(self.lengths())
        return f"one for each padded length that occurs, at most {count}; not yet tried on a GPU by this project"

    def lengths(self) -> list[int]:
        """The lengths that texts of this run are padded to, the shortest first."""
        return sorted({recorded_length(length, self.longest) for length in range(1, self.longest + 1)})

    def run(self, update: Update, batch: StepBatch, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed loss, gradient norm) of one step, by `update` itself or by a replay of what it did for this length."""
        micro_batches = batch.pieces(state.micro_batch_positions)
        length = self.length_of(micro_batches, state.micro_batch_positions)
        if length is None:
            return update(batch)
        beat(f"step {state.step + 1}")
        static = self.fill(micro_batches[0], length, batch.weight)
        # The address that `update` gives the dropout of its only micro-batch.
        seed = functools.partial(seed_everything, self.plan.config.seed, state.step, 0, self.accelerator.process_index)

        def work() -> None:
            loss, norm = update(static)
            self.loss.copy_(loss)
            self.norm.copy_(norm)

        if length in self.batches and length not in self.replays:
            seed()  # while it is recorded, a generator takes no other seed
            self.replays[length] = self.record(work, length)
        self.batches[length] = static
        replay = self.replays.get(length)
        if replay is None:
            with self.rates_on_device():
                self.recorder.warm_up(work)
            return self.loss, self.norm
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        seed()  # a replay draws by the seed that is set before it
        replay()
        return self.loss, self.norm

    def length_of(self, micro_batches: list[MicroBatch], positions: int | None) -> int | None:
        """The recorded length for a step of these micro-batches; None where the step is made as always.

        A limit of `positions`, of a lack of memory in this run or the one that it resumes, is logged with what it means here.
        """
        inputs = micro_batches[0].inputs
        if not self.records or "num_windows" in inputs:
            return None
        if "rows" in inputs and inputs["input_ids"].shape[1] > 1:  # of cached layers: known here for the first time
            self.reason = f"the part above the cached layers {OWN_MASK}"
            logger.warning("--cuda_graphs: %s", self.describe(in_windows=False))
            return None
        length = recorded_length(inputs["input_ids"].shape[1], self.longest)
        if len(micro_batches) == 1 and (positions is None or self.rows * length <= positions):
            return length
        if positions is not None and positions != self.said_limit:
            self.said_limit = positions
            fitting = [length for length in self.lengths() if self.rows * length <= positions]
            logger.warning(
                "--cuda_graphs: out of memory before, and at most %d positions (rows x padded length) fit in a forward: %s",
                positions,
                f"steps of texts of more than {fitting[-1]} tokens are run by Python"
                if fitting
                else "no step is recorded",
            )
        return None

    def fill(self, micro_batch: MicroBatch, length: int, weight: float) -> StepBatch:
        """The batch of this length, whose tensors now hold `micro_batch`; `weight` is that of the step."""
        moved = stretch(micro_batch.to(self.accelerator.device), self.rows, length, self.pad_token_id)
        inputs = with_ready_mask(self.model, moved.inputs, self.accelerator.mixed_precision)
        new = dataclasses.replace(moved, inputs=inputs)
        if length not in self.batches:
            divisor: Any = torch.full((), weight, device=self.accelerator.device)
            return StepBatch([new], self.rows, divisor)
        static = self.batches[length]
        (old,), divisor = static.micro_batches, static.weight
        for place, tensor in [
            *((old.inputs[name], tensor) for name, tensor in new.inputs.items()),
            (old.labels, new.labels),
            (old.weights, new.weights),
        ]:
            place.copy_(tensor)
        divisor.fill_(weight)
        return static

    def record(self, work: Callable[[], None], length: int) -> Callable[[], None] | None:
        """The replay of a step of this length; None where memory is too short for it, which is logged.

        Raises UserError if the step does what cannot be recorded.
        """
        self.recording = True
        try:
            with self.rates_on_device(capturable=True):
                return self.recorder.record(work)
        except (RuntimeError, MemoryError) as error:
            # With a cause, the recording could not be ended: the GPU would go on recording.
            if not is_out_of_memory(error) or error.__cause__ is not None:
                raise UserError(
                    f"--cuda_graphs: a step cannot be recorded: {first_line(error)}\nA recorded step may read no number of the "
                    "GPU (.item(), print, if). Leave --cuda_graphs out, and add --allow_changes to go on with this run"
                ) from error
        finally:
            self.recording = False
        self.optimizer.zero_grad()  # gradients lie where the recording would have put them, and hold no numbers
        clear_device_cache(garbage_collection=True)
        logger.warning(
            "--cuda_graphs: too little memory to record a step of %d texts of %d tokens: those steps are run by Python, at the "
            "same padding, and no number changes",
            self.rows,
            length,
        )
        return None

    @contextlib.contextmanager
    def rates_on_device(self, capturable: bool = False) -> Iterator[None]:
        """Within, the optimizer reads its learning rates from the device, where a replay finds those of its step."""
        groups = self.optimizer.param_groups
        before = [{key: group[key] for key in ("lr", "capturable")} for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            rate.fill_(group["lr"])
            group.update(lr=rate, capturable=capturable)
        try:
            yield
        finally:
            for group, values in zip(groups, before, strict=True):
                group.update(values)
