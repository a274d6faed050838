"""MLflow beside a run that fails: it is waited for where there is something to see."""

import json

import pytest

from syncbn.compose import compose
from syncbn.launch import tracked as module
from syncbn.launch.tracked import tracked


class Recorded:
    """A shipping that notes how it ended."""

    def __init__(self) -> None:
        self.ends: list[str] = []

    def close(self, timeout_s: float = 30.0) -> int:
        del timeout_s
        self.ends.append("close")
        return 0

    def drop(self) -> None:
        self.ends.append("drop")


@pytest.mark.parametrize(
    ("records", "end"), [([], "drop"), ([{"step": 1, "metrics": {}}], "close")]
)
def test_a_run_that_fails_is_sent_where_it_has_measured_something(
    tmp_path, monkeypatch, records, end
):
    shipping = Recorded()
    monkeypatch.setattr(module, "probe_tracking", lambda cfg: None)
    monkeypatch.setattr(module, "start_shipping", lambda cfg, journal: shipping)
    cfg = compose([f"runs_dir={tmp_path}"])
    cfg.folder.mkdir()
    lines = [json.dumps(record) + "\n" for record in [{"event": "start"}, *records]]
    (cfg.folder / "journal.jsonl").write_text("".join(lines))
    with pytest.raises(ValueError, match="mistake"), tracked(cfg):
        raise ValueError("mistake")
    assert shipping.ends == [end]
