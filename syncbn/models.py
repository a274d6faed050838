"""Networks by name, always with torch's batch norm as their norm.

A model is built the same for every arm, from a seed of its own, and `syncbn.arms` replaces the norms afterwards. So all
arms start from the same weights, bit for bit. Biases are kept even where a batch norm follows and makes them idle,
because in the arm without a norm they are needed.
"""

import difflib
from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn

from syncbn.config import ModelConfig
from syncbn.errors import UsageError
from syncbn.registry import MODELS

Shape = tuple[int, int, int]
"""(C, H, W) of one image."""

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
}


_TAKE_ANY_IMAGE = ("mlp", "cnn", "vgg")


def build_model(cfg: ModelConfig, shape: Shape, num_classes: int, seed: int) -> nn.Module:
    """The network that `cfg` names, for images (N, *shape), giving logits (N, num_classes), float32, on the CPU.

    Its weights are decided by `seed` alone; the global random state is left as it was.

    Raises:
        UsageError: an unknown architecture, or a model that cannot take these images; see `Entry.keywords`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        entry = MODELS[cfg.name]
        model = entry.build(shape, num_classes, **entry.keywords(cfg))
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"model={cfg.name} is a {type(model).__name__}: it must be a torch.nn.Module"
            )
        if cfg.init == "normal":
            init_normal(model, cfg.init_std)
        if cfg.name not in _TAKE_ANY_IMAGE:
            _try_out(model, cfg.arch or cfg.name, shape)
    return model


def _try_out(model: nn.Module, name: str, shape: Shape) -> None:
    """Raise `UsageError` where a model does not take inputs of `shape`; no statistics move."""
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"model={name} cannot take inputs of shape {tuple(shape)}: {reason}"
        ) from error
    model.train()


def init_normal(model: nn.Module, std: float) -> None:
    """Draw the weights of all linear and convolutional layers from N(0, std^2) and set their biases to 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def hidden_layer(cfg: ModelConfig, affine: nn.Linear | nn.Conv2d) -> nn.Sequential:
    """A linear map or convolution with its norm and its activation, in the order that `cfg.placement` says.

    `pre`: affine, norm, activation (Ioffe & Szegedy 2015). `post`: affine, activation, norm. `input`: norm,
    affine, activation, so the first such layer normalises the images themselves. Where `cfg` asks for them, local
    response normalisation (`lrn`, after convolutions) and then `dropout` follow the activation.
    """
    norm = _norm(affine, on_input=cfg.placement == "input")
    parts = {"affine": affine, "norm": norm, "activation": ACTIVATIONS[cfg.activation]()}
    if cfg.lrn:
        parts["lrn"] = local_response_norm()
    if cfg.dropout:
        parts["dropout"] = nn.Dropout(cfg.dropout)
    activated = [name for name in ("activation", "lrn", "dropout") if name in parts]
    order = {
        "pre": ["affine", "norm", *activated],
        "post": ["affine", *activated, "norm"],
        "input": ["norm", "affine", *activated],
    }[cfg.placement]
    return nn.Sequential(OrderedDict((name, parts[name]) for name in order))


def local_response_norm() -> nn.LocalResponseNorm:
    """Over 5 adjacent channels with AlexNet's constants (Krizhevsky, Sutskever & Hinton 2012, section 3.3).

    y_i = x_i / (2 + 1e-4 * sum over channels i-2 to i+2 of x^2) ** 0.75. Torch takes the mean over 5 channels in
    place of the sum, so its alpha is 5 times theirs.
    """
    return nn.LocalResponseNorm(size=5, alpha=5 * 1e-4, beta=0.75, k=2.0)


def _norm(affine: nn.Linear | nn.Conv2d, on_input: bool) -> nn.Module:
    if isinstance(affine, nn.Linear):
        return nn.BatchNorm1d(affine.in_features if on_input else affine.out_features)
    return nn.BatchNorm2d(affine.in_channels if on_input else affine.out_channels)


