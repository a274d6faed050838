"""The short form of the studies, on the published data: the whole way from a job description to its verdicts."""

import json
import os

import pytest
from programs import SYNCBN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.shared_data,
    pytest.mark.skipif(
        "SYNCBN_DATA_ROOT" not in os.environ, reason="SYNCBN_DATA_ROOT names no folder"
    ),
]


@pytest.mark.timeout(2400)
def test_the_fast_tier_runs_whole_and_no_claim_of_it_is_contradicted(bench, tmp_path):
    root = f"data.root={os.environ['SYNCBN_DATA_ROOT']}"
    done = bench.run(*SYNCBN, "studies", "--tier", "fast", root, "tracking=journal", timeout=2000)
    assert done.returncode == 0, done.stderr
    book = json.loads((tmp_path / "runs" / "studies.json").read_text())["studies"]
    verdicts = {entry["study"]: entry["verdicts"] for entry in book}
    assert set(verdicts) == {"equivalence-fast", "batch_size-fast", "ioffe_mnist-fast"}
    assert verdicts["equivalence-fast"]["trajectory_4_ranks"] == "REPRODUCED"
    assert verdicts["batch_size-fast"]["sync_beats_local"] == "REPRODUCED"
    told = {verdict for of_study in verdicts.values() for verdict in of_study.values()}
    assert told <= {"REPRODUCED", "INCONCLUSIVE"}
