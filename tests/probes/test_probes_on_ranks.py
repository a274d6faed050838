"""Probes on real ranks: they compare ranks with one process, cost their exchanges, and leave training alone."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from syncbn.checkpoint import load_latest
from syncbn.config import (
    DataConfig,
    LauncherConfig,
    ModelConfig,
    NormConfig,
    ProbeConfig,
    RunConfig,
    TrainConfig,
)
from syncbn.errors import UsageError
from syncbn.norm.comm.exchange import NO_TURN, Exchange, exchange_of
from syncbn.norm.comm.fingerprint import BACKWARD, FORWARD, Fingerprint
from syncbn.norm.comm.transports.shared_memory import ELSEWHERE
from syncbn.probes.oracle import KINDS
from syncbn.runtime import TorchrunRuntime
from syncbn.tracking import Untracked, read_journal
from syncbn.train import recorded_run, train

CPU = torch.device("cpu")
NAMES = ["quantiles", "shift", "saturation", "gradients", "exchange", "oracle"]
"""Those that may look at several ranks."""


def _config(folder, world_size: int, names: list[str], arm="sync", **options: object) -> RunConfig:
    settings = {"steps": 30, "per_rank_batch": 24 // world_size, "precision": "float64"} | options
    return RunConfig(
        runs_dir=str(folder),
        model=ModelConfig(hidden=[16, 8]),
        data=DataConfig(limit=60),
        norm=NormConfig(name=arm),
        train=TrainConfig(**settings),
        launcher=LauncherConfig(num_workers=world_size),
        probe=ProbeConfig(names=names, every=3, samples=40),
    )


@pytest.mark.world_size(2, 3)
@pytest.mark.parametrize("drop_last", [True, False], ids=["whole batches", "uneven last batches"])
def test_synchronised_ranks_stay_with_the_textbook_and_local_ones_do_not(
    world_size, tmp_path, drop_last
):
    runtime = TorchrunRuntime(CPU)
    for arm in ("sync", "local"):
        cfg = _config(tmp_path / arm, world_size, ["oracle"], arm, drop_last=drop_last)
        cfg = replace(cfg, data=DataConfig(limit=60 + 5))  # an epoch may end with a batch of 17
        final = train(cfg, runtime, Untracked()).final
        gaps = {kind: final[f"oracle_gap_{kind}"] for kind in KINDS}
        if arm == "sync":
            assert all(0 <= gap < 1e-9 for gap in gaps.values()), gaps
        else:
            assert all(gap > 1e-3 for gap in gaps.values()), gaps


@pytest.mark.world_size(2)
@pytest.mark.parametrize("arm", ["sync", "local_avg"])
def test_probes_leave_ranks_their_bits_and_all_ranks_the_same_finals(world_size, tmp_path, arm):
    runtime = TorchrunRuntime(CPU)
    straight, probed = (
        _config(tmp_path / name, world_size, names, arm)
        for name, names in (("a", []), ("b", NAMES))
    )
    recorded_run(straight, runtime)
    summary = recorded_run(probed, runtime)
    ours, theirs = (load_latest(cfg.folder / "checkpoints") for cfg in (probed, straight))
    for name, value in ours.model_state.items():
        assert torch.equal(value, theirs.model_state[name]), name
    assert ours.meta.rng == theirs.meta.rng
    finals = [None] * world_size
    dist.all_gather_object(finals, json.dumps(summary.final))
    assert finals[0] == finals[1]
    assert {"quantile_range", "shift_slope", "oracle_gap_loss", "step_ms"} <= summary.final.keys()


@pytest.mark.world_size(2)
def test_a_resumed_run_of_ranks_ends_with_the_same_numbers(world_size, tmp_path):
    runtime = TorchrunRuntime(CPU)
    names = [name for name in NAMES if name != "exchange"]  # times never repeat
    straight, cfg = (
        _config(tmp_path / name, world_size, names, checkpoint_every=10) for name in "ab"
    )
    whole = recorded_run(straight, runtime)
    recorded_run(cfg, runtime)
    if dist.get_rank() == 0:  # as if killed after step 10
        (cfg.folder / "summary.json").unlink()
        (cfg.folder / "checkpoints" / "LATEST").write_text("step-000020\n")
    dist.barrier()
    assert recorded_run(cfg, runtime).final == whole.final


@pytest.mark.world_size(2)
def test_exchanges_of_a_step_are_counted_and_timed_by_layer(world_size, tmp_path):
    cfg = _config(tmp_path, world_size, ["exchange"])
    final = recorded_run(cfg, TorchrunRuntime(CPU)).final
    # float64: count, two sums' room and 2C moments forward, 2C sums backward; see syncbn.norm.moments
    sizes = {"hidden.0.norm": 16, "hidden.1.norm": 8}
    for layer, channels in sizes.items():
        assert final[f"exchange_bytes/{layer}"] == 8 * (2 + 2 * channels) + 8 * 2 * channels
        assert 0 < final[f"exchange_ms/{layer}"] <= final["exchange_ms"]
    assert final["exchange_bytes"] == sum(final[f"exchange_bytes/{layer}"] for layer in sizes)
    assert final["exchange_ms"] < final["step_ms"]
    assert final["exchange_share"] == final["exchange_ms"] / final["step_ms"]
    assert Exchange.observer is None


@pytest.mark.world_size(2)
def test_probes_on_ranks_give_the_numbers_of_one_process(world_size, tmp_path):
    names = ["quantiles", "shift", "saturation", "gradients"]
    ranks = _config(tmp_path / "ranks", world_size, names)
    recorded_run(ranks, TorchrunRuntime(CPU))
    if dist.get_rank() == 0:
        one = replace(ranks, runs_dir=str(tmp_path / "one"), norm=NormConfig(name="big_batch"))
        recorded_run(one, TorchrunRuntime(CPU).solo())
        ours, theirs = (list(read_journal(cfg.folder / "journal.jsonl")) for cfg in (ranks, one))
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.get("step") == other.get("step")
            assert mine.get("metrics", {}) == pytest.approx(other.get("metrics", {}), rel=1e-6)


@pytest.mark.world_size(2)
def test_probes_that_need_one_process_are_refused_before_anything_is_written(world_size, tmp_path):
    cfg = _config(tmp_path, world_size, ["population"])
    with pytest.raises(
        UsageError, match=r"needs one process, and 2 ranks train: use train.virtual"
    ):
        recorded_run(cfg, TorchrunRuntime(CPU))
    assert not list(tmp_path.glob("run/checkpoints/*"))


@pytest.mark.world_size(2)
def test_population_of_a_process_that_trains_alone_among_others_waits_for_nobody(
    world_size, tmp_path
):
    cfg = _config(tmp_path, world_size, ["population"], "big_batch")
    if dist.get_rank() == 0:  # as in a study, where the other rank is busy with a trial of its own
        final = train(cfg, TorchrunRuntime(CPU).solo(), Untracked()).final
        assert 0 <= final["test_error_precise"] < 1


@pytest.mark.world_size(2)
def test_an_observer_is_told_of_each_exchange_and_changes_none(world_size):
    torch.manual_seed(dist.get_rank())
    what = Fingerprint("a", 3, torch.float32, needs_grad=True)
    packed, sums = torch.rand(8), torch.rand(2, 3)
    exchange = exchange_of(dist.group.WORLD)
    expected = [
        exchange.combine(packed, FORWARD, what),
        exchange.combine(sums.flatten(), BACKWARD, what),
    ]
    told = []
    Exchange.observer = lambda *exchanged: told.append(exchanged)
    try:
        assert exchange.announce_native(FORWARD, packed.nbytes, what) == (ELSEWHERE, NO_TURN)
        found = [
            exchange.combine(packed, FORWARD, what),
            exchange.combine(sums.flatten(), BACKWARD, what),
        ]
    finally:
        Exchange.observer = None
    exchange.combine(packed, FORWARD, what)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert [exchanged[:3] for exchanged in told] == [("a", FORWARD, 32), ("a", BACKWARD, 24)]
    assert all(exchanged[3] > 0 for exchanged in told)
