"""What the launcher was asked for is what runs; what is not followed is refused by its name, with a line that works."""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.default import write_basic_config
from accelerate.utils.launch import prepare_multi_gpu_env

from lib.errors import UserError
from lib.runtime import launch_checks
from lib.runtime.accelerator import build_accelerator, check_devices
from lib.runtime.device_options import DeviceOptions
from lib.runtime.launch_checks import (
    REFUSED,
    WITH_FSDP,
    WITHOUT_FSDP,
    Setting,
    Sharding,
    check_launch,
    launch_arguments,
    read_launch,
    read_sharding,
)
from lib.runtime.launcher import Launcher
from tests.conftest import ROOT, Command, results_of, sentences, write_csv

WRITTEN = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "NO",
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "machine_rank": 0,
    "main_process_port": 0,
    "main_training_function": "main",
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 1,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": False,
}
"""What `accelerate config` writes for one process; no one notices what else stands there."""


@pytest.fixture(autouse=True)
def _plain_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if re.match(
            r"ACCELERATE_|PARALLELISM_|FSDP_|(OMPI|MV2|PMI|SLURM)_|CUDA_VISIBLE|(LOCAL_)?WORLD_SIZE|RANK", name
        ):
            monkeypatch.delenv(name)
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])


Told = Callable[..., list[str]]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """`told("--cpu", "train.py", keys={...}, outside={...})`: the check under an `accelerate launch` that was told that."""

    def check(*flags: str, keys: dict | None = None, outside: dict | None = None) -> list[str]:
        if keys is not None:
            file = tmp_path / "lab.yaml"
            file.write_text(yaml.safe_dump(WRITTEN | keys))
            flags = ("--config_file", str(file), *flags)
        command = ["python", "/venv/bin/accelerate", "launch", *flags, "train.py", "--lr", "1e-5", ""]
        monkeypatch.setattr(launch_checks, "find_launcher", lambda: Launcher(command, outside or {}))
        return check_launch()

    return check


# ---------------------------------------------------------------------------------------------------- what is refused

VALUES = {
    "ACCELERATE_MIXED_PRECISION": "fp8",
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_TORCH_DEVICE": "cuda:1",
}


