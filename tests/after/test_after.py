"""A trained run, measured again, asked about files, and handed on."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from syncbn.after.find import find
from syncbn.after.measure import measure
from syncbn.after.predict import _ranked
from syncbn.after.trained import open_run
from syncbn.cli import cli
from syncbn.cli.guard import invoke
from syncbn.compose import compose
from syncbn.data import load_data
from syncbn.data.files import file_reader
from syncbn.registry import TRANSFORMS
from syncbn.runtime.base import Solo
from syncbn.runtime.local import TorchrunRuntime
from syncbn.train import recorded_run
from syncbn.weights import find as find_weights

pytestmark = pytest.mark.untraced
CPU = Solo(torch.device("cpu"))
IMPOSSIBLE = "import sys; sys.modules['syncbn'] = None; "
OWN = """
import torch
from torch.utils.data import TensorDataset
import syncbn.extend as extend

class Numbers(TensorDataset):
    classes = ("small", "large")
    def load(self, path):
        return torch.full((1, 4, 4), float(path.read_text()))

@extend.data("numbers")
def numbers(root, split, *, load: bool = True):
    x = torch.linspace(-1, 1, 64).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    made = Numbers(x, (x[:, 0, 0, 0] > 0).long())
    return made if load else TensorDataset(*made.tensors)
"""


@dataclass
class Place:
    """A current folder with runs in it."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    def call(self, *argv: str) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code = invoke(cli, argv)
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def json(self, *argv: str):
        code, out, err = self.call(*argv, "--json")
        assert code == 0, err
        return json.loads(out)


def trained(name: str, *overrides: str) -> dict[str, float]:
    return recorded_run(compose(["debug=tiny", f"name={name}", *overrides]), CPU).final


