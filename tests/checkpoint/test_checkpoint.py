"""What a checkpoint promises: bit-exact return, a fit that is checked, one job a run folder."""

import os
import random
import signal

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_kit import bits, latest, meta_at, names, save_step, small_net

from syncbn.checkpoint import (
    Meta,
    RunLock,
    check_matches,
    load,
    load_latest,
    restore_model,
    rng,
    save,
)
from syncbn.checkpoint.safetensors_file import NAMES, encoded
from syncbn.errors import CheckpointError

# What comes back


def test_model_optimizer_and_meta_come_back_bit_for_bit(tmp_path):
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    extra = {"best": 0.1, "seen": torch.arange(3)}
    save(tmp_path, model.state_dict(), optimizer.state_dict(), meta_at(7), extra=extra)

    found = latest(tmp_path)
    assert found.meta == meta_at(7)
    assert found.notes == ()
    other = small_net()
    assert restore_model(other, found.model_state) == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
        assert other.state_dict()[name].dtype == tensor.dtype
    again = torch.optim.AdamW(other.parameters(), lr=0.9)
    again.load_state_dict(found.optimizer_state)
    assert again.param_groups[0]["lr"] == 0.1
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        for key, tensor in optimizer.state[ours].items():
            assert torch.equal(again.state[theirs][key], tensor), key
    assert found.extra["best"] == 0.1
    assert torch.equal(found.extra["seen"], torch.arange(3))


def test_shared_strided_empty_and_special_values_come_back(tmp_path):
    weight = torch.randn(4, 3)
    state = {
        "tied.a": weight,
        "tied.b": weight,
        "transposed": weight.t(),
        "row": weight[1],
        "bf16": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16),
        "num_batches_tracked": torch.tensor(2**40 + 1),
        "empty": torch.empty(0, 3),
        "flag": torch.tensor([True, False]),
    }
    save(tmp_path, state, {}, meta_at(1))
    back = latest(tmp_path).model_state
    assert set(back) == set(state)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(bits(back[name]), bits(tensor)), name


def test_the_models_file_is_the_one_that_safetensors_makes():
    state = {f'{dtype} é"': torch.arange(6).reshape(3, 2).to(dtype) for dtype in NAMES}
    state |= {"z": torch.zeros(2), "a": torch.tensor(1.0), "empty": torch.empty(0, 3)}
    for one in (state, {}, {"a": torch.zeros(3, dtype=torch.int8)}):
        assert bytes(encoded(one)) == safetensors.torch.save(one)


def test_a_dtype_that_safetensors_lacks_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"phase is of torch.complex128, .* use one of"):
        save(tmp_path, {"phase": torch.zeros(2, dtype=torch.complex128)}, {}, meta_at(1))
    assert names(tmp_path) == []


def test_random_states_come_back(tmp_path):
    cpu = torch.device("cpu")
    random.gauss(0, 1)  # leaves a cached value behind, which is part of the state
    np.random.standard_normal()  # noqa: NPY002
    row = rng.capture(cpu)
    save(tmp_path, {}, {}, Meta(1, 8, "abc", 1, 8, [rng.to_text(row)]))

    def draws():
        return (
            random.gauss(0, 1),
            random.random(),
            np.random.standard_normal(),  # noqa: NPY002
            torch.rand(3).tolist(),
        )

    first = draws()
    rng.restore(rng.from_text(latest(tmp_path).meta.rng[0]), cpu)
    assert draws() == first
    assert rng.capture(cpu).shape == row.shape


def test_nothing_saved_yet_is_a_fresh_start(tmp_path):
    assert load_latest(tmp_path / "checkpoints") is None
    assert load_latest(tmp_path) is None


def test_the_newest_two_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step)
    assert names(tmp_path) == ["LATEST", "step-000003", "step-000004"]
    assert (tmp_path / "LATEST").read_text() == "step-000004\n"


