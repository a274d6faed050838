"""Errors that synchronised batch norms have had, planted one at a time: the tests must see each of them."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EQUIVALENCE = "tests/dist/test_equivalence.py"
ONE_BATCH = f"{EQUIVALENCE}::test_any_split_matches_one_big_batch_in_float64[2-ranks-4d]"
LARGE_MEAN = f"{EQUIVALENCE}::test_float32_stays_within_its_bound_even_at_a_large_mean"
TRAINING = "tests/dist/test_train_on_ranks.py::test_synchronised_ranks_train_as_one_process_on_the_whole_batch"


@dataclass(frozen=True)
class Mutant:
    """A change of one file, and the test that must fail with it."""

    what: str
    file: str
    before: str
    after: str
    test: str


FUNCTIONAL, MOMENTS = "syncbn/norm/functional.py", "syncbn/norm/moments.py"
MUTANTS = [
    Mutant(
        "no reduction in backward",
        FUNCTIONAL,
        "return gathered.sum(0).view_as(sums)",
        "return sums",
        ONE_BATCH,
    ),
    Mutant(
        "per-rank variances averaged",
        MOMENTS,
        "M2 = (M2s + weights * (means - mean) ** 2).sum(0)",
        "M2 = (M2s / weights.clamp(min=1)).mean(0) * total",
        ONE_BATCH,
    ),
    Mutant(
        "mean of means with unequal counts",
        MOMENTS,
        "mean = (weights * means).sum(0) / total.clamp(min=1)",
        "mean = means.mean(0)",
        ONE_BATCH,
    ),
    Mutant(
        "Bessel's correction with the local count",
        FUNCTIONAL,
        "var * (total / (total - 1).clamp(min=1))",
        "var * ((local := input.numel() / input.shape[1]) / max(local - 1, 1))",
        ONE_BATCH,
    ),
    Mutant(
        "gradients summed where DDP averages",
        "syncbn/train/loop.py",
        "(share * state.runtime.world_size).backward()",
        "(share * state.runtime.world_size**2).backward()",
        TRAINING,
    ),
    Mutant(
        "E[x^2] - E[x]^2 in float32",
        "syncbn/norm/kernels/eager.py",
        "M2 = (x - _per_channel(mean, x)).square_().sum(_reduced(x))",
        "M2 = x.square().sum(_reduced(x)) - count * mean.square()",
        LARGE_MEAN,
    ),
    Mutant(
        "momentum applied once a rank",
        FUNCTIONAL,
        "return seen * momentum",
        "return seen * (1 - (1 - momentum) ** 2)",
        ONE_BATCH,
    ),
    Mutant(
        "evaluation still exchanges",
        "syncbn/norm/module.py",
        "if not self.training:",
        "if False:",
        f"{EQUIVALENCE}::test_evaluation_communicates_nothing",
    ),
    Mutant(
        "uneven losses unweighted",
        "syncbn/train/loop.py",
        'reduction="sum") / global_batch',
        'reduction="mean") / state.runtime.world_size',
        f"{TRAINING}[2-ranks-uneven last batches]",
    ),
    Mutant(
        "weight and bias gradients reduced twice",
        FUNCTIONAL,
        "dweight = sum_dy_xhat.to(weight.dtype)",
        "dweight = sums[1].to(weight.dtype)",
        ONE_BATCH,
    ),
    Mutant(
        "process_group ignored",
        "syncbn/norm/module.py",
        "group = resolve(self.process_group)",
        "group = resolve(None)",
        "tests/dist/test_groups.py::test_statistics_are_shared_within_the_group_alone",
    ),
    Mutant(
        "num_batches_tracked not counted",
        FUNCTIONAL,
        "num_batches_tracked.add_(seen.to(num_batches_tracked.dtype))",
        "pass",
        ONE_BATCH,
    ),
    Mutant(
        "headers not compared",
        "syncbn/norm/exchange.py",
        "if not torch.equal(headers, headers[:1].expand_as(headers)):",
        "if False:",
        "tests/dist/test_disagreement.py::test_another_dtype",
    ),
    Mutant(
        "an empty batch counted",
        FUNCTIONAL,
        "seen = (total > 0).to(torch.float64)",
        "seen = (total >= 0).to(torch.float64)",
        f"{EQUIVALENCE}::test_a_batch_empty_on_all_ranks_changes_nothing",
    ),
    Mutant(
        "the second frame forgotten",
        "syncbn/norm/exchange.py",
        "parts += [self._frames.gather(part, part.numel(), header) for part in rest]",
        "parts += [torch.zeros_like(frames[:, : part.numel()]) for part in rest]",
        f"{EQUIVALENCE}::test_wide_layers_need_more_than_one_frame_and_stay_exact",
    ),
    Mutant(
        "frames read before they are written",
        "syncbn/norm/shared.py",
        "        self._wait(doing)\n",
        "",
        "tests/dist/test_shared_memory.py::test_a_thousand_exchanges_bring_every_ranks_latest_values",
    ),
    Mutant(
        "shared memory that not all ranks can map",
        "syncbn/norm/shared.py",
        "if memory and bool(verdicts.all()) else None",
        "if memory else None",
        "tests/dist/test_shared_memory.py::test_ranks_that_cannot_share_memory_all_take_the_wire",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.what)
def test_the_mutant_is_killed(mutant, tmp_path):
    shutil.copytree(ROOT / "syncbn", tmp_path / "syncbn")
    file = tmp_path / mutant.file
    source = file.read_text()
    assert source.count(mutant.before) == 1, f"{mutant.file} no longer says {mutant.before!r} once"
    file.write_text(source.replace(mutant.before, mutant.after))
    result = _run([mutant.test], tmp_path)
    assert result.returncode == 1, f"survived: {result.stdout}"
    assert "1 failed" in result.stdout


@pytest.mark.slow
def test_without_a_mutant_the_same_tests_pass(tmp_path):
    shutil.copytree(ROOT / "syncbn", tmp_path / "syncbn")
    tests = sorted({mutant.test for mutant in MUTANTS})
    result = _run(tests, tmp_path)
    assert result.returncode == 0, result.stdout


def _run(tests: list[str], package: Path) -> subprocess.CompletedProcess[str]:
    """Run `tests` against the copy of the package in the folder `package`, which comes first on the path."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    command = [sys.executable, "-m", "pytest", *options, *(str(ROOT / test) for test in tests)]
    environment = os.environ | {"PYTHONPATH": str(package)}
    return subprocess.run(
        command, cwd=package, env=environment, capture_output=True, text=True, timeout=300
    )
