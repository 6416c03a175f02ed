"""The patch embedding of a vision transformer: found in any module on random images, and proven there."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F

from attack_modules.threat_model.observed import ObservedRound, RoundsSummary
from attack_modules.threat_model.requirements import Requirement
from fl_lightning.client import Tensors
from fl_lightning.models import Arguments, ImageClassifier
from fl_lightning.models.head import PROBES, same

PERTURBATION = 0.02
"""Standard deviation of what is added to all parameters of a probed model: a head of zeros would hide all errors."""
ROUNDED = 1 / 12
"""Variance of a rounding error over the squared distance of neighbouring numbers."""
ROUNDED_MEAN = 1 / 8
"""The same where the mean of two such numbers is rounded, half of which lie just between two others."""


@dataclass(frozen=True)
class PatchEmbedding:
    """A convolution of the image, to whose outputs a learned position embedding is added before anything else.

    Then the loss's gradient with respect to the embedding of a position is that with respect to the convolution's
    output there, the *error* of the position, summed over the images (as in APRIL, Lu et al. 2022, arXiv 2112.14087,
    who solve for the input of the attention layer behind it).

    Attributes:
        weight: parameter name of the convolution's weight (D, C, kh, kw).
        bias: of its bias; None without.
        position: of the position embedding, whose last dimension is D.
        first: which row of the position embedding, as a matrix of D columns, belongs to the first position.
        positions: number P of positions.
        kernel: of the convolution, as the next three.
        stride: of its positions.
        padding: with zeros.
        dilation: of the kernel.
    """

    weight: str
    bias: str | None
    position: str
    first: int
    positions: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @staticmethod
    def of(model: ImageClassifier) -> "PatchEmbedding | None":
        """Of a model's class and arguments, tried once on random images; None where there is none.

        Args:
            model: may be on the meta device.
        """
        return _found(model.built_from)

    def patches(self, images: Tensor) -> Tensor:
        """(N, C, H, W) inputs of the convolution -> (N, P, T) what it sees at each position, T = C kh kw."""
        return F.unfold(images, self.kernel, self.dilation, self.padding, self.stride).transpose(1, 2)

    def scattered(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        """The adjoint of `patches`: (N, P, T) -> (N, C, *size), sums where patches overlap."""
        return F.fold(patches.transpose(1, 2), size, self.kernel, self.dilation, self.padding, self.stride)

    @property
    def overlap(self) -> int:
        """In how many patches a pixel is, at most."""
        (height, width), (down, right) = self.kernel, self.stride
        return -(-height // down) * -(-width // right)


@lru_cache(maxsize=32)
def _found(built_from: Arguments) -> PatchEmbedding | None:
    with isolate_rng(), torch.device("cpu"), torch.enable_grad():
        torch.manual_seed(0)
        model = built_from.build().eval()
        for parameter in model.parameters():
            parameter.data.add_(PERTURBATION * torch.randn_like(parameter))
        images = torch.rand(PROBES, *model.hparams["image_shape"])
        inputs = model.normalise(images)
        calls: list[tuple[nn.Conv2d, Tensor]] = []

        def collect(layer: nn.Conv2d, seen: tuple[Tensor], outputs: Tensor) -> None:
            if outputs.requires_grad and same(seen[0], inputs):
                outputs.retain_grad()
                calls.append((layer, outputs))

        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
                layer.register_forward_hook(collect)
        loss = F.cross_entropy(model(images), torch.zeros(PROBES, dtype=torch.long))
        if calls and loss.requires_grad:
            loss.backward()
        return next((made for layer, outputs in calls if (made := _embedding(model, layer, outputs.grad))), None)


def _embedding(model: ImageClassifier, layer: nn.Conv2d, slopes: Tensor | None) -> PatchEmbedding | None:
    """What a convolution of the image is part of, from the loss's gradient (N, D, h, w) at its outputs."""
    if slopes is None or not slopes.any() or isinstance(layer.padding, str):
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    errors = slopes.sum(0).flatten(1).T  # of a parameter that all images share
    for name, parameter in model.named_parameters():
        first = _first_row(parameter, errors)
        if first is not None:
            bias = None if layer.bias is None else names[id(layer.bias)]
            geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation
            return PatchEmbedding(names[id(layer.weight)], bias, name, first, len(errors), *geometry)
    return None


