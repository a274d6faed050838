"""Damaged and forged checkpoints: always noticed, named in one line, never run, and the previous one is taken."""

import builtins
import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_kit import FILES, latest, load_step, meta_at, model_at, save_step
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn.checkpoint import load, load_latest, save
from syncbn.errors import CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints that tests copy or restore, never change for good."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_step(folder, 1)
    save_step(folder, 2)
    return folder


@pytest.fixture
def two(saved, tmp_path):
    """A folder of its own with checkpoints of steps 1 and 2."""
    return Path(shutil.copytree(saved, tmp_path / "two"))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_detected(saved, data):
    file = saved / "step-000002" / data.draw(st.sampled_from(FILES))
    whole = file.read_bytes()
    position = data.draw(st.integers(0, 8 * len(whole) - 1))
    damaged = bytearray(whole)
    damaged[position // 8] ^= 1 << position % 8
    try:
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load(saved / "step-000002")
        found = latest(saved)
        assert found.meta.step == 1
        assert len(found.notes) == 1
        assert "step-000002" in found.notes[0]
    finally:
        file.write_bytes(whole)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_latest_is_reported(saved, data):
    file = saved / "LATEST"
    whole = file.read_bytes()
    position = data.draw(st.integers(0, 8 * (len(whole) - 1) - 1))
    damaged = bytearray(whole)
    damaged[position // 8] ^= 1 << position % 8
    try:
        file.write_bytes(damaged)
        found = latest(saved)
        assert found.meta.step in (1, 2)
        assert found.notes
    finally:
        file.write_bytes(whole)


def remove(file):
    file.unlink()


def empty(file):
    file.write_bytes(b"")


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def grow(file):
    file.write_bytes(file.read_bytes() + b"\0")


def make_text(file):
    file.write_text("this is no checkpoint\n")


def make_json(file):
    file.write_text('["model.safetensors"]')


def make_folder(file):
    file.unlink()
    file.mkdir()


def swap(file):
    shutil.copy(file.parents[1] / "step-000001" / file.name, file)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "harm", [remove, empty, truncate, grow, make_text, make_json, make_folder, swap]
)
def test_a_damaged_file_is_named_and_the_previous_checkpoint_is_taken(two, name, harm):
    if (name, harm) == ("state.pt", swap):
        save(two, model_at(2), {"other": 1}, meta_at(2))
    harm(two / "step-000002" / name)
    found = latest(two)
    assert found.meta.step == 1
    (note,) = found.notes
    assert "\n" not in note
    assert "step-000002" in note
    if harm is not swap or name != "manifest.json":
        assert name in note


def test_the_whole_folder_gone_or_swapped_is_noticed(two):
    shutil.rmtree(two / "step-000002")
    assert "cannot be read: No such file" in latest(two).notes[0]
    shutil.copytree(two / "step-000001", two / "step-000002")
    assert "holds step 1" in latest(two).notes[0]


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(two):
    for step in (1, 2):
        empty(two / f"step-00000{step}" / "state.pt")
    with pytest.raises(
        CheckpointError, match=r"no whole checkpoint in .*state.pt is empty"
    ) as caught:
        load_latest(two)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("harm", [remove, empty, make_text, make_folder])
def test_without_a_readable_latest_the_newest_is_taken_with_a_note(two, harm):
    harm(two / "LATEST")
    found = latest(two)
    assert found.meta.step == 2
    assert "LATEST" in found.notes[0]


def test_latest_cannot_point_out_of_the_folder(two):
    (two / "LATEST").write_text("../two/step-000001")
    found = latest(two)
    assert found.meta.step == 2
    assert "names no checkpoint" in found.notes[0]


@pytest.mark.parametrize("kind", ["file", "empty LATEST alone"])
def test_something_else_in_place_of_the_folder_is_an_error(tmp_path, kind):
    folder = tmp_path / "checkpoints"
    if kind == "file":
        folder.write_text("hello")
    else:
        folder.mkdir()
        (folder / "LATEST").write_text("")
    with pytest.raises(CheckpointError):
        load_latest(folder)


class Payload:
    """Leaves a file behind where unpickling runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return builtins.open, (str(self.path), "w")


def forge(folder, name, blob):
    """Put `blob` into a checkpoint with a manifest that fits, as somebody who means harm would."""
    (folder / name).write_bytes(blob)
    entries = {
        file: {"sha256": hashlib.sha256(blob).hexdigest(), "size": len(blob)}
        for file in FILES[:3]
        for blob in [(folder / file).read_bytes()]
    }
    (folder / "manifest.json").write_text(json.dumps(entries, indent=1))


def plain_pickle(value):
    return pickle.dumps(value, protocol=2)


def torch_pickle(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("dump", [plain_pickle, torch_pickle])
def test_a_pickle_payload_with_a_fitting_manifest_is_refused_and_not_run(two, tmp_path, name, dump):
    trace = tmp_path / "code-ran"
    payload = {"optimizer": Payload(trace), "extra": {}}
    forge(two / "step-000002", name, dump(payload))
    with pytest.raises(CheckpointError, match=name):
        load(two / "step-000002")
    assert not trace.exists()
    assert load_step(two) == 1
    pickle.loads(pickle.dumps(payload))
    assert trace.exists(), "the payload itself must work, or this test shows nothing"


@pytest.mark.parametrize(
    ("name", "blob"),
    [
        ("state.pt", torch_pickle([1, 2])),
        ("meta.json", b'{"step": 2}'),
        ("meta.json", json.dumps(["step"]).encode()),
        ("model.safetensors", b"\xff" * 64),
    ],
)
def test_files_of_another_form_are_refused(two, name, blob):
    forge(two / "step-000002", name, blob)
    with pytest.raises(
        CheckpointError, match=f"{name} fits its checksum but is not plain data"
    ) as caught:
        load(two / "step-000002")
    assert "\n" not in str(caught.value)
