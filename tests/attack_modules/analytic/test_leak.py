"""Closed-form leakage on tiny heads, where the answer is known."""

import math

import pytest
import torch
from torch import Tensor, nn

from attack_modules.analytic.gates import GateRegression, Gates, _Images, _Units, gates_of_activations
from attack_modules.analytic.head_training import co_members, group_peers, offset_to_match, simulate
from attack_modules.analytic.leak import leak, leak_rounds
from attack_modules.analytic.one_layer import head_inputs
from attack_modules.analytic.results import Leakage, TrainingKnowledge
from attack_modules.analytic.row_space import RowSpace, augmented
from attack_modules.attack import AttackError

CLASSES, HIDDEN, WIDTH = 40, 48, 60


def make_head(
    bias: bool = False, single: bool = False, seed: int = 0, classes: int = CLASSES, hidden: int = HIDDEN
) -> nn.Sequential:
    torch.manual_seed(seed)
    if single:
        return nn.Sequential(nn.Linear(WIDTH, classes, bias=bias)).double()
    layers = [nn.Linear(WIDTH, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, classes, bias=bias)]
    return nn.Sequential(*layers).double()


def make_features(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(head: nn.Sequential) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in head.named_parameters()}


def train(
    head: nn.Sequential, features: Tensor, labels: Tensor, lr: float, steps: int, peers: int = 1
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean over equal peers of (before - after) of full-batch SGD on fixed features."""
    before = weights_of(head)
    total = {name: torch.zeros_like(value) for name, value in before.items()}
    for part in torch.arange(len(labels)).chunk(peers):
        head.load_state_dict(before)
        optimizer = torch.optim.SGD(head.parameters(), lr)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features[part]), labels[part]).backward()
            optimizer.step()
        for name, value in weights_of(head).items():
            total[name] += (before[name] - value) / peers
    head.load_state_dict(before)
    return total, before


def relative_error(found: Tensor, truth: Tensor) -> Tensor:
    return (found.double() - truth).norm(dim=1) / truth.norm(dim=1)


def check_matched(found: Leakage, features: Tensor, labels: Tensor, error: float) -> None:
    """Every image is found once, with its label; images of one class in any order."""
    distances = torch.cdist(found.features.double(), features) / features.norm(dim=1)
    nearest = distances.argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(labels)))
    assert found.labels.tolist() == labels[nearest].tolist()
    assert distances.amin(1).max() < error


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_one_step_is_exact(bias: bool, single: bool) -> None:
    labels = torch.tensor([3, 7, 8, 15, 22, 39])
    features = make_features(len(labels))
    head = make_head(bias, single)
    update, before = train(head, features, labels, lr=0.01, steps=1)
    found = leak(update, before, TrainingKnowledge(lr=0.01, steps=1))
    assert found.labels.tolist() == labels.tolist()
    assert relative_error(found.features, features).max() < 1e-6
    assert found.diagnosis.num_images == len(labels)
    assert found.diagnosis.gap > 1e6
    assert found.diagnosis.residual < 1e-6


def test_several_steps_beat_first_order() -> None:
    labels = torch.arange(0, 24, 3)
    features = make_features(len(labels))
    head = make_head()
    update, before = train(head, features, labels, lr=0.02, steps=4)
    found = leak(update, before, TrainingKnowledge(lr=0.02, steps=4))
    assert relative_error(found.features, features).max() < 2e-3
    assert found.diagnosis.drift < 0.01


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("labels", [[0, 0, 1, 3, 3, 3], [0, 1, 2, 3]], ids=["shared", "one of each"])
def test_few_classes_are_exact(bias: bool, labels: list[int]) -> None:
    labels = torch.tensor(labels)
    features = make_features(len(labels))
    update, before = train(make_head(bias, classes=4, hidden=128), features, labels, lr=0.01, steps=1)
    found = leak(update, before, TrainingKnowledge(lr=0.01, steps=1))
    assert found.labels.tolist() == labels.tolist()
    assert found.diagnosis.disentangled == found.diagnosis.num_images == len(labels)
    assert found.diagnosis.outside < 0.1
    check_matched(found, features, labels, 1e-5)


def test_shared_class_among_many_is_exact() -> None:
    labels = torch.tensor([3, 7, 7, 15, 22, 22])
    features = make_features(len(labels))
    update, before = train(make_head(hidden=128), features, labels, lr=0.01, steps=1)
    check_matched(leak(update, before, TrainingKnowledge(lr=0.01, steps=1)), features, labels, 1e-5)


def test_given_shared_labels_keep_their_order() -> None:
    labels = torch.tensor([22, 3, 22, 7])
    features = make_features(len(labels))
    update, before = train(make_head(hidden=128), features, labels, lr=0.01, steps=1)
    found = leak(update, before, TrainingKnowledge(lr=0.01, steps=1, labels=labels))
    assert found.labels.tolist() == labels.tolist()
    check_matched(found, features, labels, 1e-5)


def test_shared_classes_over_several_steps() -> None:
    labels = torch.tensor([0, 0, 1, 3, 3, 3])
    features = make_features(len(labels))
    update, before = train(make_head(classes=4, hidden=128), features, labels, lr=0.01, steps=3, peers=2)
    check_matched(leak(update, before, TrainingKnowledge(lr=0.01, steps=3)), features, labels, 0.01)


def test_a_failure_to_disentangle_is_an_error() -> None:
    labels = torch.tensor([0, 0, 1, 3, 3, 3])
    update, before = train(make_head(classes=4, hidden=128), make_features(len(labels)), labels, lr=0.01, steps=1)
    torch.manual_seed(0)
    layers = {name: weight.clone() for name, weight in before.items()}
    layers["2.weight"] = torch.randn_like(layers["2.weight"])  # another model: no gates agree with the update
    with pytest.raises(AttackError, match="none could be disentangled"):
        leak(update, layers, TrainingKnowledge(lr=0.01, steps=1))


def test_given_labels_keep_their_order() -> None:
    labels = torch.tensor([22, 3, 39, 7])
    features = make_features(len(labels))
    update, before = train(make_head(), features, labels, lr=0.01, steps=1)
    found = leak(update, before, TrainingKnowledge(lr=0.01, steps=1, labels=labels))
    assert found.labels.tolist() == labels.tolist()
    assert relative_error(found.features, features).max() < 1e-6


def test_wrong_rate_shows_in_the_diagnosis() -> None:
    labels = torch.arange(0, 24, 3)
    update, before = train(make_head(), make_features(len(labels)), labels, lr=0.02, steps=4)
    right = leak(update, before, TrainingKnowledge(lr=0.02, steps=4)).diagnosis
    wrong = leak(update, before, TrainingKnowledge(lr=0.04, steps=4)).diagnosis
    assert wrong.drift > 10 * right.drift


def test_augmented_appends_biases() -> None:
    layers = augmented({"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2), "b.weight": torch.ones(4, 2)})
    assert [tuple(layer.shape) for layer in layers] == [(2, 4), (4, 2)]
    assert layers[0][:, 3].tolist() == [0, 0]


def test_row_space_is_that_of_the_update() -> None:
    torch.manual_seed(0)
    update = torch.rand(30, 5, dtype=torch.float64) @ torch.rand(5, 50, dtype=torch.float64)
    update[7] = 0  # a unit that was never active
    update[9:] += 1e-4 * torch.randn(21, 50)
    weight = torch.rand(30, 50)
    space = RowSpace.of(update, weight)
    torch.testing.assert_close(space.vectors(space.rows), update, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(space.weight @ space.rows.T, weight.double() @ update.T)
    assert not space.rows[7].any()
    directions = space.vectors(torch.eye(len(space.mixing), dtype=torch.float64))[:26]  # 5 and 21
    unit = torch.eye(len(directions), dtype=torch.float64)
    torch.testing.assert_close(directions @ directions.T, unit, rtol=0, atol=1e-5)  # the last are 4e-6 of the update


@pytest.mark.parametrize("true_width", [1e-3, 0.3])
def test_the_likeliest_width_of_gates_is_sought_in_one_direction(true_width: float) -> None:
    torch.manual_seed(0)
    errors, noise = torch.rand(3, 20).double(), torch.full((3,), 1e-12).double()
    middle = torch.full((3, 20), 0.5).double()
    true_gates = middle + true_width * torch.randn(3, 20)
    tried = []

    def prior(width: float) -> Gates:
        tried.append(width)
        return Gates(middle, torch.full_like(middle, width**2))

    regression = GateRegression((true_gates * errors).T @ torch.rand(3, 9).double(), 3)
    found = regression.best(prior, errors, noise)
    assert len(set(tried)) == len(tried)  # each is computed once
    evidence = {width: regression.evidence(prior(width), errors, noise)[1] for width in tuple(tried)}
    likeliest = max(evidence, key=evidence.__getitem__)
    assert likeliest / true_width == pytest.approx(1, rel=1)
    held, _ = regression.evidence(prior(likeliest), errors, noise)
    torch.testing.assert_close(found.mean, regression.posterior(prior(likeliest), errors, held).mean)


def test_gates_are_solved_by_units_as_by_images() -> None:
    torch.manual_seed(0)
    regression = GateRegression(torch.rand(40, 30).double() @ torch.rand(30, 50).double(), 30)
    errors, noise = torch.randn(4, 40).double(), torch.tensor([1e-6, 1e-4, 1e-2, 1e-4]).double()
    variance = torch.zeros(4, 40).double()
    variance[:3, 5:13] = 0.1
    prior = Gates(torch.rand(4, 40).double(), variance)
    parts = list(regression._solvers(prior, errors, noise))
    assert {type(solver) for _, solver in parts} == {_Units}
    root, gated = variance.sqrt() * errors.abs(), prior.mean * errors
    for part, solver in parts:
        other = _Images(regression.inside, root[part], regression._outside(gated[part]))
        some = torch.arange(len(part))[1:]
        for found, expected in zip(
            solver.misfit(noise[part][1:], some), other.misfit(noise[part][1:], some), strict=True
        ):
            torch.testing.assert_close(found, expected)
        for found, expected in zip(solver.solution(noise[part]), other.solution(noise[part]), strict=True):
            torch.testing.assert_close(found, expected)
    assert torch.equal(regression.posterior(prior, errors, noise).mean[3], prior.mean[3])


def test_an_image_without_any_activation_has_no_open_gate() -> None:
    gates = gates_of_activations(torch.tensor([[-1.0, -2.0, 0.0], [1.0, 2.0, 0.0]]), width=0.01)
    assert not gates.mean[0].any() and not gates.variance[0].any()
    assert gates.mean[1, :2].min() > 0.99


def test_images_seen_once_count_once() -> None:
    labels = torch.tensor([3, 3, 7, 7, 22, 22])
    update, before = train(make_head(hidden=128), make_features(len(labels)), labels, lr=0.01, steps=1)
    first = next(iter(update))
    update[first] += 1e-9 * torch.linalg.qr(torch.randn_like(update[first])).Q  # rounding, alike in all directions
    epochs = TrainingKnowledge(lr=0.005, steps=2)
    assert leak(update, before, epochs).diagnosis.num_images == len(labels) / 2  # the same image in both, it seems
    batches = TrainingKnowledge(lr=0.005, steps=2, epochs=1)  # two steps, each on half of the images
    assert leak(update, before, batches).diagnosis.num_images == len(labels)


def test_head_inputs_is_exact() -> None:
    torch.manual_seed(0)
    inputs = torch.rand(4, 10, dtype=torch.float64)
    weight = torch.randn(12, 10, dtype=torch.float64)
    targets = nn.functional.one_hot(torch.tensor([1, 5, 6, 11]), 12).double()
    probabilities = (inputs @ weight.T).softmax(1)
    found, found_probabilities = head_inputs((probabilities - targets).T @ inputs, weight, targets, 200)
    torch.testing.assert_close(found, inputs)
    torch.testing.assert_close(found_probabilities, probabilities)


@pytest.mark.parametrize("bias", [False, True])
def test_simulation_is_the_training(bias: bool) -> None:
    labels = torch.arange(6)
    features = make_features(6)
    head = make_head(bias)
    update, before = train(head, features, labels, lr=0.05, steps=3, peers=2)
    first, last = augmented(before)
    inputs = nn.functional.pad(features, (0, int(bias)), value=1.0)
    influence = torch.block_diag(torch.full((3, 3), 1 / 3), torch.full((3, 3), 1 / 3)).double()
    targets = nn.functional.one_hot(labels, CLASSES).double()
    (path,) = simulate(inputs @ inputs.T, inputs @ first.T, [last], targets, influence, 0.05, 3)
    gated = (path.errors * (path.preactivations > 0)).mean(0)
    torch.testing.assert_close(augmented(update)[0], gated.T @ inputs * 0.05 * 3 / 6)


def test_co_members_finds_peers() -> None:
    torch.manual_seed(0)
    features, past = torch.rand(6, 20, dtype=torch.float64), torch.randn(6, 30, dtype=torch.float64)
    gram = features @ features.T
    truth = torch.block_diag(torch.full((2, 2), 0.5), torch.full((4, 4), 0.25)).double()
    guess = torch.full((6, 6), 1 / 6, dtype=torch.float64)
    drift = 0.1 * (truth * gram) @ past
    found = co_members(drift, torch.ones_like(drift), gram, past, 0.1, guess)
    torch.testing.assert_close(found, truth, atol=1e-3, rtol=0)
    assert group_peers(found).tolist() == [0, 0, 1, 1, 1, 1]


def test_two_images_that_look_alike_do_not_join_their_peers() -> None:
    influence = torch.block_diag(torch.full((4, 4), 0.25), torch.full((5, 5), 0.2), torch.ones(1, 1)).double()
    influence[3, 4:6] = influence[4:6, 3] = 0.3
    influence = influence[order := torch.tensor([4, 0, 5, 1, 9, 6, 2, 7, 3, 8])][:, order]
    unit = nn.functional.normalize(influence, dim=1)
    assert (unit @ unit.T)[0, 8] > 0.5  # images 3 and 4, of different peers
    assert group_peers(influence).tolist() == [0, 1, 0, 1, 2, 0, 1, 0, 1, 0]
    assert group_peers(torch.ones(1, 1).double()).tolist() == [0]
    assert group_peers(torch.tensor([[0.0, 0, 0], [0, 1, 1], [0, 1, 1]])).tolist() == [0, 1, 1]  # of no influence


def test_peers_whose_rows_are_much_alike_are_two() -> None:
    peers = torch.tensor([0, 1] * 8)
    influence = torch.where(peers[:, None] == peers, 1.0, 0.29).double()  # the cosine across is 0.53
    assert torch.equal(group_peers(influence), peers)


def test_peers_are_found_where_features_are_not() -> None:
    features, labels = make_features(8), 3 * torch.arange(8)
    update, before = train(make_head(), features, labels, lr=0.5, steps=3, peers=2)
    found = leak(update, before, TrainingKnowledge(lr=0.5, steps=3))
    assert relative_error(found.features, features).max() > 0.1  # of 0.18 to 0.4, as sums are ordered
    assert found.peers.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_offset_matches_mean_activation() -> None:
    torch.manual_seed(0)
    path = torch.randn(5, 3, 7, dtype=torch.float64)
    wanted = torch.rand(3, 7, dtype=torch.float64)
    torch.testing.assert_close((path + offset_to_match(path, wanted)).relu().mean(0), wanted)
    silent = path + offset_to_match(path, torch.zeros(3, 7, dtype=torch.float64))
    assert silent.max() <= 1e-12 and math.isfinite(silent.min())


def rounds(
    count: int, features: Tensor, labels: Tensor, lr: float, steps: int, hidden: int
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Updates and weights of rounds that follow each other, all on the same images."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(features.shape[1], hidden, bias=False), nn.ReLU(), nn.Linear(hidden, 90, bias=False))
    head = head.double()
    updates, weights = [], []
    for _ in range(count):
        update, before = train(head, features, labels, lr, steps, peers=2)
        updates.append(update)
        weights.append(before)
        head.load_state_dict({name: before[name] - update[name] for name in before})
    return updates, weights


@pytest.mark.parametrize("steps", [1, 2])
def test_rounds_reach_beyond_the_width(steps: int) -> None:
    """30 images through 24 units: one round cannot tell them apart, three can."""
    features = torch.rand(30, 400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(0, 90, 3)
    lr = 0.1 if steps == 1 else 0.01
    updates, weights = rounds(3, features, labels, lr, steps, hidden=24)
    training = TrainingKnowledge(lr, steps)
    alone = leak(updates[0], weights[0], training)
    together = leak_rounds(updates, weights, training)
    assert relative_error(alone.features, features).median() > 0.1
    assert relative_error(together.features, features).median() < 0.03
    assert together.labels.tolist() == labels.tolist()
    assert together.diagnosis.conditioning < alone.diagnosis.conditioning / 10


def test_rounds_of_other_images_are_refused() -> None:
    features = torch.rand(30, 400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = rounds(1, features, torch.arange(0, 90, 3), lr=0.1, steps=1, hidden=24)
    second = rounds(1, features, torch.arange(1, 90, 3), lr=0.1, steps=1, hidden=24)
    with pytest.raises(AttackError, match="do not hold the same images"):
        leak_rounds(first[0] + second[0], first[1] + second[1], TrainingKnowledge(lr=0.1, steps=1))
