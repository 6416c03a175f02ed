from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attack_modules import FeatureInversion, GradientInversion
from attack_modules.analytic.counting import (
    apportion,
    class_evidence,
    count_images,
    counts_to_try,
    empty_scale,
    infer_labels,
    is_compressed,
    read_counts,
)
from attack_modules.analytic.leak import leak
from attack_modules.analytic.observed_head import head_parameters, labels_in, training_knowledge
from attack_modules.analytic.results import ImageCount, TrainingKnowledge
from attack_modules.analytic.row_space import RowSpace, augmented
from attack_modules.analytic.typical_head import TypicalHead, pink_noise
from attack_modules.attack import AttackError
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRound
from fl_lightning.client import LocalTraining
from fl_lightning.federation import Federation
from fl_lightning.models import ClassifierFactory

Observe = Callable[..., ObservedRound]
BLIND = Knowledge(labels="inferred", label_counts="inferred")
UNKNOWN = Knowledge(labels="inferred", label_counts="inferred", num_images="inferred", num_clients="inferred")
SHY = LocalTraining(lr=0.003, local_epochs=1)


def labels_of(seen: ObservedRound) -> list[int]:
    return labels_in(seen, seen.peers_update(), seen.observation.build_model()).tolist()


def test_distinct_classes_among_many(observe: Observe) -> None:
    seen = observe(Federation(client=SHY), BLIND, num_classes=100, images_per_client=4)
    assert labels_of(seen) == list(range(8))


def test_counts_with_a_bias_are_exact(observe: Observe, linear_classifier: ClassifierFactory) -> None:
    seen = observe(Federation(model=linear_classifier, client=SHY), BLIND, images_per_client=12, num_clients=2)
    assert labels_of(seen) == sorted(i % 10 for i in range(12))


def test_number_of_images_is_the_rank(observe: Observe) -> None:
    seen = observe(Federation(client=SHY), UNKNOWN, num_classes=100, images_per_client=5)
    assert seen.assumptions.num_images is None
    assert len(labels_of(seen)) == 10


def test_a_narrow_head_cannot_tell_the_number(observe: Observe, linear_classifier: ClassifierFactory) -> None:
    seen = observe(Federation(model=linear_classifier, client=SHY), UNKNOWN, images_per_client=12)
    with pytest.raises(AttackError, match=r"Give a guess as `knowledge\.num_images`"):
        labels_of(seen)


def test_more_images_than_can_be_separated_are_refused_at_once(observe: Observe) -> None:
    """A wrong number must not search for minutes."""
    told = Knowledge(labels="inferred", label_counts="inferred", num_images=400, num_clients="inferred")
    seen = observe(Federation(client=SHY), told, images_per_client=4)
    model = seen.observation.build_model()
    update = head_parameters(seen.peers_update(), model)
    with pytest.raises(AttackError, match="400 images were counted"):
        leak(update, head_parameters(seen.observation.before, model), training_knowledge(seen, model))


def test_mean_signs_of_clients_are_compressed_and_an_update_is_not() -> None:
    torch.manual_seed(0)
    assert is_compressed(torch.randn(4, 100, 200).sign().mul(torch.tensor([1.0, 1.3, 0.8, 2]).view(4, 1, 1)).mean(0))
    assert not is_compressed(torch.randn(100, 3) @ torch.randn(3, 200))


def test_pink_noise_has_a_photographs_spectrum() -> None:
    images = pink_noise(32, (1, 64, 64))
    assert images.min() >= 0
    assert images.max() <= 1
    power = torch.fft.fft2(images).abs().square().mean((0, 1))
    ratio = power[0, 2:5].mean() / power[0, 16:29].mean()  # amplitude 1/f: power falls by (22 / 3)^2 = 54
    assert 20 < ratio < 150