def test_a_damaged_checkpoint_does_not_count_among_those_kept(tmp_path):
    for step in (1, 2):
        save_step(tmp_path, step)
    (tmp_path / "step-000002" / "state.pt").write_text("no longer")
    save_step(tmp_path, 3)
    assert names(tmp_path) == ["LATEST", "step-000001", "step-000003"]


def test_saving_an_earlier_step_abandons_later_ones(tmp_path):
    for step in (10, 20):
        save_step(tmp_path, step)
    save_step(tmp_path, 5)
    assert names(tmp_path) == ["LATEST", "step-000005"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save_step(tmp_path, 1)
    save(tmp_path, {"weight": torch.full((3, 2), 1.0), "other": torch.ones(1)}, {}, meta_at(1))
    assert "other" in latest(tmp_path).model_state
    assert names(tmp_path) == ["LATEST", "step-000001"]


def test_a_state_that_could_not_be_read_back_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match=r"state\['extra'\]\['lr'\] is a numpy.float64"):
        save(tmp_path, {}, {}, meta_at(1), extra={"lr": np.float64(0.1)})
    assert names(tmp_path) == []


def test_a_save_waits_for_the_disk_no_more_often_for_a_model_of_more_layers(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(file), fsync(file)))
    counts = set()
    for step, num_layers in enumerate((1, 4, 40), start=1):
        state = {f"layer{i}.weight": torch.zeros(10, 10) for i in range(num_layers)}
        save(tmp_path, state, {}, meta_at(step))
        counts.add(len(synced))
        synced.clear()
    assert len(counts) == 1
    assert counts.pop() <= 8


# Matching


def test_another_global_batch_is_refused(tmp_path):
    found = load(save_step(tmp_path, 2))
    assert check_matches(found, world_size=2, global_batch=8) == []
    with pytest.raises(CheckpointError, match=r"a global batch .* of 8, this run has 16"):
        check_matches(found, world_size=4, global_batch=16)


def test_another_world_size_is_said(tmp_path):
    (note,) = check_matches(load(save_step(tmp_path, 2)), world_size=4, global_batch=8)
    assert "resuming on 4 ranks a run saved on 2" in note


def test_another_architecture_is_named_and_changes_nothing():
    model, state = small_net(), small_net().state_dict()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["0.weight"] = torch.zeros(3, 5)
    state["2.bias"] = state["2.bias"].double()
    state["extra.weight"] = state.pop("1.weight")
    with pytest.raises(CheckpointError) as caught:
        restore_model(model, state)
    message = str(caught.value)
    assert "missing: 1.weight" in message
    assert "unexpected: extra.weight" in message
    assert "0.weight is float32 (3, 5), the model has float32 (3, 4)" in message
    assert "2.bias is float64 (2,), the model has float32 (2,)" in message
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_a_long_list_of_missing_parameters_is_cut():
    with pytest.raises(CheckpointError, match=r"missing: 0.weight, 0.bias, 1.weight and 6 more"):
        restore_model(small_net(), {})


def test_a_module_prefix_is_taken_off_and_said():
    source, model = small_net(), small_net()
    state = {f"module.{name}": tensor for name, tensor in source.state_dict().items()}
    (note,) = restore_model(model, state)
    assert "'module.'" in note
    assert torch.equal(model.state_dict()["0.weight"], source.state_dict()["0.weight"])


# The lock


def test_a_second_job_on_a_run_folder_is_refused(tmp_path):
    with RunLock(tmp_path / "run"):
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}") as caught:
            RunLock(tmp_path / "run").__enter__()
        assert caught.value.exit_code == 4
    with RunLock(tmp_path / "run"):
        pass


def test_a_lock_dies_with_its_process(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with RunLock(tmp_path):
                os.write(writer, b".")
                signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reader, 1) == b"."
        with pytest.raises(CheckpointError, match=f"in use by process {child}"):
            RunLock(tmp_path).__enter__()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    with RunLock(tmp_path):
        pass


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*: Not a directory"):
        RunLock(tmp_path / "file" / "run").__enter__()
