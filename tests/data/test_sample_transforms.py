"""Transforms of extensions: what they see, what their random numbers depend on, and what is refused."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fake_data import fetch, write_images, write_mnist
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

import syncbn.extend as extend
from syncbn.compose import compose
from syncbn.config import DataConfig, config_hash
from syncbn.config.identity import identity, identity_of
from syncbn.data import load_data
from syncbn.errors import DataError, UsageError

RAMP = torch.arange(64.0).reshape(1, 8, 8)


class Pairs(Dataset):
    """Sixteen images of one ramp, each with a random number of its own in the corner."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = RAMP.clone()
        image[0, 0, 0] = torch.rand(())
        return image, index % 2


@pytest.fixture(autouse=True)
def registered(own_registrations: None) -> Iterator[None]:
    """A data set and transforms, which go with the test."""
    extend.data("pairs")(lambda root, split: Pairs())
    extend.data("in_memory")(
        lambda root, split: TensorDataset(RAMP.expand(16, 1, 8, 8), torch.arange(16) % 2)
    )

    @extend.transform("noise")
    def noise(input: torch.Tensor, *, std: float = 1.0) -> torch.Tensor:
        draws = random.random() + np.random.rand() + torch.rand(input.shape)  # noqa: NPY002
        return (input + std * draws).to(input.dtype)

    @extend.transform("erase")
    def erase(input: torch.Tensor) -> torch.Tensor:
        return v2.RandomErasing(p=1.0)(input)

    @extend.transform("half", on_test=True)
    def half(input: torch.Tensor) -> torch.Tensor:
        return input[:, ::2, ::2]

    @extend.transform("relabel")
    def relabel(
        input: torch.Tensor, target: torch.Tensor, *, to: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return input, torch.full_like(torch.as_tensor(target), to)

    @extend.transform("bad")
    def bad(input: torch.Tensor, *, kind: str = "raises") -> object:
        if kind == "raises":
            raise ValueError("no\nsuch brush")
        if kind == "ragged":
            return input[:, : 8 if random.random() > 0.3 else 7]
        return {"numpy": input.numpy(), "none": None, "crops": input[:, :4]}[kind]

    return


def split_of(name: str, transforms: dict, tmp_path, part: str = "train", seed: int = 0, **fields):
    cfg = DataConfig(name=name, root=str(tmp_path), image_size=8, transforms=transforms, **fields)
    return getattr(load_data(cfg, seed), part)


def all_batches(*args, **fields) -> list:
    return list(split_of(*args, **fields).batches([torch.arange(8), torch.arange(8)]))


def written(name: str, root) -> str:
    """The data set `name`, under `root` where it has files."""
    if name == "mnist":
        write_mnist(root)
    if name == "image_folder":
        write_images(root, each=8)
    return name


SETS = ["digits", "mnist", "image_folder", "pairs", "in_memory"]


@pytest.mark.parametrize("name", SETS)
def test_random_numbers_depend_on_seed_step_and_sample_only(name, tmp_path):
    written(name, tmp_path)
    varied = {"noise": {"std": 20.0}, "erase": {}}
    split = split_of(name, varied, tmp_path)
    whole = fetch(split, 0, 1, 2, 3, first_step=7)[0]
    ranks = [fetch(split, *part, first_step=7)[0] for part in ((0, 1), (2,), (3,))]
    assert torch.equal(torch.cat(ranks), whole)
    loaded = split_of(name, varied, tmp_path, num_loaders=2)
    plan = [torch.tensor([3, 2]), torch.tensor([1]), torch.tensor([], dtype=torch.int64)]
    batches = list(loaded.batches(plan, first_step=7))
    assert torch.equal(batches[0][0], whole[[3, 2]])
    assert batches[2][0].shape == (0, *whole.shape[1:])
    for other in (
        fetch(split, 0, 1, 2, 3, first_step=8)[0],
        fetch(split_of(name, varied, tmp_path, seed=1), 0, 1, 2, 3, first_step=7)[0],
        fetch(split, 1, 0, 3, 2, first_step=7)[0],
    ):
        assert not torch.equal(other, whole)


@pytest.mark.parametrize("name", SETS)
def test_fetching_leaves_every_global_generator_as_it_was(name, tmp_path):
    written(name, tmp_path)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    fetch(split_of(name, {"noise": {}}, tmp_path), 0, 1)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_what_a_data_set_draws_itself_is_decided_by_seed_step_and_sample_too(tmp_path):
    split = split_of("pairs", {}, tmp_path)
    one = fetch(split, 4, first_step=3)[0]
    assert torch.equal(fetch(split, 5, 4, first_step=3)[0][1:], one)
    assert not torch.equal(fetch(split, 4, first_step=4)[0], one)


def test_evaluated_samples_are_the_same_whatever_batch_they_come_in(tmp_path):
    test = split_of("pairs", {}, tmp_path, "test")
    plan = [torch.tensor([0]), torch.tensor([1]), torch.tensor([2])]
    assert torch.equal(
        torch.cat([x for x, _ in test.batches(plan)]), fetch(test, 0, 1, 2, first_step=9)[0]
    )


@pytest.mark.parametrize("name", SETS)
def test_only_what_is_registered_for_it_is_done_to_the_test_set(name, tmp_path):
    written(name, tmp_path)
    plain = fetch(split_of(name, {"half": {}}, tmp_path, "test"), 0, 1)[0]
    both = {"half": {}, "noise": {"std": 50.0}}
    assert torch.equal(fetch(split_of(name, both, tmp_path, "test"), 0, 1)[0], plain)
    sets = load_data(DataConfig(name=name, root=str(tmp_path), image_size=8, transforms=both), 0)
    assert sets.shape == tuple(plain.shape[1:])
    assert fetch(sets.train, 0)[0].shape[1:] == sets.shape


def test_published_images_are_transformed_as_raw_pixels_and_standardised_after(tmp_path):
    images, _ = write_mnist(tmp_path)
    seen = []
    extend.transform("look")(lambda input: seen.append(input) or 255 - input)
    x, _ = fetch(split_of("mnist", {"look": {}}, tmp_path), 3)
    assert seen[-1].dtype == torch.uint8
    expected = ((255 - images[3].astype(float)) / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(x[0, 0], torch.from_numpy(expected).float())


def test_a_joint_transform_sees_and_returns_the_target(tmp_path):
    for name in ("digits", "pairs"):
        assert fetch(split_of(name, {"relabel": {"to": 0}}, tmp_path), 1, 3)[1].tolist() == [0, 0]


def test_transforms_follow_augmentation_and_each_other_in_their_order(tmp_path):
    extend.transform("double")(lambda input: input * 2)
    extend.transform("more")(lambda input: input + 1)
    plain = fetch(split_of("digits", {}, tmp_path, augment=True), 0, first_step=2)[0]
    for names, expected in (("double more", 2 * plain + 1), ("more double", 2 * (plain + 1))):
        transforms = dict.fromkeys(names.split())
        split = split_of("digits", transforms, tmp_path, augment=True)
        assert torch.equal(fetch(split, 0, first_step=2)[0], expected)


@pytest.mark.parametrize("loaders", [0, 1])
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("raises", r"^transform bad failed on data=.*: sample 0: ValueError: no such brush$"),
        ("none", r"sample 0: TypeError: it returned a NoneType as input: a tensor is needed$"),
        ("numpy", r"it returned a ndarray as input"),
        ("ragged", r"data=\S+ \(train\): sample \d+ has an input of shape .*: make them equal$"),
        ("crops", r"\(1, 4, 8\) and \(1, 8, 8\): make them equal; .* on_test=True$"),
    ],
)
def test_a_transform_that_fails_is_named_with_its_sample(kind, says, loaders, tmp_path):
    for name in ("digits", "pairs"):
        with pytest.raises(DataError, match=says) as raised:
            all_batches(name, {"bad": {"kind": kind}}, tmp_path, num_loaders=loaders)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.transforms.nois={}", "did you mean 'noise'?"),
        ("data.transforms.noise.sdt=1", "data.transforms.noise.sdt is not an option of transform"),
        ("data.transforms.noise.std=loud", "data.transforms.noise.std='loud' is not allowed: of"),
        ("data.transforms.noise=3", "data.transforms.noise=3 is not allowed: its options"),
        ("data.transforms=[noise]", "data.transforms takes names, each with its options"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_starts(override, says):
    with pytest.raises(UsageError, match=says.replace("?", r"\?")):
        compose([override])


def test_a_transform_takes_an_input_and_perhaps_a_target():
    with pytest.raises(UsageError, match=r"as \(input, \*, .*\) or \(input, target, \*, .*\)"):
        extend.transform("wrong")(lambda a, b, c: a)


def test_options_and_order_are_part_of_the_hash_and_no_transforms_are_none():
    plain = compose([])
    assert "transforms" not in identity(plain)["data"]
    short, full, other, turned = (
        compose([f"data.transforms={{{text}}}"])
        for text in (
            "noise:{},half:{}",
            "noise:{std:1.0},half:{}",
            "noise:{std:2.0},half:{}",
            "half:{},noise:{}",
        )
    )
    assert config_hash(short) == config_hash(full)
    assert len({config_hash(cfg) for cfg in (plain, short, other, turned)}) == 4
    from dataclasses import asdict

    assert identity_of(asdict(short)) == identity(short)
