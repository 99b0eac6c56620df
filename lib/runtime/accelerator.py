"""The accelerator of a process, after checks of the launch; the devices and their memory in words."""

import itertools
import logging
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, patch_environment

from lib.errors import UserError
from lib.runtime.attention import check_attention, choose_kernels
from lib.runtime.cpu.kernels import use_cpu_kernels
from lib.runtime.cpu.tuning import tune_cpu
from lib.runtime.determinism import request_determinism
from lib.runtime.device_options import DeviceOptions
from lib.runtime.launch_checks import check_device, check_launch, read_sharding, truth
from lib.runtime.launcher import asks_for_gpu
from lib.runtime.network import is_launched
from lib.runtime.precision import resolve_precision, use_tf32, uses_gpu
from lib.runtime.processes import PROCESS_TIMEOUT, is_alone, join
from lib.runtime.signals import follow_launcher
from lib.runtime.startup import quiet_libraries

logger = logging.getLogger(__name__)


def build_accelerator(
    options: DeviceOptions, log_with: str = "none", folder: Path | None = None, shards: bool = False
) -> Accelerator:
    """The accelerator of this process, after checks that the launch is what the user asked for.

    `log_with` is the tracker and `folder` the place for its files; `shards`: the script can spread a model over processes,
    as `read_sharding` says. Gradient accumulation stays with the training loop, which
    knows the samples of a whole step. Raises UserError if the launcher was told what is not followed here, if GPUs were
    asked for and none is visible, if processes outnumber GPUs, if attention cannot be computed as asked, if each process
    believes it is alone, or if a process does not come.
    """
    follow_launcher()
    notes = check_launch(shards)
    notes_of_one = check_devices()
    tune_cpu()
    request_determinism(options.deterministic)
    precision, launchers = (
        resolve_precision(options.mixed_precision),
        os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
    )
    if launchers not in ("no", precision):
        notes.append(
            f"mixed precision is {precision}, by --mixed_precision or the run; {launchers} of the launcher is not used"
        )
    check_attention(options.attn_implementation, precision)
    check_graphs(options.cuda_graphs)
    if precision == "fp16" and read_sharding():
        raise UserError("FSDP and fp16 do not go together: shards know no loss scale; use --mixed_precision bf16 or no")
    if is_launched() and is_alone():
        join("nccl" if uses_gpu() else "gloo", options.join_timeout)
    # A model is spread by `shard_model`, on GPUs and CPUs alike: Accelerate's way averages gradients and forgets new heads.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # transformers would load nothing on other processes
    with patch_environment(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_PARALLELISM_CONFIG="false"):
        accelerator = Accelerator(
            mixed_precision=precision,
            project_dir=folder,
            log_with=None if log_with == "none" else log_with,
            step_scheduler_with_optimizer=False,
            # Else a number in the environment would divide the gradients.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
        )
    show_log(accelerator)
    notes += check_device(accelerator)
    for note in notes + (notes_of_one if accelerator.num_processes == 1 else []):
        logger.info(note)
    quiet_libraries()
    use_tf32(accelerator.device.type, accelerator.mixed_precision)
    choose_kernels(accelerator.device.type)
    use_cpu_kernels(options.cpu_kernels and accelerator.device.type == "cpu")
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != accelerator.num_processes:
        device = describe_devices(accelerator)[0]  # only here: asking a GPU for its memory makes a context on it
        raise UserError(
            f"{wanted} processes were launched, but each believes it is alone ({device}): they would write over each other. "
            "For several processes on a CPU: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes "
            f"{wanted} --main_process_port 0 ...; else launch one process, or make the GPUs visible."
        )
    return accelerator


def check_graphs(wanted: bool) -> None:
    """Raise UserError for `--cuda_graphs` where no GPU is used."""
    if wanted and not uses_gpu():
        raise UserError(
            "--cuda_graphs records work of a GPU, and none is used here; leave it out, or run where nvidia-smi shows a GPU"
        )


def check_devices() -> list[str]:
    """What a user should know about the GPUs of the launch, one line each.

    Raises UserError if environment or launcher ask for GPUs that PyTorch does not see, or for more processes than GPUs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if truth("ACCELERATE_USE_CPU"):
        return []
    if visible not in ("", "-1", "NoDevFiles") and not torch.cuda.is_available():
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} asks for GPUs, but PyTorch sees none; check nvidia-smi and that this PyTorch "
            f"({torch.__version__}) is built for CUDA, or unset the variable to train on the CPU"
        )
    local, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if not torch.cuda.is_available() and not torch.accelerator.is_available() and (asked := asks_for_gpu()):
        on_cpu = "accelerate launch --config_file accelerate_configs/cpu.yaml ..."
        if local > 1:
            on_cpu = f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {local} --main_process_port 0 ..."
        raise UserError(
            f"{asked} of the launcher asks for a GPU, but PyTorch sees none; check nvidia-smi and that this PyTorch "
            f"({torch.__version__}) is built for CUDA, or train on the CPU: {on_cpu}"
        )
    named = list(
        itertools.takewhile(lambda name: not name.startswith("-"), filter(None, map(str.strip, visible.split(","))))
    )
    if 0 < count < len(named):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} names {len(named)} GPUs, but PyTorch sees {count}: the driver stops at the "
            "first one that does not exist, or is named twice; `nvidia-smi -L` lists them"
        )
    if 0 < count < local:
        raise UserError(
            f"{local} processes were launched on this machine, but {count} GPUs are visible "
            f"(CUDA_VISIBLE_DEVICES={visible or 'not set'}); launch with --num_processes {count}"
        )
    if local == 1 < count:
        return [
            f"{count} GPUs are visible and one process uses one of them; for all: accelerate launch --multi_gpu "
            f"--num_processes {count} --main_process_port 0 ..., for another one: CUDA_VISIBLE_DEVICES=1"
        ]
    return []


def show_log(accelerator: Accelerator) -> None:
    """Print what `lib` logs to stderr, as plain lines, on the main process only."""
    logger = logging.getLogger("lib")
    logger.handlers = [logging.StreamHandler()] if accelerator.is_main_process else [logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def describe_devices(accelerator: Accelerator) -> list[str]:
    """The devices of this machine that the run uses: GPUs with name and memory, or the CPU with its threads.

    A process says how much memory is free on its own GPU alone: asking another one would make a context there, which takes
    hundreds of MiB from the process whose GPU it is.
    """
    device = accelerator.device
    if device.type == "cpu":
        unused = ", no GPU is visible" if torch.version.cuda else ""
        return [f"CPU, {torch.get_num_threads()} threads{unused}"]
    if device.type != "cuda":
        return [str(device)]
    own = device.index or 0
    if accelerator.num_processes == 1:
        return [describe_gpu(own, own=True)]
    local = min(torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return [describe_gpu(index, index == own) for index in range(local)]


def describe_gpu(index: int, own: bool) -> str:
    """Index, name and memory of a visible GPU; how much is free on this process's `own`."""
    properties = torch.cuda.get_device_properties(index)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    if own:
        memory = f"{torch.cuda.mem_get_info(index)[0] / 2**30:.0f} of {memory} free"
    return f"GPU {index}: {properties.name}, {memory}"


def peak_memory_gib(accelerator: Accelerator) -> float:
    """Peak memory of this process in GiB: allocated on its GPU, or resident without one."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
