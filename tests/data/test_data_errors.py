"""Bad data: one line that says what is wrong and what to do, and exit code 3, before training starts."""

import os
import re

import numpy as np
import pytest
from fake_data import fetch, write_cifar10, write_idx, write_images, write_mnist
from PIL import Image

from syncbn.config import DataConfig
from syncbn.data import load_data
from syncbn.errors import DataError, exit_code

TRAIN_IMAGES = "MNIST/raw/train-images-idx3-ubyte"
TRAIN_LABELS = "MNIST/raw/train-labels-idx1-ubyte"


def complaint(name: str, root, **fields) -> str:
    """What loading says, held to be one line of a `DataError`."""
    with pytest.raises(DataError) as caught:
        load_data(DataConfig(name=name, root=str(root), **fields), seed=0)
    assert "\n" not in str(caught.value)
    assert exit_code(caught.value) == 3
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("cifar10", "cifar-10-batches-py"),
    ],
)
def test_a_missing_set_says_how_to_get_it(tmp_path, name, folder):
    for root in (tmp_path, tmp_path / "nowhere"):
        text = complaint(name, root)
        assert "is missing" in text
        assert f"data.root=PATH where PATH/{folder}/" in text
        assert "data.download=true" in text


def test_a_missing_file_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / TRAIN_LABELS).unlink()
    assert re.search(
        r"train-labels-idx1-ubyte is missing: set data.root", complaint("mnist", tmp_path)
    )


@pytest.mark.parametrize("name", ["mnist", "cifar10", "image_folder"])
def test_a_file_where_a_folder_is_due(tmp_path, name):
    (tmp_path / "file").write_text("x")
    assert "is a file where a folder is due" in complaint(name, tmp_path / "file")


def test_a_file_of_no_bytes(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / TRAIN_IMAGES).write_bytes(b"")
    assert "is damaged (0 bytes): remove it, then set data.root" in complaint("mnist", tmp_path)


@pytest.mark.parametrize("kept", [1, 3, 7, 16, 500, -1])
@pytest.mark.parametrize("file", [TRAIN_IMAGES, TRAIN_LABELS])
def test_a_truncated_file(tmp_path, file, kept):
    write_mnist(tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: min(kept, len(whole) - 1)])
    assert "training files of MNIST" in (text := complaint("mnist", tmp_path))
    assert "are damaged" in text


def test_text_instead_of_images(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / TRAIN_IMAGES).write_text("<html>404 Not Found</html>")
    assert "are damaged" in complaint("mnist", tmp_path)


def test_a_changed_byte_of_cifar10_is_noticed_before_it_is_unpickled(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr("pickle.load", lambda *_, **__: pytest.fail("unpickled"))
    assert "are damaged (Dataset not found or corrupted" in complaint("cifar10", tmp_path)


def test_more_images_than_labels(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path / TRAIN_LABELS, np.zeros(19))
    assert "20 images but 19 labels" in complaint("mnist", tmp_path)


def test_a_label_out_of_range(tmp_path):
    write_mnist(tmp_path)
    labels = np.zeros(20)
    labels[7] = 12
    write_idx(tmp_path / TRAIN_LABELS, labels)
    text = complaint("mnist", tmp_path)
    assert text == "data=mnist (train): sample 7 has target 12: allowed are 0 to 9"


def test_a_set_without_samples(tmp_path):
    write_mnist(tmp_path, num_test=0)
    assert "the test files of MNIST" in complaint("mnist", tmp_path)


def test_training_and_test_images_of_different_sizes(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path / "MNIST/raw/t10k-images-idx3-ubyte", np.zeros((6, 14, 14)))
    assert "training and test images differ in size" in complaint("mnist", tmp_path)


@pytest.mark.parametrize("linked", [".", "MNIST", TRAIN_LABELS])
def test_links_to_other_storage_are_followed(tmp_path, linked):
    write_mnist(tmp_path / "data")
    (tmp_path / "data" / linked).rename(tmp_path / "disk")
    (tmp_path / "data" / linked).symlink_to(tmp_path / "disk")
    assert len(load_data(DataConfig(name="mnist", root=str(tmp_path / "data")), 0).train) == 20


def refuse_access(monkeypatch, path) -> None:
    """Have this process lack permission on `path`, also as root, whom file modes do not stop."""
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: p != path and allowed(p, mode))


