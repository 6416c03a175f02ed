"""Images of rounds with different participants, where it is known who holds what."""

import torch
from torch import Tensor

from attack_modules.analytic.defended_head import Expected, ReadAgain, Rereadable
from attack_modules.analytic.peer_attribution import JoinedRounds, attribute, joined_features, joined_labels
from attack_modules.analytic.results import Diagnosis, Leakage

SURE = Diagnosis(num_images=4, disentangled=4, gap=1e3, residual=0.0, conditioning=1.0, drift=0.0, outside=0.0)


def features(count: int = 6) -> Tensor:
    """Alike, as features of photographs are: their mean is larger than what tells them apart."""
    return 2 + torch.randn(count, 200, generator=torch.Generator().manual_seed(0))


def leaked(all_features: Tensor, images: list[int], peers: list[int] | None = None, change: float = 0.0) -> Leakage:
    """A round that shows these images in this order, through a model that has changed so much."""
    generator = torch.Generator().manual_seed(sum(images))
    moved = all_features[images] + change * torch.randn(1, 200, generator=generator)
    noise = 0.1 * change * torch.randn(len(images), 200, generator=generator)
    peers = [0] * len(images) if peers is None else peers
    return Leakage(torch.tensor(images) % 3, moved + noise, torch.tensor(peers), SURE, torch.zeros(len(images)))


def originals_of(shown: list[list[int]], identities: list[Tensor]) -> list[int]:
    """Which original each recognised image is; fails where one is taken for two or two for one."""
    pairs = set(zip(torch.cat(identities).tolist(), [o for images in shown for o in images], strict=True))
    originals = dict(pairs)
    assert len(originals) == len(pairs) == len(set(originals.values()))
    return [originals[image] for image in range(len(originals))]


def test_presence_tells_peers_of_one_step() -> None:
    shown = [[0, 1, 2, 3], [5, 3, 4, 2], [4, 1, 5, 0]]  # peers hold 0 and 1, 2 and 3, 4 and 5
    rounds = [leaked(features(), images, change=0.2) for images in shown]
    found = attribute(rounds)
    order = torch.tensor(originals_of(shown, found.identities))
    assert found.presence[:, order.argsort()].long().tolist() == [
        [1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1],
        [1, 1, 0, 0, 1, 1],
    ]
    assert found.peers[order.argsort()].tolist() in ([0, 0, 1, 1, 2, 2], [0, 0, 2, 2, 1, 1])
    assert found.alike > 0.9 > 0.5 > found.different
    assert joined_labels(rounds, found).tolist() == (order % 3).tolist()
    moved = joined_features([leaked.features for leaked in rounds], found) - features()[order]
    assert moved.norm(dim=1).max() < 0.2 * features().norm(dim=1).min()


class Halved(Rereadable):
    """Takes half of what is expected for what was read."""

    def again(self, expected: Expected) -> ReadAgain:
        return ReadAgain(expected.features / 2, 3 * expected.error, expected.features / 4)


def test_rounds_under_a_defence_are_read_again_each_with_its_own_images() -> None:
    shown = [[0, 1, 2], [2, 1, 3]]
    found = attribute([leaked(features(), images) for images in shown])
    expected = Expected(torch.rand(4, 5), torch.rand(4))
    again = JoinedRounds([Halved(), Halved()], found).again(expected)
    torch.testing.assert_close(again.features, expected.features / 2)
    torch.testing.assert_close(again.uncertainty, 3 * expected.error)
    torch.testing.assert_close(again.weights, expected.features / 4)


def test_peers_that_come_and_go_together_are_one_unless_local_steps_tell() -> None:
    shown = [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert attribute([leaked(features(), images) for images in shown]).peers.unique().tolist() == [0]
    told = attribute([leaked(features(), shown[0], [5, 5, 1, 1]), leaked(features(), shown[1], [0, 0, 7, 7])])
    assert told.peers.tolist() == [0, 0, 1, 1]


def test_an_image_that_stays_away_once_belongs_to_another_peer() -> None:
    found = attribute([leaked(features(), [0, 1, 2]), leaked(features(), [0, 1])])
    assert found.peers.tolist() == [0, 0, 1]


def test_a_round_that_groups_wrongly_is_outvoted() -> None:
    rounds = [leaked(features(), [0, 1, 2, 3], peers) for peers in ([0, 0, 1, 1], [0, 1, 1, 1], [2, 2, 0, 0])]
    assert attribute(rounds).peers.tolist() == [0, 0, 1, 1]


def test_another_image_of_the_class_is_another_image() -> None:
    found = attribute([leaked(features(), [0, 1]), leaked(features(), [3, 4])])  # classes 0 and 1 in both
    assert found.presence.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert found.alike == 1
    assert found.peers.tolist() == [0, 0, 1, 1]


def test_one_round_is_as_it_leaked() -> None:
    found = attribute([leaked(features(), [0, 1, 2], [1, 0, 1])])
    assert found.peers.tolist() == [0, 1, 0]
    assert found.presence.tolist() == [[True] * 3]
