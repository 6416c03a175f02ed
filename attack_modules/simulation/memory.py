"""The least memory that simulated training takes, so that what cannot fit is refused before it starts."""

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from attack_modules.threat_model.assumptions import Assumptions
from fl_lightning.client import parameters
from fl_lightning.models import ImageClassifier, ImageShape
from fl_lightning.models.head import PROBES


def activation_bytes(model: ImageClassifier, image_shape: ImageShape) -> int:
    """Bytes that a forward pass keeps of each image for its backward pass; 0 for a model that needs real images.

    Args:
        model: on the meta device, where the pass neither computes nor allocates anything.
        image_shape: (C, H, W) of an image.
    """
    kept: dict[int, int] = {}
    own = {id(parameter) for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own and id(tensor._base) not in own:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    images = torch.zeros(PROBES, *image_shape, device="meta", requires_grad=True)
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            graph = model(images)  # it holds the storages, so that no two have the same address
    except (RuntimeError, NotImplementedError):  # it looks at values
        return 0
    del graph
    return sum(kept.values()) // PROBES


def simulation_bytes(
    model: ImageClassifier,
    image_shape: ImageShape,
    assumptions: Assumptions,
    merged: bool,
    chunk_size: int | None = None,
    head_alone: bool = False,
) -> int:
    """Bytes that the differentiable simulation of a round certainly holds at once; the peak was 2.5 to 8 times that.

    It keeps the activations of every image in every epoch, of one chunk of images if they are recomputed, and the
    weights outside the head before every step but the first of every simulated client.

    Args:
        model: on the meta device.
        image_shape: (C, H, W) of an image.
        assumptions: how the peers train. An unknown number of images counts as one.
        merged: whether one virtual client holds all images.
        chunk_size: see `SimulatedPeers`.
        head_alone: whether the convolutions are frozen.
    """
    images = assumptions.num_images or 1
    if chunk_size is not None:
        passes = min(chunk_size, images)
    else:
        passes = images if head_alone else images * assumptions.local_epochs
    clients = 1 if merged or not assumptions.client_sizes else len(assumptions.client_sizes)
    trained = (
        0
        if head_alone
        else sum(tensor.nbytes for name, tensor in parameters(model).items() if name not in model.head_parameters)
    )
    steps = clients * (assumptions.local_steps - 1)  # the first step's weights are the observed ones
    return passes * activation_bytes(model, image_shape) + steps * trained
