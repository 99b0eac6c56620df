"""How the processes of a launch find each other: who has come, over which network, and how long they are waited for."""

import contextlib
import dataclasses
import hashlib
import ipaddress
import json
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from lib.errors import UserError, first_line
from lib.runtime.signals import leave, say

INTERFACES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
"""Variables in which gloo and NCCL read their network interface, with what makes it the name and not a prefix of names."""
PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables with which a launcher says who a process is, and where the processes meet."""
JOIN_SECONDS = 600.0
"""How long the processes of a launch wait for each other: as the launchers do."""
RESOLVE_SECONDS = 10.0
"""How long a name may take to be known: name servers are busy when a job starts on many machines."""
POLL_SECONDS = 0.1
BEAT_SECONDS = 5.0
"""How often a process that others wait for says that it is at work."""
SILENT_SECONDS = 60.0
"""How long the store may take, at least, to answer a program that it has let in."""
PATIENCE_SECONDS = 20.0
"""After how long the first process says for whom it waits."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A process of a launch: where it runs, and the address of its machine on the way to the first one."""

    key: str
    """New for each start of a process."""
    host: str
    address: str
    machine: int
    """The launcher's number of the machine, which may run more or fewer processes than others."""


def is_launched() -> bool:
    """Whether this process was launched as one of several, even if it is the only one.

    Raises UserError if the launcher has left out where the others are.
    """
    if int(os.environ.get("LOCAL_RANK", "-1")) == -1:  # as Accelerate reads it
        return False
    if missing := [name for name in PLACE if not os.environ.get(name)]:
        raise UserError(
            f"LOCAL_RANK is set, as by a launcher, but not {', '.join(missing)}: start the script with accelerate launch or "
            "torchrun, which set all of them, or unset LOCAL_RANK for a single process"
        )
    return True


