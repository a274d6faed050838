"""Of ranks that fail because another did, each says what that one failed of, and so does the journal."""

import json
import os
from pathlib import Path

import pytest
import torch
from own_ranks import run_ranks

from syncbn.compose import compose
from syncbn.errors import (
    DataError,
    InfrastructureError,
    NonFinite,
    RankFailed,
    Stopped,
    exit_code,
    with_class,
)
from syncbn.norm import RankLost, RanksDisagree
from syncbn.runtime import causes
from syncbn.runtime.base import Solo
from syncbn.runtime.causes import cause_told

CLOSED = "[pair.cc:561] Connection closed by peer [127.0.0.1]:1234"

LATE = "[unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete"


class OfTwo(Solo):
    """One of two ranks, whose posts the other one reads."""

    world_size = 2

    def __init__(self, rank, posts):
        super().__init__(torch.device("cpu"))
        self.rank, self.posts = rank, posts

    def post(self, key, text):
        self.posts.setdefault(key, text)

    def posted(self, key):
        return self.posts.get(key)


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setattr(causes, "PATIENCE_S", 0.05)
    posts = {}
    return [OfTwo(rank, posts) for rank in range(2)]


def raised(error, runtime, work=""):
    """What a rank raises that fails of `error`."""
    with pytest.raises(BaseException) as caught, cause_told(runtime, work):  # noqa: PT011
        raise error
    return caught.value


@pytest.mark.parametrize(
    "own",
    [
        DataError("sample 7 is damaged"),
        InfrastructureError("loader process 7 was lost"),
        OSError(28, "No space left on device"),
        MemoryError("no room"),
        KeyError("x"),
        SystemExit(3),
    ],
)
@pytest.mark.parametrize(
    "consequence",
    [
        RanksDisagree("rank 1 left"),
        RankLost("rank 1 exited"),
        RuntimeError(CLOSED),
        RuntimeError(LATE),
        RuntimeError("out of step"),
    ],
)
def test_what_follows_from_another_ranks_failure_is_said_to_be_that(ranks, own, consequence):
    assert raised(own, ranks[1]) is own
    heard = raised(consequence, ranks[0])
    assert isinstance(heard, RankFailed)
    assert (heard.exit_code, heard.rank) == (exit_code(own), 1)
    assert str(own) in str(heard)
    assert type(own).__name__ in heard.details
    assert with_class(heard).startswith(f"{type(own).__name__}: ")
    assert with_class(heard).endswith("(rank 1)")


def test_the_first_of_two_failures_is_the_cause(ranks):
    raised(DataError("first"), ranks[1])
    raised(DataError("second"), ranks[0])
    assert str(raised(RanksDisagree("third"), ranks[0])) == "first"


def test_a_disagreement_or_a_death_without_a_cause_stays_what_it_is(ranks):
    error = RanksDisagree("eval mode")
    assert raised(error, ranks[0]) is error
    assert isinstance(raised(RuntimeError(CLOSED), ranks[1]), InfrastructureError)
    bug = RuntimeError("sizes differ")
    assert raised(bug, ranks[1]) is bug


def test_a_rank_that_does_not_come_to_a_collective_is_named_and_can_be_tried_again(ranks):
    error = raised(RuntimeError(LATE), ranks[0])
    assert exit_code(error) == 75
    assert str(error).startswith("rank 1 did not come within launcher.timeout_s: it is stopped or")
    assert "every other rank waits too" in str(raised(RuntimeError(LATE), ranks[1]))


def test_a_stop_is_no_failure(ranks):
    raised(Stopped(15), ranks[1])
    error = RanksDisagree("late")
    assert raised(error, ranks[0]) is error


def test_the_next_piece_of_work_does_not_end_with_the_failure_of_one_before(ranks):
    raised(NonFinite("diverged"), ranks[1], "trial-1")
    error = RanksDisagree("eval mode")
    assert raised(error, ranks[0], "trial-2") is error


MINE = """
import os, torch
from torch import nn
from torch.utils.data import Dataset
import syncbn.extend as extend

class Images(Dataset):
    num_classes = 2
    def __len__(self): return 32
    def __getitem__(self, i):
        if i == 13: raise OSError("image file is truncated")
        return torch.ones(1, 2, 2) * i, i % 2

@extend.data("images")
def images(root, split): return Images() if split == "train" else torch.utils.data.TensorDataset(
    torch.ones(8, 1, 2, 2), torch.arange(8) % 2)
"""


def _ends_with_its_cause(folder: str, exchange: str) -> None:
    """On each rank: a data set of which one rank alone fetches a damaged sample."""
    from syncbn.runtime.local import TorchrunRuntime
    from syncbn.train import recorded_run

    os.chdir(folder)
    os.environ["SYNCBN_EXCHANGE"] = exchange
    runtime = TorchrunRuntime(torch.device("cpu"))
    cfg = compose(["extensions=[mine]", "data=images", "debug=tiny", "norm=sync", "train.steps=8",
                   "train.per_rank_batch=2", "launcher.num_workers=2", "tracking=journal", "name=run"])  # fmt: skip
    try:
        with cause_told(runtime):
            recorded_run(cfg, runtime)
    except Exception as error:
        Path(f"said-{runtime.rank}").write_text(f"{exit_code(error)} {error}")
    os._exit(0) if runtime.rank == 0 else runtime.close()


@pytest.mark.parametrize(
    "exchange",
    ["shared", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sockets", "gloo"))],
)
def test_the_journal_ends_with_what_one_rank_failed_of(tmp_path, exchange):
    (tmp_path / "mine.py").write_text(MINE)
    run_ranks(__name__, "_ends_with_its_cause", str(tmp_path), exchange)
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert len(set(said)) == 1
    assert said[0].startswith("3 data=images (train): sample 13 is no pair of tensors")
    *_, end = map(json.loads, (tmp_path / "runs/run/journal.jsonl").read_text().splitlines())
    assert end["error"].startswith("DataError: data=images (train): sample 13 is no pair")
