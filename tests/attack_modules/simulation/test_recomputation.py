import torch
from torch import Tensor

from attack_modules.simulation.low_rank import LowRank, SimulatedUpdate
from attack_modules.simulation.recomputation import recomputed


def setting() -> tuple[SimulatedUpdate, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    factored = LowRank(normal(2, 3).detach(), 1.0, (normal(4, 2), normal(1, 2)), (normal(4, 3), normal(1, 3)))
    return {"scale": normal(3), "linear": factored}, normal(4, 3)


def gradient_of(weights: SimulatedUpdate, images: Tensor) -> SimulatedUpdate:
    """Of a linear layer on scaled images, the sum of cubes as its loss."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        scale = weights["scale"] if weights["scale"].requires_grad else weights["scale"].clone().requires_grad_()
        inputs = images * scale
        outputs = weights["linear"].linear(inputs)
        loss = outputs.pow(3).sum()
        scales, errors = torch.autograd.grad(loss, [scale, outputs], create_graph=differentiable)
    return {"linear": LowRank(weights["linear"].base, 0.0, (errors,), (inputs,)), "scale": scales}


def test_a_recomputed_gradient_and_its_derivatives_are_the_same() -> None:
    weights, images = setting()
    factored = weights["linear"]
    sources = [images, weights["scale"], *factored.left, *factored.right]
    found = []
    for gradient in (recomputed(gradient_of, weights, images), gradient_of(weights, images)):
        value = gradient["linear"].dense().sin().sum() + gradient["scale"].cos().sum()
        found.append((value, *torch.autograd.grad(value, sources)))
    torch.testing.assert_close(found[0], found[1])


def test_it_is_computed_once_without_gradients_and_once_when_differentiated() -> None:
    weights, images = setting()
    called = []

    def watched(weights: SimulatedUpdate, images: Tensor) -> SimulatedUpdate:
        asked = [tensor.requires_grad for tensor in (images, weights["scale"])]
        called.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), *asked))
        return gradient_of(weights, images)

    weights["scale"] = weights["scale"].detach()  # nobody asks for the derivative by it
    with torch.autocast("cpu", torch.bfloat16):
        gradient = recomputed(watched, weights, images)
    assert called == [(False, True, False, False)]
    gradient["scale"].sum().backward()
    assert called == [(False, True, False, False), (True, True, True, False)]
    assert images.grad is not None
