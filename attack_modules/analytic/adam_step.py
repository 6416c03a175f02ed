"""Features where each peer took one step of Adam (Kingma and Ba 2015), which is nearly the sign of its gradient.

Notation as in `analytic.leak`. A first step of Adam is `lr phi(G_c)`, `phi(g) = g / (|g| + eps)`: a sign, less
`psi = eps / (|g| + eps)`, which float32 models resolve for all but the largest entries. So the sum of the peers' steps,
in units of `lr`, is a vote `V` of their signs less a remainder `R = sum_c sign(G_c) psi(G_c)`, most of which belongs to
the peer whose entry is the smallest.

1. In the last layer, every peer with an active image votes for a class that nobody holds. The peer of an image votes
   against its class at the units that are active for it: gates. How many peers vote at each unit tells which images
   share a peer.
2. In the first layer, each column of the steps is `Z = sum_c phi(Delta_c^T f_c)`, as many equations as units. Whose
   entry is the smallest, and how the others voted, is not known. Expectation propagation (Minka 2001) puts, in place of
   each equation, a Gaussian of the entry with the moments that it has under all these hypotheses, given the features
   that all other equations show, and starts from typical features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track
from torch import Tensor

from attack_modules.analytic.defended_head import (
    DefendedFeatures,
    DefendedReading,
    Expected,
    HeadRound,
    LastLayer,
    UnreadableDefense,
)
from fl_lightning.defenses import Defense
from fl_lightning.loss import logit_errors

EPSILON = 1e-8
"""Of Adam in PyTorch."""
MOST_PEERS = 6
"""Number of peers up to which votes are read."""
UNEVEN = 0.2
"""Distance of a sum of steps to the nearest whole number, in units of the rate, from which it is no vote."""
VOTES = 0.97
"""Share of the entries that are votes."""
ARITHMETIC = 2e-7
"""Error of a step in units of the rate, beside the rounding of the models: arithmetic in float32."""
STARTS = 10
"""Number of sortings of the images by peer that are tried."""
MISCOUNTED = 0.05
"""Share of the units at which a wrong number of peers votes, from which images were not sorted by peer."""
ATTEMPTS = ((0, 0.3, 0.65), (1, 0.5, 0.7))
"""Which half of the units is read; the relative error that is added to every entry at first, since it is read before
the others are known; and the factor by which that falls from iteration to iteration. The second is for columns that the
first leaves unexplained."""
ITERATIONS = 9
DAMPING = 0.7
LEAST_CAVITY = 1e-3
"""Share of an entry's precision that is left without its own equation, at least."""
LEAST_SHARE = 0.2
"""Share of an equal part of the remainder that the smallest entry has, at least."""
UNLIKELY = 2.0
"""Log odds against a hypothesis that leaves it less."""
WRONG = 0.02
"""Probability that an equation is wrong, as where a gate was overlooked since its unit is hardly active."""
LOG_RANGE = 10.0
"""Range of the logarithm of the remainders that wrong equations have."""
RESOLVED = 3.0
"""Remainder over the rounding from which it tells of an entry."""
LEAST_RESOLVED = 0.7
"""Share of the remainders of several peers that are resolved, below which the errors of the features are underrated.
Measured: 0.89 for LeNet5 at a rate of 0.0003; of 0.42, features come out 40 % off where 14 % are foretold."""
LEAST_ENTRY = 1e-9
"""Error of an entry, at least."""
FAILED = 0.1
"""Share of unexplained remainders in a column from which its features were not found. Measured: 0.00 to 0.03 where they
were, 0.4 to 1 where not."""
UNEXPLAINED = 0.2
"""Part of a remainder from which, if left, it counts as unexplained."""
MOVED = 0.01
"""Relative change of the back-propagated errors with the features found, from which columns are solved again."""
TYPICAL_SPREAD = 1e-3
"""Variance of a feature of which nothing is expected, as a share of the mean square of all."""
FAR = 8.0
"""Standard deviations from which a tail is approximated."""
LEAST_VARIANCE = 1e-4
"""Of a Gaussian that is cut off, as a share of what it was."""
CHUNK = 512
"""Columns that are solved at once."""


