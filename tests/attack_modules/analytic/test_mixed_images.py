"""Mixed images under a head whose mixtures, gates and features are known."""

import pytest
import torch
from torch import Tensor, nn

from attack_modules.analytic.defended_head import UnreadableDefense
from attack_modules.analytic.leak_defended import leak_defended
from attack_modules.analytic.mixed_images import MixedImages, pairs
from attack_modules.analytic.results import TrainingKnowledge
from fl_lightning.defenses import Mixup, TopK
from fl_lightning.loss import CrossEntropy

HIDDEN, WIDTH, CLASSES, LR = 128, 300, 60, 0.01
LABELS = torch.tensor([2, 3, 5, 7, 11, 13, 17])
PARTNERS = torch.tensor([1, 0, 3, 4, 2, 5, 6])  # a pair that is mixed both ways, three in a ring, two with none


def mixture(shares: Tensor) -> Tensor:
    mixing = shares.diag()
    mixing[torch.arange(len(shares)), PARTNERS] += 1 - shares
    return mixing


def trained(mixing: Tensor, smoothing: float = 0.0) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Update and weights of a step on random mixed images, and the features of the mixtures."""
    random = torch.Generator().manual_seed(0)
    features = mixing @ torch.rand(len(mixing), WIDTH, generator=random) ** 2  # stand for those of mixed images
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    for tensor in model.parameters():
        tensor.data = torch.randn(tensor.shape, generator=random) / tensor.shape[-1] ** 0.5
    targets = mixing @ CrossEntropy(smoothing).targets(LABELS, CLASSES, mixing)
    nn.functional.cross_entropy(model(features), targets).backward()
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return {name: LR * tensor.grad for name, tensor in model.named_parameters()}, weights, features


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pairs_shares_and_features(smoothing: float) -> None:
    shares = torch.tensor([0.6, 0.6, 0.75, 0.75, 0.75, 1.0, 1.0])  # of each peer its own
    update, weights, features = trained(mixture(shares), smoothing)
    training = TrainingKnowledge(LR, 1, len(LABELS), LABELS, loss=CrossEntropy(smoothing))
    found = leak_defended([update], [weights], training, MixedImages())
    torch.testing.assert_close(found.mixing, mixture(shares), rtol=0, atol=2e-3)
    assert torch.equal(found.mixing > 0, mixture(shares) > 0)
    assert ((found.features - features).norm(dim=1) / features.norm(dim=1)).max() < 1e-3
    torch.testing.assert_close(found.ones, torch.ones(len(LABELS)), rtol=0, atol=1e-3)
    assert not found.noisy


def test_smaller_share_first_is_the_larger_one_of_the_other() -> None:
    """0.4 of the first and 0.6 of the second are the mixtures of which the second is the first."""
    update, weights, _ = trained(mixture(torch.tensor([0.4, 0.4, 0.4, 0.4, 0.4, 1.0, 1.0])))
    found = leak_defended([update], [weights], TrainingKnowledge(LR, 1, 7, LABELS), MixedImages())
    assert found.mixing.diagonal()[:5].sub(0.6).abs().max() < 2e-3
    assert found.mixing[2, 4] > 0.39  # the ring runs the other way


def test_what_cannot_be_read_is_refused() -> None:
    random = torch.Generator().manual_seed(0)
    directions, errors = torch.linalg.qr(torch.randn(HIDDEN, 5, generator=random)).Q, torch.randn(5, 5, HIDDEN)
    assert pairs(directions, errors)[2].min() > 0.3
    update, weights, _ = trained(mixture(torch.tensor([0.501, 0.501, 0.7, 0.7, 0.7, 1.0, 1.0])))
    with pytest.raises(UnreadableDefense, match="half and half"):
        leak_defended([update], [weights], TrainingKnowledge(LR, 1, 7, LABELS), MixedImages())
    with pytest.raises(UnreadableDefense, match="single local step"):
        leak_defended([update], [weights], TrainingKnowledge(LR, 3, 7, LABELS), MixedImages())
    with pytest.raises(UnreadableDefense, match="does not show"):
        leak_defended([update], [weights], TrainingKnowledge(LR, 1, 6, LABELS[1:]), MixedImages())


def test_which_defences_ask_for_it() -> None:
    assert MixedImages.against([TopK(0.1), Mixup(alpha=1.0)])
    assert MixedImages.against([TopK(0.1)]) is None