def test_most_of_a_fall_over_two_steps_is_where_it_is_steep() -> None:
    """16 radiographs: the last image is half of the one before, and rounding a 300th of it."""
    images = torch.tensor([1.0, *torch.linspace(0.05, 0.0035, 14).tolist(), 0.0017])
    singular = torch.cat([images, 5.5e-6 * torch.linspace(1, 0.9, 300)])
    assert count_images(singular, held=2, epochs=1, distinct=False) == (16, True, False)


def test_a_common_drift_may_have_been_counted() -> None:
    singular = torch.tensor([1.0, 0.02, 0.018, 0.016, 0.005, 0.0004, 0.0003])
    steps = TrainingKnowledge(lr=0.1, steps=3)
    assert counts_to_try(singular, ImageCount(num_images=5, held=2), steps) == [5, 4]
    assert counts_to_try(singular, ImageCount(num_images=4, held=2), steps) == [4]  # as large as the one before
    assert counts_to_try(singular, ImageCount(num_images=5, held=4), steps) == [5]
    assert counts_to_try(singular, ImageCount(num_images=5, held=2), replace(steps, steps=1)) == [5]
    assert counts_to_try(singular, ImageCount(num_images=5, held=2), replace(steps, num_images=5)) == [5]


def test_rank_counts_images() -> None:
    torch.manual_seed(0)
    update = torch.rand(30, 5, dtype=torch.float64) @ torch.rand(5, 50, dtype=torch.float64)
    update += 1e-7 * torch.randn(30, 50, dtype=torch.float64)  # rounding of the active units' weights
    update[7:12] = 1e-17 * torch.rand(5, 50)  # units that were never active, and what a strategy adds to all parameters
    space = RowSpace.of(update, torch.rand(30, 50, dtype=torch.float64))
    assert torch.where(~space.rows.any(1))[0].tolist() == [*range(7, 12)]
    for held, epochs in ((0, 1), (3, 3)):
        assert count_images(space.singular, held, epochs) == (5, True, False)


def test_count_knows_drifting_features() -> None:
    singular = torch.tensor([90.0, 9, 8, 7, 3, 2.9, 2.8, 2.7, *[0.01 * 0.99**i for i in range(20)]])
    assert count_images(singular, held=4, epochs=2) == (4, True, False)
    assert count_images(singular, held=4, epochs=3)[0] == 8


def test_a_third_of_the_drifting_rank_is_no_count_where_the_fall_begins_later() -> None:
    """Four radiographs of a single peer over three steps, whose drift ends in the rounding at 9 by chance."""
    images = torch.tensor([1.0, 0.051, 0.038, 0.024])
    drift = torch.tensor([4.6e-4, 6.7e-5, 5e-5, 3.4e-5, 2e-5])
    singular = torch.cat([images, drift, 1e-7 * 0.99 ** torch.arange(100)])
    assert count_images(singular, held=2, epochs=3, distinct=False) == (4, True, False)


def test_rounding_that_ends_before_the_rank_is_no_image() -> None:
    singular = torch.cat([torch.linspace(3, 1, 16), torch.linspace(0.13, 0.1, 361), torch.full((21,), 0.003)])
    assert count_images(singular, held=9, epochs=1, distinct=False) == (16, True, False)
    full = torch.cat([torch.linspace(3, 1, 377), torch.full((21,), 0.003)])
    assert count_images(full, held=9, epochs=1, distinct=False) == (377, True, False)


def test_the_count_is_a_lower_bound_where_nothing_falls() -> None:
    singular = 0.9 ** torch.arange(40.0)
    assert count_images(singular, held=12, epochs=1) == (12, False, False)
    assert count_images(singular, held=40, epochs=1) == (40, False, False)


def test_count_of_drifting_images_need_not_be_the_second_steepest_fall() -> None:
    falls = torch.full((98,), 1.02)
    falls[[0, 19, 21, 59]] = torch.tensor([6.0, 1.8, 1.9, 200.0])  # 20 images, 3 steps, beside a steeper fall at 22
    singular = 1e3 / torch.cat([torch.ones(1), falls.cumprod(0)])
    assert count_images(singular, held=20, epochs=3) == (20, True, False)
    assert count_images(singular, held=20, epochs=1)[0] == 60