@dataclass(frozen=True)
class Votes:
    """Sums of the peers' steps in the first layer, in units of the rate; K units, D features, P peers.

    Attributes:
        sums: (K, D).
        noise: (K, D) standard deviation, of rounding.
        errors: (N, K) gated back-propagated errors of each image, over the number of its peer's images.
        peers: (N,) long, below P.
    """

    sums: Tensor
    noise: Tensor
    errors: Tensor
    peers: Tensor

    def part(self, units: Tensor | slice, columns: Tensor) -> "Votes":
        """Of some units and columns."""
        return Votes(self.sums[units][:, columns], self.noise[units][:, columns], self.errors[:, units], self.peers)

    def of_peers(self) -> list[Tensor]:
        """(n, K) float64 errors of each peer's images."""
        return [self.errors[self.peers == peer].double() for peer in self.peers.unique()]

    def entries(self, features: Tensor) -> Tensor:
        """(P, K, D) each peer's gradient, for features (N, D)."""
        own = self.errors.to(features)
        return torch.stack([own[self.peers == peer].T @ features[self.peers == peer] for peer in self.peers.unique()])


class AdamStep(DefendedReading):
    """Reads the first step of Adam of peers that have equally many images."""

    shows_rank = False
    single_step = True

    @classmethod
    def against(cls, defenses: Sequence[Defense]) -> "AdamStep | None":
        """For peers that train by Adam: None if they, or the server, have defences as well."""
        return None if defenses else cls()

    def solve(self, rounds: Sequence[HeadRound], expected: Expected) -> DefendedFeatures:
        (seen,) = rounds
        last, count = seen.last, len(seen.last.labels)
        number = number_of_peers(seen.update / count)
        gates, peers = gates_of_votes(last.gradient[:, : len(seen.update)] * (number / count), last.labels, number)
        rate = count / last.scale
        noise = rounding(seen.weight.abs() + rate, number) / rate
        probabilities = last.probabilities.expand_as(last.targets)
        features, errors = expected.features, None
        for _ in range(2):
            former, errors = errors, errors_of(gates, peers, probabilities, last)
            if former is not None and (errors - former).norm() < MOVED * former.norm():
                break
            votes = Votes((seen.update * (number / count)).float(), noise.float(), errors, peers)
            refuse_coarse(votes)
            features, variance, left = solve_columns(votes, expected)
            shown = (features @ seen.weight.T.double()).relu()
            ones = shown.new_ones(len(shown), last.weight.shape[1] - shown.shape[1])
            probabilities = (torch.cat([shown, ones], 1) @ last.weight.T).softmax(1)
        return DefendedFeatures(
            features=features,
            gated=errors * peers.bincount()[peers][:, None],
            uncertainty=(variance.sum(1) / features.square().sum(1)).sqrt(),
            peers=peers,
            residual=left,
        )


def rounding(size: Tensor, peers: int) -> Tensor:
    """(H, D) standard deviation of the sum of the peers' updates: that of each own model, and of the global one.

    The attacker's own update was taken from the mean, as that of one more peer.

    Args:
        size: (H, D) of the weights, at most, in the precision of the models.
        peers: without the attacker.
    """
    spacing = torch.finfo(size.dtype).eps * torch.ldexp(torch.full_like(size, 0.5), torch.frexp(size).exponent)
    return (spacing.double().square() * (peers + (peers + 1) ** 2) / 12).sqrt()


