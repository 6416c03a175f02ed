"""Features from the rounds of a linear head over a frozen backbone, also where images share classes.

Features do not change from round to round. With one full-batch step a round, the gradients of R rounds, summed over
the N images and stacked, are `G = A F`: `F (N x D)` the features (with a 1 for the bias), and `A (R C x N)` the errors
`softmax(W_t f_n) - t_n` of every image in every round; with T local steps, their sums over the steps. So the rank of G
is N, its row space is that of the features, and in an orthonormal basis of it `A(X) X = G` are R C N equations for the
N x N coordinates X of all features.

Several local steps of one peer are a closed system in X: step s adds `-lr / N A_s X` to the weights, which moves the
logits of the next steps by `-lr / N A_s X X^T`. So they are simulated exactly, at T times the cost. With several peers,
only images of the same peer would move each other; who holds which image is neither told nor found here
(`sparse_rounds` needs none of this, where the backbone ends in a ReLU).

They are solved by Levenberg and Marquardt's method. A rotation of the images of one class among each other changes the
residual in third order only, so the way to the solution is a narrow curved valley: without the second-order correction
of each step (geodesic acceleration; Transtrum and Sethna, arXiv 1201.5885) the iteration comes to a halt in it. The
unknowns of a step are `O (N x N)`, `X + O X`, in which the normal matrix is nearly the sum of two Kronecker products,
which is inverted exactly and preconditions the conjugate gradients, together with the blocks of pairs of classes
(`PairBlocks`); up to `DIRECT` images it is factorised instead. For C classes of n images, a step of the conjugate
gradients takes about `10 R C N^2 + 4 N^2 n^2` flops, and memory is for `10 R C N + 6 N^2 n^2` numbers; a factorisation
takes `N^6 / 3` flops, with several steps `10 T R C N^4` more, and `5 N^4` numbers. The start is drawn around the means
of the classes, which are fitted first, with their counts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from attack_modules.analytic.counting import apportion
from attack_modules.analytic.stacked_rounds import CERTAIN, StackedRounds
from attack_modules.attack import AttackError

FIRST_ROUNDS = (0.1, 0.3, 1.0)
"""Shares of the rounds that the means of the classes are fitted to, one after the other: fitted to all at once, they
end at other counts where training soon is at its end."""
DIRECT = 34
"""Most images for which the normal matrix is factorised. A start of 16 images takes 1 s, with conjugate gradients 50 s;
one of 32 takes 10 s either way."""
MOST_BENT = 0.3
"""Largest size of the second-order correction beside the step. Of four starts, one found 16 images at 0.75, and all
at 0.3."""
EXPLAINED = 8.0
"""Residual, in units of the observed noise, up to which a solution is certified. Measured: 1.7 to 7 where the features
are right, 9.5 and more where they are not."""
TRIES = 30
"""Raises of the damping before an iteration is given up."""
STEPS = 24
"""Most steps of the conjugate gradients for each image. Without `PairBlocks`, 64 images were solved within 140
iterations, and with 10 steps not within 200."""
LEAST_DAMPING = 1e-16
"""Float64 resolves no less beside the normal matrix."""
PROBES = 4
"""Draws of the noise from which the expected errors are estimated."""


@dataclass(frozen=True)
class LocalSteps:
    """What one peer does in a round, if it holds all the images.

    Attributes:
        steps: full batches.
        rate: of a step; of no importance if there is one.
    """

    steps: int
    rate: float


ONE_STEP = LocalSteps(1, 0.0)
"""Then images do not move each other, so that the number of peers does not matter."""


@dataclass(frozen=True)
class ClassMeans:
    """The mean features of each class, as if its images were alike.

    Attributes:
        counts: (C,) long.
        means: (C, N) in the basis; without meaning for classes without images.
    """

    counts: Tensor
    means: Tensor

    @classmethod
    def of(
        cls, rounds: StackedRounds, smoothing: float = 0.0, training: LocalSteps = ONE_STEP, iterations: int = 150
    ) -> "ClassMeans":
        """The images of a class as so many copies of one, whose features and number explain all rounds best.

        The input of a bias is always 1, which settles the numbers.

        Args:
            rounds: of a head with a bias.
            smoothing: of the labels.
            training: of the peers in each round.
            iterations: of L-BFGS, for each part of the rounds.
        """
        number, classes, size = rounds.weights.shape
        gradients = rounds.gradients.view(number, classes, size)
        targets = torch.eye(classes).to(gradients) * (1 - smoothing) + smoothing / classes
        first = gradients[0] @ rounds.one / training.steps
        share = (1 / classes - first / size).clamp_min(0.1 / size)  # of the first predictions
        shares = (share / share.sum()).log().requires_grad_()
        means = (rounds.one / rounds.one.square().sum()).repeat(classes, 1).requires_grad_()
        for part in FIRST_ROUNDS:
            seen, weights = gradients[: math.ceil(part * number)], rounds.weights[: math.ceil(part * number)]
            optimizer = torch.optim.LBFGS(
                [means, shares], max_iter=iterations, history_size=30, line_search_fn="strong_wolfe"
            )

            def loss(seen: Tensor = seen, weights: Tensor = weights, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                parts = shares.softmax(0)
                logits = means @ weights.transpose(1, 2)  # (rounds, class of the images, C)
                errors = summed = logits.softmax(2) - targets
                for _ in range(training.steps - 1):
                    logits = logits - training.rate * (means @ means.T * parts) @ errors
                    errors = logits.softmax(2) - targets
                    summed = summed + errors
                fitted = (summed * (parts * size)[:, None]).transpose(1, 2) @ means
                fit = (fitted - seen).square().sum() / seen.square().sum()
                value = fit + 0.1 * (means @ rounds.one - 1).square().mean()
                value.backward()
                return value

            with torch.enable_grad():
                optimizer.step(loss)
        quota = shares.detach().softmax(0) * size
        return cls(apportion(quota, torch.zeros(classes, dtype=torch.long), size), means.detach())

    def start(self, labels: Tensor, generator: torch.Generator, spread: float) -> Tensor:
        """(N, N) random coordinates around the means of the classes of labels (N,).

        Images of one class differ by about as much as its mean does from the others', times the root of its size.
        """
        held = self.counts > 0
        centred = self.means[held] - self.means[held].mean(0)
        typical = (centred.square().sum(1) * self.counts[held]).mean().sqrt()
        noise = torch.randn(len(labels), len(labels), generator=generator, dtype=torch.float64)
        return self.means[labels] + spread * typical / len(labels) ** 0.5 * noise


@dataclass(frozen=True)
class JointSolution:
    """The images of all rounds.

    Attributes:
        labels: (N,) long, ascending.
        features: (N, D) float64, without the 1 of a bias.
        residual: root mean square of what is left unexplained, over the observed noise; 1 if the noise is all.
        expected_errors: (N,) relative errors of the features by noise as observed, or of the residual's size.
        gap: see `StackedRounds`.
        conditioning: largest singular value of the stacked gradients over the smallest.
        tried: residual of each start.
    """

    labels: Tensor
    features: Tensor
    residual: float
    expected_errors: Tensor
    gap: float
    conditioning: float
    tried: list[float]

    @property
    def explained(self) -> bool:
        """Whether noise of the observed size explains the residual: the attacker's own proof of success."""
        return self.residual <= EXPLAINED

    @property
    def certified(self) -> Tensor:
        """(N,) bool."""
        return (self.expected_errors <= CERTAIN) & self.explained


