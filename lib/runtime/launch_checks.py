"""Whether what the user asked of the launcher is what runs: what no script here follows is refused by name.

The user asks with flags of `accelerate launch`, keys of its YAML file (`--config_file`, or the default_config.yaml that
`accelerate config` writes), or variables. The launcher passes most of them on as variables, and drops the others.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import str_to_bool

from lib.errors import UserError
from lib.runtime.launcher import Launcher, find_launcher

MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which MPI tells how many processes it started."""


def truth(name: str) -> bool:
    """Whether a variable of accelerate is on, read as accelerate reads it. Raises UserError if it is neither on nor off."""
    try:
        return bool(str_to_bool(os.environ.get(name, "false")))
    except ValueError:
        value = os.environ[name]
        raise UserError(f"{name}={value!r} is neither true nor false: set it to true or false, or unset it") from None


def is_on(value: str) -> bool:
    """Whether a setting asks for something."""
    return value.lower() not in ("", "0", "f", "false", "n", "no", "none", "off")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting of the launcher that is refused, under its three names."""

    what: str
    why: str
    variable: str
    flag: str = ""
    """Without the dashes: also the launcher's name for the value, wherever it is from."""
    key: str = ""
    """In the YAML file."""
    asks: Callable[[str], bool] = is_on


WHOLE = "here every process holds the whole model"
PARALLEL = "tensor, context or sequence parallelism"
TPU = "it is not tested there"

REFUSED = (
    Setting("DeepSpeed", WHOLE, "ACCELERATE_USE_DEEPSPEED", "use_deepspeed", "distributed_type: DEEPSPEED"),
    Setting("Megatron-LM", WHOLE, "ACCELERATE_USE_MEGATRON_LM", "use_megatron_lm", "distributed_type: MEGATRON_LM"),
    Setting(PARALLEL, WHOLE, "ACCELERATE_ALLOW_CP_STANDALONE"),
    *(
        Setting(
            PARALLEL,
            WHOLE,
            f"PARALLELISM_CONFIG_{axis}_SIZE",
            f"parallelism_config_{axis.lower()}_size",
            f"parallelism_config: parallelism_config_{axis.lower()}_size",
            lambda value: value not in ("", "1"),
        )
        for axis in ("TP", "CP", "SP")
    ),
    Setting(
        "TorchDynamo around the whole model",
        "a checkpoint of it would have other names of weights; `train.py --compile True` compiles the trained layers instead",
        "ACCELERATE_DYNAMO_BACKEND",
        "dynamo_backend",
        "dynamo_config: dynamo_backend",
    ),
    Setting(
        "fp8",
        "it computes in bf16, fp16 or float32",
        "ACCELERATE_MIXED_PRECISION",
        "mixed_precision",
        "mixed_precision",
        lambda value: value.lower() not in ("", "no", "fp16", "bf16"),
    ),
    Setting("mpirun", "processes are connected by the launcher itself", "", "mpirun_hostfile", "mpirun_config"),
    Setting("TPUs", TPU, "ACCELERATE_IN_TPU_POD", "tpu", "distributed_type: XLA"),
    Setting("bf16 in place of float32 on TPUs", TPU, "ACCELERATE_DOWNCAST_BF16", "downcast_bf16", "downcast_bf16"),
    Setting("Amazon SageMaker", "it is not tested there", "ACCELERATE_USE_SAGEMAKER"),
    Setting("Intel's extension for PyTorch", "Accelerate no longer uses it", "ACCELERATE_USE_IPEX"),
    Setting(
        "one device by its name",
        "all processes would share it; choose GPUs with CUDA_VISIBLE_DEVICES, the CPU with ACCELERATE_USE_CPU=true",
        "ACCELERATE_TORCH_DEVICE",
    ),
)

