"""A damaged image that one rank alone comes upon: what a person must mend is what every record says."""

import json
import sqlite3

import numpy as np
import pytest
from PIL import Image
from programs import complaint
from test_signalled_loaders import SYNCBN, TORCHRUN

RUN = ("train", "data=image_folder", "data.root=images", "data.image_size=8", "data.augment=false", "norm=sync",
       "model.hidden=[4]", "train.per_rank_batch=2", "train.steps=4", "train.eval_every=2",
       "tracking.uri=sqlite:///mlflow.db", "train.progress=false")  # fmt: skip
LAUNCHERS = {
    "one": (*SYNCBN, *RUN, "launcher.num_workers=1"),
    "local": (*SYNCBN, *RUN, "launcher.num_workers=2"),
    "torchrun": (*TORCHRUN, *RUN),
    "ray": (*SYNCBN, *RUN, "launcher=ray", "launcher.num_workers=2"),
}


def make_images(folder):
    """Images of two classes; the second of the test set, which is rank 1's, is cut off."""
    for split in ("train", "test"):
        for label in ("a", "b"):
            (place := folder / split / label).mkdir(parents=True)
            for number in range(4):
                noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(noise).save(place / f"{number}.png")
    damaged = folder / "test" / "a" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:100])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_loaders", [0, 1])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_damaged_image_is_what_every_record_names(bench, tmp_path, launcher, num_loaders):
    make_images(tmp_path / "images")
    command = (*LAUNCHERS[launcher], f"data.num_loaders={num_loaders}", "train.eval_batch=2")
    result = bench.run(*command)
    if launcher != "torchrun":  # which ends with 1 itself, and a table
        assert result.returncode == 3, result.stderr
        assert "Traceback" not in result.stderr
    assert "images/test/a/1.png cannot be decoded" in complaint(result)
    run = tmp_path / "runs" / "run"
    *_, end = map(json.loads, (run / "journal.jsonl").read_text().splitlines())
    assert end["status"] == "failed"
    assert end["error"].startswith("DataError: image ")
    assert "images/test/a/1.png cannot be decoded" in end["error"]
    assert _tags(tmp_path / "mlflow.db")["error"] == end["error"]
    assert "images/test/a/1.png" in (run / "error.log").read_text()
    assert not bench.left_running()


def _tags(store):
    with sqlite3.connect(store) as connection:
        return dict(connection.execute("select key, value from tags"))
