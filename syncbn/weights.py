"""What `model.weights` names, a file, a run or published weights, and the sha256 of its content; no tensor is read.

The content decides a run's numbers, not its path. So a config is given the content's sha256 when it is composed
(`model.weights_sha256`), its hash has that in place of the path, and what a rank reads later is compared with it.
"""

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from syncbn.config import RunConfig
from syncbn.errors import CheckpointError, UsageError
from syncbn.kept_checkpoint import kept_checkpoint, sha256_of, whole

SUFFIXES = (".safetensors", ".pt", ".pth")
_PUBLISHED = {"torchvision": r"\w+_Weights\.\w+", "timm": r"pretrained"}
_HOW = (
    "a file (.safetensors, .pt, .pth), the folder or name of a run, a member of torchvision's weights for "
    "model=torchvision, or `pretrained` for model=timm"
)


class NotThere(UsageError):
    """`model.weights` names nothing that exists here."""


@dataclass(frozen=True)
class Source:
    """Where weights are.

    Attributes:
        kind: `file`, `checkpoint` or `published`.
        path: the file, or the folder of the checkpoint; the current folder where they are published.
        sha256: of the file, or of the checkpoint's manifest; "" where they are published, whose name never changes.
    """

    kind: str
    path: Path
    sha256: str = ""


def find(cfg: RunConfig) -> Source:
    """What `cfg.model.weights` names.

    Raises:
        NotThere: nothing of that name.
        UsageError: a file of another kind, published weights of another library's models, or the run itself.
        CheckpointError: a run without a whole checkpoint, or whose best one is damaged.
    """
    text = str(cfg.model.weights)
    for library, pattern in _PUBLISHED.items():
        if re.fullmatch(pattern, text):
            return _published(text, library, cfg.model.name)
    path = Path(text)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UsageError(f"model.weights={text} is not allowed: {_HOW}")
        return Source("file", path, sha256_of(path))
    folder = path if path.is_dir() else Path(cfg.runs_dir) / text
    if not folder.is_dir() or path.suffix in SUFFIXES:
        raise NotThere(f"model.weights={text} is not there: {_HOW}{_runs_like(text, cfg)}")
    if folder.resolve() == cfg.folder.resolve():
        raise UsageError(f"model.weights={text} is the run itself: give this one another name")
    return _checkpoint(folder)


def pin(cfg: RunConfig) -> None:
    """Set `cfg.model.weights_sha256`; where it is set already, it is what the content must have.

    A run that has a checkpoint of its own does not read the weights again. So what is not there any more is allowed
    where its sha256 is known, from the config or from the journal of the run, and so is another run that has trained on
    since this one began with it.

    Raises:
        UsageError: see `find`.
        CheckpointError: see `find`, or another content than the config demands.
    """
    if cfg.model.weights is None:
        return
    demanded = cfg.model.weights_sha256
    try:
        source = find(cfg)
        began_with = _recorded(cfg) if source.kind == "checkpoint" and has_begun(cfg) else None
        found = began_with or source.sha256 or None
    except NotThere:
        found = demanded or _recorded(cfg)
        if found is None:
            raise
    if demanded not in (None, found):
        raise CheckpointError(
            f"model.weights={cfg.model.weights} has sha256 {found}, model.weights_sha256 demands {demanded}"
        )
    cfg.model.weights_sha256 = found


def has_begun(cfg: RunConfig) -> bool:
    """Whether the run goes on from a checkpoint of its own."""
    return cfg.train.resume and any((cfg.folder / "checkpoints").glob("step-*"))


def _published(text: str, library: str, model: str) -> Source:
    if model != library:
        raise UsageError(
            f"model.weights={text} is not allowed with model={model}: it is of model={library}"
        )
    return Source("published", Path())


def _checkpoint(folder: Path) -> Source:
    """The checkpoint in `folder`, or that of the run there (`kept_checkpoint`)."""
    found = whole(folder) or kept_checkpoint(folder)
    if found is not None:
        return Source("checkpoint", found.path, found.sha256)
    if not (folder / "checkpoints").is_dir() and not (folder / "journal.jsonl").is_file():
        raise UsageError(f"model.weights={folder} is a folder without a run in it: {_HOW}")
    raise CheckpointError(
        f"model.weights={folder} has no whole checkpoint in {folder / 'checkpoints'}: wait until the run has saved one"
    )


def _recorded(cfg: RunConfig) -> str | None:
    """The sha256 that the latest attempt in the run's own journal names for the same `model.weights`."""
    try:
        records = [json.loads(line) for line in (cfg.folder / "journal.jsonl").open()]
        model = [r for r in records if r.get("event") == "start"][-1]["config"]["model"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return model.get("weights_sha256") if model.get("weights") == cfg.model.weights else None


def _runs_like(text: str, cfg: RunConfig) -> str:
    runs = sorted(path.parent.name for path in Path(cfg.runs_dir).glob("*/checkpoints"))
    near = difflib.get_close_matches(text, runs, n=1)
    return f"; did you mean the run {near[0]}?" if near else ""
