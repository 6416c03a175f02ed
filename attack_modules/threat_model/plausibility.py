"""Whether what was observed can be a round of SGD: what cannot is refused, what is doubtful is named."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.client import Tensors
from fl_lightning.defenses import Sign
from fl_lightning.errors import AuditError
from fl_lightning.observation import Observation, build_on_meta

SIGN_LIKE = 0.7
"""`evenness` from which sizes are nearly one value. Measured with LeNet5, VGG7 and ResNet9: SGD, also with momentum,
several steps and clients, at most 0.58; Gaussian noise 0.66; one step of Adam or of signs 1, of five clients 0.71."""
DENSE = 0.4
"""Share of entries that pruned updates, whose few entries are of similar size too, do not reach."""
LEAST_ENTRIES = 100
"""Of a matrix whose entries are compared."""
MOST_UNITS = 1000
"""Rows and columns of a matrix that are looked at, evenly spread."""
LEAST_MATRICES = 3
"""One layer alone may have entries of one size by SGD too: the update of two classes by nearly constant features."""
UPHILL = 0.1
"""Share of the classes' sums that must have the wrong sign."""
MANY_CLASSES = 10
"""From so many classes on, all clients' updates have the same sign for most of them. Measured: cosine of the aggregate
and one client's update 0.18 or more with 10 classes, down to -0.9 with 2."""
MOSTLY_EMPTY = 50
"""From so many classes on, most are without images in nearly every round, and their logits' sums are above 0."""
FEW = 0.25
"""Share of classes below which it cannot be so many that are above 0."""
AGAINST = -0.15
"""Cosine of the aggregate and the attacker's own update below which one of both has the wrong sign."""


class ObservationError(AuditError):
    """An observed round cannot be a round of training, or shows nothing of the peers."""


def refuse_impossible(observation: Observation, server_lr: float | None = 1.0) -> None:
    """Refuse a round from which no attack can read anything, before work starts.

    Args:
        observation: what crossed the wire.
        server_lr: the server's learning rate; None where its step is no multiple of the mean update.

    Raises:
        ObservationError: a model holds NaN or infinity, the attacker's weight is not in [0, 1), or the models differ by
            nothing that a peer did.
    """
    round_, weight = observation.round, observation.own_weight
    whose = {"before": "The model before", "after": "The model after", "own_update": "The attacker's own update of"}
    for group, words in whose.items():
        for name, tensor in getattr(observation, group).items():
            if tensor.is_floating_point() and tensor.numel() and not _finite(tensor):
                raise ObservationError(
                    f"{words} round {round_} holds NaN or infinity in '{name}': the training diverged, or a file is "
                    "damaged. Observe an earlier round, or lower the clients' learning rate (`federation.client.lr`)."
                )
    if not (math.isfinite(weight) and 0 <= weight < 1):
        raise ObservationError(
            f"The attacker's own weight in round {round_} is {weight:g}, but it must be at least 0 and below 1, or no "
            "peer has a share. Give `own_weight` as the attacker's share of all images of the round."
        )
    changes = [(name, observation.before[name], observation.after[name]) for name in parameters_of(observation)]
    if all(torch.equal(before, after) for _, before, after in changes):
        raise ObservationError(
            f"The models before and after round {round_} are the same, so nothing was trained between them. Give two "
            "consecutive global models of a round in which peers took part."
        )
    if server_lr is None or not observation.own_update:
        return
    if not any(_beyond_rounding(observation, server_lr, *change) for change in changes):
        raise ObservationError(
            f"Without the attacker's own update, round {round_} differs by the rounding of its numbers alone: no peer "
            "trained, or their learning rate was far too small to leave a trace. Observe another round."
        )


