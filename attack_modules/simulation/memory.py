"""The least memory that simulated training takes, so that what cannot fit is refused before it starts."""

from attack_modules.threat_model.assumptions import Assumptions
from fl_lightning.client import parameters
from fl_lightning.models import ImageClassifier, ImageShape
from fl_lightning.models.activations import activation_bytes


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
