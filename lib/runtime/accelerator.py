"""The only file that asks the machine: accelerator, devices, launch sanity, precision, threads, seeds."""

import contextlib
import ctypes
import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from lib.config.sections import PROCESS_TIMEOUT, UserError
from lib.runtime.cpu.attention import use_fast_attention
from lib.runtime.cpu.casts import use_shared_casts
from lib.runtime.cpu.dropout import use_fast_dropout
from lib.runtime.processes import join_again
from lib.runtime.signals import EXIT_RESUME, Stopped, follow_launcher

FEW_PRODUCTS = 1_000_000
"""Multiplications that one thread makes in the time that others take to wake up, some tens of microseconds."""

VERSIONS = ("torch", "transformers", "accelerate", "datasets", "evaluate", "scikit-learn", "tokenizers", "wandb")


def run_script(main: Callable[[Any], None], config: Any) -> None:
    """Call `main`; a mistake of the user ends the process with code 2 and its message, printed once, without a trace.

    A run that was stopped and saved ends with code 75.
    """
    try:
        main(config)
        return
    except UserError as error:
        code, message = 2, f"error: {error}"
    except Stopped as stopped:
        code, message = EXIT_RESUME, f"{stopped}: saved; the same command goes on from here"
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # whoever read this may be gone
            print(message, file=sys.stderr, flush=True)
    # Without cleaning up: processes that wait for this one are ended by the launcher, not by a collective.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def build_accelerator(mixed_precision: str, log_with: str = "none", folder: Path | None = None) -> Accelerator:
    """The accelerator of this process, after checks that the launch is what the user asked for.

    `log_with` is the tracker and `folder` the place for its files. Gradient accumulation stays with the training loop,
    which knows the samples of a whole step. Raises UserError when GPUs were asked for and none is visible, when
    processes outnumber GPUs, or when each process believes it is alone.
    """
    follow_launcher()
    check_devices()
    use_all_cores()
    flush_denormals()
    keep_freed_memory()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0":
        join_again(attempt, "nccl" if uses_gpu() else "gloo")
    accelerator = Accelerator(
        mixed_precision=resolve_precision(mixed_precision),
        project_dir=folder,
        log_with=None if log_with == "none" else log_with,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            # The buffers of encoders are constants: broadcasting them before every forward is pure cost.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT),
        ],
    )
    show_log(accelerator)
    use_tf32(accelerator.device.type, accelerator.mixed_precision)
    if accelerator.device.type == "cpu":
        use_fast_dropout()
        use_fast_attention()
        use_shared_casts()
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != accelerator.num_processes:
        raise UserError(
            f"{wanted} processes were launched, but each believes it is alone ({describe_device(accelerator)}): they would "
            "write over each other. For several processes on a CPU: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            f"--num_processes {wanted} --main_process_port 0 ...; else launch one process, or make the GPUs visible."
        )
    return accelerator


def show_log(accelerator: Accelerator) -> None:
    """What the library logs goes to stderr, from the main process, as plain lines."""
    logger = logging.getLogger("lib")
    logger.handlers = [logging.StreamHandler()] if accelerator.is_main_process else [logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def check_devices() -> None:
    """Raise UserError when the environment asks for GPUs that are not there, or for more processes than GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return
    if visible not in ("", "-1", "NoDevFiles") and not torch.cuda.is_available():
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} asks for GPUs, but PyTorch sees none; check nvidia-smi and that this PyTorch "
            f"({torch.__version__}) is built for CUDA, or unset the variable to train on the CPU"
        )
    local, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if 0 < count < local:
        raise UserError(
            f"{local} processes were launched on this machine, but {count} GPUs are visible "
            f"(CUDA_VISIBLE_DEVICES={visible or 'not set'}); launch with --num_processes {count}"
        )


def use_all_cores() -> None:
    """Share the cores among the processes of this machine where the launcher, finding no setting, allowed one each."""
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))


def use_one_core_for(products: int) -> None:
    """On a CPU, leave steps of so few multiplications to one thread: waking the others takes longer than the work."""
    if products <= FEW_PRODUCTS:
        torch.set_num_threads(1)


def flush_denormals() -> None:
    """Take numbers nearer to 0 than 1.2e-38, the least normal float32, for 0; threads started from here on do so as well.

    The moments of words that no batch had for 800 steps have shrunk to such numbers, and processors take many times as
    long for them: with 5,000 rows of them AdamW's step over a table of 30,522 words takes 29 ms instead of 5.7.
    """
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks instead of returning them: a step on the CPU otherwise faults its pages in anew."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def uses_gpu() -> bool:
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true")


def resolve_precision(choice: str) -> str:
    """`auto` as the launcher's choice, else bf16 where the device is fast at it, else no.

    The launcher exports "no" also when it was not asked, so that only its fp16 and bf16 count as a choice.
    Raises UserError for fp16 without a GPU.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    on_gpu = uses_gpu()
    if choice == "auto":
        fast = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if on_gpu
            else cpu_is_fast_at_bf16(cpu_description())
        )
        choice = launcher if launcher in ("fp16", "bf16") else ("bf16" if fast else "no")
    if choice == "fp16" and not on_gpu:
        raise UserError("--mixed_precision fp16 needs a GPU; use --mixed_precision bf16 or no")
    return choice