@MODELS.register("mlp")
class MLP(nn.Module):
    """Fully connected layers: `hidden` (one `hidden_layer` each), then `output`, linear."""

    def __init__(self, shape: Shape, num_classes: int, *, cfg: ModelConfig) -> None:
        super().__init__()
        channels, height, width = shape
        sizes = [channels * height * width, *cfg.hidden]
        self.hidden = nn.Sequential(
            *(hidden_layer(cfg, nn.Linear(fan_in, fan_out)) for fan_in, fan_out in pairwise(sizes))
        )
        self.output = nn.Linear(sizes[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, C, H, W)."""
        return self.output(self.hidden(images.flatten(1)))


class ConvNet(nn.Module):
    """Convolutions and poolings `hidden`, the mean over positions, then `output`, linear."""

    def __init__(self, hidden: nn.Sequential, channels: int, num_classes: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.output = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, C, H, W)."""
        return self.output(self.hidden(images).mean((2, 3)))


@MODELS.register("cnn")
def build_cnn(shape: Shape, num_classes: int, *, cfg: ModelConfig) -> nn.Module:
    """Three 3x3 convolutions of width, 2 width and 4 width channels; the second and third halve the image."""
    channels = [shape[0], cfg.width, 2 * cfg.width, 4 * cfg.width]
    layers = [
        _convolution(cfg, fan_in, fan_out, stride)
        for fan_in, fan_out, stride in zip(channels, channels[1:], (1, 2, 2), strict=False)
    ]
    return ConvNet(nn.Sequential(*layers), channels[-1], num_classes)


@MODELS.register("vgg")
def build_vgg(shape: Shape, num_classes: int, *, cfg: ModelConfig) -> nn.Module:
    """Three stages of two 3x3 convolutions and a pooling; width, 2 width, 4 width channels.

    The pattern of Simonyan & Zisserman (2015) at the depth that suits images of 8 to 64 pixels.
    """
    layers: list[nn.Module] = []
    fan_in = shape[0]
    for fan_out in (cfg.width, 2 * cfg.width, 4 * cfg.width):
        layers += [_convolution(cfg, fan_in, fan_out), _convolution(cfg, fan_out, fan_out)]
        layers.append(nn.MaxPool2d(2, ceil_mode=True))  # never to size 0, however small the image
        fan_in = fan_out
    return ConvNet(nn.Sequential(*layers), fan_in, num_classes)


def _convolution(cfg: ModelConfig, fan_in: int, fan_out: int, stride: int = 1) -> nn.Sequential:
    affine = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1)
    return hidden_layer(cfg, affine)


@MODELS.register("torchvision")
def build_torchvision(shape: Shape, num_classes: int, *, cfg: ModelConfig) -> nn.Module:
    """Torchvision's classification model `cfg.arch`, without trained weights and without auxiliary outputs."""
    from torchvision import models

    known = models.list_models(module=models)
    if cfg.arch not in known:
        close = difflib.get_close_matches(str(cfg.arch), known, n=5, cutoff=0.4)
        hint = (
            f"did you mean {', '.join(close)}?" if close else f"for example {', '.join(known[:5])}"
        )
        raise UsageError(f"model.arch={cfg.arch} is not a torchvision classification model; {hint}")
    if shape[0] != 3:
        raise UsageError(
            f"model.arch={cfg.arch} takes images of 3 channels, these have {shape[0]}: use data=cifar10, "
            "image_folder or synthetic, or model=cnn"
        )
    options = {"aux_logits": False} if cfg.arch in ("googlenet", "inception_v3") else {}
    return models.get_model(cfg.arch, weights=None, num_classes=num_classes, **options)


@MODELS.register("timm")
def build_timm(shape: Shape, num_classes: int, *, cfg: ModelConfig) -> nn.Module:
    """Timm's model `cfg.arch` for images of `shape`, without trained weights."""
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            "model=timm needs timm, which is not installed: pip install timm"
        ) from error
    assert cfg.arch is not None
    if not timm.is_model(cfg.arch):
        close = timm.list_models(f"*{cfg.arch}*")[:5] or difflib.get_close_matches(
            cfg.arch, timm.list_models(), n=5, cutoff=0.4
        )
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise UsageError(f"model.arch={cfg.arch} is not a model of timm{hint}")
    return timm.create_model(cfg.arch, num_classes=num_classes, in_chans=shape[0])
