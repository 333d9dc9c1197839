"""Trained networks with the numbers that ship, so that what is reported, compared with and served is one network."""

from __future__ import annotations

from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cxr_retrieval.contract import TensorSpec

HALVED_FROM: Final = 256
"""Tensors of so many elements are stored as fp16; what is smaller (biases, gains, axes) stays fp32."""


Convolution = nn.Conv2d | nn.ConvTranspose2d
Network = TypeVar("Network", bound=nn.Module)


def as_shipped(network: Network, takes: TensorSpec) -> Network:
    """Folds each batch norm into the convolution before it and rounds weights, in place; it computes in fp32 as before.

    Large tensors become what fp16 holds, as which they are stored, and convolutions' weights what bf16 holds as well: rounded by the
    runtime instead, all films alike, they are 40 % of what bf16 changes in the lungs' outline (docs/performance.md).

    An export stores exactly these numbers. Rounded only there, after folding, they would differ from the network that made the
    gallery's closed-form parts and the report: one pixel of the lungs' outline in ten thousand falls on the other side, and one in
    forty of the ten nearest cases is another (measured).

    Args:
        network: Not to be trained any further.
        takes: Its one input.
    """
    network.eval()
    _fold_batch_norms(network, takes)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, Convolution):
                module.weight.copy_(module.weight.bfloat16())
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.dtype == torch.float32 and tensor.numel() >= HALVED_FROM:
                tensor.copy_(tensor.half())
    return network


def _fold_batch_norms(network: nn.Module, takes: TensorSpec) -> None:
    """Jacob et al. 2018, section 3.2. Which convolution a batch norm stands behind is seen by running an empty image through."""
    made: dict[int, tuple[Tensor, Convolution]] = {}
    behind: dict[nn.BatchNorm2d, Convolution] = {}

    def after(convolution: Any, _: Any, output: Tensor) -> None:
        made[id(output)] = output, convolution  # the tensor is kept, or its id would be given to another

    def before(norm: Any, inputs: tuple[Tensor]) -> None:
        if id(inputs[0]) in made:
            behind[norm] = made[id(inputs[0])][1]

    hooks = [module.register_forward_hook(after) for module in network.modules() if isinstance(module, Convolution)]
    hooks += [module.register_forward_pre_hook(before) for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.inference_mode():
        network(torch.zeros((1, *takes.shape), dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    for name, norm in list(network.named_modules()):
        if not isinstance(norm, nn.BatchNorm2d) or norm not in behind:
            continue
        convolution = behind[norm]
        fused = fuse_conv_bn_eval(convolution, norm, transpose=isinstance(convolution, nn.ConvTranspose2d))
        convolution.weight, convolution.bias = fused.weight, fused.bias
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, getattr(norm, "act", nn.Identity()))  # timm's norm holds the activation, too
