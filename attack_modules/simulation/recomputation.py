"""Gradients that one can differentiate, without the activations that this takes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from attack_modules.simulation.low_rank import LowRank, SimulatedUpdate

GradientOf = Callable[[SimulatedUpdate, Tensor], SimulatedUpdate]


def recomputed(gradient_of: GradientOf, weights: SimulatedUpdate, images: Tensor) -> SimulatedUpdate:
    """`gradient_of(weights, images)`, which is computed a second time when it is differentiated.

    `torch.utils.checkpoint` would compute the forward pass twice more, since the gradient is itself a backward pass
    that asks for the activations.

    Args:
        gradient_of: gives a gradient for each of the weights, those of factored ones in one pair of factors. It is
            called without gradients and with them, and must not depend on other tensors that are differentiated.
        weights: by parameter name.
        images: (N, C, H, W).
    """

    def flat(images: Tensor, *tensors: Tensor) -> list[Tensor]:
        gradient = gradient_of(_packed(weights, tensors), images)
        return _tensors({name: gradient[name] for name in weights})

    one_pair = {  # the gradient's form: `_packed` puts its tensors in the place of these
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
    """All that an update is made of, but the constant bases."""
    return [t for u in update.values() for t in ((*u.left, *u.right) if isinstance(u, LowRank) else (u,))]


def _packed(template: SimulatedUpdate, tensors: Sequence[Tensor]) -> SimulatedUpdate:
    """The update that `_tensors` took apart, in the form of `template`."""
    rest = iter(tensors)
    return {
        name: replace(u, left=tuple(islice(rest, len(u.left))), right=tuple(islice(rest, len(u.right))))
        if isinstance(u, LowRank)
        else next(rest)
        for name, u in template.items()
    }
