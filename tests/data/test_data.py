"""Data sets: what a batch holds, what is held out, and what augmentation may depend on."""

import os
from io import BytesIO

import numpy as np
import pytest
import torch
from fake_data import fetch, write_cifar10, write_images, write_mnist
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from syncbn.config import DataConfig
from syncbn.data import embedded, folder, hold_out, kept_in_memory, load_data, memory
from syncbn.data.augment import Augment
from syncbn.data.embedded import stratified
from syncbn.errors import DataError


def everything(split):
    return fetch(split, *range(len(split)))


def test_digits_are_1297_and_500_real_digits_in_the_unit_range():
    sets = load_data(DataConfig(name="digits"), seed=0)
    x, y = everything(sets.train)
    assert x.shape == (1297, 1, 8, 8)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert (x.min(), x.max()) == (0, 1)
    assert (len(sets.test), sets.num_classes, sets.shape) == (500, 10, (1, 8, 8))


def test_the_digits_are_those_of_scikit_learn():
    sets = load_data(DataConfig(name="digits"), seed=0)
    ours = [
        (x.flatten() * 16, y)
        for part in (sets.train, sets.test)
        for x, y in zip(*everything(part), strict=True)
    ]
    theirs = zip(*load_digits(return_X_y=True), strict=True)
    assert sorted((*x.tolist(), int(y)) for x, y in ours) == sorted((*x, y) for x, y in theirs)


@pytest.mark.parametrize("options", [{}, {"augment": True}, {"limit": 50}], ids=str)
def test_a_split_has_the_labels_of_its_batches_at_hand(tmp_path, options):
    write_images(tmp_path, each=30)
    for name in ("digits", "image_folder"):
        sets = load_data(DataConfig(name=name, root=str(tmp_path), image_size=8, **options), seed=0)
        for split in (sets.train, sets.test):
            assert torch.equal(split.labels, everything(split)[1])


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    embedded._all_digits.cache_clear()
    with pytest.raises(DataError, match=r"install syncbn\[service\]"):
        load_data(DataConfig(name="digits"), seed=0)


def test_digits_split_is_stratified_disjoint_and_the_same_for_every_seed():
    one, other = (load_data(DataConfig(name="digits"), seed) for seed in (0, 1))
    for part in ("train", "test"):
        assert torch.equal(everything(getattr(one, part))[0], everything(getattr(other, part))[0])
    counts = np.bincount(load_digits().target)
    test_counts = everything(one.test)[1].bincount()
    assert np.abs(test_counts.numpy() - counts * 500 / 1797).max() < 1
    assert (test_counts + everything(one.train)[1].bincount()).tolist() == counts.tolist()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_a_stratified_choice_takes_each_class_in_its_share(labels, data):
    chosen = data.draw(st.integers(1, len(labels)))
    labels = np.array(labels)
    indices = stratified(labels, chosen)
    assert len(set(indices.tolist())) == chosen
    share = np.bincount(labels, minlength=5) * chosen / len(labels)
    assert np.all(np.abs(np.bincount(labels[indices], minlength=5) - share) <= 1)


