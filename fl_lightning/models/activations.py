"""What a model keeps of an image between its forward and its backward pass, from shapes alone."""

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fl_lightning.models.classifier import ImageClassifier, ImageShape
from fl_lightning.models.head import PROBES


def activation_bytes(model: ImageClassifier, image_shape: ImageShape, of_images: bool = True) -> int:
    """Bytes that a forward pass keeps of each image for its backward pass; 0 for a model that needs real images.

    Args:
        model: on the meta device, where the pass neither computes nor allocates anything.
        image_shape: (C, H, W) of an image.
        of_images: whether the backward pass is to the images, else to those parameters alone that are not frozen.
    """
    kept: dict[int, int] = {}
    own = {id(parameter) for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own and id(tensor._base) not in own:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    images = torch.zeros(PROBES, *image_shape, device="meta", requires_grad=of_images)
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            graph = model(images)  # it holds the storages, so that no two have the same address
    except Exception:  # of a user's model that looks at values
        return 0
    del graph
    return sum(kept.values()) // PROBES
