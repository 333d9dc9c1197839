"""Trained networks with the numbers that ship, so that what is reported, compared with and served is one network; and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cxr_retrieval.contract import TensorSpec

HALVED_FROM: Final = 256
"""Tensors of so many elements are stored as fp16; what is smaller (biases, gains, axes) stays fp32."""


Convolution = nn.Conv2d | nn.ConvTranspose2d
Network = TypeVar("Network", bound=nn.Module)


def as_shipped(network: Network, takes: TensorSpec, int8_weights: bool = False) -> Network:
    """Folds each batch norm into the convolution before it and rounds weights, in place; it computes in fp32 as before.

    Large tensors become what fp16 holds, as which they are stored, and convolutions' weights what bf16 holds as well: rounded by the
    runtime instead, all films alike, they are 40 % of what bf16 changes in the lungs' outline (docs/performance.md).

    An export stores exactly these numbers. Rounded only there, after folding, they would differ from the network that made the
    gallery's closed-form parts and the report: one pixel of the lungs' outline in ten thousand falls on the other side, and one in
    forty of the ten nearest cases is another (measured).

    Args:
        network: Not to be trained any further.
        takes: Its one input.
        int8_weights: Weights of convolutions and linear layers become what int8 and a power of two for each row hold, as which they are
            stored in half the size.
    """
    network.eval()
    _fold_batch_norms(network, takes)
    with torch.no_grad():
        for module in network.modules():
            if int8_weights and isinstance(module, Convolution | nn.Linear):
                scale = int8_scale(module.weight)
                module.weight.copy_((module.weight / scale).round() * scale)
            elif isinstance(module, Convolution):
                module.weight.copy_(module.weight.bfloat16())
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.dtype == torch.float32 and tensor.numel() >= HALVED_FROM:
                tensor.copy_(tensor.half())
    return network


def int8_scale(weight: Tensor) -> Tensor:
    """`[out, 1, …]`: of each row of a weight `[out, …]`, the least power of two by which the largest of it is 127 at most.

    A power of two, for then int8's numbers are numbers of bf16 and fp16, too, and rounding them again changes nothing.
    """
    largest = weight.abs().flatten(1).amax(dim=1)
    mantissa, exponent = torch.frexp(largest / 127.0)  # mantissa from 0.5 to below 1
    scale = torch.ldexp(torch.ones_like(largest), exponent - (mantissa == 0.5).int())
    return torch.where(largest > 0, scale, torch.ones_like(scale)).reshape(-1, *(1,) * (weight.dim() - 1))


def as_trained(network: Network, shipped: Mapping[str, Tensor], takes: TensorSpec) -> Network:
    """Undoes `as_shipped` as far as can be, in place: weights back into a network of the same kind, whose batch norms then change nothing.

    What their statistics were is gone; `as_shipped` of the result has the numbers of `shipped` to the bit.

    Args:
        network: Built, not trained.
        shipped: State by name of the network that came through `as_shipped`.

    Raises:
        KeyError: A name that `shipped` lacks.
    """
    network.eval()
    norms = _norms_behind_convolutions(network, takes)
    names = {module: name for name, module in network.named_modules()}
    own = {name: tensor for name, tensor in network.state_dict(keep_vars=True).items() if tensor.is_floating_point()}
    with torch.no_grad():
        for norm, convolution in norms.items():
            shift = shipped[f"{names[convolution]}.bias"]  # what the norm added, once folded
            own.pop(f"{names[norm]}.weight").fill_(1.0)
            own.pop(f"{names[norm]}.bias").copy_(shift)
            own.pop(f"{names[norm]}.running_mean").zero_()
            own.pop(f"{names[norm]}.running_var").fill_(1.0 - norm.eps)
            if convolution.bias is not None:
                own.pop(f"{names[convolution]}.bias").zero_()
        for name, tensor in own.items():
            tensor.copy_(shipped[name].reshape(tensor.shape))
    return network


def _fold_batch_norms(network: nn.Module, takes: TensorSpec) -> None:
    """Jacob et al. 2018, section 3.2."""
    names = {module: name for name, module in network.named_modules()}
    for norm, convolution in _norms_behind_convolutions(network, takes).items():
        fused = fuse_conv_bn_eval(convolution, norm, transpose=isinstance(convolution, nn.ConvTranspose2d))
        convolution.weight, convolution.bias = fused.weight, fused.bias
        parent, _, child = names[norm].rpartition(".")
        setattr(network.get_submodule(parent), child, getattr(norm, "act", nn.Identity()))  # timm's norm holds the activation, too


def _norms_behind_convolutions(network: nn.Module, takes: TensorSpec) -> dict[nn.BatchNorm2d, Convolution]:
    """Which batch norm stands behind which convolution is seen by running an empty image through."""
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
    return behind
