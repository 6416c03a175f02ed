"""One step of Adam of several peers, added up, with gates, peers and features that are known."""

import pytest
import torch
from torch import Tensor, nn

from attack_modules.analytic.adam_step import AdamStep, Votes, gates_of_votes, number_of_peers, refuse_coarse
from attack_modules.analytic.defended_head import Expected, HeadRound, LastLayer, UnreadableDefense
from fl_lightning.defenses import TopK

IMAGES, HIDDEN, WIDTH, CLASSES, RATE = 6, 256, 40, 100, 3e-4


def stepped(peers: Tensor) -> tuple[HeadRound, Tensor, Tensor]:
    """A random head whose peers each took PyTorch's step of Adam; the features, and (N, H) which units are active."""
    random = torch.Generator().manual_seed(0)
    features = torch.rand(IMAGES, WIDTH, generator=random) ** 2 / 15
    weight = torch.randn(HIDDEN, WIDTH, generator=random) / WIDTH**0.5 / 10  # small, so that float32 resolves a step
    last = torch.randn(CLASSES, HIDDEN, generator=random) / HIDDEN**0.5 / 4
    images, means = torch.arange(IMAGES), []
    for peer in peers.unique():
        head = [nn.Parameter(weight.clone()), nn.Parameter(last.clone())]
        own = images[peers == peer]
        optimizer = torch.optim.Adam(head, RATE)
        nn.functional.cross_entropy((features[own] @ head[0].T).relu() @ head[1].T, own).backward()
        optimizer.step()
        means.append([before - after.detach() for before, after in zip((weight, last), head, strict=True)])
    first, second = (IMAGES / RATE * torch.stack(layer).mean(0) for layer in zip(*means, strict=True))
    hidden = (features @ weight.T).relu()
    shown = LastLayer(
        second.double(),
        last.double(),
        images,
        nn.functional.one_hot(images, CLASSES).double(),
        (hidden @ last.T).softmax(1).mean(0).double(),
        IMAGES / RATE,
    )
    nothing = torch.zeros(IMAGES, HIDDEN)
    return HeadRound(first, weight, nothing, nothing, shown), features, hidden > 0


@pytest.mark.parametrize("number", [1, 3])
def test_gates_peers_and_features(number: int) -> None:
    peers = torch.arange(IMAGES) * number // IMAGES  # not the sorting that the search begins with
    seen, features, active = stepped(peers)
    assert number_of_peers(seen.update / IMAGES) == number
    gates, found = gates_of_votes(seen.last.gradient * number / IMAGES, seen.last.labels, number)
    assert (gates == active).double().mean() > 0.99
    assert torch.equal(found[:, None] == found, peers[:, None] == peers)
    typical = features.mean(0) / 2
    read = AdamStep().solve([seen], Expected(typical.expand(IMAGES, -1), torch.ones(IMAGES)))
    error = (read.features - features).norm(dim=1) / features.norm(dim=1)
    assert error.mean() < 0.2  # mostly of a few columns; typical features are 0.7 off
    assert read.residual < 0.2
    assert read.uncertainty.mean() > error.mean() / 3


def test_peers_of_other_sizes_are_refused() -> None:
    seen, *_ = stepped(torch.tensor([0, 0, 1, 1, 2, 2]))
    with pytest.raises(UnreadableDefense, match="weigh the same"):
        number_of_peers(0.7 * seen.update / IMAGES)
    with pytest.raises(UnreadableDefense, match="no multiple"):
        gates_of_votes(seen.last.gradient * 4 / IMAGES, seen.last.labels, 4)
    shuffled = seen.last.gradient[:, torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(0))]
    mixed = torch.cat([seen.last.gradient[:IMAGES], shuffled[IMAGES:]])  # votes of other units
    with pytest.raises(UnreadableDefense, match="no sorting"):
        gates_of_votes(mixed * 3 / IMAGES, seen.last.labels, 3)


def test_defences_beside_it_are_not_read() -> None:
    assert AdamStep.against([TopK(0.1)]) is None
    assert AdamStep.against([]) is not None


def test_steps_of_which_rounding_leaves_signs_alone_are_refused() -> None:
    seen, *_ = stepped(torch.arange(IMAGES) % 3)
    sums, fine = seen.update * 3 / IMAGES, torch.full_like(seen.update, 1e-7)
    errors = seen.last.weight[:IMAGES, :HIDDEN]
    refuse_coarse(Votes(sums, fine, errors, torch.arange(IMAGES) % 3))
    with pytest.raises(UnreadableDefense, match="rate is too small"):
        refuse_coarse(Votes(sums, 1e5 * fine, errors, torch.arange(IMAGES) % 3))