def test_no_permission_on_a_folder_or_a_file(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    for path in (tmp_path / "MNIST" / "raw", tmp_path / TRAIN_LABELS):
        with monkeypatch.context() as context:
            refuse_access(context, path)
            assert "no permission to read" in (text := complaint("mnist", tmp_path))
            assert str(path) in text


@pytest.mark.skipif(os.geteuid() == 0, reason="file modes do not stop root")
def test_a_folder_closed_by_its_mode(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw").chmod(0)
    assert "no permission to read" in complaint("mnist", tmp_path)


# Downloads


def test_a_failed_download_says_so(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    def fail(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nno route to host")

    monkeypatch.setattr(MNIST, "download", fail)
    text = complaint("mnist", tmp_path / "new", download=True)
    assert text.startswith(
        f"cannot download MNIST into data.root={tmp_path}/new: Error downloading"
    )


def test_a_set_that_is_there_is_not_downloaded(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "download", lambda self: pytest.fail("downloaded"))
    write_mnist(tmp_path)
    cfg = DataConfig(name="mnist", root=str(tmp_path), download=True)
    assert len(load_data(cfg, seed=0).train) == 20


def test_a_download_fills_a_new_folder(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "download", lambda self: write_mnist(tmp_path / "new"))
    cfg = DataConfig(name="mnist", root=str(tmp_path / "new"), download=True)
    assert len(load_data(cfg, seed=0).train) == 20


# Images in folders


def test_an_image_folder_without_train_or_test(tmp_path):
    write_images(tmp_path)
    (tmp_path / "test").rename(tmp_path / "val")
    text = complaint("image_folder", tmp_path)
    assert "test is missing" in text
    assert "PATH/train/<class>/ and PATH/test/<class>/" in text


def test_a_class_without_images(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "empty").mkdir()
    assert "no valid file for the classes empty" in complaint("image_folder", tmp_path)


def test_a_part_without_classes(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train").rename(tmp_path / "old")
    (tmp_path / "train").mkdir()
    assert "train" in complaint("image_folder", tmp_path)


def test_classes_that_differ_between_train_and_test(tmp_path):
    write_images(tmp_path)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "dogs")
    assert complaint("image_folder", tmp_path).endswith("differ: dog, dogs")


def test_an_image_of_no_bytes(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"")
    assert "cat/1.png is damaged (0 bytes): remove it" in complaint("image_folder", tmp_path)


@pytest.mark.parametrize("inner", ["train/cat/1.png", "train/cat", "train"])
def test_an_image_class_or_part_linked_from_elsewhere_is_read(tmp_path, inner):
    write_images(tmp_path / "root")
    (tmp_path / "root" / inner).rename(tmp_path / "elsewhere")
    (tmp_path / "root" / inner).symlink_to(tmp_path / "elsewhere")
    assert len(load_data(DataConfig(name="image_folder", root=str(tmp_path / "root")), 0).train)


def test_an_image_linked_to_nothing(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "cat" / "1.png").unlink()
    (tmp_path / "train" / "cat" / "1.png").symlink_to(tmp_path / "gone.png")
    assert "cat/1.png is missing" in complaint("image_folder", tmp_path)


def test_an_image_whose_values_have_no_known_range(tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "cat" / "0.png").unlink()
    Image.fromarray(np.ones((32, 32), np.float32)).save(tmp_path / "train" / "cat" / "0.tiff")
    text = complaint("image_folder", tmp_path)
    assert "cat/0.tiff cannot be decoded (its values are floating-point numbers" in text


def test_a_truncated_jpeg(tmp_path):
    write_images(tmp_path)
    file = tmp_path / "train" / "cat" / "0.png"
    Image.open(file).save(file.with_suffix(".jpg"))
    file.unlink()
    content = file.with_suffix(".jpg").read_bytes()
    file.with_suffix(".jpg").write_bytes(content[: len(content) // 2])
    text = complaint("image_folder", tmp_path)
    assert re.search(
        r"cat/0\.jpg cannot be decoded \(.*[tT]runcated.*\): remove or replace it$", text
    )


@pytest.mark.parametrize("num_loaders", [0, 1])
@pytest.mark.parametrize("content", ["truncated", "text"])
def test_an_image_that_cannot_be_decoded(tmp_path, num_loaders, content):
    write_images(tmp_path)
    file = tmp_path / "train" / "cat" / "1.png"
    file.write_bytes(file.read_bytes()[:200] if content == "truncated" else b"not an image")
    cfg = DataConfig(
        name="image_folder", root=str(tmp_path), image_size=16, num_loaders=num_loaders
    )
    split = load_data(cfg, seed=0).train
    with pytest.raises(
        DataError, match=r"^image .*cat/1\.png cannot be decoded \(.*\): remove"
    ) as e:
        fetch(split, 0, 1)
    assert "\n" not in str(e.value)