def test_augmented_images_are_noticed() -> None:
    falls = torch.full((98,), 1.02)
    falls[[0, 59]] = torch.tensor([6.0, 200.0])  # nothing ends at the 20 held classes, but at 3 views of each
    singular = 1e3 / torch.cat([torch.ones(1), falls.cumprod(0)])
    assert count_images(singular, held=20, epochs=3) == (60, True, True)


def test_infer_labels_counts_duplicates() -> None:
    activations = torch.full((7, 10), 1.0)
    labels = torch.tensor([0, 4, 4, 4, 9, 11, 11])
    targets = torch.nn.functional.one_hot(labels, 30).float()
    assert infer_labels((1 / 30 - targets).T @ activations, 7, hidden=10).tolist() == labels.tolist()


def test_a_class_on_the_side_of_images_is_held_whatever_the_others_do() -> None:
    rows = torch.tensor([-3.0, 0.1, 0.1, -2.0, 0.1, 4.0])  # the last by a training that went too far
    assert class_evidence(rows[:, None])[1].tolist() == [True, False, False, True, False, False]


def noise(update: Tensor, ratio: float) -> Tensor:
    """Gaussian noise of `ratio` times the norm of the update, as of differential privacy."""
    return update + torch.randn_like(update) * ratio * update.norm() / update.numel() ** 0.5


def pruned(update: Tensor, share: float) -> Tensor:
    return torch.where(update.abs() >= update.abs().flatten().quantile(1 - share), update, 0.0)


def quantised(update: Tensor, bits: int) -> Tensor:
    step = update.abs().max() / (2 ** (bits - 1) - 1)
    return (update / step).round() * step


@pytest.mark.parametrize(
    ("defence", "noisy"),
    [
        (lambda update: noise(update, 0.3), True),
        (lambda update: noise(update, 3), True),
        (lambda update: pruned(update, 0.1), False),
        (lambda update: quantised(update, 4), False),
        (torch.sign, False),
    ],
    ids=["noise 0.3", "noise 3", "top 10 %", "4 bits", "sign"],
)
def test_images_of_distinct_classes_are_counted_whatever_is_done_to_the_update(
    observe: Observe, defence: Callable[[Tensor], Tensor], noisy: bool
) -> None:
    seen = observe(Federation(client=SHY), UNKNOWN, num_classes=100, images_per_client=4)
    model = seen.observation.build_model()
    torch.manual_seed(0)
    update = {name: defence(tensor) for name, tensor in head_parameters(seen.peers_update(), model).items()}
    layers, before = augmented(update), augmented(head_parameters(seen.observation.before, model))
    space, training = RowSpace.of(layers[0], before[0]), training_knowledge(seen, model)
    count, labels = read_counts(space, [layers[-1].double()], model.head[-1].in_features, training)
    assert labels.tolist() == list(range(8))
    assert (count.held, count.num_images) == (8, 8)
    assert (count.noise is not None) == noisy


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_clipping_makes_no_images_of_empty_classes(observe: Observe, noise: float) -> None:
    """In the clipped update, rows of empty classes look like those of classes with their mean share of images."""
    seen = observe(Federation(client=SHY), UNKNOWN, num_classes=20, images_per_client=4)
    model = seen.observation.build_model()
    torch.manual_seed(0)
    layers = [0.1 * layer for layer in augmented(head_parameters(seen.peers_update(), model))]
    layers = [layer + noise * layer.std() * torch.randn_like(layer) for layer in layers]
    space = RowSpace.of(layers[0], augmented(head_parameters(seen.observation.before, model))[0])
    count, labels = read_counts(
        space, [layers[-1].double()], model.head[-1].in_features, training_knowledge(seen, model)
    )
    assert labels.tolist() == list(range(8))
    assert (count.held, count.num_images, count.noise is not None) == (8, 8, noise > 0)


