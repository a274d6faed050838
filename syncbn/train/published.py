"""Trained weights that torchvision and timm publish: their file in the cache, fetched only where a config says so."""

import difflib
from pathlib import Path
from urllib.error import URLError

import torch

from syncbn.config import ModelConfig
from syncbn.errors import ServiceUnreachable, UsageError


def published(cfg: ModelConfig) -> Path:
    """The file of `cfg.weights` on this machine.

    Raises:
        UsageError: `cfg.arch` has no such weights, or they are not in the cache and `cfg.download` is false.
        ServiceUnreachable: they could not be fetched.
    """
    return _of_torchvision(cfg) if cfg.name == "torchvision" else _of_timm(cfg)


def _of_torchvision(cfg: ModelConfig) -> Path:
    from torchvision import models

    known = {str(weights): weights for weights in models.get_model_weights(str(cfg.arch))}
    if cfg.weights not in known:
        near = difflib.get_close_matches(str(cfg.weights), known, n=1, cutoff=0)
        raise UsageError(
            f"model.weights={cfg.weights} is not of model.arch={cfg.arch}; did you mean {near[0]}?"
        )
    url = known[cfg.weights].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        _require_download(cfg, f"{url} as {path}")
        _fetch(url, path)
    return path


def _fetch(url: str, path: Path) -> None:
    """Download `url`, whose name ends in the first digits of its sha256, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        digits = path.stem.rpartition("-")[2]
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digits, progress=False)
    except (URLError, OSError, RuntimeError) as error:
        raise ServiceUnreachable(f"{url} cannot be fetched: {error}") from error


def _of_timm(cfg: ModelConfig) -> Path:
    import timm
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    found = timm.get_pretrained_cfg(str(cfg.arch))
    if found is None or not found.hf_hub_id:
        raise UsageError(
            f"model.weights=pretrained is not allowed with model.arch={cfg.arch}: timm has no trained weights of it"
        )
    name = "model.safetensors"
    cached = try_to_load_from_cache(found.hf_hub_id, name)
    if isinstance(cached, str):
        return Path(cached)
    _require_download(cfg, f"{name} of {found.hf_hub_id} in the cache of huggingface_hub")
    try:
        return Path(hf_hub_download(found.hf_hub_id, name))
    except Exception as error:
        raise ServiceUnreachable(
            f"{found.hf_hub_id} cannot be fetched: {str(error).partition(chr(10))[0]}"
        ) from error


def _require_download(cfg: ModelConfig, what: str) -> None:
    if not cfg.download:
        raise UsageError(
            f"model.weights={cfg.weights} is not on this machine: model.download=true fetches it, or put {what}"
        )
