"""Headers, sums and the watch over other processes: the parts of an exchange that need no ranks."""

import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from syncbn.norm.comm.patrol import Absent, Patrol

from syncbn.norm import sums
from syncbn.norm.comm import patrol
from syncbn.norm.comm.fingerprint import (
    BACKWARD,
    FORWARD,
    NAMED,
    Header,
    RankLost,
    RanksDisagree,
    Serials,
)
from syncbn.norm.comm.processes import Process, Rest
from syncbn.norm.moments import Moments, merge, pack, unpack


@given(
    st.sampled_from([FORWARD, BACKWARD]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(1, 2**40),
    st.text(alphabet="abc.0", max_size=136),
)
def test_headers_survive_packing(kind, dtype, channels, layer):
    header = Header(kind, NAMED, channels, dtype, True, 8 * channels, layer)
    assert Header.unpack(header.pack()) == header


def test_long_layer_names_keep_the_end_that_tells_them_apart():
    name = "backbone." * 40 + "bn7"
    header = Header(FORWARD, NAMED, 1, torch.float32, True, 0, name)
    assert Header.unpack(header.pack()).layer == name[-136:]


@given(st.lists(st.integers(0, 50)), st.integers(0, 10**6), st.integers(1, 1000))
def test_codes_of_unnamed_layers_depend_on_order_alone(serials, offset, gap):
    here, there = Serials(), Serials()
    for serial in serials:
        assert _used(here, serial) == _used(there, offset + gap * serial)


def _used(serials, serial):
    code = serials.code(serial)
    serials.keep(serial)
    return code


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_codes_of_unnamed_layers_tell_orders_apart(one, other):
    here, there = Serials(), Serials()
    codes = [(_used(here, a), _used(there, b)) for a, b in zip(one, other, strict=True)]
    assert all(a == b for a, b in codes) == (one == other)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.floats(-1e3, 1e3)), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_summed_moments_merge_like_gathered_ones(ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    packed = []
    for count, mean in ranks:
        x = mean + torch.randn(count, 3, generator=generator, dtype=torch.float64)
        own = x.mean(0) if count else torch.zeros(3, dtype=torch.float64)
        M2 = ((x - own) ** 2).sum(0)
        packed.append(pack(Moments(torch.tensor(float(count)).double(), own, M2)))
    together = sums.to_packed(torch.stack([sums.of_packed(p) for p in packed]).sum(0))
    ours, theirs = merge(*unpack(together)), merge(*unpack(torch.stack(packed)))
    assert ours.count == theirs.count
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(ours.M2, theirs.M2, rtol=1e-9, atol=1e-7)


def test_large_counts_survive_sums():
    moments = Moments(torch.tensor(2.0**31 + 5, dtype=torch.float64), torch.ones(1), torch.ones(1))
    back = unpack(sums.to_packed(sums.of_packed(pack(moments))).to(torch.float32))
    assert back.count == moments.count


def _program(text):
    return subprocess.Popen([sys.executable, "-c", text])


def _asleep_after(process, seconds):
    rest = Rest(Process(process.pid))
    until = time.monotonic() + seconds
    asleep_s = 0.0
    while time.monotonic() < until:
        asleep_s = rest.asleep_s()
        time.sleep(0.1)
    process.kill()
    process.wait()
    return asleep_s


def test_a_sleeping_process_is_asleep_and_a_working_one_is_not():
    sleeping = _program("import time; time.sleep(60)")
    working = _program("while True: pass")
    time.sleep(0.5)
    assert _asleep_after(sleeping, 1.5) > 1.2
    assert _asleep_after(working, 1.5) < 1.0


@pytest.mark.parametrize("buried", [True, False], ids=["buried", "zombie"])
def test_a_process_that_ended_is_lost_buried_or_not(buried):
    ended = subprocess.Popen(["true"])
    if buried:
        ended.wait()
    else:
        time.sleep(0.3)
    with pytest.raises(RankLost, match="rank 0 is here and waits for rank 3: it died"):
        Patrol("rank 0 is here", 60.0).look([Absent(3, Process(ended.pid))])
    ended.wait()


def test_a_later_process_of_the_same_id_is_not_mistaken_for_it():
    own = Process.own()
    assert own.state() in "RS"
    assert Process(own.pid, own.started - 1).state() == "X"


def test_a_rank_that_left_cannot_come():
    with pytest.raises(RanksDisagree, match="it destroyed its process group and cannot come"):
        Patrol("rank 0 is here", 60.0).look([Absent(1, None, left=True)])


def test_nobody_is_missed_when_all_have_come_after_all():
    Patrol("rank 0 is here", 0.0).look([])


def test_a_rank_of_which_nothing_is_known_is_missed_at_the_time_limit():
    watch = Patrol("rank 0 is here", 0.05)
    watch.look([Absent(1, None, "backward")])
    time.sleep(0.1)
    with pytest.raises(RanksDisagree, match=r"it did not come within 0\.05 s"):
        watch.look([Absent(1, None)])


def test_limits_for_sleepers_leave_room_below_ten_seconds():
    assert patrol.ASLEEP_S["backward"] < patrol.ASLEEP_S["forward"] < 8 < patrol.ASLEEP_S[""]
