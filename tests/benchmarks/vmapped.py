"""Client-by-client simulation of full batches through `torch.func.vmap`, to be measured against the loop."""

from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from attack_modules.simulation.local_training import SimulatedPeers
from attack_modules.simulation.low_rank import LowRank, SimulatedUpdate
from fl_lightning.models import ImageClassifier


def vmapped_update(
    peers: SimulatedPeers, model: ImageClassifier, images: Tensor, labels: Tensor, clients: int
) -> SimulatedUpdate:
    """The mean update of clients with equally many images, as `SimulatedPeers.mean_update` gives it.

    Args:
        peers: gives the weights and the assumed training.
        model: as theirs (a head of linear layers without bias), but without hooks, which vmap does not support.
        images: (N, C, H, W) in [0, 1], ordered by client.
        labels: (N,) long.
        clients: their number.
    """
    lr = peers.assumptions.client_lr
    base = {name: peers.parameters[name] for name in peers.linear_weights}
    names = list(base)

    def loss(dense: dict, shifts: dict, factors: dict, x: Tensor, y: Tensor) -> tuple[Tensor, dict]:
        x, inputs = functional_call(model.features, dense, (model.normalise(x),)).flatten(1), {}
        for index, layer in enumerate(model.head):
            name = f"head.{index}.weight"
            if name not in base:
                x = layer(x)
                continue
            inputs[name] = x
            outputs = x @ base[name].T + shifts[name]  # the loss's gradient at a shift of zero is that of the outputs
            for left, right in factors[name]:
                outputs = outputs - lr * (x @ right.T) @ left
            x = outputs
        return F.cross_entropy(x, y), inputs

    def client(x: Tensor, y: Tensor) -> tuple[dict, dict]:
        start = {n.removeprefix("features."): w for n, w in peers.parameters.items() if n not in base}
        dense, factors = start, {name: [] for name in names}
        for _ in range(peers.assumptions.local_epochs):
            shifts = {name: x.new_zeros(len(x), len(base[name])) for name in names}
            (slopes, errors), inputs = grad(loss, argnums=(0, 1), has_aux=True)(dense, shifts, factors, x, y)
            dense = {name: weight - lr * slopes[name] for name, weight in dense.items()}
            factors = {name: [*factors[name], (errors[name], inputs[name])] for name in names}
        return {f"features.{name}": start[name] - dense[name] for name in start}, factors

    updates, factors = vmap(client)(images.unflatten(0, (clients, -1)), labels.unflatten(0, (clients, -1)))
    mean: SimulatedUpdate = {name: update.mean(0) for name, update in updates.items()}
    for name in names:
        left = tuple(lr / clients * left.flatten(0, 1) for left, _ in factors[name])
        mean[name] = LowRank(base[name], 0.0, left, tuple(right.flatten(0, 1) for _, right in factors[name]))
    return mean