SIZES = ("dp_replicate_size", "dp_shard_size")
"""The settings of Accelerate for replicas and shards."""
REPLICAS = "shards or replicas of a model", "they go with FSDP2, as in accelerate_configs/hsdp.yaml"
HSDP_LINE = (
    "accelerate launch --config_file accelerate_configs/hsdp.yaml --num_processes 4 "
    "--parallelism_config_dp_replicate_size 2 --parallelism_config_dp_shard_size 2"
)
WITHOUT_FSDP = (
    Setting(*REPLICAS, "ACCELERATE_USE_PARALLELISM_CONFIG", "use_parallelism_config", "parallelism_config"),
    *(Setting(*REPLICAS, f"PARALLELISM_CONFIG_{n.upper()}", asks=lambda value: value not in ("", "1")) for n in SIZES),
)
"""What is refused where FSDP is not asked for."""

WITH_FSDP = (
    Setting(
        "another strategy than full shards",
        "replicas are those of accelerate_configs/hsdp.yaml; layers stay whole after forward with "
        "fsdp_reshard_after_forward: false",
        "FSDP_SHARDING_STRATEGY",
        "fsdp_sharding_strategy",
        "fsdp_config: fsdp_sharding_strategy",
        lambda value: value.upper() not in ("", "FULL_SHARD", "1"),
    ),
    Setting(
        "weights in main memory",
        "AdamW steps where the model computes; leave it out",
        "FSDP_OFFLOAD_PARAMS",
        "fsdp_offload_params",
        "fsdp_config: fsdp_offload_params",
    ),
    Setting(
        "FSDP's activation checkpointing",
        "`train.py --gradient_checkpointing True` computes the trained layers a second time; leave it out",
        "FSDP_ACTIVATION_CHECKPOINTING",
        "fsdp_activation_checkpointing",
        "fsdp_config: fsdp_activation_checkpointing",
    ),
    Setting(
        "modules that FSDP ignores",
        "their gradients would not be summed; leave it out",
        "FSDP_IGNORED_MODULES",
        "fsdp_ignored_modules",
        "fsdp_config: fsdp_ignored_modules",
    ),
)
"""Settings of FSDP that are refused."""

