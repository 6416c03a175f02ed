"""Differentiable gradients whose activations are recomputed instead of stored."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from attack_modules.simulation.low_rank import LowRank, SimulatedUpdate

GradientOf = Callable[[SimulatedUpdate, Tensor], SimulatedUpdate]


def recomputed(gradient_of: GradientOf, weights: SimulatedUpdate, images: Tensor) -> SimulatedUpdate:
    """`gradient_of(weights, images)`, recomputed in the backward pass.

    `torch.utils.checkpoint` would run the forward pass two more times, because the gradient is itself the result of a
    backward pass.

    Args:
        gradient_of: returns a gradient for each of the weights, for low-rank ones as one pair of factors. It is called
            with gradients disabled and enabled, and must not depend on other differentiable tensors.
        weights: by parameter name.
        images: (N, C, H, W).
    """

    def flat(images: Tensor, *tensors: Tensor) -> list[Tensor]:
        gradient = gradient_of(_packed(weights, tensors), images)
        return _tensors({name: gradient[name] for name in weights})

    one_pair = {  # a template of the gradient, into which `_packed` puts the tensors
        name: LowRank(w.base, 0.0, (w.base,), (w.base,)) if isinstance(w, LowRank) else w for name, w in weights.items()
    }
    return _packed(one_pair, _Recomputed.apply(flat, images, *_tensors(weights)))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, function: Callable[..., list[Tensor]], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        device = inputs[0].device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return tuple(output.detach() for output in function(*(tensor.detach() for tensor in inputs)))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        asked = ctx.needs_input_grad[1:]
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.saved_tensors, asked, strict=True)]
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            outputs = ctx.function(*inputs)
        needed = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(outputs, needed, slopes, allow_unused=True))
        return None, *(next(found) if need else None for need in asked)


def _tensors(update: SimulatedUpdate) -> list[Tensor]:
    """The tensors of an update, without the constant bases of low-rank ones."""
    return [t for u in update.values() for t in ((*u.left, *u.right) if isinstance(u, LowRank) else (u,))]


def _packed(template: SimulatedUpdate, tensors: Sequence[Tensor]) -> SimulatedUpdate:
    """The inverse of `_tensors`: an update of the form of `template`."""
    rest = iter(tensors)
    return {
        name: replace(u, left=tuple(islice(rest, len(u.left))), right=tuple(islice(rest, len(u.right))))
        if isinstance(u, LowRank)
        else next(rest)
        for name, u in template.items()
    }
