"""Who gives another program's word for a key is told ours, and how to convert the value."""

import pytest

from syncbn.compose import compose
from syncbn.errors import UsageError
from syncbn.keys import SYNONYMS, instead_of, known_keys


def test_words_of_other_programs_lead_to_keys_that_exist():
    keys = known_keys()
    words = " ".join(SYNONYMS).split()
    assert {key for key, _ in SYNONYMS.values()} <= set(keys)
    assert len(words) == len(set(words))
    assert not set(words) & {key.rsplit(".", 1)[-1] for key in keys}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("train.epochs=3", "it is train.steps (optimiser steps: epochs x training samples /"),
        ("batch_size=64", "it is train.per_rank_batch (samples a rank: the global batch /"),
        ("train.batch_size=64", "it is train.per_rank_batch"),
        ("learning_rate=1", "it is optim.lr"),
        ("lr=1", "did you mean 'optim.lr'?"),
        ("train.lr=1", "did you mean 'optim.lr'?"),
        ("workers=2", "it is launcher.num_workers (ranks; processes that load data are data.num_loaders)"),
        ("data.num_workers=2", "it is data.num_loaders"),
        ("gpus=2", "it is launcher.num_workers (the number of ranks"),
        ("random_seed=1", "it is seed"),
        ("model_name=cnn", "it is model (one of its options, as model=cnn)"),
        ("optimizer=adam", "it is optim (one of its options"),
        ("Data-Dir=x", "it is data.root"),
        ("data.lmit=3", "did you mean 'data.limit'?"),
        ("++train.epochs=3", "it is train.steps"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_answered_with_the_one_that_is_meant(given, said):
    with pytest.raises(UsageError) as refused:
        compose([given])
    assert str(refused.value).startswith(f"unknown key {given.lstrip('+').partition('=')[0]!r}")
    assert said in str(refused.value)
    assert "+" not in str(refused.value), "Hydra's advice to append, which is refused"


def test_a_word_that_is_like_no_key_has_no_suggestion():
    assert instead_of("foo") == ""