@dataclass(frozen=True)
class Point:
    """An iterate of the coordinates.

    Attributes:
        coordinates: (N, N).
        gram: (N, N) their inner products.
        logits: (T, R C, N) in each local step, as are the two that follow.
        probabilities: (T, R C, N).
        each: (T, R C, N) errors.
        errors: (R C, N) the sum over the steps.
        residual: (R C, N) of the gradients.
        ones: (N,) of the 1 of a bias.
        cost: weighted sum of their squares.
    """

    coordinates: Tensor
    gram: Tensor
    logits: Tensor
    probabilities: Tensor
    each: Tensor
    errors: Tensor
    residual: Tensor
    ones: Tensor
    cost: float


class JointProblem:
    """The equations `A(X) X = G`, and `x_n . one = 1` with a bias, for the coordinates X (N, N) of all images.

    Args:
        rounds: in the basis.
        labels: (N,) long.
        smoothing: of the labels.
        training: of the peers in each round.
    """

    def __init__(
        self, rounds: StackedRounds, labels: Tensor, smoothing: float = 0.0, training: LocalSteps = ONE_STEP
    ) -> None:
        number, self.classes, self.size = rounds.weights.shape
        self.rounds = rounds
        self.labels = labels
        self.steps = training.steps
        self.pace = training.rate / self.size
        self.flat = rounds.weights.reshape(number * self.classes, self.size)
        hard = F.one_hot(labels, self.classes).to(self.flat)
        self.targets = (hard * (1 - smoothing) + smoothing / self.classes).T
        self.one = torch.zeros(self.size).to(self.flat) if rounds.one is None else rounds.one
        # as heavy as a hundredth of all gradients, so that the 1 is settled first; its own noise is smaller still
        self.weight = 0.01 * rounds.singular.square().sum().item() * rounds.biased

    def point(self, coordinates: Tensor) -> Point:
        """Evaluate the equations."""
        gram = coordinates @ coordinates.T
        logits, probabilities, each = [self.flat @ coordinates.T], [], []
        for step in range(self.steps):
            soft = logits[-1].view(-1, self.classes, self.size).softmax(1)
            probabilities.append(soft.view(-1, self.size))
            each.append((soft - self.targets).view(-1, self.size))
            if step < self.steps - 1:
                logits.append(logits[-1] - self.pace * each[-1] @ gram)
        errors = torch.stack(each)
        summed = errors.sum(0)
        residual = summed @ coordinates - self.rounds.gradients
        ones = coordinates @ self.one - float(self.rounds.biased)
        cost = (residual.square().sum() + self.weight * ones.square().sum()).item()
        parts = torch.stack(logits), torch.stack(probabilities), errors
        return Point(coordinates, gram, *parts, summed, residual, ones, cost)

    def softened(self, probabilities: Tensor, change: Tensor) -> Tensor:
        """(R C, M) change of the probabilities (R C, M) that a change of the logits (R C, M) causes."""
        shape = (-1, self.classes, change.shape[1])
        weighted = probabilities.view(shape) * change.view(shape)
        return torch.addcmul(weighted, probabilities.view(shape), weighted.sum(1, keepdim=True), value=-1).view_as(
            change
        )

    def turned(self, at: Point, step: Tensor) -> Tensor:
        """(R C, N) change of the residual by coordinates `X + step X`, in first order, in terms of X."""
        total = torch.zeros_like(at.errors)
        for logits, probabilities, errors in zip(at.logits, at.probabilities, at.each, strict=True):
            change = torch.addmm(logits @ step.T, total, at.gram, alpha=-self.pace)  # the weights have changed too
            total = torch.addmm(total + self.softened(probabilities, change), errors, step)
        return total

    def turned_back(self, at: Point, mixed: Tensor) -> Tensor:
        """(N, N): the transpose of `turned`."""
        step = torch.zeros_like(at.gram)
        parts = (at.logits, at.probabilities, at.each)
        for logits, probabilities, errors in zip(*(part.flip(0) for part in parts), strict=True):
            change = self.softened(probabilities, mixed)
            step = step + change.T @ logits + errors.T @ mixed
            mixed = torch.addmm(mixed, change, at.gram, alpha=-self.pace)
        return step

    def forward(self, at: Point, step: Tensor) -> tuple[Tensor, Tensor]:
        """Change of the residual (R C, N) and of the ones (N,) by coordinates `X + step X`, in first order."""
        return self.turned(at, step) @ at.coordinates, step @ (at.coordinates @ self.one)

    def backward(self, at: Point, residual: Tensor, ones: Tensor) -> Tensor:
        """(N, N): the transpose of `forward`."""
        by_ones = self.weight * ones[:, None] * (at.coordinates @ self.one)
        return self.turned_back(at, residual @ at.coordinates.T) + by_ones

    def normal(self, at: Point, step: Tensor) -> Tensor:
        """(N, N): `backward` of `forward`."""
        ones = at.coordinates @ self.one
        by_ones = self.weight * (step @ ones)[:, None] * ones
        return self.turned_back(at, self.turned(at, step) @ at.gram) + by_ones

    def normal_matrix(self, at: Point) -> Tensor:
        """(N N, N N), exactly."""
        if self.steps > 1:
            units = torch.eye(self.size**2).to(at.gram).view(-1, self.size, self.size)
            turned = torch.func.vmap(lambda unit: self.turned(at, unit), chunk_size=64)(units)
            turned = (turned @ at.coordinates).flatten(1)
            ones, identity = at.coordinates @ self.one, torch.eye(self.size).to(at.gram)
            return turned @ turned.T + self.weight * torch.kron(identity, torch.outer(ones, ones))
        every = torch.arange(self.size)
        return self.normal_block(at, every.repeat_interleave(self.size), every.repeat(self.size))

    def normal_block(self, at: Point, rows: Tensor, columns: Tensor) -> Tensor:
        """(M, M) of the normal matrix for the M unknowns `O[rows, columns]`.

        It is exact for one step; of several, what the change of one does to the next is left out.
        """
        gram, ones = at.gram, at.coordinates @ self.one
        turned = torch.zeros(len(self.flat), len(rows)).to(gram)
        for logits, probabilities in zip(at.logits, at.probabilities, strict=True):
            turned += self.softened(probabilities[:, rows], logits[:, columns])
        left, right = rows[:, None], columns[:, None]
        mixed = (at.errors.T @ turned)[rows].mul_(gram[right, rows])
        block = (turned.T @ turned).mul_(gram[left, rows])
        block.addcmul_((at.errors.T @ at.errors)[left, rows], gram[right, columns])
        block.add_(mixed).add_(mixed.T)
        return block.addcmul_(torch.outer(ones[columns], ones[columns]), left == rows, value=self.weight)