def _first_row(parameter: nn.Parameter, errors: Tensor) -> int | None:
    """At which row of a parameter's gradient, as a matrix of D columns, the errors (P, D) stand; None for nowhere."""
    positions, width = errors.shape
    if parameter.grad is None or parameter.ndim < 2 or parameter.shape[-1] != width:
        return None
    rows = parameter.grad.reshape(-1, width)
    starts = range(len(rows) - positions, -1, -1)  # extra tokens mostly come first
    return next((start for start in starts if same(rows[start : start + positions], errors)), None)


class TrainedPatchEmbedding(Requirement):
    """A vision transformer of which the peers trained the patch embedding and the position embedding."""

    name = "a patch embedding to which a learned position embedding is added, both trained"

    def violation(self, rounds: RoundsSummary) -> str | None:
        embedding, model = PatchEmbedding.of(rounds.model), type(rounds.model).__name__
        trained = {name: parameter.requires_grad for name, parameter in rounds.model.named_parameters()}
        if embedding is None:
            return (
                f"{model} has none: the gradient of no parameter is that of a convolution of the image, position by "
                "position. Attack this model by `--model FeatureInversion` or `--model GradientInversion`."
            )
        for name in (embedding.weight, embedding.position):
            if not trained[name]:
                return (
                    f"the round leaves {name} as it was: it is frozen, or the last layer was 0 at the only local step, "
                    "as torchvision's begins. Observe a later round (`federation.observed_rounds`)."
                )
        return None


class OneImage(Requirement):
    """A single image in each update, as far as its number is told."""

    name = "one image in each update"

    def violation(self, rounds: RoundsSummary) -> str | None:
        told = {known.num_images for known in rounds.assumptions} - {None, 1}
        if told:
            return (
                f"there are {max(told)}, whose errors at a position add up, so their patches cannot be told apart. "
                "Attack them by `--model GradientInversion`; a server that sees single clients reads those with one "
                "image (`federation.seat: CuriousServer`)."
            )
        return None


@dataclass(frozen=True)
class PatchUpdate:
    """What one round shows of a patch embedding: of a single image, `products = errors^T patches`.

    So it is after any number of local steps at any rate, with momentum or without, whatever comes behind the embedding
    (dropout included), since the image's patches are the same in all steps.

    Attributes:
        products: (D, T) update of the convolution, float64.
        errors: (P, D) update of the position embedding.
        total: (D,) update of the bias, which but for noise is the sum of `errors`; None where it has none or stays.
        rounding: standard deviations of the rounding errors in an entry of the three; 0 for a missing one.
    """

    products: Tensor
    errors: Tensor
    total: Tensor | None
    rounding: tuple[float, float, float]

    @staticmethod
    def of(seen: ObservedRound, update: Tensors, embedding: PatchEmbedding) -> "PatchUpdate":
        """Of an observed round.

        Args:
            seen: the round.
            update: the peers' mean update by parameter name.
            embedding: of the round's model.
        """
        known, observation = seen.assumptions, seen.observation
        names = [embedding.weight, embedding.position]
        if embedding.bias and update[embedding.bias].any():  # else it is frozen, or not sent
            names.append(embedding.bias)
        update = seen.without_weight_decay(update)
        amplified = 1 / (known.server_lr * (1 - observation.own_weight))
        size = (ROUNDED_MEAN * amplified**2 + ROUNDED * known.local_steps) ** 0.5  # of the server, and of each step
        rounding = [size * max(_spacing(observation.before[n]), _spacing(observation.after[n])) for n in names]
        weight, position, *bias = (update[name].detach().cpu().double() for name in names)
        rows = position.reshape(-1, position.shape[-1])[embedding.first :][: embedding.positions]
        return PatchUpdate(weight.flatten(1), rows, bias[0] if bias else None, (*rounding, 0.0)[:3])


def _spacing(tensor: Tensor) -> float:
    """Distance (root mean square) of a tensor's entries to the next larger number of their type."""
    size = tensor.abs()
    return (torch.nextafter(size, torch.full_like(size, torch.inf)) - size).double().square().mean().sqrt().item()