def test_mnist_is_read_and_standardised(tmp_path):
    images, labels = write_mnist(tmp_path)
    sets = load_data(DataConfig(name="mnist", root=str(tmp_path)), seed=0)
    x, y = fetch(sets.train, 3, 11)
    expected = (torch.from_numpy(images[[3, 11]]).double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(x, expected.float().unsqueeze(1))
    assert y.tolist() == labels[[3, 11]].tolist()
    assert (len(sets.test), sets.shape) == (6, (1, 28, 28))


def test_fashion_mnist_has_a_folder_and_a_mean_of_its_own(tmp_path):
    images, _ = write_mnist(tmp_path, "FashionMNIST")
    sets = load_data(DataConfig(name="fashion_mnist", root=str(tmp_path)), seed=0)
    expected = (images[5, 0, 0] / 255 - 0.2860) / 0.3530
    assert fetch(sets.train, 5)[0][0, 0, 0, 0] == pytest.approx(expected, abs=1e-6)


def test_cifar10_is_read_channels_first(tmp_path, monkeypatch):
    images = write_cifar10(tmp_path, monkeypatch)
    sets = load_data(DataConfig(name="cifar10", root=str(tmp_path)), seed=0)
    x, y = fetch(sets.train, 6)
    expected = (images[6, 2, 4, 9] / 255 - 0.4465) / 0.2616
    assert x[0, 2, 4, 9] == pytest.approx(expected, abs=1e-6)
    assert (y.item(), sets.shape, len(sets.test)) == (2, (3, 32, 32), 4)


def test_binarised_pixels_are_those_above_one_half(tmp_path):
    images, _ = write_mnist(tmp_path)
    sets = load_data(DataConfig(name="mnist", root=str(tmp_path), binarize=True), seed=0)
    x, _ = everything(sets.train)
    assert torch.equal(x[:, 0], torch.from_numpy(images > 127).float())
    digits = load_data(DataConfig(name="digits", binarize=True), seed=0)
    assert everything(digits.test)[0].unique().tolist() == [0, 1]


@pytest.mark.shared_data
@pytest.mark.skipif("SYNCBN_DATA_ROOT" not in os.environ, reason="SYNCBN_DATA_ROOT names no folder")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_published_sets_have_mean_0_and_std_1(name):
    sets = load_data(DataConfig(name=name, root=os.environ["SYNCBN_DATA_ROOT"]), seed=0)
    x, y = everything(sets.train)
    assert (len(sets.train), len(sets.test)) == (60_000, 10_000)
    assert x.mean().item() == pytest.approx(0, abs=1e-3)
    assert x.std().item() == pytest.approx(1, abs=1e-3)
    assert y.bincount(minlength=10).min() > 5_000


def test_synthetic_classes_come_from_the_seed_and_can_be_told_apart():
    cfg = DataConfig(name="synthetic", image_size=8, channels=2, num_classes=4, num_samples=400)
    one, same, other = (load_data(cfg, seed) for seed in (0, 0, 1))
    x, y = everything(one.train)
    assert torch.equal(x, everything(same.train)[0])
    assert not torch.equal(x, everything(other.train)[0])
    assert (one.shape, one.num_classes, len(one.test)) == ((2, 8, 8), 4, 100)
    means = torch.stack([x[y == k].mean(0).flatten() for k in range(4)])
    test_x, test_y = everything(one.test)
    nearest = torch.cdist(test_x.flatten(1), means).argmin(1)
    assert (nearest == test_y).float().mean() > 0.9


def test_an_empty_share_is_an_empty_batch(tmp_path):
    write_images(tmp_path)
    for cfg in (
        DataConfig(name="digits"),
        DataConfig(name="digits", augment=True),
        DataConfig(name="image_folder", root=str(tmp_path), image_size=16),
    ):
        sets = load_data(cfg, seed=0)
        x, y = fetch(sets.train)
        assert (x.shape, y.shape) == ((0, *sets.shape), (0,))
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_a_set_too_large_to_keep_ready_gives_the_same_batches(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    cfg = DataConfig(name="mnist", root=str(tmp_path))
    ready = load_data(cfg, seed=0).train
    monkeypatch.setattr(memory, "READY_BYTES", 0)
    raw = load_data(cfg, seed=0).train
    assert type(raw) is not type(ready)
    assert torch.equal(fetch(raw, 4, 2)[0], fetch(ready, 4, 2)[0])


# What is held out and left out


@given(st.integers(2, 500), st.floats(0.01, 0.9), st.data())
def test_held_out_and_kept_samples_are_disjoint_and_fixed(n, share, data):
    if not 0 < round(n * share) < n:
        return
    kept, held_out = hold_out(n, share, None)
    assert sorted(torch.cat([kept, held_out]).tolist()) == list(range(n))
    assert len(held_out) == round(n * share)
    limit = data.draw(st.integers(1, len(kept)))
    fewer, same = hold_out(n, share, limit)
    assert len(fewer) == limit
    assert set(fewer.tolist()) <= set(kept.tolist())
    assert torch.equal(same, held_out)


def test_with_validation_the_test_set_is_a_part_of_the_training_samples():
    whole = load_data(DataConfig(name="digits"), seed=0)
    tuned = load_data(DataConfig(name="digits", validation=0.1, augment=True), seed=0)
    assert (len(tuned.train), len(tuned.test)) == (1167, 130)
    of_train = {row.numpy().tobytes() for row in everything(whole.train)[0]}
    assert all(row.numpy().tobytes() in of_train for row in everything(tuned.test)[0])


def test_limit_leaves_the_test_set_alone():
    sets = load_data(DataConfig(name="digits", limit=64), seed=0)
    assert (len(sets.train), len(sets.test)) == (64, 500)


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (DataConfig(limit=1298), "data.limit=1298 is not allowed: there are 1297"),
        (DataConfig(limit=1200, validation=0.1), "there are 1167 training samples"),
        (DataConfig(validation=1e-4), "data.validation=0.0001 of 1297 .* holds out 0"),
        (DataConfig(validation=0.9999), "holds out 1297"),
    ],
)
def test_more_than_there_is_cannot_be_asked_for(cfg, says):
    with pytest.raises(DataError, match=says):
        load_data(cfg, seed=0)