def test_empty_classes_show_the_scale_by_which_classes_share_the_images() -> None:
    """Of 20 classes, 7 have 12 images, in an update that was clipped to a tenth."""
    torch.manual_seed(0)
    features, hidden = torch.rand(12, 60).double(), torch.rand(12, 40).double()
    hidden *= torch.rand(12, 40) > 0.5
    truth = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6, 6])
    probabilities = torch.linspace(0.045, 0.055, 20).double()
    errors = probabilities - torch.eye(20)[truth]
    update = 0.1 * ((errors @ torch.randn(20, 40).double()) * (hidden > 0)).T @ features / 12
    typical = TypicalHead(probabilities, hidden.sum(1).mean().item())
    space, last = RowSpace.of(update, torch.rand(40, 60).double()), 0.1 * errors.T @ hidden / 12
    count, labels = read_counts(space, [last], 40, TrainingKnowledge(1.0, 1, typical=typical))
    assert (count.num_images, labels.tolist()) == (12, truth.tolist())
    assert empty_scale(last, 40, torch.arange(20) < 7, typical) == pytest.approx(0.1, rel=1e-3)
    assert empty_scale(last[:9], 40, torch.arange(9) < 2, replace(typical, probabilities=probabilities[:9])) is None


def test_the_mean_of_images_that_are_alike_is_no_single_image() -> None:
    """Of two classes, the one with most images is evident by itself, and the largest singular value stands alone."""
    torch.manual_seed(0)
    features, hidden = 1 + 0.05 * torch.rand(16, 60).double(), torch.rand(16, 40).double()
    hidden *= torch.rand(16, 40) > 0.5
    errors = torch.full((16, 2), 0.5, dtype=torch.float64) - torch.eye(2)[[0] * 12 + [1] * 4]
    update = ((errors @ torch.randn(2, 40).double()) * (hidden > 0)).T @ features / 16
    update += 1e-4 * torch.randn(40, 60)
    training = TrainingKnowledge(
        1.0, 1, typical=TypicalHead(torch.full((2,), 0.5).double(), hidden.sum(1).mean().item())
    )
    space = RowSpace.of(update, torch.rand(40, 60).double())
    count, labels = read_counts(space, [errors.T @ hidden / 16], 40, training)
    assert (count.num_images, count.counted) == (16, True)
    assert labels.bincount().tolist() == [12, 4]


@pytest.mark.parametrize("lr", [0.003, 0.03])
def test_label_counts_are_right_where_every_class_is_held(observe: Observe, lr: float) -> None:
    """Nearly all of 10 classes have images, unequally many, so that no row of the update is that of an empty class."""
    federation = Federation(client=LocalTraining(lr=lr, local_epochs=1))
    seen = observe(federation, BLIND, num_clients=3, images_per_client=[9, 5, 1])
    assert labels_of(seen) == sorted(i % 10 for i in range(14))


def test_one_count_and_one_label_inference_serve_all_attacks(observe: Observe, attack: Callable) -> None:
    seen = observe(Federation(client=LocalTraining(lr=0.1, local_epochs=3)), UNKNOWN, num_classes=50)
    matching, closed = attack(GradientInversion(), seen, steps=1), attack(FeatureInversion(), seen, steps=1)
    assert matching.labels.tolist() == closed.labels.tolist() == [0, 1, 2, 3]


def test_apportioning_keeps_what_is_certain() -> None:
    quota, least = torch.tensor([2.6, 0.2, 1.2]), torch.tensor([0, 1, 0])
    assert apportion(quota, least, 4).tolist() == [2, 1, 1]
    assert apportion(quota, torch.tensor([1, 1, 1]), 2).tolist() == [1, 0, 1]