def _finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite, without a copy of the tensor."""
    least, most = tensor.aminmax()  # of which both are NaN where an entry is
    return math.isfinite(least) and math.isfinite(most)


def parameters_of(observation: Observation) -> list[str]:
    """Names of the parameters; the other tensors of the observed models are buffers."""
    return [name for name, _ in build_on_meta(observation.model).named_parameters()]


def _beyond_rounding(observation: Observation, server_lr: float, name: str, before: Tensor, after: Tensor) -> bool:
    """Whether the peers changed an entry of a parameter by more than the two roundings of `before - after`."""
    own = observation.own_update.get(name, torch.zeros(()))
    peers = (before - after) - server_lr * observation.own_weight * own
    return bool((peers.abs() > 2 * torch.finfo(before.dtype).eps * torch.maximum(before.abs(), after.abs())).any())


def doubts(seen: ObservedRound) -> Iterator[str]:
    """What speaks against a round of SGD from `before` to `after`, each a warning with its likely cause."""
    update = seen.without_weight_decay(seen.peers_update())
    round_, known = seen.observation.round, seen.assumptions
    signs = known.optimizer == "Adam" or any(isinstance(defense, Sign) for defense in known.defenses)
    if looks_like_signs(update) and not signs:
        yield (
            f"In round {round_} the entries of the peers' update are nearly of one size: it looks like Adam, or like "
            "signs or few levels of a compressed update. The attack assumes plain SGD, whose update is a sum of "
            "gradients, so numbers of images, labels and images may come out wrong."
        )
    if goes_uphill(seen, update):
        yield (
            f"In round {round_} the last layer's update has the wrong sign: the models before and after are swapped, "
            "or the labels are not these peers', or the clients' rate is so large that their training overshoots. "
            "Exchange the two models if they are swapped."
        )


def looks_like_signs(update: Tensors) -> bool:
    """Whether most matrices of an update have entries of nearly one size, as after a step of Adam or of signs."""
    shares = [evenness(tensor) for tensor in update.values() if tensor.ndim > 1 and tensor.numel() >= LEAST_ENTRIES]
    shares = [share for share in shares if share is not None]
    if len(shares) < LEAST_MATRICES:
        return False
    even, dense = (torch.tensor(values).median().item() for values in zip(*shares, strict=True))
    return even > SIGN_LIKE and dense > DENSE


def evenness(update: Tensor) -> tuple[float, float] | None:
    """How even the sizes of a matrix's entries are: `mean(|u|)^2 / mean(u^2)`, and the share of entries in this mean.

    Units without any change, and entries below a hundredth of the largest (signs of two clients that cancel), are left
    out. Entries of one size give 1, Gaussian ones 0.64, gradients less. None without any change.
    """
    matrix = update.flatten(1)
    strides = [math.ceil(size / MOST_UNITS) for size in matrix.shape]
    sizes = matrix[:: strides[0], :: strides[1]].abs()  # a sample of a head of 100 MB is enough
    sizes = sizes[(sizes > 0).any(1)]
    sizes = sizes[:, (sizes > 0).any(0)].double()
    if not sizes.numel():
        return None
    large = sizes[sizes > sizes.max() / 100]
    return (large.mean().square() / large.square().mean()).item(), large.numel() / sizes.numel()


def goes_uphill(seen: ObservedRound, update: Tensors) -> bool:
    """Whether an update descends from the after to the before.

    The gradient of a logit is the sum of its class's probabilities, above 0, where no peer holds the class. Where it is
    unknown which classes these are, the attacker's own update is a part of the aggregate, and of many classes most are
    without images.
    """
    labels = seen.assumptions.labels
    sums = class_sums(seen.observation, update)
    if sums is None:
        return False
    if seen.assumptions.label_smoothing:  # which gives every class a share
        return against_own(seen.observation)
    if labels is not None:
        absent = torch.ones(len(sums), dtype=torch.bool)
        absent[torch.tensor(labels)] = False
        return bool(sums[absent].sum() < -UPHILL * sums.abs().sum())
    swapped = len(sums) >= MOSTLY_EMPTY and (sums > 0).double().mean() < FEW
    return bool(swapped) or against_own(seen.observation)


def against_own(observation: Observation) -> bool:
    """Whether the aggregate leads away from where the observing client's own update, a part of it, leads."""
    own = observation.own_update
    if not own or observation.num_classes < MANY_CLASSES:
        return False
    sums = torch.zeros(3)
    for name, tensor in own.items():  # one parameter at a time, without copies of it: a head has 100 MB and more
        moved = (observation.before[name] - observation.after[name]).flatten().to(sums)
        own_part = tensor.flatten().to(sums)  # maybe of another precision than the models
        sums += torch.stack([moved @ own_part, moved @ moved, own_part @ own_part])
    product, *squares = sums
    return bool(product < AGAINST * squares[0].sqrt() * squares[1].sqrt())


def class_sums(observation: Observation, update: Tensors) -> Tensor | None:
    """(C,) of the sign of each logit's gradient: of the last layer's bias, or of weights whose inputs a ReLU made.

    None where the head has neither.
    """
    layers = build_on_meta(observation.model).head_layers
    if not layers or not isinstance(layers[-1][1], nn.Linear):
        return None
    last = layers[-1][0]
    if f"{last}.bias" in update:
        return update[f"{last}.bias"].double()
    after_relu = any(isinstance(layer, nn.ReLU) for _, layer in layers)
    return update[f"{last}.weight"].double().sum(1) if after_relu else None