@pytest.fixture
def place(tmp_path, monkeypatch, capsys, own_registrations):
    """A folder of its own; what an extension there registers goes with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield Place(tmp_path, capsys)
    sys.modules.pop("mine", None)


def grey(path: Path, size: int = 8) -> str:
    pixels = np.arange(size * size, dtype=np.uint8).reshape(size, size)
    Image.fromarray(pixels).save(path)
    return str(path)


def own_measures(final: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in final.items() if name.startswith("test_")}


@pytest.mark.parametrize("arm", ["sync", "ghost", "group_norm", "none", "local_avg"])
def test_a_run_measured_again_gives_its_own_numbers_bit_for_bit(place, arm):
    final = trained("r", f"norm={arm}", "train.ema=0.5", "train.precision=bf16", "task.top=3")
    found = place.json("evaluate", "r")
    assert found["measures"] == own_measures(final)
    assert (found["step"], found["num_samples"], found["data"]) == (2, 500, "digits")
    assert place.json("evaluate", "runs/r", "train.eval_batch=7")["measures"] == pytest.approx(
        own_measures(final)
    )


@pytest.mark.parametrize("arm", ["sync", "local", "local_avg"])
@pytest.mark.world_size(2)
def test_so_does_a_run_of_several_ranks(world_size, tmp_path, arm):
    settings = ["debug=tiny", f"norm={arm}", "task.confusion=true"]  # a metric, gathered from ranks
    cfg = compose([*settings, f"runs_dir={tmp_path}", f"launcher.num_workers={world_size}"])
    final = recorded_run(cfg, TorchrunRuntime(CPU.device)).final
    if dist.get_rank() == 0:
        assert measure(find(str(cfg.folder)))["measures"] == own_measures(final)


def test_the_best_checkpoint_and_that_of_a_step(place):
    final = trained(
        "r", "train.steps=6", "train.eval_every=2", "train.keep_best=true", "optim.lr=3"
    )
    best = place.json("evaluate", "r", "--checkpoint", "best")
    assert best["measures"]["test_error"] == final["best_error"]
    assert best["step"] == final["best_step"]
    assert place.json("evaluate", "r", "--checkpoint", str(best["step"])) == best


@pytest.fixture
def kept(place):
    """A run whose best checkpoint is that of step 4, and whose newest is that of step 6."""
    trained("r", "train.steps=6", "train.checkpoint_every=2")
    Path("runs/r/checkpoints/BEST").write_text("step-000004\n")
    return Path("runs/r/checkpoints/step-000004")


def test_one_checkpoint_stands_for_a_run_wherever_it_is_used(place, kept):
    tuned = compose(["name=other", "model.weights=r"])
    assert place.json("evaluate", "r")["step"] == 4
    assert find_weights(tuned).path == kept
    assert place.json("evaluate", "r", "--checkpoint", "latest")["step"] == 6
    Path("runs/r/checkpoints/BEST").unlink()
    assert place.json("evaluate", "r")["step"] == 6
    assert find_weights(tuned).path == kept.with_name("step-000006")


def test_a_damaged_best_checkpoint_is_said_and_not_passed_over(place, kept):
    (kept / "model.safetensors").write_bytes(b"torn")
    code, _, err = place.call("evaluate", "r")
    assert code == 4
    assert f"{kept}, the best checkpoint of runs/r, is damaged" in err
    assert place.json("evaluate", "r", "--checkpoint", "latest")["step"] == 6


def test_a_run_is_measured_whatever_became_of_the_weights_that_it_began_with(place):
    trained("base")
    final = trained("tuned", "model.weights=base")
    trained("base", "seed=1", "train.resume=false")
    assert place.json("evaluate", "tuned")["measures"] == own_measures(final)
    assert place.json("evaluate", "tuned", "data.limit=9")["measures"] == own_measures(final)


def test_nothing_of_the_run_is_changed(place):
    trained("r")
    files = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    place.json("evaluate", "r", "data.validation=0.2")
    grey(place.folder / "a.png")
    place.json("predict", "r", "a.png")
    assert {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()} == files


def test_predictions_are_the_models_on_files_prepared_as_the_data_set_is(place):
    trained("r", "model=cnn", "model.width=2")
    (place.folder / "in").mkdir()
    for name in ("b.png", "a.png"):
        grey(place.folder / "in" / name)
    (place.folder / "in" / "notes.txt").write_text("no image")
    said = place.json("predict", "r", "in", "--top", "10")
    assert [one["file"] for one in said] == ["in/a.png", "in/b.png"]
    shares = [one["probability"] for one in said[0]["classes"]]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    assert {one["name"] for one in said[0]["classes"]} == set("0123456789")


def test_a_class_without_a_name_is_called_by_its_number():
    ranked = _ranked(torch.tensor([0.0, 2.0, 1.0]), ["first"], 3)
    assert [row["name"] for row in ranked] == ["1", "2", "first"]


def test_a_file_read_alone_is_the_sample_that_the_folder_gives(place):
    for part in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (folder := place.folder / "pets" / part / name).mkdir(parents=True)
            pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
            for suffix in ("png", "jpg"):
                Image.fromarray(pixels).save(folder / f"x.{suffix}")
    cfg = compose(["data=image_folder", "data.root=pets", "data.image_size=16"]).data
    x, _ = next(load_data(cfg, 0).test.batches([torch.arange(4)]))
    files = sorted(Path("pets/test").rglob("x.*"))
    assert torch.equal(torch.stack([file_reader(cfg)(file) for file in files]), x)
    trained("r", "data=image_folder", "data.root=pets", "data.image_size=16")
    said = place.json("predict", "r", "pets/test", "--top", "2")
    assert {one["name"] for one in said[0]["classes"]} == {"cat", "dog"}


def test_a_transform_sees_a_file_of_a_digit_as_it_sees_those_of_the_data_set(place, monkeypatch):
    monkeypatch.setattr(TRANSFORMS, "_entries", {})
    TRANSFORMS.register("negative", on_test=True)(lambda input: 1 - input)
    plain, cfg = (
        compose(["data=digits", f"data.transforms={t}"]).data for t in ("{}", "{negative:{}}")
    )
    file = Path(grey(place.folder / "a.png"))
    assert torch.equal(file_reader(cfg)(file), 1 - file_reader(plain)(file))


def test_a_data_set_of_an_extension_says_how_a_file_becomes_an_input(place):
    (place.folder / "mine.py").write_text(OWN)
    trained("r", "extensions=[mine]", "data=numbers", "train.steps=40", "optim.lr=0.1")
    (place.folder / "n.txt").write_text("0.9")
    (place.folder / "bad.txt").write_text("nine")
    assert place.json("predict", "r", "n.txt")[0]["classes"][0]["name"] == "large"
    code, _, err = place.call("predict", "r", "bad.txt")
    assert code == 3
    assert "bad.txt: ValueError" in err
    trained("q", "extensions=[mine]", "data=numbers", "data.options.load=false")
    code, _, err = place.call("predict", "q", "n.txt")
    assert code == 2
    assert "load(path)" in err
    (place.folder / "mine.py").unlink()
    sys.modules.pop("mine")
    code, _, err = place.call("evaluate", "r")
    assert code == 2
    assert "there is no module 'mine'" in err


@pytest.mark.parametrize("arm", ["sync", "ghost", "group_norm", "none"])
def test_weights_are_exported_under_the_names_of_torchs_own_layers(place, arm):
    from safetensors.torch import load_file

    trained("r", f"norm={arm}", "train.ema=0.9")
    assert place.json("export", "r", "--to", "safetensors")["max_difference"] < 1e-5
    exported, summary = (
        Path("runs/r", name).stat() for name in ("model.safetensors", "summary.json")
    )
    assert exported.st_mode == summary.st_mode
    names = set(load_file("runs/r/model.safetensors"))
    kept = {"running_mean", "running_var"} <= {name.rpartition(".")[2] for name in names}
    assert kept == (arm in ("sync", "ghost"))


def loads_without_us(file: str, count: int) -> None:
    program = (
        f"{IMPOSSIBLE}import torch; m = torch.export.load({file!r}).module();"
        f"torch.save(m(torch.load('x.pt')), 'y.pt'); assert m(torch.load('x.pt')[:1]).shape[0] == 1"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert len(torch.load("y.pt")) == count


@pytest.mark.slow
def test_an_exported_program_runs_where_this_package_cannot_be_imported(place):
    trained("r", "model.hidden=[8]")
    place.json("export", "r", "--to", "pt2", "--out", "m.pt2")
    run = open_run(find("r"))
    x, _ = next(run.sets.test.batches([torch.arange(5)]))
    torch.save(x, "x.pt")
    loads_without_us("m.pt2", 5)
    assert torch.allclose(torch.load("y.pt"), run.model(x).detach(), rtol=1e-5, atol=1e-5)


IMAGES = ("data=synthetic", "data.image_size=32", "data.num_samples=32")
MODELS = {
    "mlp": (),
    "cnn": ("model=cnn", "model.width=4"),
    "vgg": ("model=vgg", "model.width=4", "model.placement=post", "model.lrn=true"),
    "torchvision": ("model=torchvision", "model.arch=resnet18", *IMAGES),
    "timm": ("model=timm", "model.arch=resnet10t", *IMAGES),
}


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors", "pt2", "onnx"])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_exported_in_every_format(place, model, to):
    if model == "timm":
        pytest.importorskip("timm")
    trained("r", *MODELS[model], "train.steps=4", "optim.lr=0.001")
    made = place.json("export", "r", "--to", to)
    assert made["max_difference"] < 1e-5
    if to == "pt2":
        shape = (3, 3, 32, 32) if model in ("torchvision", "timm") else (3, 1, 8, 8)
        torch.save(torch.randn(shape), "x.pt")
        loads_without_us("runs/r/model.pt2", 3)


def test_a_file_that_computes_something_else_is_not_put_in_place(place, monkeypatch):
    import syncbn.after.export as export

    trained("r")
    monkeypatch.setitem(export.FORMATS, "safetensors", wrong(export.FORMATS["safetensors"]))
    Path("m").write_text("before")
    code, _, err = place.call("export", "r", "--to", "safetensors", "--out", "m")
    assert code == 4
    assert "m was not written: its outputs differ" in err
    assert Path("m").read_text() == "before"
    assert sorted(path.name for path in place.folder.iterdir()) == ["m", "runs"]


def wrong(write):
    def written(exported, file):
        outputs = write(exported, file)
        return lambda x: outputs(x) + 1e-3

    return written


BAD = {
    "evaluate ru": (2, "there is no run 'ru' in runs; did you mean 'r'?"),
    "evaluate runs": (2, "runs is no run"),
    "evaluate a.png": (2, "is a file"),
    "evaluate r lr=1": (2, "'lr=1' is not allowed"),
    "evaluate r norm=local": (2, "a run is measured as it was trained"),
    "evaluate r launcher.num_workers=2": (2, "evaluate is one process"),
    "evaluate r data=nope": (2, "data=nope is not allowed: one of"),
    "evaluate r data.limits=3": (2, "did you mean 'data.limit'?"),
    "evaluate r train.eval_batch=0": (2, "train.eval_batch=0 is not allowed"),
    "evaluate r data=synthetic": (2, "does not fit inputs (3, 32, 32) and 10 outputs"),
    "evaluate r data=mnist data.root=none": (3, "folder none is missing"),
    "evaluate r --checkpoint best": (4, "keeps no best checkpoint"),
    "evaluate r --checkpoint 9": (4, "has no checkpoint of step 9: there are step-000002"),
    "evaluate r --checkpoint last": (2, "latest, best or a step"),
    "evaluate begun": (4, "has saved no checkpoint yet"),
    "evaluate torn": (4, "no whole checkpoint"),
    "evaluate broken": (4, "journal.jsonl is damaged"),
    "predict r nowhere.png": (3, "nowhere.png is missing"),
    "predict r empty": (3, "folder empty holds no"),
    "predict r text.png": (3, "image text.png cannot be decoded"),
    "predict r large.png": (3, "large.png is 9 x 9 pixels: data=digits has images of 8 x 8"),
    "predict r colour.png": (3, "colour.png is an image of mode RGB"),
    "predict r a.png --top 0": (2, "--top"),
    "predict random a.png": (2, "data=synthetic is made of random numbers"),
    "export r --to tflite": (2, "'tflite' is not one of"),
    "export r": (2, "Missing option '--to'"),
    "export r --to pt2 --out no/m.pt2": (2, "there is no folder no"),
    "export r --to pt2 --out empty": (2, "empty is a folder"),
}


@pytest.fixture(scope="module")
def flawed(tmp_path_factory):
    """A folder with runs and files, most of which have a flaw."""
    folder = tmp_path_factory.mktemp("flawed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("r", "begun", "torn", "broken"):
            trained(name)
        trained("random", "data=synthetic", "data.num_samples=16", "data.image_size=4")
    grey(folder / "a.png")
    grey(folder / "large.png", 9)
    Image.new("RGB", (8, 8)).save(folder / "colour.png")
    (folder / "text.png").write_text("no image")
    (folder / "empty").mkdir()
    for path in (folder / "runs/begun/checkpoints").rglob("*.*"):
        path.unlink()
    (folder / "runs/begun/checkpoints/LATEST").unlink()
    (folder / "runs/begun/checkpoints/step-000002").rmdir()
    (folder / "runs/torn/checkpoints/step-000002/model.safetensors").write_bytes(b"torn")
    (folder / "runs/broken/journal.jsonl").write_text('{"event": "start"\n')
    return folder


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_one_line_and_the_right_code(flawed, monkeypatch, capsys, command):
    monkeypatch.chdir(flawed)
    wanted, words = BAD[command]
    code, out, err = Place(flawed, capsys).call(*command.split())
    assert (code, out) == (wanted, "")
    assert err.count("\n") == 1
    assert words in err


def test_onnx_is_named_where_it_is_missing(place, monkeypatch):
    import syncbn.after.export as export

    trained("r")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    code, _, err = place.call("export", "r", "--to", "onnx")
    assert code == 2
    assert "pip install 'syncbn[export]'" in err
