"""Two layers that could be siblings, and what they are given."""

import torch
from oracle import batch_norm, own_part

import syncbn

SIZES = {2: (2, 4), 3: (3, 0, 2)}
CHANNELS = (3, 5)


def siblings(dtype=torch.float32, group=None, acts=("relu", None), names=("b.main", "b.side.1")):
    """Two layers that could be siblings, named as a conversion names them."""
    torch.manual_seed(1)
    layers = []
    for channels, act, name in zip(CHANNELS, acts, names, strict=True):
        layer = syncbn.convert_sync_batchnorm(batch_norm(channels).to(dtype), group)
        layer.act, layer.layer_name = act, name
        layers.append(layer)
    return layers


def inputs_of(world_size, dtype=torch.float32, layout=torch.contiguous_format):
    """This rank's inputs, a residual for the first, and upstream gradients."""
    generator = torch.Generator().manual_seed(7)
    total = sum(SIZES[world_size])
    wholes = [
        torch.randn(total, channels, 4, 6, generator=generator).to(dtype, memory_format=layout)
        for channels in (*CHANNELS, CHANNELS[0], *CHANNELS)
    ]
    a, b, residual, *dys = (own_part(whole, SIZES[world_size]) for whole in wholes)
    return a.requires_grad_(), b.requires_grad_(), residual.requires_grad_(), dys