@pytest.mark.parametrize("variable", sorted({setting.variable for setting in (*REFUSED, *WITHOUT_FSDP)} - {""}))
def test_variable_that_asks_for_what_is_not_followed_is_named(
    variable: str, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = VALUES.get(variable, "2" if variable.endswith("SIZE") else "true")
    with pytest.raises(UserError, match=rf"{variable}={value} .*train\.py.*\n.*unset {variable}"):
        told(outside={variable: value})  # the launcher may overwrite it
    monkeypatch.setattr(launch_checks, "find_launcher", lambda: None)
    assert check_launch() == []
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=rf"{variable}={value} .*train\.py.*\n.*unset {variable}"):
        check_launch()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_MIXED_PRECISION", "no"),
        ("ACCELERATE_USE_FSDP", "false"),
        ("ACCELERATE_USE_DEEPSPEED", "0"),
        ("PARALLELISM_CONFIG_TP_SIZE", "1"),
    ],
)
def test_variable_that_asks_for_nothing_is_no_error(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert check_launch() == []


FLAGS = {
    "--use_fsdp": [],  # the launcher's default is version 1
    "--use_deepspeed": [],
    "--use_megatron_lm": [],
    "--tpu": [],
    "--downcast_bf16": [],
    "--dynamo_backend inductor": [],
    "--mixed_precision fp8": [],
    "--mpirun_hostfile hosts": [],
}


@pytest.mark.parametrize("flag", FLAGS)
def test_flag_of_the_launcher_that_is_not_followed_is_named(flag: str, told: Told) -> None:
    with pytest.raises(UserError, match=rf"{flag} of accelerate launch .*\nThis works: .*accelerate launch"):
        told(*flag.split(), *FLAGS[flag])


KEYS = {
    "distributed_type: FSDP": {"distributed_type": "FSDP", "num_processes": 2},
    "parallelism_config": {
        "distributed_type": "MULTI_GPU",
        "num_processes": 2,
        "parallelism_config": {"parallelism_config_dp_shard_size": 2},
    },
    "distributed_type: DEEPSPEED": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
    "distributed_type: MEGATRON_LM": {"distributed_type": "MEGATRON_LM"},
    "distributed_type: XLA": {"distributed_type": "XLA"},
    "parallelism_config: parallelism_config_tp_size: 2": {
        "distributed_type": "MULTI_GPU",
        "num_processes": 2,
        "parallelism_config": {"parallelism_config_tp_size": 2},
    },
    "dynamo_config: dynamo_backend: INDUCTOR": {
        "dynamo_config": {"dynamo_backend": "INDUCTOR", "dynamo_mode": "default"}
    },
    "mixed_precision: fp8": {"mixed_precision": "fp8"},
    "downcast_bf16": {"downcast_bf16": True},
    "mpirun_config: hosts": {
        "distributed_type": "MULTI_CPU",
        "use_cpu": True,
        "mpirun_config": {"mpirun_hostfile": "hosts"},
        "num_processes": 2,
    },
    "num_processes: 2": {"distributed_type": "MULTI_CPU", "use_cpu": True, "num_processes": 2},
}


@pytest.mark.parametrize("key", KEYS)
def test_key_of_the_users_file_that_is_not_followed_is_named_with_the_file(key: str, told: Told) -> None:
    with pytest.raises(UserError, match=rf"{key} in \S*lab\.yaml .*\nThis works: .*accelerate launch"):
        told(keys=KEYS[key])


FSDP2 = {"distributed_type": "FSDP", "num_processes": 4, "fsdp_config": {"fsdp_version": 2}}


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launcher passes on with FSDP2 for four processes."""
    for name, value in (("WORLD_SIZE", "4"), ("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, value)


def test_file_for_fsdp_is_refused_where_the_launcher_drops_it(told: Told) -> None:
    with pytest.raises(UserError, match=r"distributed_type: FSDP in(.|\n)*fsdp2\.yaml --num_processes 4"):
        told("--cpu", keys=FSDP2)


@pytest.mark.usefixtures("shards")
def test_fsdp2_is_followed_and_said_what_is_not_used(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(keys=FSDP2) == []
    assert read_sharding() == Sharding(4)
    written = {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_state_dict_type": "SHARDED_STATE_DICT"}
    written |= {
        "fsdp_offload_params": False,
        "fsdp_activation_checkpointing": False,
        "fsdp_cpu_ram_efficient_loading": True,
    }
    notes = told(keys=FSDP2 | {"fsdp_config": FSDP2["fsdp_config"] | written})
    assert [re.search(r"fsdp_config: \w+", note)[0] for note in notes] == [  # type: ignore[index]
        "fsdp_config: fsdp_auto_wrap_policy",
        "fsdp_config: fsdp_state_dict_type",
    ]
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert read_sharding() == Sharding(4, reshard_after_forward=False)


@pytest.mark.usefixtures("shards")
def test_flag_that_replaces_fsdp_of_the_file_is_an_error(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP")  # which the launcher does not set then
    monkeypatch.delenv("FSDP_VERSION")
    with pytest.raises(UserError, match=r"distributed_type: FSDP in(.|\n)*fsdp2\.yaml --num_processes 4"):
        told("--multi_gpu", keys=FSDP2)


SIZES_OF_HSDP = {"parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 2}


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        ("--parallelism_config_dp_replicate_size 2 --parallelism_config_dp_shard_size 2", FSDP2),
        ("--use_fsdp --fsdp_version 2", FSDP2 | {"parallelism_config": SIZES_OF_HSDP}),
    ],
)
def test_replicas_that_the_launcher_drops_are_an_error(flags: str, keys: dict, told: Told) -> None:
    with pytest.raises(UserError, match=r"parallelism_config_dp_replicate_size(.|\n)*hsdp\.yaml"):
        told(*flags.split(), keys=keys)


@pytest.mark.usefixtures("shards")
def test_unused_variable_of_fsdp_is_said_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_checks, "find_launcher", lambda: None)
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "BertLayer")
    (note,) = check_launch()
    assert note.startswith("FSDP_TRANSFORMER_CLS_TO_WRAP=BertLayer")


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize("strategy", ["SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"])
def test_strategy_of_fsdp_that_is_not_followed_is_an_error(strategy: str, told: Told) -> None:
    with pytest.raises(UserError, match=rf"fsdp_sharding_strategy: {strategy} in"):
        told(keys=FSDP2 | {"fsdp_config": FSDP2["fsdp_config"] | {"fsdp_sharding_strategy": strategy}})


def test_variable_that_asks_for_fsdp_is_named_and_not_a_key_that_is_not_in_the_file(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"^ACCELERATE_USE_FSDP=true"):
        told(keys={"distributed_type": "MULTI_GPU", "num_processes": 2})


@pytest.mark.parametrize("shards", [True, False])
def test_shards_are_proposed_only_by_the_script_that_has_them(shards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError) as error:
        check_launch(shards)
    assert ("fsdp2.yaml" in str(error.value)) == shards


@pytest.mark.usefixtures("shards")
def test_fsdp_in_its_first_version_is_an_error_with_the_line_for_the_second(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"distributed_type: FSDP in(.|\n)*fsdp2\.yaml --num_processes 4"):
        told(keys=FSDP2 | {"fsdp_config": {}})
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setattr(launch_checks, "find_launcher", lambda: None)
    with pytest.raises(UserError, match=r"ACCELERATE_USE_FSDP=true(.|\n)*fsdp2\.yaml --num_processes 4"):
        check_launch()


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize(("replicas", "size"), [("2", "2"), ("2", "1"), ("4", "1"), ("3", "2"), ("2", "x")])
def test_replicas_and_shards_must_make_the_processes(
    replicas: str, size: str, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", replicas)
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", size)
    if (replicas, size) == ("2", "2"):
        assert told(keys=FSDP2) == []
        assert read_sharding() == Sharding(2, 2)
    else:
        with pytest.raises(UserError, match=f"dp_replicate_size {replicas} and dp_shard_size {size}"):
            told(keys=FSDP2)


@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize("setting", WITH_FSDP, ids=lambda setting: setting.flag)
def test_setting_of_fsdp_that_is_not_followed_is_named(
    setting: Setting, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=rf"{setting.key}.* in \S*lab\.yaml"):
        told(keys=FSDP2 | {"fsdp_config": FSDP2["fsdp_config"] | {setting.flag: True}})
    monkeypatch.setattr(launch_checks, "find_launcher", lambda: None)
    monkeypatch.setenv(setting.variable, "true")
    with pytest.raises(UserError, match=rf"{setting.variable}=true"):
        check_launch()


@pytest.mark.usefixtures("shards")
def test_scripts_that_do_not_train_refuse_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["eval.py"])
    with pytest.raises(UserError, match=r"eval\.py(.|\n)*multi_gpu\.yaml --num_processes 4"):
        check_launch(shards=False)


@pytest.mark.parametrize(
    "flags",
    [
        ["--cpu", "--num_processes", "2"],
        ["--cpu", "--num-processes=2"],
        ["--num_machines", "2", "--num_processes", "2"],
    ],
)
def test_processes_that_were_asked_for_and_do_not_run_are_an_error(flags: list[str], told: Told) -> None:
    with pytest.raises(UserError, match=r"--num_processes 2 .*it started one(.|\n)*multi_gpu\.yaml --num_processes 2"):
        told(*flags)


def test_processes_that_run_are_no_error(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in launch_checks.MPI_SIZES:  # srun sets them for the launchers of several machines
        monkeypatch.setenv(name, "2")
    assert told("--multi_gpu", "--num_processes", "2") == []


@pytest.mark.parametrize("name", launch_checks.MPI_SIZES)
def test_processes_of_mpi_that_would_not_know_of_each_other_are_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    check_launch()
    monkeypatch.setenv(name, "4")
    with pytest.raises(UserError, match=rf"{name}=4(.|\n)*--num_processes 4"):
        check_launch()


@pytest.mark.parametrize("visible", ["1", "2,3", ""])
def test_gpus_of_the_launcher_and_other_ones_of_the_variable_are_an_error(visible: str, told: Told) -> None:
    outside = {"CUDA_VISIBLE_DEVICES": visible}
    with pytest.raises(UserError, match=f"gpu_ids: 0 in .* overrides CUDA_VISIBLE_DEVICES={visible};"):
        told(keys={"gpu_ids": "0"}, outside=outside)
    with pytest.raises(UserError, match=f"--gpu_ids 0,1 .* overrides CUDA_VISIBLE_DEVICES={visible};"):
        told("--gpu_ids", "0,1", keys={}, outside=outside)
    assert told("--gpu_ids", "all", keys={"gpu_ids": "0"}, outside=outside) == []
    assert told("--gpu_ids", visible or "all", outside=outside) == []
    assert told("--gpu_ids", "0,1", outside={"CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == []


# ---------------------------------------------------------------------------------------------------- what is said or read


@pytest.mark.parametrize("value", ["1", "true", "True", "yes", "on", "y", "t"])
def test_cpu_is_asked_for_with_every_word_that_accelerate_knows(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert check_launch() + check_devices() == []


@pytest.mark.parametrize("name", ["ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY"])
@pytest.mark.parametrize("value", ["", "ja"])
def test_variable_that_is_neither_on_nor_off_is_an_error(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"{name}='{value}' is neither true nor false"):
        check_launch()


def test_cpu_is_used_where_the_user_asked_for_it_though_the_launcher_forgets(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    told(outside={"ACCELERATE_USE_CPU": "on"})
    assert launch_checks.truth("ACCELERATE_USE_CPU")


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("value", ["4", "auto"])
def test_accumulation_in_the_environment_does_not_divide_gradients_and_is_said(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", value)
    accelerator = build_accelerator(DeviceOptions("no"))
    weight = torch.ones(1, requires_grad=True)
    accelerator.backward(weight * 8)
    assert weight.grad is not None
    assert weight.grad.item() == 8
    assert f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={value} of the launcher is not used" in capsys.readouterr().err


def test_accumulation_and_clipping_of_the_launcher_are_said(told: Told) -> None:
    (note,) = told("--gradient_accumulation_steps", "4")
    assert "--gradient_accumulation_steps 4" in note
    assert "--train_batch_size" in note
    notes = told(keys={"deepspeed_config": {"gradient_accumulation_steps": 2, "gradient_clipping": 1.0}})
    assert [re.search(r"deepspeed_config: \w+", note)[0] for note in notes] == [  # type: ignore[index]
        "deepspeed_config: gradient_accumulation_steps",
        "deepspeed_config: gradient_clipping",
    ]


@pytest.mark.usefixtures("on_cpu")
def test_precision_of_the_launcher_that_is_not_used_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert build_accelerator(DeviceOptions("no")).mixed_precision == "no"
    assert "bf16 of the launcher is not used" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    build_accelerator(DeviceOptions("no"))
    assert "not used" not in capsys.readouterr().err


def test_precision_in_a_variable_that_the_launcher_overwrites_is_said(told: Told) -> None:
    (note,) = told(outside={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert "ACCELERATE_MIXED_PRECISION=bf16 is not used" in note
    assert told(outside={"ACCELERATE_MIXED_PRECISION": "no"}) == []


@pytest.mark.usefixtures("on_cpu")
def test_devices_that_are_not_tested_are_an_error() -> None:
    accelerator = build_accelerator(DeviceOptions("no"))
    assert launch_checks.check_device(accelerator) == []
    accelerator.state.device = torch.device("mps")
    assert "no test runs" in launch_checks.check_device(accelerator)[0]
    accelerator.state.device = torch.device("xpu")
    with pytest.raises(UserError, match=r"device xpu(.|\n)*cpu\.yaml"):
        launch_checks.check_device(accelerator)
    accelerator.state._reset_state(reset_partial_state=True)


# ---------------------------------------------------------------------------------------------------- what works

PAGES = [
    "README.md",
    "train.py",
    "eval.py",
    "predict.py",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
LINES = sorted(
    {
        line.strip("` |").split("   ")[0].split("  #")[0]
        for page in [*map(ROOT.joinpath, PAGES), *(ROOT / "accelerate_configs").iterdir()]
        for line in re.findall(
            r"(?:[A-Z_]+=[\w,]+ )*accelerate launch [^`\n]*\.py[^`\n]*", page.read_text(encoding="utf-8")
        )
    }
)


@pytest.mark.parametrize("line", LINES)
def test_documented_launch_is_allowed(line: str, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parts = shlex.split(line)
    start = parts.index("launch")
    outside = dict(part.split("=", 1) for part in parts[: start - 1])
    flags = launch_arguments(["accelerate", *parts[start:]]) or []
    if "--num_processes" in flags:
        monkeypatch.setenv("WORLD_SIZE", flags[flags.index("--num_processes") + 1])
    monkeypatch.setattr(launch_checks, "find_launcher", lambda: Launcher(["accelerate", *parts[start:]], outside))
    launch = read_launch()
    if launch and launch.told("use_fsdp"):
        for name, value in prepare_multi_gpu_env(launch.settings).items():
            if name.startswith(("ACCELERATE_USE_", "FSDP_", "PARALLELISM_")):
                monkeypatch.setenv(name, value)
    assert told(*flags, outside=outside) == []


def test_lines_of_the_documentation_are_found() -> None:
    assert len(LINES) > 40
    assert any("multi_gpu.yaml" in line for line in LINES)


def test_file_that_accelerate_config_writes_is_allowed(told: Told, tmp_path: Path) -> None:
    path = tmp_path / "basic.yaml"
    write_basic_config(save_location=str(path))
    assert told("--config_file", str(path)) == []
    assert told(keys={}) == []


@pytest.mark.parametrize(
    "command",
    [
        ["python", "/venv/bin/accelerate", "launch", "--cpu", "train.py", ""],
        ["python", "/venv/bin/accelerate-launch", "--cpu", "train.py"],
        ["python", "-m", "accelerate.commands.launch", "--cpu", "train.py"],
        ["python", "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "train.py"],
    ],
)
def test_arguments_of_the_launcher_are_found_in_its_command(command: list[str]) -> None:
    assert launch_arguments(command) == ["--cpu", "train.py"]
    assert launch_arguments(["torchrun", "--nproc_per_node", "2", "accelerate-finetune/train.py"]) is None


# ---------------------------------------------------------------------------------------------------- the real launcher

LAUNCHER = ["-m", "accelerate.commands.launch"]


def with_defaults(folder: Path, **keys: object) -> dict[str, str]:
    """The environment of a user whose default_config.yaml of accelerate has `keys`."""
    file = folder / "home" / "accelerate" / "default_config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump(WRITTEN | keys))
    return {"HF_HOME": str(folder / "home"), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def error_of(stderr: str) -> list[str]:
    """The error and its second line, the only ones of a project's own."""
    lines = stderr.splitlines()
    errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    return lines[errors[0] : errors[0] + 2]


def flags_of(folder: Path, model: Path) -> list[object]:
    files = ("--train_file", "train.csv", "--validation_file", "dev.csv")
    for name in files[1::2]:
        write_csv(folder / name, sentences(12))
    return [
        "--model",
        model,
        *files,
        "--max_steps",
        1,
        "--bs",
        4,
        "--report_to",
        "none",
        "--output_dir",
        folder / "out",
    ]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.slow
def test_default_file_of_the_user_is_named_and_the_line_in_the_error_works(
    run: Command, roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = with_defaults(tmp_path, distributed_type="MULTI_CPU", num_processes=2, use_cpu=True)
    flags = flags_of(tmp_path, roberta)
    launcher = tmp_path / "accelerate-launch"
    launcher.write_text("from accelerate.commands.launch import main; main()")
    done = run(launcher, ROOT / "train.py", *flags, env=environment, code=1)
    error, works = error_of(done.stderr)
    assert f"num_processes: 2 in {tmp_path}/home/accelerate/default_config.yaml" in error
    assert not (tmp_path / "out").exists()

    before, _, line = (
        works.strip().removeprefix("This works: ").removesuffix(" train.py ...").partition("accelerate launch ")
    )
    assert before.strip() == "ACCELERATE_USE_CPU=true"
    arguments = [ROOT / part if part.endswith(".yaml") else part for part in line.split()]
    done = run(launcher, *arguments, ROOT / "train.py", *flags, env=environment)
    assert results_of(done)["run/num_processes"] == 2


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("script", "keys", "words"),
    [
        ("train.py", KEYS["distributed_type: FSDP"] | {"num_processes": 1}, "distributed_type: FSDP in"),
        ("predict.py", KEYS["dynamo_config: dynamo_backend: INDUCTOR"], "dynamo_backend: INDUCTOR in"),
    ],
)
def test_engine_of_the_users_default_file_is_refused_before_data_is_read(
    script: str, keys: dict, words: str, run: Command, roberta: Path, tmp_path: Path
) -> None:
    environment = with_defaults(tmp_path, **keys)
    launcher = tmp_path / "accelerate-launch"
    launcher.write_text("from accelerate.commands.launch import main; main()")
    missing = {"train.py": ["--train_file", "gone.csv"], "predict.py": ["--input", "gone.csv", "--output", "o.csv"]}
    (tmp_path / "gone.csv").write_bytes(b"\xff\xfe broken")
    done = run(launcher, ROOT / script, "--model", roberta, *missing[script], env=environment, code=1)
    error, works = error_of(done.stderr)
    assert words in error
    assert script in error
    assert "accelerate_configs/" in works


def test_tasks_of_srun_may_be_runs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    check_launch()


def test_accelerate_without_its_private_names_leaves_the_variables_to_check(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("accelerate.commands.launch._validate_launch_command")
    assert told("--num_processes", "1") == []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_FSDP=true"):
        told("--num_processes", "1")