def number_of_peers(mean: Tensor) -> int:
    """Number of peers whose mean step this is, in units of the rate (H, D): the least for which sums are whole.

    Raises:
        UnreadableDefense: there is none up to `MOST_PEERS`, as where some peers weigh more than others.
    """
    some = mean[mean.abs().amax(1) > UNEVEN].flatten()
    some = some[:: max(len(some) // 10**6, 1)]
    for number in range(1, MOST_PEERS + 1):
        if ((number * some - (number * some).round()).abs() < UNEVEN).double().mean() > VOTES:
            return number
    raise UnreadableDefense(
        f"The peers are said to train by Adam, but the entries of the update are not the votes of up to {MOST_PEERS} "
        "peers that weigh the same in a single local step."
    )


def gates_of_votes(sums: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """(N, H) bool: which units are active for an image, and (N,) long: its peer.

    Args:
        sums: (C, H) of the peers' steps in the last layer, in units of the rate.
        labels: (N,) that are distinct, and not all classes.
        number: of the peers.

    Raises:
        UnreadableDefense: the images cannot be sorted by peer.
    """
    free = torch.ones(len(sums), dtype=torch.bool)
    free[labels] = False
    voters = sums[free].median(0).values  # all peers with an active image
    gates = voters - sums[labels] > 1
    return gates, peers_of_voters(gates, voters.round().long(), number)


def peers_of_voters(gates: Tensor, voters: Tensor, number: int) -> Tensor:
    """(N,) long: peers of equally many images, such that `voters` (H,) of them have an image whose gate (N, H) is open.

    Images of two peers are exchanged as long as that explains more units.

    Raises:
        UnreadableDefense: images are no multiple of the peers, or no sorting explains the voters.
    """
    count, random = len(gates), torch.Generator().manual_seed(0)
    if count % number:
        raise UnreadableDefense(
            f"The update shows {number} peers that weigh the same, but {count} images, which is no multiple of it."
        )

    def wrong(peers: Tensor) -> int:
        voting = sum(gates[peers == peer].any(0).long() for peer in range(number))
        return int((voting - voters).abs().sum())

    best, least = torch.arange(count) % number, voters.sum()
    for _ in range(STARTS):
        peers = torch.arange(count)[torch.randperm(count, generator=random)] % number
        left, improved = wrong(peers), True
        while improved:
            improved = False
            for one, other in combinations(range(count), 2):
                if peers[one] == peers[other]:
                    continue
                exchanged = peers.clone()
                exchanged[[one, other]] = peers[[other, one]]
                if (found := wrong(exchanged)) < left:
                    peers, left, improved = exchanged, found, True
        if left < least:
            best, least = peers, left
    if least > MISCOUNTED * len(voters):
        raise UnreadableDefense(
            f"The peers are said to train by Adam, but no sorting of {count} images into {number} peers explains who "
            f"votes in the last layer: {int(least)} of {len(voters)} units have another number of votes."
        )
    return best


def errors_of(gates: Tensor, peers: Tensor, probabilities: Tensor, last: LastLayer) -> Tensor:
    """(N, H) gated back-propagated errors, over the number of the peer's images, of which Adam sees the mean."""
    errors = logit_errors(probabilities, last.targets) @ last.weight
    return gates * errors[:, : gates.shape[1]] / peers.bincount()[peers][:, None]


def solve_columns(votes: Votes, expected: Expected) -> tuple[Tensor, Tensor, float]:
    """(N, D) float64 features, their variance, and the relative norm of the features that do not explain the votes.

    Columns that the first attempt leaves unexplained are tried again; where none explains a column, what is expected
    counts as its error.
    """
    positive = expected.features.min() >= 0
    prior = expected.features.double()
    spread = (expected.error[:, None].double() * prior).square()
    spread = spread + TYPICAL_SPREAD * spread.mean()
    features, variance = prior.clone(), spread.clone()
    unexplained = torch.ones(prior.shape[1], dtype=torch.float64)
    for attempt, (half, blur, sharper) in enumerate(ATTEMPTS):
        open_ = (unexplained > FAILED).nonzero().flatten().split(CHUNK)
        name = "Features from votes, again" if attempt else "Features from votes"
        for columns in track(open_, name, transient=True, disable=rank_zero_only.rank > 0):
            read = votes.part(slice(half, None, 2), columns)
            found, off = propagate(read, prior[:, columns], spread[:, columns], blur, sharper)
            found = found.clamp_min(0) if positive else found
            left = unexplained_share(votes.part(slice(None), columns), found)
            better = left < unexplained[columns]
            kept = columns[better]
            features[:, kept], variance[:, kept], unexplained[kept] = found[:, better], off[:, better], left[better]
    failed = unexplained > FAILED
    variance[:, failed] += spread[:, failed] + (features - prior)[:, failed].square()
    weight = (features.square() + variance).sum(0)  # in signs, columns of small features count as much as others
    return features, variance, ((weight * unexplained).sum() / weight.sum()).sqrt().item()


def refuse_coarse(votes: Votes) -> None:
    """Refuse votes of several peers of which little more than the signs is left.

    Raises:
        UnreadableDefense: with the share of remainders that the models' rounding leaves.
    """
    voters = torch.stack([(own != 0).any(0) for own in votes.of_peers()]).sum(0)
    remainder = (nearest_votes(votes.sums, voters) - votes.sums).abs()
    resolved = (remainder > RESOLVED * votes.noise)[voters > 0].double().mean().item()
    if resolved < LEAST_RESOLVED and len(votes.peers.unique()) > 1:
        raise UnreadableDefense(
            f"The peers are said to train by Adam, but the rounding of the models leaves only {resolved:.0%} of what "
            "tells their steps from signs: their rate is too small beside their weights."
        )


def steps(gradient: Tensor) -> Tensor:
    """Adam's first step, in units of the rate."""
    return gradient / (gradient.abs() + EPSILON)


def nearest_votes(sums: Tensor, voters: Tensor) -> Tensor:
    """The nearest sums (K, D) of as many signs as there are `voters` (K,)."""
    most = voters[:, None].to(sums)
    return (2 * ((sums - most) / 2).round() + most).clamp(-most, most)


def unexplained_share(votes: Votes, features: Tensor) -> Tensor:
    """(D,) share of the units whose remainder of a vote the features do not explain."""
    entries = votes.entries(features)
    voters = (entries != 0).any(2).sum(0)
    remainder = nearest_votes(votes.sums, voters) - votes.sums
    off = (steps(entries).sum(0) - votes.sums).abs() > UNEXPLAINED * remainder.abs() + 3 * votes.noise
    return (off & (voters > 0)[:, None]).sum(0) / (voters > 0).sum().clamp_min(1).double()


@dataclass(frozen=True)
class Ballot:
    """Equations in which the same peers vote, with the same result; M of them, k peers.

    Everything is multiplied by the sign of the remainder, which is then positive.

    Attributes:
        vote: the sum of the signs.
        resolved: whether the remainder is more than noise; else it tells nothing.
        entries: index into (P, K, D), which gives (k, M).
        flip: (M,) that sign.
        remainder: (M,).
        noise: (M,) its standard deviation.
    """

    vote: int
    resolved: bool
    entries: tuple[Tensor, Tensor, Tensor]
    flip: Tensor
    remainder: Tensor
    noise: Tensor


def ballots(votes: Votes) -> list[Ballot]:
    """All equations of some columns in which anybody votes."""
    active = torch.stack([(own != 0).any(0) for own in votes.of_peers()])  # (P, K)
    found = []
    for voting in active.unique(dim=1).T:
        who, units = voting.nonzero(), (active == voting[:, None]).all(0).nonzero().flatten()
        if not len(who):
            continue
        sums = votes.sums[units]
        nearest = nearest_votes(sums, voting.sum().expand(len(units)))
        remainder = nearest - sums
        flip = torch.where(nearest.abs() == len(who), nearest, remainder).sign()
        flip = torch.where(flip == 0, 1.0, flip)
        result, resolved = (nearest * flip).round().long(), remainder * flip > RESOLVED * votes.noise[units]
        for vote, clear in product(result.unique().tolist(), (True, False)):
            rows, columns = ((result == vote) & (resolved == clear)).nonzero(as_tuple=True)
            if not len(rows):
                continue
            sign = flip[rows, columns]
            rest = (remainder[rows, columns] * sign).clamp_min(0)
            where = (who, units[rows][None], columns[None])
            found.append(Ballot(vote, clear, where, sign, rest, votes.noise[units[rows], columns]))
    return found


def propagate(votes: Votes, prior: Tensor, spread: Tensor, blur: float, sharper: float) -> tuple[Tensor, Tensor]:
    """(N, D) mean and variance of the features by expectation propagation.

    Args:
        votes: in D columns.
        prior: (N, D) float64 mean before anything is seen.
        spread: (N, D) float64 variance, positive.
        blur: relative error that is added to every entry at first.
        sharper: factor by which it falls from iteration to iteration.
    """
    own, equations, peers = votes.of_peers(), ballots(votes), votes.peers
    pairs = [(part[:, None] * part[None]).flatten(0, 1) for part in own]  # (n * n, K)
    shape = (len(own), *votes.sums.shape)
    precision, pull = torch.zeros(shape), torch.zeros(shape)  # of the Gaussian that replaces each equation
    mean, variance = prior.clone(), spread.clone()
    covariances = [torch.diag_embed(spread[peers == peer].T) for peer in range(len(own))]  # (D, n, n) each
    for step in range(ITERATIONS):
        entries = torch.stack([part.T @ mean[peers == peer] for peer, part in enumerate(own)]).float()
        width = torch.stack([p.T @ c.flatten(1).T for p, c in zip(pairs, covariances, strict=True)]).float()
        width = width.clamp_min(torch.finfo(width.dtype).tiny ** 0.5)
        alone = (1 / width - precision).maximum(LEAST_CAVITY / width)  # precision that the other equations give
        centre = (entries / width - pull) / alone
        new_precision, new_pull = torch.zeros(shape), torch.zeros(shape)
        for one in equations:
            known, around = alone[one.entries], centre[one.entries]
            found, off = moments(one, around * one.flip, known.rsqrt(), blur * sharper**step)
            gained = (1 / off - known).clamp_min(0)
            new_precision[one.entries] = gained
            shown = (found * (gained + known) - around * one.flip * known) * one.flip
            new_pull[one.entries] = torch.where(gained > 0, shown, 0.0)
        precision += DAMPING * (new_precision - precision)
        pull += DAMPING * (new_pull - pull)
        for peer, (part, pair) in enumerate(zip(own, pairs, strict=True)):
            mine = peers == peer
            inverse = (pair @ precision[peer].double()).T.unflatten(1, (len(part), len(part)))
            inverse = inverse + torch.diag_embed(1 / spread[mine].T)
            right = (part @ pull[peer].double()).T + (prior / spread)[mine].T
            covariances[peer] = torch.linalg.inv(inverse)
            mean[mine] = (covariances[peer] @ right[..., None])[..., 0].T
            variance[mine] = covariances[peer].diagonal(dim1=1, dim2=2).T
    return mean, variance


def moments(ballot: Ballot, mean: Tensor, width: Tensor, blur: float) -> tuple[Tensor, Tensor]:
    """(k, M) mean and variance of the peers' entries, given how they voted and what remained.

    A hypothesis says who voted how, and whose entry of those that voted with the remainder is the smallest: that entry
    then follows from what the others leave of it. One more says that the equation is wrong, and tells nothing.

    Args:
        ballot: M equations of k peers.
        mean: (k, M) of the entries by all other equations.
        width: (k, M) their standard deviation.
        blur: relative error that is added to the entry that follows.
    """
    size = (mean.square() + width.square()).sqrt()
    share = EPSILON / (size + EPSILON)  # of the remainder
    loose = (share * width / size).square()
    sides = {sign: one_sided(mean, width, sign) for sign in (1, -1)}
    logs, entries, variances = [], [], []
    for signs in product((1, -1), repeat=len(mean)):
        if sum(signs) != ballot.vote:
            continue
        votes = torch.tensor(signs, dtype=mean.dtype)[:, None]
        likely, cut, left = (torch.where(votes > 0, up, down) for up, down in zip(sides[1], sides[-1], strict=True))
        total, every = (votes * share).sum(0), likely.sum(0)
        if not ballot.resolved:
            logs.append(every)
            entries.append(cut)
            variances.append(left)
            continue
        for smallest in (votes[:, 0] > 0).nonzero().flatten().tolist():
            own, least = ballot.remainder - total + share[smallest], LEAST_SHARE * ballot.remainder / len(mean)
            too_small = own < least
            own = own.maximum(least).clamp_min(ARITHMETIC / 100)
            entry = EPSILON * (1 - own).clamp_min(0) / own
            off = ballot.noise.square() + loose.sum(0) - loose[smallest]
            off = entry.square() * (off / own.square() + blur**2) + LEAST_ENTRY**2
            both = off + width[smallest].square()
            fit = -(entry - mean[smallest]).square() / both / 2 - both.log() / 2
            slope = 2 * (entry + EPSILON).log()  # of the entry over its share
            logs.append(every - likely[smallest] + fit + slope - UNLIKELY * too_small)
            gain = width[smallest].square() / both
            moved, left_over = cut.clone(), left.clone()
            moved[smallest] = mean[smallest] + gain * (entry - mean[smallest])
            left_over[smallest] = gain * off
            entries.append(moved)
            variances.append(left_over)
    measure = math.log(EPSILON) + math.log(2 * math.pi) / 2  # which the other logarithms leave out
    spread = measure - math.log(LOG_RANGE) - ballot.remainder.clamp_min(ARITHMETIC).log()
    logs.append(math.log(WRONG) + (spread if ballot.resolved else torch.zeros_like(ballot.remainder)))
    entries.append(mean)
    variances.append(width.square())
    weights = torch.stack(logs).softmax(0)[:, None]
    entries = torch.stack(entries)
    found = (weights * entries).sum(0)
    return found, (weights * (torch.stack(variances) + (entries - found).square())).sum(0)


def one_sided(mean: Tensor, width: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log probability that a Gaussian has this sign, and its mean and variance if it has."""
    at = sign * mean / width
    log_probability = torch.special.log_ndtr(at)
    hazard = (-at.square() / 2 - math.log(2 * math.pi) / 2 - log_probability).exp()
    far = at < -FAR  # where these differences are lost
    hazard = torch.where(far, -at - 1 / at, hazard)
    shrunk = torch.where(far, at.square().reciprocal(), 1 - hazard * (hazard + at)).clamp_min(LEAST_VARIANCE)
    return log_probability, mean + sign * width * hazard, width.square() * shrunk
