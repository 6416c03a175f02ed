"""Signs of several peers, added up, with sizes, gates and features that are known."""

import pytest
import torch
from torch import Tensor, nn

from attack_modules.analytic.defended_head import Expected, HeadRound, LastLayer, UnreadableDefense
from attack_modules.analytic.signed_update import (
    OF_TYPICAL,
    SLOWNESS,
    USUAL,
    SignedUpdate,
    signs_of_peers,
    sizes_of_levels,
)
from fl_lightning.defenses import Sign, TopK

IMAGES, HIDDEN, WIDTH, CLASSES = 6, 128, 400, 60
PEERS = torch.tensor([0, 1, 2, 0, 1, 2])


def signed(scale: float | None = None) -> tuple[HeadRound, Tensor, Tensor]:
    """One step of a random head of which three peers send signs; the features, and the peers' signs."""
    random = torch.Generator().manual_seed(0)
    features = torch.rand(IMAGES, WIDTH, generator=random) ** 2 * (0.5 + torch.rand(WIDTH, generator=random))
    weight = torch.randn(HIDDEN, WIDTH, generator=random) / WIDTH**0.5
    last = 0.5 * torch.randn(CLASSES, HIDDEN, generator=random) / HIDDEN**0.5
    hidden = (features @ weight.T).relu()
    wrong = (hidden @ last.T).softmax(1) - nn.functional.one_hot(torch.arange(IMAGES), CLASSES)
    gated, first, second, signs = (hidden > 0) * (wrong @ last), weight.clone(), torch.zeros_like(last), []
    for peer in (0, 1, 2):
        own = gated[peer == PEERS].T @ features[peer == PEERS]
        signs.append(own.sign())
        first -= 1e-2 * Sign(scale).on_update({"w": own}, None)["w"]  # rounded, as models are
        second += 1e-2 * Sign(scale).on_update({"w": wrong[peer == PEERS].T @ hidden[peer == PEERS]}, None)["w"]
    targets = nn.functional.one_hot(torch.arange(IMAGES), CLASSES).double()
    uniform = torch.full((CLASSES,), 1 / CLASSES).double()
    shown = LastLayer(100 * second.double(), last.double(), torch.arange(IMAGES), targets, uniform, 100.0)
    nothing = torch.zeros(IMAGES, HIDDEN)
    return HeadRound(100 * (weight - first), weight, nothing, nothing, shown), features, torch.stack(signs)


def test_sizes_signs_peers_and_features() -> None:
    seen, features, signs = signed()
    sizes = sizes_of_levels(seen.update, seen.weight, seen.last.scale)
    assert len(sizes) == 3
    found = signs_of_peers(seen.update, sizes)
    order = [int((found == own).double().mean((1, 2)).argmax()) for own in signs]
    assert sorted(order) == [0, 1, 2]
    assert (found[order] == signs).double().mean() > 0.995
    reading = SignedUpdate()
    first = reading.solve([seen], Expected((0.5 * features.mean(0)).expand(IMAGES, -1), torch.ones(IMAGES)))
    assert torch.equal(first.peers[:, None] == first.peers, PEERS[:, None] == PEERS)

    def error(other: Tensor) -> float:
        return ((other - features).norm(dim=1) / features.norm(dim=1)).mean().item()

    assert 0 < first.residual < 0.5
    larger = reading.solve([seen], Expected((5.0 * features.mean(0)).expand(IMAGES, -1), torch.ones(IMAGES)))
    torch.testing.assert_close(larger.features, first.features)  # of which the mean size of the entries tells
    assert error(first.features) < 0.8 * error(features.mean(0).expand(IMAGES, -1))
    again = reading.solve([seen], Expected(features, torch.full((IMAGES,), 1.0), of_images=True))
    off = again.uncertainty
    for _ in range(48):
        off = reading.solve([seen], Expected(features, off, of_images=True)).uncertainty
    of_sizes = (again.uncertainty.square() - off.square() + (OF_TYPICAL * 50**-SLOWNESS) ** 2).sqrt()
    torch.testing.assert_close(of_sizes, torch.full_like(of_sizes, OF_TYPICAL * 2**-SLOWNESS), rtol=1e-5, atol=0)
    assert error(again.features) < 0.7 * error(first.features)
    of_directions = (again.uncertainty.square() - (OF_TYPICAL * 2**-SLOWNESS) ** 2).sqrt().mean().item()
    assert 0.4 < of_directions / error(again.features) < 1.6  # two images of a peer are not Gaussian
    columns = torch.stack([again.features[peer == PEERS].square().mean(0) for peer in (0, 1, 2)])[PEERS]
    order = columns.flatten().argsort()  # known up to the same relative error
    assert (again.weights.flatten()[order].diff() <= 0).all()
    assert again.weights.min() >= 0
    assert again.weights.max() <= 1
    assert again.weights[columns < USUAL * again.features.square().mean()].min() > 0.5


def test_signs_of_one_size_hide_the_peers() -> None:
    seen, *_ = signed(scale=0.01)
    with pytest.raises(UnreadableDefense, match="different ones"):
        sizes_of_levels(seen.update, seen.weight, seen.last.scale)


def test_which_defences_ask_for_it() -> None:
    assert SignedUpdate.against([TopK(0.1), Sign()])
    assert SignedUpdate.against([TopK(0.1), Sign(scale=0.01)]) is None
    assert SignedUpdate.against([TopK(0.1)]) is None
