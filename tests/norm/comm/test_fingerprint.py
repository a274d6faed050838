"""Headers, codes of unnamed layers, and sums: the parts of an exchange that need no ranks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from syncbn.norm.comm.fingerprint import (
    BACKWARD,
    FORWARD,
    NAMED,
    Fingerprint,
    Serials,
    packed,
    text_of,
    unpacked,
)
from syncbn.norm.moments import Moments, from_sums, merge, pack, to_sums, unpack


@given(
    st.sampled_from([FORWARD, BACKWARD]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(1, 2**40),
    st.text(alphabet="abc.0", max_size=136),
)
def test_headers_survive_packing(kind, dtype, channels, layer):
    body = packed(kind, NAMED, 8 * channels, Fingerprint(layer, channels, dtype, True))
    header = unpacked(body)
    assert header[:3] + header[4:6] == (kind, NAMED, channels, True, 8 * channels)
    assert header.layer.rstrip(b"\0").decode() == layer
    name = str(dtype).removeprefix("torch.")
    assert f" {layer!r} (sequence number 7, {channels} channels, {name})" in text_of(body, 7)


def test_long_layer_names_keep_the_end_that_tells_them_apart():
    name = "backbone." * 40 + "bn7"
    body = packed(FORWARD, NAMED, 0, Fingerprint(name, 1, torch.float32, True))
    assert unpacked(body).layer.decode() == name[-136:]


def test_a_dtype_without_a_code_is_called_another():
    body = packed(FORWARD, NAMED, 0, Fingerprint("bn", 1, torch.complex64, False))
    assert text_of(body, 1).endswith("another dtype, no gradient)")


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
    together = from_sums(torch.stack([to_sums(p) for p in packed]).sum(0))
    ours, theirs = merge(*unpack(together)), merge(*unpack(torch.stack(packed)))
    assert ours.count == theirs.count
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(ours.M2, theirs.M2, rtol=1e-9, atol=1e-7)


def test_large_counts_survive_sums():
    moments = Moments(torch.tensor(2.0**31 + 5, dtype=torch.float64), torch.ones(1), torch.ones(1))
    back = unpack(from_sums(to_sums(pack(moments))).to(torch.float32))
    assert back.count == moments.count
