"""Each image's activation pattern from the first layer's update alone, for images that share classes.

The first layer's update is `G1 = Delta^T F`: the row of hidden unit h is the sum of the features `f_n` of the images
for which the unit is active, each times the back-propagated error of its class at h. Most units are active for nearly
all images or for nearly none. So the sum over the images of each class is fitted to the rows robustly, and what it
leaves of a row holds only the few images that this unit tells from the others, often one: its features, up to scale.
The gates are then `W1 f > 0`. An image that is found is fitted with its own gates from there on, which leaves single
images in further rows (the peeling decoder of sparse codes; Luby et al., 2001).

Where several images are left in every row, the gates that such a row gives are wrong in some units. Gates times errors
lie in the column space of `G1`, of dimension N among H units, and an l1 fit in it corrects as sparse an error (decoding
by linear programming; Candes and Tao, 2005).

Gates certify themselves: rounded to {0, 1} and multiplied by a class's error they lie in the column space, as those of
no image do not. The class is the one whose error fits; where two fit, the one with which the features agree with the
gates. Images that do not certify are missing from the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

CERTAIN = 0.02
"""`Separation.outside` of certain images. Measured: at most this for nearly all images at one local step."""
LEAST_ACTIVE = 0.05
"""Least share of a class's squared error that an image's gates let through. Measured: 0.3 or more for images."""
SAME = 0.6
"""`Separation.outside` of the difference of two gate vectors from which they are of one image, with wrong gates."""
NOTHING = 1e-4
"""Share of the largest below which what is left of a row is none. Rounding leaves 1e-6."""
ENTRIES = 2**23
"""Upper limit to the entries of an intermediate tensor; bounds memory."""


@dataclass(frozen=True)
class Separation:
    """The gate vectors found, `n <= N` of them.

    Attributes:
        labels: (n,) long, in the order of discovery.
        gates: (n, H) 0 or 1, float64.
        outside: (n,) share of each gated error's norm outside the update's column space, in units of its value for a
            random vector: near 0 for an image's gates, near 1 for others.
    """

    labels: Tensor
    gates: Tensor
    outside: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Separation"]) -> "Separation":
        """All of several."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def part(self, index: Tensor) -> "Separation":
        """Those at the positions `index` (k,) long, or where `index` (n,) bool is true."""
        return Separation(self.labels[index], self.gates[index], self.outside[index])


def separate(
    rows: Tensor,
    weight: Tensor,
    errors: Tensor,
    num_images: int,
    quota: Tensor,
    exact: bool,
    sure: float = 0.25,
) -> Separation:
    """Find the gate vectors of all images.

    Args:
        rows: (H, r) summed gradient of the first layer.
        weight: (H, r) of the first layer, in the same basis.
        errors: (C, H) back-propagated error of an image of each class, without gates.
        num_images: N, the rank of `rows`.
        quota: (C,) expected number of images of each class; the N classes with most are considered.
        exact: whether `quota` is exact, so that no more images of a class are returned.
        sure: `Separation.outside` below which a gate vector is accepted. Measured: at most 0.02 for images at one local
            step, 0.18 at three; above 0.9 for most others.
    """
    classes = quota.topk(min(num_images, len(quota))).indices.sort().values
    classes = classes[quota[classes] > 0]
    live = rows.any(1)  # units that were active for any image
    search = GateSearch(rows[live], weight[live], errors[classes][:, live], num_images, sure)
    with Progress(disable=rank_zero_only.rank > 0) as progress:
        task = progress.add_task("Images disentangled", total=num_images)
        while len(search.found.labels) < num_images and search.advance():
            progress.update(task, completed=len(search.found.labels))
    found = search.labelled()
    if exact:
        order = found.outside.argsort()
        earlier = F.one_hot(found.labels[order], len(classes)).cumsum(0)
        rank = earlier.gather(1, found.labels[order, None])[:, 0]  # 1 for the best image of a class
        found = found.part(order[rank <= quota[classes][found.labels[order]]].sort().values)
    everywhere = rows.new_zeros(len(found.labels), len(rows))
    everywhere[:, live] = found.gates
    return Separation(classes[found.labels], everywhere, found.outside)