Solve = Callable[[Tensor, float], Tensor]
"""Right-hand side (N, N) and damping -> solution of the damped normal equations; not a number where there is none."""


def direct_solve(problem: JointProblem, at: Point) -> Solve:
    """By Cholesky's factorisation."""
    matrix, gram = problem.normal_matrix(at), at.gram
    metric = torch.kron(torch.eye(len(gram)).to(gram), gram) * gram.diagonal().mean()
    factors: dict[float, Tensor] = {}

    def solve(right: Tensor, damping: float) -> Tensor:
        if damping not in factors:
            factors.clear()
            factor, failed = torch.linalg.cholesky_ex(matrix + damping * metric)
            factors[damping] = factor.fill_(math.nan) if failed else factor
        return torch.cholesky_solve(right.reshape(-1, 1), factors[damping]).view_as(right)

    return solve


class PairBlocks:
    """A block of the normal matrix for each pair of classes: the unknowns `O[i, j]` and `O[j, i]` of their images.

    Directions are nearly flat where what `O[i, j]` changes is undone by `O[j, i]`, so both are in one block.

    Args:
        problem: the equations.
        at: where they are linearised.
    """

    def __init__(self, problem: JointProblem, at: Point) -> None:
        members = [(problem.labels == label).nonzero()[:, 0] for label in problem.labels.unique()]
        blocks: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}  # those of one size are solved at once
        gram = at.gram
        for place, first in enumerate(members):
            for second in members[place:]:
                rows, columns = (side.reshape(-1) for side in torch.meshgrid(first, second, indexing="ij"))
                if first is not second:
                    rows, columns = torch.cat([rows, columns]), torch.cat([columns, rows])
                block = problem.normal_block(at, rows, columns)
                metric = gram[rows][:, rows] * gram[columns][:, columns]
                blocks.setdefault(len(rows), []).append((rows * problem.size + columns, block, metric))
        self.blocks = [[torch.stack(parts) for parts in zip(*alike, strict=True)] for alike in blocks.values()]

    def inverse(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Each block's part of an (N, N) right-hand side, solved by itself."""
        inverses = [(places, torch.linalg.inv(block + damping * metric)) for places, block, metric in self.blocks]

        def solve(right: Tensor) -> Tensor:
            solution = torch.empty_like(right).view(-1)
            for places, inverse in inverses:
                solution[places] = (right.view(-1)[places][:, None] @ inverse)[:, 0]  # 3 times as fast from this side
            return solution.view_as(right)

        return solve


def iterative_solve(problem: JointProblem, at: Point, steps: int | None = None, tolerance: float = 1e-2) -> Solve:
    """By conjugate gradients, preconditioned by the sum of two inverses.

    One is that of the two Kronecker products of the normal matrix without their mixture, the other that of
    `PairBlocks`; together they need a third of the steps that the first needs.

    Where the steps end first, what they have not reached is damped more than was asked for. That is a good step of
    Levenberg and Marquardt's method all the same, since both leave the same flat directions out.

    Args:
        problem: the equations.
        at: where they are linearised.
        steps: upper limit; `STEPS` for each image by default.
        tolerance: norm of the residual in the metric of the preconditioner, relative to that at the beginning.
    """
    n, shape = problem.size, (-1, problem.classes, problem.size)
    gram, ones = at.gram, at.coordinates @ problem.one
    probabilities, logits = at.probabilities.mean(0).view(shape), at.logits.mean(0).view(shape)
    squared = probabilities.square()
    mixed = squared @ probabilities.transpose(1, 2)
    mean = torch.diag_embed(squared.sum(2)) - mixed - mixed.transpose(1, 2)
    mean = (mean + (probabilities * squared.sum(1, keepdim=True)) @ probabilities.transpose(1, 2)) / n
    softened = problem.steps**2 * torch.einsum("rci,rcj->ij", logits, mean @ logits)
    softened = softened + problem.weight * n / gram.trace() * ones[:, None] * ones
    left, rows = _pencil(at.errors.T @ at.errors, gram)
    right, columns = _pencil(softened, gram)
    values = left[:, None] + right
    blocks = PairBlocks(problem, at)

    def solve(target: Tensor, damping: float) -> Tensor:
        by_blocks = blocks.inverse(damping)

        def precondition(vector: Tensor) -> Tensor:
            return rows @ ((rows.T @ vector @ columns) / (values + damping)) @ columns.T + by_blocks(vector)

        solution, rest = torch.zeros_like(target), target.clone()
        preconditioned = precondition(rest)
        direction, product = preconditioned.clone(), (rest * preconditioned).sum()
        least = tolerance**2 * product
        for _ in range(steps or STEPS * n):
            image = problem.normal(at, direction) + damping * (gram @ direction @ gram)
            length = product / (direction * image).sum()
            solution += length * direction
            rest -= length * image
            preconditioned = precondition(rest)
            before, product = product, (rest * preconditioned).sum()
            if product < least:
                break
            direction = preconditioned + product / before * direction
        return solution

    return solve


def _pencil(matrix: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Values d (N,) and vectors U (N, N) of symmetric matrices: `U^T matrix U = diag(d)`, `U^T metric U = 1`."""
    factor = torch.linalg.cholesky(metric)
    half = torch.linalg.solve_triangular(factor, matrix, upper=False)
    reduced = torch.linalg.solve_triangular(factor, half.T, upper=False)
    values, vectors = torch.linalg.eigh((reduced + reduced.T) / 2)
    return values.clamp_min(0), torch.linalg.solve_triangular(factor.T, vectors, upper=True)


def solver_of(problem: JointProblem, at: Point) -> Solve:
    """The cheaper of the two."""
    return direct_solve(problem, at) if problem.size <= DIRECT else iterative_solve(problem, at)


def minimise(
    problem: JointProblem, coordinates: Tensor, goal: float, iterations: int, report: Callable[[float], None]
) -> Point:
    """Levenberg-Marquardt with geodesic acceleration, until the cost is at `goal`, or no step lowers it.

    Args:
        problem: the equations.
        coordinates: (N, N) to start from.
        goal: cost that rounding and noise explain.
        iterations: upper limit.
        report: is told the cost after every iteration.
    """
    at, damping, probe = problem.point(coordinates), 1e-4, 0.1
    for _ in range(iterations):
        solve = solver_of(problem, at)
        slope = -problem.backward(at, at.residual, at.ones)
        for _ in range(TRIES):
            step = solve(slope, damping)
            moved = step @ at.coordinates
            ahead = problem.point(at.coordinates + probe * moved)
            linear = problem.forward(at, step)
            bent = [
                2 / probe * ((there - here) / probe - straight)
                for there, here, straight in zip(
                    (ahead.residual, ahead.ones), (at.residual, at.ones), linear, strict=True
                )
            ]
            correction = solve(-problem.backward(at, *bent), damping) @ at.coordinates
            ratio = (correction.norm() / moved.norm()).item()
            candidate = problem.point(at.coordinates + moved + correction / 2)
            if ratio < MOST_BENT and candidate.cost < at.cost:
                break
            damping *= 2.5
        else:
            return at
        at = candidate
        report(at.cost)
        if at.cost <= goal:
            return at
        if ratio < MOST_BENT / 2:
            damping = max(damping / 5, LEAST_DAMPING)
    return at


def solve_rounds(
    rounds: StackedRounds,
    labels: Tensor | None = None,
    smoothing: float = 0.0,
    training: LocalSteps = ONE_STEP,
    starts: int = 6,
    iterations: int = 200,
    spread: float = 0.3,
    seed: int = 0,
) -> JointSolution:
    """The features of all images; the start whose residual is least wins, and none follows one that is explained.

    Args:
        rounds: as `StackedRounds.of` finds them.
        labels: (N,) long, if they are told; else a bias shows their counts.
        smoothing: of the labels.
        training: of the peers in each round.
        starts: most random starts.
        iterations: most of each start.
        spread: of the starts around the means of the classes, relative to the spread of the images.
        seed: of the starts.

    Raises:
        AttackError: there is no bias.
    """
    if not rounds.biased:
        raise AttackError(
            "The head has no bias, from which the number of images of each class is read. Rounds of such a head cannot "
            "be solved together yet; attack one round with FeatureInversion."
        )
    means = ClassMeans.of(rounds, smoothing, training)
    if labels is None:
        labels = torch.arange(len(means.counts)).repeat_interleave(means.counts)
    elif not torch.equal(labels.bincount(minlength=len(means.counts)), means.counts):
        means = ClassMeans(labels.bincount(minlength=len(means.counts)), means.means)
    problem = JointProblem(rounds, labels, smoothing, training)
    generator = torch.Generator().manual_seed(seed)
    noise = rounds.noise**2 * rounds.gradients.numel()
    found: list[Point] = []
    with Progress(transient=True) as progress:
        for start in range(starts):
            name = f"Joint rounds, start {start + 1} of at most {starts}"
            task = progress.add_task(name, total=iterations)

            def report(cost: float, task: int = task, name: str = name) -> None:
                times = (cost / noise) ** 0.5
                progress.update(task, advance=1, description=f"{name} (residual {times:.3g} times the noise)")

            drawn = means.start(labels, generator, spread)
            found.append(minimise(problem, drawn, EXPLAINED**2 / 4 * noise, iterations, report))
            if found[-1].cost <= EXPLAINED**2 * noise:
                break
    best = min(found, key=lambda point: point.cost)
    if best.cost <= EXPLAINED**2 * noise:  # the 1 now weighs as much as the noise of its direction allows
        problem.weight = 1 / (best.coordinates / problem.rounds.singular).square().sum(1).mean().item()
        best = minimise(problem, best.coordinates, 0.0, 5, lambda cost: None)
    residual = (best.residual.square().sum() / noise).sqrt().item()
    features = torch.linalg.lstsq(best.errors, rounds.gradients, driver="gelsd").solution @ rounds.basis
    return JointSolution(
        labels=labels,
        features=features[:, :-1],
        residual=residual,
        expected_errors=max(residual, 1.0) * expected_errors(problem, best, generator),
        gap=rounds.gap,
        conditioning=(rounds.singular[0] / rounds.singular[-1]).item(),
        tried=[(point.cost / noise) ** 0.5 for point in found],
    )


def expected_errors(problem: JointProblem, at: Point, generator: torch.Generator) -> Tensor:
    """(N,) root mean square relative errors of the features, of draws of the noise, in first order.

    Within the row space, noise moves the solution of the equations; outside, it turns the row space itself.
    """
    solve, rounds = solver_of(problem, at), problem.rounds
    squares = torch.zeros(problem.size).to(at.coordinates)
    for _ in range(PROBES):
        noise = rounds.noise * torch.randn(at.residual.shape, generator=generator, dtype=torch.float64)
        step = solve(problem.backward(at, noise, torch.zeros_like(at.ones)), LEAST_DAMPING)
        squares += (step @ at.coordinates).square().sum(1) / PROBES
    outside = rounds.basis.shape[1] - problem.size
    squares += outside * rounds.noise**2 * torch.linalg.pinv(at.errors).square().sum(1)
    return squares.sqrt() / at.coordinates.norm(dim=1)