def rank_and_size() -> tuple[int, int]:
    """The number of this process among those that were launched together, and how many these are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def processes_per_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def master() -> str:
    """Address and port at which the processes find each other, as the launcher gave them."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def own_address(other: str) -> str:
    """The address of this machine on the way to the machine `other`; nothing is sent.

    Raises UserError if the name `other` is not known here, or no network leads to it.
    """
    deadline = time.monotonic() + RESOLVE_SECONDS
    while True:
        try:
            family, kind, _, _, place = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
            break
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"the first machine {other} is not known to {socket.gethostname()}: {error}; give the launcher its IP "
                    "address (--main_process_ip of accelerate launch; --master-addr or --rdzv-endpoint of torchrun, and "
                    "--local-addr on that machine)"
                ) from None
            time.sleep(0.5)
    with socket.socket(family, kind) as probe:
        try:
            probe.connect(place)
        except OSError as error:
            raise UserError(
                f"no network leads from {socket.gethostname()} to the first machine {other}: {error}"
            ) from None
        return str(probe.getsockname()[0]).partition("%")[0]


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has `address`; None if none has."""
    import psutil

    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def meet(store: Any, timeout: float) -> list[Member]:
    """All processes of this launch, in their order, when each of them knows that all others are here.

    The first process calls the roll, and each one answers when it finds itself in it. `store` is PyTorch's, reached by all. A
    launcher that restarts processes keeps it, with what those of earlier attempts wrote; hence only what answers now
    counts. `timeout` is in seconds without a sign of anybody. Raises UserError, which names who is missing, or two
    processes that were started as the same one.
    """
    rank, size = rank_and_size()
    machine = int(
        os.environ.get("GROUP_RANK", rank // processes_per_machine())
    )  # GROUP_RANK: of torchrun and Accelerate
    own = Member(secrets.token_hex(8), socket.gethostname(), own_address(os.environ["MASTER_ADDR"]), machine)
    store.set(f"member/{rank}", json.dumps(dataclasses.asdict(own)))
    began = last = time.monotonic()
    told, answered, roll, beat, members = False, "", "", "", list[Member | None]()
    while True:
        if rank == 0 and (called := call_roll(store, size)) != roll:
            store.set("roll", called)
        check_alone(store, own)
        if (heard := beat_of(store, 0)) != beat:  # it calls no roll while it is at work
            beat, last = heard, time.monotonic()
        if store.check(["roll"]) and (found := store.get("roll").decode()) != roll:
            roll, last = found, time.monotonic()
            members = [Member(**entry) if entry else None for entry in json.loads(roll)["members"]]
        listed = len(members) == size and members[rank] == own
        everyone = [member for member in members if member]
        if listed and len(everyone) == size:
            if store.add(f"answers/{digest(everyone)}", int(answered != digest(everyone))) == size:
                return everyone
            answered = digest(everyone)
        missing = [number for number, member in enumerate(members) if member is None] if listed else [0]
        waited = time.monotonic() - began
        if time.monotonic() - last > timeout:
            raise UserError(describe_missing(missing, everyone if listed else [own], size, waited, timeout))
        if rank == 0 and not told and waited > PATIENCE_SECONDS:
            told = True
            say(f"waiting for {describe_ranks(missing)} of {size} at {master()}; {describe_present(everyone)}")
        time.sleep(POLL_SECONDS)


def call_roll(store: Any, size: int) -> str:
    """Who has written into the store, now or in an earlier attempt, and the signs of those that are still at work."""
    here = [number for number in range(size) if store.check([f"member/{number}"])]
    found = dict(zip(here, store.multi_get([f"member/{number}" for number in here]), strict=True))
    members = [json.loads(found[number]) if number in found else None for number in range(size)]
    return json.dumps({"members": members, "beats": [beat_of(store, number) for number in range(size)]})


def beat_of(store: Any, rank: int) -> str:
    """The last sign of a process that is still at work; empty before the first one."""
    return str(store.get(name).decode()) if store.check([name := f"beat/{rank}"]) else ""


def check_alone(store: Any, own: Member) -> None:
    """Raise UserError if another process was started with the number of this one."""
    rank, size = rank_and_size()
    other = Member(**json.loads(store.get(f"member/{rank}")))
    if other.key != own.key:
        raise UserError(
            f"two processes were started as number {rank} of {size}, on {own.host} ({own.address}) and on {other.host} "
            f"({other.address}): each machine needs a number of its own (--machine_rank of accelerate launch, "
            "--node-rank of torchrun)"
        )


def digest(members: list[Member]) -> str:
    """A name for just these processes, in just this attempt."""
    return hashlib.sha256(" ".join(member.key for member in members).encode()).hexdigest()[:16]


def describe_ranks(ranks: list[int]) -> str:
    """Processes by number, in words."""
    if not ranks:
        return "the answer of a process"
    return f"{'process' if len(ranks) == 1 else 'processes'} {', '.join(map(str, ranks))}"


def describe_present(members: list[Member]) -> str:
    """How many processes have come from each machine, in words: on which one those run that have not, only they know."""
    counts = Counter((member.machine, member.host) for member in members)
    return "here are " + ", ".join(f"{count} of machine {number} ({host})" for (number, host), count in counts.items())


def describe_missing(missing: list[int], here: list[Member], size: int, seconds: float, timeout: float) -> str:
    """Who did not come in time, in words."""
    return (
        f"{len(missing) or 'some'} of {size} processes did not come to {master()} within {seconds:.0f} s: "
        f"{describe_ranks(missing)}; {describe_present(here)}. Nothing was heard of the others for {timeout:g} s "
        "(--join_timeout). Look at the log of their machine: they may have ended with an error, or be launched with another "
        "address, port or number of processes"
    )


def choose_interfaces(members: list[Member]) -> dict[str, str]:
    """The variables for gloo and NCCL with the interface that leads to the first machine, but for those the user has set.

    Both libraries would look up the machine's own name, which many machines have as a loopback address that no other one
    can reach. So may the first machine know its own name; then the way to the others counts. Raises UserError if the address
    has no interface here.
    """
    own = members[rank_and_size()[0]].address
    if ipaddress.ip_address(own).is_loopback:
        others = [member.address for member in members if not ipaddress.ip_address(member.address).is_loopback]
        own = own_address(others[0]) if others else own
    unset = {name: mark for name, mark in INTERFACES.items() if not os.environ.get(name)}
    if not unset:
        return {}
    if (interface := interface_of(own)) is None:
        raise UserError(
            f"no network interface of {socket.gethostname()} has the address {own}, from which {master()} is reached; name one "
            f"of `ip addr` in {' and '.join(unset)}"
        )
    return {name: mark + interface for name, mark in unset.items()}


def open_store(timeout: float, *, or_leave: bool) -> Any:
    """PyTorch's store, in which the processes find each other; the first process makes it where no launcher did.

    Raises UserError with its address if nobody listens there for `timeout` seconds. PyTorch waits for ever for what listens
    and does not answer; with `or_leave` this process then ends.
    """
    from torch.distributed import TCPStore  # here: it takes seconds to import

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, size = rank_and_size()
    makes = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    own_address(host)
    if not makes:
        knock(host, port, timeout)
    patience = max(SILENT_SECONDS, timeout)
    silent = f"what listens there does not answer for {patience:g} s; it may be another program"
    backstop = threading.Timer(patience, leave, (f"error: {no_answer(silent)}", 2))
    backstop.daemon = True
    if or_leave:
        backstop.start()
    try:
        return TCPStore(host, port, size, makes, timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(no_answer(first_line(error))) from error
    finally:
        backstop.cancel()


def knock(host: str, port: int, timeout: float) -> None:
    """Wait until a program listens at an address. Raises UserError if none does for `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=min(5.0, timeout)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(no_answer(f"{error}, for {timeout:g} s (--join_timeout)")) from None
        time.sleep(0.2)


def no_answer(why: str) -> str:
    """That the first machine does not answer, in words."""
    return (
        f"{socket.gethostname()} does not reach the first machine at {master()}: {why}\nLook whether that is the address and "
        "the port of machine 0, whether it was started, and whether a firewall is between"
    )


OPENED: list[Any] = []
"""Stores that must stay open: one of the first process closes with its last reference."""


@contextlib.contextmanager
def telling_others() -> Iterator[None]:
    """Within, the processes of this launch that wait in `meet` hear that this one is at work, however long it takes."""
    done = threading.Event()
    rank, size = rank_and_size()

    def beat() -> None:
        with contextlib.suppress(Exception):  # whoever waits says what is wrong
            count, key = 0, secrets.token_hex(8)
            while not done.wait(BEAT_SECONDS):
                if not OPENED:
                    OPENED.append(open_store(JOIN_SECONDS, or_leave=False))
                count += 1
                OPENED[0].set(f"beat/{rank}", f"{key} {count}")

    if size > 1:
        threading.Thread(target=beat, daemon=True, name="at work").start()
    try:
        yield
    finally:
        done.set()
