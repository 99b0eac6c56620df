"""Two processes in network namespaces of their own, joined by a link of limited speed: seconds of training steps.

    python benchmarks/limited_link.py --way overlap --rate 1gbit --model FOLDER --train_file FILE ... --max_steps 15

Ways: `overlap`, gradients are summed while backward runs, as train.py does; `after`, as train.py did it before that: once
backward is done, they are copied into buckets, summed, and copied back; `ddp`, by PyTorch's DistributedDataParallel;
`fsdp2`, as train.py does with the model in shards. All other flags are those of train.py, and `--weights FILE` keeps what
was learned. Each process has one core. Needs root, `ip` and `tc` of iproute2, and `taskset`; the namespaces are removed at
the end, also after an error. Prints one line of JSON.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

STEPS = Path(__file__).resolve().parent / "linked_steps.py"
WAYS = ("overlap", "after", "ddp", "fsdp2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "veth0"
SECONDS = 600.0
"""A process that takes longer than this waits for the other one."""


class LinkFailed(Exception):
    """A command that makes the link failed."""


def unavailable() -> str | None:
    """Why this machine cannot make such a link; None if it can."""
    missing = [tool for tool in ("ip", "tc", "taskset") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} is not installed"
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        return "two cores are needed"
    try:
        with link("1gbit"):
            return None
    except LinkFailed as error:
        return str(error)


@contextlib.contextmanager
def link(rate: str) -> Iterator[tuple[str, str]]:
    """Names of two network namespaces that reach each other at `rate`, as tc writes it; removed afterwards."""
    names = f"ovA{os.getpid()}", f"ovB{os.getpid()}"
    try:
        for name in names:
            call("ip", "netns", "add", name)
        pair = ("type", "veth", "peer", "name", DEVICE, "netns", names[1])
        call("ip", "link", "add", DEVICE, "netns", names[0], *pair)
        for name, address in zip(names, ADDRESSES, strict=True):
            call("ip", "-n", name, "link", "set", "lo", "up")
            call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            call("ip", "-n", name, "link", "set", DEVICE, "up")
            shape = ("rate", rate, "burst", "1mb", "latency", "200ms")
            call("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", DEVICE, "root", "tbf", *shape)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LinkFailed(f"{' '.join(command)}: {done.stderr.strip()}")


def run(rate: str, way: str, flags: list[str]) -> int:
    """Run the steps as two processes, the first of which prints what was measured; returns an exit code.

    One that fails, or takes too long, ends the other.
    """
    cores = sorted(os.sched_getaffinity(0))
    with link(rate) as names:
        running: list[subprocess.Popen] = []
        try:
            for rank, name in enumerate(names):
                place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
                meeting = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29611", "GLOO_SOCKET_IFNAME": DEVICE}
                one = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
                if way == "fsdp2":
                    one |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
                command = ["ip", "netns", "exec", name, "taskset", "-c", str(cores[rank]), sys.executable, str(STEPS)]
                output = None if rank == 0 else subprocess.DEVNULL
                environment = os.environ | place | meeting | one
                running.append(subprocess.Popen([*command, *flags], env=environment, stdout=output))
            deadline = time.monotonic() + SECONDS
            while any(process.poll() is None for process in running) and time.monotonic() < deadline:
                if any(process.poll() for process in running):
                    return 1
                time.sleep(0.1)
            return int(any(process.poll() != 0 for process in running))
        finally:
            for process in running:
                process.kill()
                process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="1gbit", help="of the link, each way [default: 1gbit]")
    parser.add_argument("--way", choices=WAYS, required=True)
    options, flags = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the namespaces are removed then, too
    try:
        sys.exit(run(options.rate, options.way, ["--way", options.way, *flags]))
    except LinkFailed as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