def use_tf32(device_type: str, mixed_precision: str) -> None:
    """On a GPU, let products that mixed precision leaves in float32 use TF32; without mixed precision they stay exact."""
    mixed = device_type == "cuda" and mixed_precision != "no"
    torch.set_float32_matmul_precision("high" if mixed else "highest")


def describe_precision(mixed_precision: str) -> str:
    """What is computed in which type, in words."""
    rest = "TF32" if torch.get_float32_matmul_precision() == "high" else "float32"
    return (
        "no, all float32" if mixed_precision == "no" else f"{mixed_precision}, weights float32, other products {rest}"
    )


def cpu_description() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text().split("\n\n")[0] if path.exists() else platform.processor()


def cpu_is_fast_at_bf16(description: str) -> bool:
    """Whether bf16 products beat float32 ones, from the text of /proc/cpuinfo.

    Intel's AMX and AMD's AVX512_BF16 do. Intel's AVX512_BF16 without AMX does not: measured at 160 GFLOP/s against 290
    of float32 on two cores of a Xeon of model 207.
    """
    return "amx_bf16" in description or ("AuthenticAMD" in description and "avx512_bf16" in description)


def describe_device(accelerator: Accelerator) -> str:
    """The device of this process as a person names it: index, name, free memory; or the CPU with its threads."""
    device = accelerator.device
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return f"GPU {device.index or 0}: {name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    if device.type == "cpu":
        unused = ", no GPU is visible" if torch.version.cuda else ""
        return f"CPU, {torch.get_num_threads()} threads{unused}"
    return str(device)


def describe_devices(accelerator: Accelerator) -> list[str]:
    """The devices of this machine that the run uses."""
    if accelerator.device.type != "cuda" or accelerator.num_processes == 1:
        return [describe_device(accelerator)]
    rows = []
    for index in range(min(torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))):
        free, total = torch.cuda.mem_get_info(index)
        rows.append(
            f"GPU {index}: {torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        )
    return rows


def peak_memory_gib(accelerator: Accelerator) -> float:
    """Peak memory of this process: of the GPU where it uses one, else resident."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def seed_everything(*key: int) -> None:
    """Set PyTorch's random numbers by address: equal keys give equal numbers, whatever was drawn before.

    Dropout takes (seed, step, micro-batch, process); a resumed run therefore needs no saved generator, and an extra
    evaluation changes nothing.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(mix(*key))
    else:  # where there is none, `torch.manual_seed` notes the stack each time, for devices that may come
        torch.default_generator.manual_seed(mix(*key))


def mix(*key: int) -> int:
    """A 63-bit hash of integers (the finaliser of SplitMix64, Steele et al. 2014, chained over `key`)."""
    state = 0
    for value in key:
        state = (state + value + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def run_record(accelerator: Accelerator) -> dict[str, Any]:
    """What a run was made with: commit, versions, devices, precision; no setting and no secret."""
    record: dict[str, Any] = {
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "devices": describe_devices(accelerator),
        "python": platform.python_version(),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }
    return record | {f"version_{name}": version(name) for name in VERSIONS}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """Output of a git command in the project's folder, None without git or repository."""
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
