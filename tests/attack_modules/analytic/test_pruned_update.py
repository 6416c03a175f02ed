"""Updates of which each peer sent only the largest entries, with masks, peers and features that are known."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attack_modules.analytic.defended_head import Expected, HeadRound
from attack_modules.analytic.pruned_update import PrunedUpdate, active, masks, peers_of_masks, regrouped, solve_columns
from fl_lightning.defenses import GaussianNoise, TopK

IMAGES, HIDDEN, WIDTH = 6, 128, 400
PEERS = torch.tensor([0, 1, 0, 1, 1, 0])


def pruned(keep: float) -> tuple[HeadRound, Tensor, Tensor]:
    """One step of a random head of which both peers send a share of the entries; the features, and who sent what."""
    random = torch.Generator().manual_seed(0)
    features = torch.rand(IMAGES, WIDTH, generator=random) ** 2
    weight = torch.randn(HIDDEN, WIDTH, generator=random) / WIDTH**0.5
    hidden = (features @ weight.T).relu()
    errors = torch.randn(IMAGES, HIDDEN, generator=random)
    sent, total = [], torch.zeros(HIDDEN, WIDTH)
    for peer in (0, 1):
        own = ((hidden > 0) * errors)[peer == PEERS].T @ features[peer == PEERS]
        sent.append(own.abs() >= own.abs().flatten().quantile(1 - keep))
        total += own * sent[-1]
    return HeadRound(total, weight, hidden, errors), features, torch.stack(sent)


@pytest.mark.parametrize("keep", [0.3, 0.1])
def test_peers_masks_and_features(keep: float) -> None:
    seen, features, sent = pruned(keep)
    typical = Expected((0.5 * features.mean(0)).expand(IMAGES, -1), torch.ones(IMAGES))
    found = PrunedUpdate().solve([seen], typical)
    assert torch.equal(found.peers[:, None] == found.peers, PEERS[:, None] == PEERS)

    def error(other: Tensor) -> Tensor:
        return (other - features).norm(dim=1) / features.norm(dim=1)

    as_dense, _, _ = solve_columns(
        seen.update,
        found.gated.float(),
        torch.ones_like(sent[:1]),
        torch.zeros_like(PEERS),
        0 * features,
        torch.ones(6),
    )
    assert error(found.features.float()).mean() < 0.8 * error(as_dense).mean()
    torch.testing.assert_close(found.uncertainty.mean(), error(found.features).mean(), rtol=0.5, atol=0)
    reading = PrunedUpdate()
    again = reading.solve([seen], Expected(features, torch.full((IMAGES,), 0.01), of_images=True))
    assert error(again.features).mean() < 0.6 * error(found.features).mean()
    assert (masks(sent.any(0), again.gated.float(), features, PEERS) == sent).double().mean() > 0.98
    few = sent[PEERS].sum(1) < 2  # (N, D): entries that an image's peer sent of a feature
    assert again.weights[few].mean() < 0.5 * again.weights[~few].mean()
    assert ((again.weights >= 0) & (again.weights <= 1)).all()
    none = again.weights[sent[PEERS].sum(1) == 0]
    assert none.numel() == 0 or none.median() < 1e-5  # the masks are not quite those


def test_peers_need_no_features_of_their_own() -> None:
    seen, features, sent = pruned(0.1)
    typical = features.mean(0).expand(IMAGES, -1)
    found = peers_of_masks(sent.any(0), active(seen.activations) * seen.errors, 0.7 * features + 0.3 * typical)
    assert torch.equal(found[:, None] == found, PEERS[:, None] == PEERS)


@pytest.mark.parametrize("wrong", [[0, 1, 0, 1, 1, 2], [0, 2, 0, 1, 1, 3], [0, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0]])
def test_images_go_to_their_peer(wrong: list[int]) -> None:
    """Also from a peer that holds others, for which the features were made."""
    seen, features, _ = pruned(0.1)
    gated, update = active(seen.activations) * seen.errors, seen.update[:, ::4]
    expected, off = (0.5 * features.mean(0)).expand(IMAGES, -1)[:, ::4], torch.ones(IMAGES)
    sent = update != 0
    made, _, _ = solve_columns(update, gated, sent[None], torch.zeros_like(PEERS), expected, off)
    found = regrouped(update, gated, made, torch.tensor(wrong), expected, off)
    assert torch.equal(found[:, None] == found, PEERS[:, None] == PEERS)


def test_peers_are_kept_as_a_round_is_read_again() -> None:
    seen, features, _ = pruned(0.1)
    reading, expected = PrunedUpdate(), Expected(features, torch.full((IMAGES,), 0.01), of_images=True)
    first = reading.solve([seen], expected).peers
    assert reading.solve([seen], replace(expected, features=features.flip(0))).peers is first
    other = replace(seen, activations=seen.activations.flip(0), errors=seen.errors.flip(0))
    assert not torch.equal(reading.solve([other], replace(expected, features=features.flip(0))).peers, first)


def test_which_defences_ask_for_it() -> None:
    assert PrunedUpdate.against([GaussianNoise(rho=1.0), TopK(0.1)])
    assert PrunedUpdate.against([GaussianNoise(rho=1.0)]) is None
