"""The processes of a launch find each other, over the network that leads to the first machine, in bounded time."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
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


def test_process_that_does_not_come_is_named_with_its_machine(store: Any) -> None:
    with ThreadPoolExecutor(3) as pool:
        for future in start(pool, store, [0, 1, 2], 4, timeout=0.5):
            with pytest.raises(
                UserError, match=r"1 of 4 .*127\.0\.0\.1:29500 .*process 3 \(of machine 1\).*--join_timeout"
            ):
                future.result(30)


def test_process_that_is_at_work_is_waited_for_longer(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(network, "open_store", lambda _: store)
    monkeypatch.setattr(network, "OPENED", [])

    def download() -> list[Member]:
        PLACE.rank, PLACE.size = 1, 2
        with network.telling_others():
            time.sleep(2.0)
        return meet(store, 20.0)

    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(download)
        (first,) = start(pool, store, [0], 2, timeout=1.0)
        assert first.result(30) == other.result(30)


def test_two_processes_with_one_number_are_an_error_that_names_both(store: Any) -> None:
    with ThreadPoolExecutor(3) as pool:
        futures = start(pool, store, [1], 3)
        time.sleep(0.2)
        futures += start(pool, store, [1], 3, timeout=1.0)
        with pytest.raises(UserError, match=r"two processes were started as number 1 of 3.*--machine_rank"):
            futures[0].result(30)
        with pytest.raises(UserError, match=r"did not come.*process 0 "):
            futures[1].result(30)


def test_name_that_is_not_known_is_an_error_that_asks_for_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "RESOLVE_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"no-such-machine\.invalid is not known.*--main_process_ip"):
        own_address("no-such-machine.invalid")


def test_interface_is_the_one_with_the_address_on_the_way_to_the_first_machine() -> None:
    assert own_address("127.0.0.1") == own_address("localhost") == "127.0.0.1"
    assert interface_of("127.0.0.1") in ("lo", "lo0")
    assert interface_of("192.0.2.1") is None


MEMBERS = [Member("a", "head", "127.0.1.1"), Member("b", "head", "127.0.1.1"), Member("c", "other", "10.77.0.2")]


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
