"""Labels of the peers' images, read from the update of the head."""

import math

import torch
from torch import Tensor, nn

from attack_modules.attack import AttackError
from fl_lightning.client import Tensors
from fl_lightning.models import FIRST_LAYER
from fl_lightning.observation import Observation


@torch.no_grad()
def infer_labels(observation: Observation, update: Tensors) -> Tensor:
    """How many images of each class the peers hold, as a sorted list of labels.

    The mean gradient of the last layer's bias is `p_c - m_c / N` in class c, with `p` the mean predicted probability
    and `m_c` the number of images. Without a bias, a row of the weight's gradient sums to about `s (p_c - m_c / N)`,
    `s` the mean sum of the layer's inputs (LLG, Wainakh et al. 2022). `p` and `s` are estimated with images of noise
    that has a photograph's spectrum, and `s`, where most classes are absent, from the rows of absent classes.

    Args:
        observation: the observed round, with the attacker's beliefs.
        update: the peers' mean update by parameter name.

    Returns:
        (N,) long, ascending; N as believed, or the numerical rank of the first head layer's update.

    Raises:
        AttackError: the number of images is neither believed nor visible in a rank.
    """
    beliefs = observation.beliefs
    model = observation.build_model()
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    num_images = beliefs.num_images or infer_num_images(observation, update)
    probes = pink_noise(64, observation.image_shape)
    inputs = nn.Sequential(*list(model.head)[:-1])(model.embed(probes))
    probability = model.head[-1](inputs).softmax(1).mean(0)  # (C,)
    rate = beliefs.mean_rate * beliefs.local_steps
    gradient = {name: tensor / rate for name, tensor in observation.without_weight_decay(update).items()}
    if f"{last}.bias" in gradient:
        share = probability - gradient[f"{last}.bias"]
    else:
        rows = gradient[f"{last}.weight"].sum(1)
        absent = rows > 0
        scale = (rows / probability)[absent].median() if num_images < len(rows) / 2 else inputs.sum(1).mean()
        share = probability - rows / scale
    remaining = share * num_images
    labels = []
    for _ in range(num_images):
        label = int(remaining.argmax())
        remaining[label] -= 1
        labels.append(label)
    return torch.tensor(sorted(labels))


def infer_num_images(observation: Observation, update: Tensors) -> int:
    """The number of images in an aggregate: the numerical rank of the first head layer's update.

    A linear layer's gradient is a sum of one outer product an image, so singular value N + 1 is much smaller than N.
    Singular values below the rounding of the observed float32 weights say nothing, and are not compared.

    Raises:
        AttackError: the layer is too narrow for its rank to tell.
    """
    weight = observation.without_weight_decay(update)[FIRST_LAYER].double()
    outputs, inputs = weight.shape
    rounding = observation.before[FIRST_LAYER].square().mean().sqrt().double() * 2**-23
    floor = rounding * (math.sqrt(outputs) + math.sqrt(inputs)) / observation.beliefs.server_lr
    singular = torch.linalg.eigvalsh(weight @ weight.T).flip(0).clamp_min(0).sqrt()
    rank = int((singular[:-1] / singular[1:].clamp_min(floor)).argmax()) + 1
    if rank >= min(outputs, inputs) - 1:  # the rows of a softmax gradient sum to zero
        raise AttackError(
            f"The number of images cannot be read from a head layer of {outputs} outputs whose update has full rank. "
            "Give a guess as `knowledge.num_images`."
        )
    return rank


def pink_noise(count: int, image_shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """(count, C, H, W) images in [0, 1] with the 1/f amplitude spectrum of photographs (Field 1987)."""
    _, height, width = image_shape
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None, :])
    frequency[0, 0] = math.inf
    spectrum = torch.fft.fft2(torch.randn(count, *image_shape, generator=generator)) / frequency
    noise = torch.fft.ifft2(spectrum).real
    return (0.45 + 0.25 * noise / noise.std((1, 2, 3), keepdim=True)).clamp(0, 1)