# Augmentation


@pytest.fixture(params=["digits", "cifar10", "image_folder", "image_folder with loaders"])
def augmented(request, tmp_path, monkeypatch):
    """The training split of a data set, augmented, by seed."""
    name = request.param.split()[0]
    if name == "cifar10":
        write_cifar10(tmp_path, monkeypatch)
    if name == "image_folder":
        write_images(tmp_path)
    cfg = DataConfig(name=name, root=str(tmp_path), augment=True, image_size=16)
    cfg.num_loaders = 2 if request.param.endswith("loaders") else 0
    return lambda seed: load_data(cfg, seed).train


def test_augmentation_depends_on_seed_step_and_sample_only(augmented):
    whole = fetch(augmented(0), 0, 1, 2, 3, first_step=7)[0]
    ranks = [fetch(augmented(0), *part, first_step=7)[0] for part in ((0, 1), (2,), (3,))]
    assert torch.equal(torch.cat(ranks), whole)
    assert not torch.equal(fetch(augmented(0), 0, 1, 2, 3, first_step=8)[0], whole)
    assert not torch.equal(fetch(augmented(1), 0, 1, 2, 3, first_step=7)[0], whole)


def test_a_resumed_plan_gives_what_the_uninterrupted_one_gave(augmented):
    plan = [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([1, 4])]
    whole = list(augmented(0).batches(plan))
    resumed = list(augmented(0).batches(plan[1:], first_step=1))
    for (x, y), (again_x, again_y) in zip(whole[1:], resumed, strict=True):
        assert torch.equal(x, again_x)
        assert torch.equal(y, again_y)


