"""The processes of a launch find each other, over the network that leads to the first machine, in bounded time."""

import dataclasses
import itertools
import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib.errors import UserError
from lib.runtime import network
from lib.runtime.network import Member, choose_interfaces, interface_of, meet, own_address

PLACE = threading.local()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store of its own; each thread is the process with the number `PLACE.rank`."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(network, "rank_and_size", lambda: (PLACE.rank, PLACE.size))
    return torch.distributed.HashStore()


def come(store: Any, rank: int, size: int, timeout: float = 20.0) -> list[Member]:
    PLACE.rank, PLACE.size = rank, size
    return meet(store, timeout)


def start(pool: ThreadPoolExecutor, store: Any, ranks: list[int], size: int, timeout: float = 20.0) -> list[Future]:
    return [pool.submit(come, store, rank, size, timeout) for rank in ranks]


def test_processes_that_meet_know_the_same_members_in_order(store: Any) -> None:
    with ThreadPoolExecutor(3) as pool:
        first, *others = [future.result(30) for future in start(pool, store, [2, 0, 1], 3)]
    assert len({member.key for member in first}) == 3
    assert others == [first, first]
    assert {member.address for member in first} == {"127.0.0.1"}


def test_processes_of_an_earlier_attempt_do_not_count(store: Any) -> None:
    """The launcher's store still has what they wrote; a machine that is back later is waited for."""
    with ThreadPoolExecutor(3) as pool:
        before, *_ = [future.result(30) for future in start(pool, store, [0, 1, 2], 3)]
        early = start(pool, store, [0, 1], 3)
        time.sleep(0.5)
        assert not any(future.done() for future in early)
        (late,) = start(pool, store, [2], 3)
        again = [future.result(30) for future in [*early, late]]
        smaller = [future.result(30) for future in start(pool, store, [0, 1], 2)]
    assert again[0] == again[1] == again[2]
    assert smaller[0] == smaller[1] == smaller[0][:2]
    assert len({member.key for member in [*before, *again[0], *smaller[0]]}) == 8


def test_process_that_does_not_come_is_named_with_the_machines_of_those_that_have(store: Any) -> None:
    """Machines need not run equally many processes: here 1 and 2, of which one has not come."""
    for rank, member in enumerate([Member("b", "node1", "10.77.0.1", 0), Member("c", "node2", "10.77.0.2", 1)], 1):
        store.set(f"member/{rank}", json.dumps(dataclasses.asdict(member)))
    with pytest.raises(
        UserError, match=r"1 of 4 .*127\.0\.0\.1:29500 .*process 3; here are .* 1 of machine 1 \(node2\)"
    ):
        come(store, 0, 4, timeout=0.0)
    with pytest.raises(UserError, match=r"process 0; here are 1 of machine .*--join_timeout"):
        come(store, 3, 4, timeout=0.0)


@pytest.mark.parametrize("busy", [0, 1])
def test_process_that_is_at_work_is_waited_for_longer(busy: int, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one's clock goes on by 100 seconds in each poll, and the busy one gives 20 signs of life."""
    clock = itertools.count(0, 100)
    now = [next(clock)]
    signs = iter(range(20))

    def poll(_: float) -> None:
        now[0] = next(clock)
        if (sign := next(signs, None)) is not None:
            store.set(f"beat/{busy}", str(sign))

    monkeypatch.setattr(network, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=poll))
    with pytest.raises(UserError, match=f"did not come.*process {busy};"):
        come(store, 1 - busy, 2, timeout=600.0)
    assert now[0] > 20 * 100 + 600


def test_process_gives_signs_of_life_as_long_as_it_is_at_work(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(network, "open_store", lambda *_, **__: store)
    monkeypatch.setattr(network, "OPENED", [])
    PLACE.rank, PLACE.size = 1, 2
    with network.telling_others():
        store.wait(["beat/1"], timedelta(seconds=30))
        first = store.get("beat/1")
        deadline = time.monotonic() + 30
        while store.get("beat/1") == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_only_a_process_that_waits_ends_itself_when_the_store_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that is at work, such as downloading."""
    ended = threading.Event()
    messages: list[str] = []
    monkeypatch.setattr(network, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(network, "leave", lambda message, _: (messages.append(message), ended.set()))
    monkeypatch.setattr(torch.distributed, "TCPStore", lambda *_, **__: ended.wait(0.5))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    network.open_store(0.05, or_leave=False)
    assert not ended.is_set()
    network.open_store(30.0, or_leave=True)
    assert not ended.is_set()
    network.open_store(0.05, or_leave=True)
    assert "does not answer" in messages[0]


def test_two_processes_with_one_number_are_an_error_that_names_both(store: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        (first,) = start(pool, store, [1], 3)
        store.wait(["member/1"], timedelta(seconds=30))
        with pytest.raises(UserError, match=r"did not come.*process 0;"):
            come(store, 1, 3, timeout=0.0)
        with pytest.raises(UserError, match=r"two processes were started as number 1 of 3.*--machine_rank"):
            first.result(30)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_variable_that_a_launcher_left_out_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*network.PLACE, "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    assert network.is_launched()
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=rf"but not {missing}:"):
        network.is_launched()
    for alone in ("-1", None):
        monkeypatch.setenv("LOCAL_RANK", alone) if alone else monkeypatch.delenv("LOCAL_RANK")
        assert not network.is_launched()


def test_name_that_is_not_known_is_an_error_that_asks_for_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "RESOLVE_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"no-such-machine\.invalid is not known.*--main_process_ip"):
        own_address("no-such-machine.invalid")


def test_interface_is_the_one_with_the_address_on_the_way_to_the_first_machine() -> None:
    assert own_address("127.0.0.1") == own_address("localhost") == "127.0.0.1"
    assert interface_of("127.0.0.1") in ("lo", "lo0")
    assert interface_of("192.0.2.1") is None


MEMBERS = [
    Member("a", "head", "127.0.1.1", 0),
    Member("b", "head", "127.0.1.1", 0),
    Member("c", "other", "10.77.0.2", 1),
]


@pytest.mark.parametrize("rank", [0, 2])
def test_machine_whose_own_name_is_its_loopback_uses_the_way_to_the_others(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in network.INTERFACES:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(network, "rank_and_size", lambda: (rank, 3))
    monkeypatch.setattr(network, "own_address", {"10.77.0.2": "10.77.0.1"}.__getitem__)
    monkeypatch.setattr(network, "interface_of", {"10.77.0.1": "eth1", "10.77.0.2": "eth2", "127.0.1.1": "lo"}.get)
    name = ["eth1", "", "eth2"][rank]
    assert choose_interfaces(MEMBERS) == {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert choose_interfaces(MEMBERS) == {"GLOO_SOCKET_IFNAME": name}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    assert choose_interfaces(MEMBERS) == {}


def test_address_without_an_interface_is_an_error_that_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in network.INTERFACES:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(network, "rank_and_size", lambda: (2, 3))
    monkeypatch.setattr(network, "interface_of", lambda _: None)
    with pytest.raises(UserError, match=r"has the address 10\.77\.0\.2.*GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"):
        choose_interfaces(MEMBERS)
