"""Connections between ranks that share no memory: the same frames as through the group, and who is missed how soon."""

import errno
import gc
import os
import signal
import socket
import struct
import time

import pytest
import torch
import torch.distributed as dist
from own_ranks import run_ranks

import syncbn
from syncbn.norm.comm.exchange import FORWARD, Fingerprint, exchange_of
from syncbn.norm.comm.fingerprint import RankLost
from syncbn.norm.comm.transports import shared_memory, sockets
from syncbn.norm.comm.transports.process_group import Group
from syncbn.norm.comm.transports.sockets import CHUNK_BYTES, Sockets

CHUNK = CHUNK_BYTES // 4
"""Values of float32 in one chunk."""


def _group():
    """A group of all ranks, connected in its first exchange."""
    group = dist.new_group()
    assert type(_first_exchange(group)) is Sockets
    return group


def _first_exchange(group, choice="sockets"):
    """The transport of a group that shares no memory."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SYNCBN_EXCHANGE", choice)
        monkeypatch.setattr(shared_memory, "_make", lambda *_: None)
        _gather(group)
    return exchange_of(group).transport


def _gather(group, values=None, layer="bn1"):
    values = torch.ones(3) if values is None else values
    what = Fingerprint(layer, len(values), values.dtype, needs_grad=True)
    return exchange_of(group).gather(values, FORWARD, what)


def _values(rank, size, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(rank)).to(dtype)


def _refused(group, error, match):
    with pytest.raises(error, match=match):
        _gather(group)


@pytest.mark.world_size(2, 3, 4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_rank_gets_the_bits_of_all_in_rank_order_whatever_their_number(world_size, dtype):
    group = _group()
    for size in (0, 1, 4098, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 7):
        gathered = _gather(group, _values(dist.get_rank(), size, dtype))
        for rank in range(world_size):
            assert torch.equal(gathered[rank], _values(rank, size, dtype))


@pytest.mark.world_size(2, 3)
def test_ranks_stay_in_step_when_some_are_faster(world_size):
    group, sizes = _group(), torch.Generator().manual_seed(0)
    for step in range(50):
        if step % world_size == dist.get_rank():
            time.sleep(0.002)
        size = int(torch.randint(2 * CHUNK, (1,), generator=sizes))
        gathered = _gather(group, torch.full((size,), 100.0 * step + dist.get_rank()))
        assert all(bool((gathered[r] == 100 * step + r).all()) for r in range(world_size))


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("sizes", [(5, 9), (9, 5), (3 * CHUNK, 7), (7, 3 * CHUNK)])
def test_the_exchange_goes_on_after_ranks_met_in_different_layers(world_size, sizes):
    group, rank = _group(), dist.get_rank()
    own, size = ("bn2", sizes[1]) if rank == 1 else ("bn1", sizes[0])
    match = f"rank {rank} is in the forward of SyncBatchNorm '{own}'.*; rank [01] is in the"
    for _ in range(2):
        with pytest.raises(syncbn.RanksDisagree, match=match):
            _gather(group, torch.ones(size), own)
        assert torch.equal(_gather(group, torch.full((5,), 2.0)), torch.full((world_size, 5), 2.0))


@pytest.mark.world_size(3)
def test_a_rank_that_does_not_come_is_named_at_the_time_limit_and_hears_of_it_when_it_comes(
    world_size,
):
    group = _group()
    exchange_of(group)._group.timeout_s = 2.0
    match = r"rank [02] .*sequence number 2.* and waits for rank 1: it did not come within 2 s"
    if dist.get_rank() != 1:
        for _ in range(2):
            _refused(group, syncbn.RanksDisagree, match)
    dist.barrier()
    if dist.get_rank() == 1:
        _refused(group, syncbn.RanksDisagree, match)


@pytest.mark.world_size(2)
def test_a_rank_that_is_interrupted_while_it_waits_tells_the_others(world_size):
    group = _group()
    if dist.get_rank() == 0:
        before = signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        _refused(group, KeyboardInterrupt, "enough")
        signal.signal(signal.SIGALRM, before)
        _refused(group, syncbn.RanksDisagree, "was interrupted: Keyb")
    else:
        time.sleep(1)
        _refused(group, RankLost, "rank 0 .* was interrupted: Keyb")


def _interrupt(*_):
    raise KeyboardInterrupt("enough")


def lose_one(keep_child):
    """Rank 1 is killed while the others wait for it, perhaps survived by a child that it forked."""
    group = _group()
    if dist.get_rank() == 1:
        time.sleep(0.5)
        if keep_child == "child" and os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        _gather(group)
    except RankLost as error:
        os.write(1, f"{error}\n".encode())
        os._exit(error.exit_code)


@pytest.mark.parametrize("child", [pytest.param("child", marks=pytest.mark.slow), "alone"])
def test_a_rank_that_is_killed_is_lost_to_all(child):
    outcomes = run_ranks(__name__, "lose_one", child, world_size=3)
    assert [outcome.returncode for outcome in outcomes] == [75, -signal.SIGKILL, 75]
    for said in (outcomes[0].output, outcomes[2].output):
        assert ": it exited" in said


@pytest.mark.world_size(2)
def test_connections_go_with_the_group(world_size):
    group = _group()
    held = exchange_of(group).transport._connections[1 - dist.get_rank()]
    dist.barrier()
    if dist.get_rank():
        dist.destroy_process_group(group)
        del group
        gc.collect()
        assert held.fileno() == -1
    else:
        _refused(group, RankLost, "rank 1: it .* left the group")


@pytest.mark.world_size(2)
def test_a_rank_that_ends_having_read_everything_is_lost(world_size):
    group = _group()
    if dist.get_rank():
        exchange_of(group).transport._connections[0].shutdown(socket.SHUT_WR)
        dist.barrier()
    else:
        dist.barrier()
        _refused(group, RankLost, "waits for rank 1: it exited")


@pytest.mark.world_size(2)
def test_a_forked_child_lets_go_of_connections(world_size):
    group = _group()
    dist.barrier()
    if dist.get_rank():
        sockets._let_go()
        assert exchange_of(group).transport._connections[0].fileno() == -1
        _refused(group, RuntimeError, "cannot use its socket to rank 0: .*Bad file descriptor")
    else:
        _refused(group, RankLost, "rank 1 .* cannot use its socket to rank 0")


@pytest.mark.world_size(3)
@pytest.mark.parametrize("obstacle", ["no interface", "encrypted", "elsewhere", "stranger", "many"])
def test_ranks_that_cannot_all_connect_gather_through_the_group(world_size, obstacle):
    group = dist.new_group()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sockets, "CONNECT_S", 0.5)
        if obstacle == "many":
            monkeypatch.setattr(sockets, "MESH_RANKS", 2)
        elif dist.get_rank() == 1:
            _obstruct(monkeypatch, obstacle)
        assert type(_first_exchange(group, "auto")) is Group
    gathered = _gather(group, torch.full((5,), float(dist.get_rank())))
    assert torch.equal(gathered, torch.arange(3.0)[:, None].expand(3, 5))


@pytest.mark.world_size(2)
def test_connections_that_cannot_be_had_are_an_error_where_they_were_demanded(world_size):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sockets, "_listener", lambda: None)
        with pytest.raises(RuntimeError, match="SYNCBN_EXCHANGE=sockets, but the ranks of this"):
            _first_exchange(dist.new_group())


def _obstruct(monkeypatch, obstacle):
    if obstacle == "no interface":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothing0")
    elif obstacle == "encrypted":
        monkeypatch.setenv("GLOO_DEVICE_TRANSPORT", "TCP_TLS")
    elif obstacle == "elsewhere":
        monkeypatch.setattr(sockets.socket, "create_connection", _unreachable)
    else:
        monkeypatch.setattr(sockets, "_HELLO", _Stranger(sockets._HELLO.format))


class _Stranger(struct.Struct):
    """Says something else than a rank would."""

    def pack(self, *_):
        return b"GET / HTTP/1.1"


def _unreachable(*_):
    raise OSError(113, "No route to host")


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("number", "error", "match"),
    [
        (
            errno.ETIMEDOUT,
            RankLost,
            "waits for rank 1: it exited, failed or left the group",
        ),
        (errno.EHOSTUNREACH, RankLost, "waits for rank 1: it exited, failed"),
        (errno.ENOBUFS, RuntimeError, "and cannot use its socket to rank 1: .*No buffer space"),
    ],
)
def test_only_what_the_network_says_of_a_rank_makes_it_lost(world_size, number, error, match):
    group = _group()
    if dist.get_rank() == 0:
        transport = exchange_of(group).transport
        transport._connections = {1: _Broken(number)}
        with pytest.raises(error, match=match) as raised:
            _gather(group)
        assert type(raised.value) is error


class _Broken(socket.socket):
    """A socket that fails."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def send(self, *_):
        raise OSError(self.number, os.strerror(self.number))