def test_fetching_leaves_the_global_random_state_alone(augmented):
    state = torch.get_rng_state()
    fetch(augmented(0), 0, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_augmented_digits_are_shifted_by_up_to_one_pixel_and_never_mirrored():
    plain = load_data(DataConfig(name="digits"), 0).train
    varied = load_data(DataConfig(name="digits", augment=True), 0).train
    image = torch.nn.functional.pad(fetch(plain, 5)[0][0, 0], (1, 1, 1, 1))
    shifts = {
        image[top : top + 8, left : left + 8].numpy().tobytes()
        for top in range(3)
        for left in range(3)
    }
    seen = {fetch(varied, 5, first_step=step)[0].numpy().tobytes() for step in range(200)}
    assert seen == shifts


def test_samples_of_one_step_are_varied_each_in_its_own_way():
    same = torch.arange(64.0).reshape(1, 1, 8, 8).expand(40, 1, 8, 8)
    views = Augment(seed=0, flip=True).batch(same, 3, torch.arange(40))
    assert len({view.numpy().tobytes() for view in views}) > 10  # of 9 shifts x 2 directions


def test_the_test_set_is_never_augmented():
    plain, varied = (load_data(DataConfig(augment=augment), 0).test for augment in (False, True))
    assert torch.equal(fetch(plain, 0, 1)[0], fetch(varied, 0, 1, first_step=3)[0])


# Images in folders


def test_image_folder_gives_classes_by_name_and_square_crops(tmp_path):
    write_images(tmp_path, ("b", "a", "c"))
    sets = load_data(DataConfig(name="image_folder", root=str(tmp_path), image_size=16), seed=0)
    x, y = everything(sets.test)
    assert (x.shape, x.dtype) == ((9, 3, 16, 16), torch.float32)
    assert y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert sets.num_classes == 3


def test_loader_processes_give_the_batches_that_the_rank_alone_gives(tmp_path):
    write_images(tmp_path)
    plan = [torch.tensor([0, 5]), torch.tensor([], dtype=torch.int64), torch.tensor([3])]
    cfg = DataConfig(name="image_folder", root=str(tmp_path), image_size=16, augment=True)
    alone = list(load_data(cfg, 0).train.batches(plan))
    cfg.num_loaders = 2
    loaded = list(load_data(cfg, 0).train.batches(plan))
    for (x, y), (other_x, other_y) in zip(alone, loaded, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


PIXEL_FILES = {
    "16-bit PNG": (lambda: Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)), "PNG"),
    "16-bit TIFF": (lambda: Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)), "TIFF"),
    "8-bit PNG": (lambda: Image.fromarray(np.array([[0, 1, 128, 255]], np.uint8)), "PNG"),
}


@pytest.mark.parametrize("kind", PIXEL_FILES)
def test_grey_values_are_scaled_by_the_range_of_their_type(kind):
    make, form = PIXEL_FILES[kind]
    make().save(file := BytesIO(), form)
    assert folder._decoded(file.getvalue())[:, 0].tolist() == [[0, 1, 128, 255]] * 3


def test_a_deep_portable_greymap_is_scaled_by_its_own_maximum():
    pixels = folder._decoded(b"P5\n2 1\n4095\n" + bytes([15, 255, 0, 0]))
    assert pixels[0, 0].tolist() == [255, 0]


def test_transparent_pixels_lie_on_white():
    image = Image.fromarray(np.array([[[9, 9, 9, 0], [10, 20, 30, 255]]], np.uint8), "RGBA")
    image.save(file := BytesIO(), "PNG")
    assert folder._decoded(file.getvalue())[:, 0].T.tolist() == [[255] * 3, [10, 20, 30]]


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_picture_is_turned_as_its_camera_says(form):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    Image.new("RGB", (8, 4), "red").save(file := BytesIO(), form, exif=exif)
    assert folder._decoded(file.getvalue()).shape == (3, 8, 4)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_jpegs_are_decoded_to_the_pixels_that_pillow_gives(mode, options):
    pixels = np.random.default_rng(0).integers(0, 256, (33, 47, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "CMYK").convert("RGB").convert(mode)
    image.save(file := BytesIO(), "JPEG", **options)
    expected = np.asarray(Image.open(file).convert("RGB"))
    assert np.array_equal(folder._decoded(file.getvalue()).permute(1, 2, 0).numpy(), expected)


def test_a_data_set_is_read_once_for_runs_that_follow_each_other_on_it():
    first = load_data(DataConfig(limit=64), 0)
    with kept_in_memory():
        one = load_data(DataConfig(limit=64), 0)
        assert load_data(DataConfig(limit=64), 1) is one
        other = load_data(DataConfig(limit=32), 1)
        assert len(other.train) == 32
        drawn = [load_data(DataConfig(name="synthetic"), seed) for seed in (0, 1)]
        assert drawn[0] is not drawn[1]  # its samples depend on the seed
    assert load_data(DataConfig(limit=64), 0) is not first