UNUSED_BY_FSDP = {
    "fsdp_auto_wrap_policy": "each transformer layer is gathered by itself",
    "fsdp_transformer_layer_cls_to_wrap": "each transformer layer is gathered by itself",
    "fsdp_min_num_params": "each transformer layer is gathered by itself",
    "fsdp_state_dict_type": "checkpoints are the same with and without FSDP",
    "fsdp_forward_prefetch": "FSDP2 has its own order",
    "fsdp_backward_prefetch": "FSDP2 has its own order",
    "fsdp_use_orig_params": "FSDP2 always keeps the parameters of the model",
    "fsdp_sync_module_states": "every process starts with the weights of the first",
    "fsdp_activation_checkpointing_offload": "there is no activation checkpointing of FSDP here",
}
"""Settings of FSDP that change nothing, and why; they are said."""


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How FSDP2 spreads a model: `replicas` groups of processes hold it, each in `shards` parts.

    `reshard_after_forward`: a layer is freed after forward, and gathered again for backward.
    """

    shards: int
    replicas: int = 1
    reshard_after_forward: bool = True

    def __str__(self) -> str:
        return f"FSDP2: {self.shards} shards" + (f" x {self.replicas} replicas" if self.replicas > 1 else "")


@dataclasses.dataclass(frozen=True)
class Launch:
    """What `accelerate launch` was told, by its own reading of its flags and its YAML file."""

    launcher: Launcher
    settings: argparse.Namespace
    """After the file was read: flags first."""
    flags: frozenset[str]
    """Names of the flags that were given."""
    file: str | None
    """The YAML file that was read."""
    keys: dict[str, Any]
    """Its content."""

    def told(self, flag: str) -> Any:
        """The value of a setting; None where this version of accelerate has no such flag."""
        return getattr(self.settings, flag, None)

    def origin(self, flag: str, key: str, value: Any) -> str | None:
        """The flag or the key with which `value` was asked for; None if neither was given."""
        if flag in self.flags:
            return f"--{flag}" if value is True else f"--{flag} {value}"
        if self.file is None:
            return None
        return f"{key} in {self.file}" if value is True else f"{key}: {value} in {self.file}"

    def processes(self) -> int:
        """How many processes the user asked for; 0 if that was left to the launcher."""
        return int(
            (self.told("num_processes") if "num_processes" in self.flags else self.keys.get("num_processes")) or 0
        )


def read_launch() -> Launch | None:
    """What the `accelerate launch` above this process was told; None without one, and where the system does not tell."""
    launcher = find_launcher()
    arguments = launch_arguments(launcher.command) if launcher else None
    if launcher is None or arguments is None:
        return None
    logging.getLogger("accelerate.commands.launch").disabled = True  # it has said already what it chose itself
    # The launcher has understood its command; a version of accelerate without these names leaves the variables to check.
    with contextlib.suppress(SystemExit, Exception):
        from accelerate.commands.config.config_args import default_config_file
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser

        settings = launch_command_parser().parse_args(arguments)
        flags = frozenset(settings.nondefault)
        settings, content, _ = _validate_launch_command(settings)
        file = None if content is None else str(settings.config_file or default_config_file)
        return Launch(launcher, settings, flags, file, {} if content is None else dict(vars(content)))
    return None


def launch_arguments(command: list[str]) -> list[str] | None:
    """The arguments of `accelerate launch` in a command; None if it is another one."""
    command = command[:-1] if command[-1:] == [""] else command  # what /proc puts at the end
    for index, part in enumerate(command):
        name = Path(part).name
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return command[index + 1 :]
        if name in ("accelerate", "accelerate.commands.accelerate_cli"):
            return command[index + 2 :] if command[index + 1 : index + 2] == ["launch"] else None
    return None


def check_launch(shards: bool = True) -> list[str]:
    """What a user should know about settings of the launcher that change nothing here, one line each.

    `shards`: the script can spread a model over processes. Raises UserError for a setting that is not followed, under the
    name that the user gave it, with the line that works.
    """
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY"):
        truth(name)
    launch = read_launch()
    outside = launch.launcher.environment if launch else {}
    if is_on(outside.get("ACCELERATE_USE_CPU", "")):
        os.environ["ACCELERATE_USE_CPU"] = "true"  # `accelerate launch` overwrites it for one process
    for setting in REFUSED:
        spreads = shards and setting.why == WHOLE
        check_setting(
            setting, launch, outside, ", or FSDP2 spreads it: accelerate_configs/fsdp2.yaml" if spreads else ""
        )
    notes = check_fsdp(launch, outside, shards)
    check_gpus(launch, outside)
    check_processes(launch)
    return notes + unused_settings(launch, outside)


def check_setting(setting: Setting, launch: Launch | None, outside: dict[str, str], more: str = "") -> None:
    """Raise UserError if flag, YAML file or variable ask for `setting`; `outside` is the launcher's environment.

    `more` is added to the reason.
    """
    reason = f"asks for {setting.what}, which {script()} does not follow: {setting.why}{more}"
    if launch and setting.flag:
        told = launch.told(setting.flag) or launch.keys.get(setting.flag)
        if setting.asks(str(told or "")) and (origin := launch.origin(setting.flag, setting.key, told)):
            raise UserError(f"{origin} of accelerate launch {reason}\nThis works: {working_line(launch)}")
    for environment in (os.environ, outside):
        value = environment.get(setting.variable, "")
        if setting.asks(value):
            raise UserError(
                f"{setting.variable}={value} {reason}\nThis works: unset {setting.variable}, then the same command"
            )


def check_fsdp(launch: Launch | None, outside: dict[str, str], shards: bool) -> list[str]:
    """What FSDP was told that changes nothing, one line each.

    Raises UserError if FSDP was asked for and is not what runs, or in a way that is not followed here.
    """
    told = bool(launch and (launch.told("use_fsdp") or str(launch.keys.get("distributed_type")).endswith("FSDP")))
    if not (told or truth("ACCELERATE_USE_FSDP")):
        for setting in WITHOUT_FSDP:
            check_setting(setting, launch, outside)
        return []
    given = launch.origin("use_fsdp", "distributed_type: FSDP", True) if launch and told else None
    asks = f"{given} of accelerate launch asks for FSDP" if given else "ACCELERATE_USE_FSDP=true asks for FSDP"
    if not shards:
        raise UserError(
            f"{asks}, which spreads a model in training; in {script()} every process holds it whole\n"
            f"This works: {working_line(launch)}"
        )
    version = str(launch.told("fsdp_version")) if launch and told else os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"{asks} in its first version (fsdp_version 1, the default of the launcher), which {script()} does not follow; "
            f"FSDP2 does the same\nThis works: {working_line(launch, file='fsdp2')}"
        )
    for setting in WITH_FSDP:
        check_setting(setting, launch, outside)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        raise UserError(
            f"{asks}, which spreads a model over processes, and one process runs {script()}: the launcher was asked for one, "
            f"or told --cpu\nThis works: {working_line(launch, file='fsdp2')}"
        )
    if not truth("ACCELERATE_USE_FSDP"):
        raise UserError(
            f"{asks}, and another way to run processes, such as --multi_gpu, was asked for as well, which the launcher "
            f"followed: give one of them\nThis works: {working_line(launch, file='fsdp2')}"
        )
    for name in SIZES if launch and not truth("ACCELERATE_USE_PARALLELISM_CONFIG") else ():
        flag = f"parallelism_config_{name}"
        if launch and str(launch.told(flag) or "1") != "1":
            raise UserError(
                f"{launch.origin(flag, f'parallelism_config: {flag}', launch.told(flag))} of accelerate launch asks for "
                f"{REPLICAS[0]}, and the launcher dropped it: it reads such sizes only where the file has both "
                f"distributed_type: FSDP and parallelism_config, and no flag such as --use_fsdp replaces the first\n"
                f"This works: {HSDP_LINE} {script()} ..."
            )
    read_sharding()
    if launch is None:
        return [
            f"{variable}={os.environ[variable]} is not used: {why}"
            for flag, why in UNUSED_BY_FSDP.items()
            if is_on(os.environ.get(variable := flag.upper().replace("_LAYER_CLS", "_CLS"), ""))
        ]
    given_settings = launch.flags | (launch.keys.get("fsdp_config") or {}).keys()
    return [
        f"{launch.origin(flag, f'fsdp_config: {flag}', launch.told(flag))} is not used: {why}"
        for flag, why in UNUSED_BY_FSDP.items()
        if flag in given_settings and is_on(str(launch.told(flag) or ""))
    ]


def read_sharding() -> Sharding | None:
    """How the launcher was told to spread the model over processes; None where every process holds it whole.

    Raises UserError for sizes that do not make the number of processes.
    """
    if not truth("ACCELERATE_USE_FSDP"):
        return None
    size, reshard = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if reshard not in ("true", "false", "full_shard", "shard_grad_op"):
        raise UserError(f"fsdp_reshard_after_forward is {reshard!r}: it is true or false with FSDP2")
    resharding = reshard in ("true", "full_shard")
    given = [os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1") for name in SIZES]
    if not truth("ACCELERATE_USE_PARALLELISM_CONFIG") and given == ["1", "1"]:
        return Sharding(size, 1, resharding)
    replicas, shards = (int(value) if value.isdecimal() else 0 for value in given)
    if shards < 2 or replicas * shards != size:
        raise UserError(
            f"parallelism_config: {' and '.join(f'{n} {v}' for n, v in zip(SIZES, given, strict=True))} do not fit {size} "
            "processes: their product is the number of processes, and dp_shard_size, the parts of each layer, is at least 2\n"
            f"This works: {HSDP_LINE} {script()} ..."
        )
    return Sharding(shards, replicas, resharding)


def check_gpus(launch: Launch | None, outside: dict[str, str]) -> None:
    """Raise UserError if the launcher's choice of GPUs replaced that of the user's CUDA_VISIBLE_DEVICES."""
    variable, chosen = outside.get("CUDA_VISIBLE_DEVICES"), launch.told("gpu_ids") if launch else None
    if launch is None or chosen in (None, "all") or variable is None or truth("ACCELERATE_USE_CPU"):
        return
    if not {part.strip() for part in str(chosen).split(",")} <= {part.strip() for part in variable.split(",")}:
        raise UserError(
            f"{launch.origin('gpu_ids', 'gpu_ids', chosen)} of accelerate launch overrides CUDA_VISIBLE_DEVICES={variable}; "
            f"give one of them\nThis works: CUDA_VISIBLE_DEVICES={variable} accelerate launch --gpu_ids all {script()} ..."
        )


def check_processes(launch: Launch | None) -> None:
    """Raise UserError if fewer processes run than were asked for, or MPI started them, each believing it is alone."""
    running = int(os.environ.get("WORLD_SIZE", "1"))
    if launch and (asked := launch.processes()) > running:
        origin = launch.origin("num_processes", "num_processes", asked)
        cause = (
            "one, whatever the number, without --multi_gpu" if running == 1 else f"{running}, as many on each machine"
        )
        raise UserError(
            f"{origin} of accelerate launch asks for {asked} processes, and it started {cause}\n"
            f"This works: {working_line(launch)}"
        )
    for name in MPI_SIZES if "WORLD_SIZE" not in os.environ else ():
        size = os.environ.get(name, "")
        if size == os.environ.get("SLURM_STEP_NUM_TASKS"):
            continue  # of srun, under which they may be runs of their own; in one folder its lock refuses all but one
        if size.isdecimal() and int(size) > 1:
            raise UserError(
                f"{name}={size}: MPI started {size} processes, and they would not know of each other; let the launcher "
                f"start them\nThis works: {working_line(None, int(size))}"
            )


def unused_settings(launch: Launch | None, outside: dict[str, str]) -> list[str]:
    """What the user asked for that changes nothing, one line each: accumulation, clipping, a variable that is overwritten."""
    notes = []
    mine, launchers = (environment.get("ACCELERATE_MIXED_PRECISION", "no") for environment in (outside, os.environ))
    if mine not in ("no", launchers):
        notes.append(
            f"ACCELERATE_MIXED_PRECISION={mine} is not used: accelerate launch overwrites it with its own --mixed_precision"
        )
    for flag, nothing, instead in (
        (
            "gradient_accumulation_steps",
            ("None", "", "1"),
            "--train_batch_size is the batch of a step, in as many micro-batches as it takes",
        ),
        ("gradient_clipping", ("None", ""), "--max_grad_norm of train.py clips"),
    ):
        asked, variable = launch.told(flag) if launch else None, f"ACCELERATE_{flag.upper()}"
        if launch and str(asked or "") not in nothing:
            notes.append(
                f"{launch.origin(flag, f'deepspeed_config: {flag}', asked)} of the launcher is not used: {instead}"
            )
        elif (value := os.environ.get(variable, "")) not in nothing:
            notes.append(f"{variable}={value} of the launcher is not used: {instead}")
    return notes


def check_device(accelerator: Accelerator) -> list[str]:
    """Raise UserError if the processes run on devices, or in a way, that is not tested; a note for Apple's GPUs."""
    ways = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    kind = accelerator.device.type
    if kind not in ("cpu", "cuda", "mps") or accelerator.distributed_type not in ways:
        raise UserError(
            f"the launch gave {accelerator.distributed_type.value} on the device {kind}, where {script()} is not tested; it runs "
            f"on NVIDIA's and AMD's GPUs and on CPUs\nThis works: {working_line(None, cpu=True)}"
        )
    if kind == "mps":
        return ["Apple's GPU (mps) is used, on which no test runs; ACCELERATE_USE_CPU=true is the CPU"]
    return []


def script() -> str:
    """The name of the script that runs."""
    return Path(sys.argv[0]).name


def working_line(
    launch: Launch | None, processes: int | None = None, cpu: bool = False, file: str = "multi_gpu"
) -> str:
    """A command that runs as many processes as were asked for, by a file of this project instead of the user's."""
    count = processes or max(int(os.environ.get("WORLD_SIZE", "1")), launch.processes() if launch else 1)
    cpu = cpu or truth("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if count == 1 and file == "fsdp2":
        count = 2
    if count == 1:
        return (
            f"accelerate launch --config_file accelerate_configs/{'cpu' if cpu else 'single_gpu'}.yaml {script()} ..."
        )
    line = f"accelerate launch --config_file accelerate_configs/{file}.yaml --num_processes {count}"
    if launch and (launch.told("num_machines") or 1) > 1:
        names = ("num_machines", "machine_rank", "main_process_ip", "main_process_port")
        line += "".join(f" --{name} {launch.told(name)}" for name in names)
    return f"{'ACCELERATE_USE_CPU=true ' if cpu else ''}{line} {script()} ..."