class GateSearch:
    """Searches for the gate vectors of one aggregate, with all it has found so far.

    Args:
        rows: (H, r) summed gradient of the first layer, of units that were ever active.
        weight: (H, r) of the first layer.
        errors: (C, H) back-propagated error of an image of each class.
        num_images: N.
        sure: see `separate`.
    """

    def __init__(self, rows: Tensor, weight: Tensor, errors: Tensor, num_images: int, sure: float) -> None:
        left, singular, right = torch.linalg.svd(rows, full_matrices=False)
        #: (H, N) orthonormal basis of the column space
        self.space = left[:, :num_images]
        self.rows = self.space * singular[:num_images]
        self.weight = weight @ right[:num_images].T
        self.errors = errors
        self.sure = sure
        self.chance = math.sqrt(max(1 - num_images / len(rows), 0.0))  # share of a random vector outside of the space
        empty = torch.zeros(0, dtype=torch.long)
        self.found = Separation(empty, rows.new_zeros(0, len(rows)), rows.new_zeros(0))

    def advance(self) -> bool:
        """Look for further images in what those found leave of the rows; whether there were any."""
        rest = torch.cat([self.fit()[1], self.unexplained()])
        size = rest.norm(dim=1)
        preactivations = rest[size > NOTHING * size.max()] @ self.weight.T
        preactivations /= preactivations.norm(dim=1, keepdim=True)
        positive, negative = (self.nearest_class((side > 0).to(rest))[1] for side in (preactivations, -preactivations))
        preactivations = torch.where((positive < negative)[:, None], preactivations, -preactivations)
        gates = (preactivations > 0).to(rest)
        label, outside = self.nearest_class(gates)
        if self.accept(self.rounded(gates, label), CERTAIN):
            return True
        batches = outside.argsort().split(max(ENTRIES // self.space.numel(), 1))
        decoded = []
        for part in batches:
            decoded.append(self.rounded(self.decode(preactivations[part], label[part]), label[part]))
            if self.accept(decoded[-1], CERTAIN):
                return True
        together = Separation.joined(decoded)
        best = torch.where(self.fresh(together), together.outside, torch.inf).amin().item()
        return self.accept(together, min(1.5 * best, self.sure))

    def fit(self, iterations: int = 60) -> tuple[Tensor, Tensor]:
        """Fit the rows by the images found, each with its gates, and the sum of the others of each class.

        The sum of absolute errors is minimised (iteratively reweighted least squares), and each unit shows the sums of
        all classes or none, whichever is closer.

        Returns:
            Features (n, N) of the images found, and (H, N) what is left of the rows.
        """
        known = (self.found.gates * self.errors[self.found.labels]).T
        shows = torch.ones_like(self.rows[:, 0])
        weight = shows
        for iteration in range(iterations):
            terms = torch.cat([known, (shows * self.errors).T], 1) * weight[:, None]
            solution = torch.linalg.lstsq(terms, self.rows * weight[:, None], driver="gelsd").solution
            features, class_sums = solution[: known.shape[1]], solution[known.shape[1] :]
            others, sums = self.rows - known @ features, self.errors.T @ class_sums
            shows = (others.norm(dim=1) > (others - sums).norm(dim=1)).to(self.rows)
            rest = others - shows[:, None] * sums
            size = rest.norm(dim=1)
            weight = size.clamp_min(0.1 * 0.9**iteration * size.median()).clamp_min(1e-9 * self.rows.norm()).rsqrt()
        return features, rest

    def unexplained(self) -> Tensor:
        """(N - n, N) what is left of the rows whatever the features of the images found: that of the last is exact."""
        basis = torch.linalg.qr((self.found.gates * self.errors[self.found.labels]).T).Q
        _, singular, right = torch.linalg.svd(self.rows - basis @ (basis.T @ self.rows), full_matrices=False)
        missing = self.space.shape[1] - len(self.found.labels)
        return singular[:missing, None] * right[:missing]

    def decode(self, preactivations: Tensor, label: Tensor, iterations: int = 15) -> Tensor:
        """(K, H) gates near those of noisy pre-activations (K, H), whose gated error lies in the space.

        The error is that of the class `label` (K,). The sum of the absolute differences is minimised, in which units
        near 0 weigh less.
        """
        error = self.errors[label]
        gated = (preactivations > 0) * error
        certainty = preactivations.abs() / (preactivations.abs() + 0.3 * preactivations.abs().mean(1, keepdim=True))
        scale = error.abs().mean(1, keepdim=True)
        weight = certainty
        for iteration in range(iterations):
            gram = (self.space.T * weight[:, None]) @ self.space
            gram.diagonal(dim1=1, dim2=2).add_(1e-12 * weight.sum(1, keepdim=True))
            inside = torch.linalg.solve(gram, (weight * gated) @ self.space)
            off = (inside @ self.space.T - gated).abs() / scale
            weight = certainty / off.clamp_min(max(0.3 * 0.6**iteration, 1e-3))
        return self.opened(inside, error)

    def rounded(self, gates: Tensor, label: Tensor, iterations: int = 2) -> Separation:
        """Gates (K, H) moved to the closest in the space, and rounded, as long as that changes them."""
        error = self.errors[label]
        for _ in range(iterations):
            gates = self.opened((gates * error) @ self.space, error)
        return Separation(label, gates, self.outside(gates, error))

    def opened(self, inside: Tensor, error: Tensor) -> Tensor:
        """(K, H) gates that, times the error (K, H), are closest to points (K, N) of the space."""
        return ((inside @ self.space.T) * error.sign() > error.abs() / 2).to(error)

    def outside(self, gates: Tensor, error: Tensor) -> Tensor:
        """(K,) see `Separation`; infinity for gates that are nearly all closed, and where nothing is outside."""
        gated = gates * error
        size = gated.square().sum(1)
        off = (size - (gated @ self.space).square().sum(1)).clamp_min(0).sqrt() / (self.chance * size.sqrt())
        return torch.where(size > LEAST_ACTIVE * error.square().sum(-1), off, torch.inf)

    def nearest_class(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """(K,) class whose error fits gates (K, H) best, and how far outside it leaves them."""
        best = torch.stack([self.outside(gates, error) for error in self.errors]).min(0)
        return best.indices, best.values

    def accept(self, candidates: Separation, limit: float) -> bool:
        """Add all candidates outside by less than `limit`, best first and each once; whether there were any."""
        candidates = candidates.part((candidates.outside < limit) & self.fresh(candidates))
        before = len(self.found.labels)
        for position in candidates.outside.argsort().split(1):
            candidate = candidates.part(position)
            if len(self.found.labels) < self.space.shape[1] and self.fresh(candidate).all():
                self.found = Separation.joined([self.found, candidate])
        return len(self.found.labels) > before

    def fresh(self, candidates: Separation) -> Tensor:
        """(K,) whether candidates are no images that were found already, with some wrong gates.

        They must differ from all combinations of those by more than they are outside of the space; and the difference
        to each of them must be in the space, where that of a few wrong gates is not.
        """
        known = self.found.gates * self.errors[self.found.labels]
        gated = candidates.gates * self.errors[candidates.labels]
        known_inside, inside = known @ self.space, gated @ self.space
        basis = torch.linalg.qr(known_inside.T).Q
        beyond = (inside - inside @ basis @ basis.T).norm(dim=1)
        rounding = math.sqrt(torch.finfo(gated.dtype).eps) * gated.norm(dim=1)
        fresh = beyond > candidates.outside * self.chance * gated.norm(dim=1) + rounding
        share = (gated @ known.T) / known.square().sum(1)  # (K, n)
        difference = gated.square().sum(1, keepdim=True) - share.square() * known.square().sum(1)
        within = inside.square().sum(1, keepdim=True) - 2 * share * (inside @ known_inside.T)
        within += share.square() * known_inside.square().sum(1)
        return fresh & (within > difference * (1 - (SAME * self.chance) ** 2)).all(1)

    def labelled(self) -> Separation:
        """The images found, with the class whose error fits best and has the sign that features and gates agree on."""
        agreement = ((self.fit()[0] @ self.weight.T) * (2 * self.found.gates - 1)).sum(1)
        gated = self.found.gates * self.errors[self.found.labels]
        outside = torch.stack([self.outside(self.found.gates, error) for error in self.errors], 1)  # (n, C)
        agrees = agreement[:, None] * (gated @ self.errors.T) > 0
        label = (outside + ~agrees).argmin(1)
        return Separation(label, self.found.gates, outside.gather(1, label[:, None])[:, 0])
