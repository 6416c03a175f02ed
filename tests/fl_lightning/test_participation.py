"""Who takes part in which round, as in the records that exist, whose fingerprints and rounds must stay as they are."""

import pytest

from fl_lightning.data import FederatedData
from fl_lightning.errors import SettingError
from fl_lightning.federation import Federation, Kept
from fl_lightning.participation import Participation
from fl_lightning.record import fingerprint
from fl_lightning.seats import ColludingClients, CuriousServer, Seat
from fl_lightning.server_optimizers import FedAvg, FedAvgM

SAMPLED = [[0, 1, 3], [0, 3, 4], [1, 2, 4], [2, 3, 4], [0, 2, 4], [0, 1, 3], [0, 3, 4], [1, 3, 5]]
"""Of six clients, of which the last has no images but looks."""
AMONG_FIVE = [[2, 3, 4], [0, 1, 4], [1, 2, 4], [0, 1, 2], [0, 3, 4], [0, 3, 4], [1, 2, 4], [0, 1, 4]]
"""Where nobody without images looks."""


def participation(**changes: object) -> Participation:
    settings = {"sizes": [2, 2, 2, 2, 2, 0], "seat": ColludingClients(1), "rounds": 8, "clients_per_round": 3,
                "broadcast": "participants", "observed_rounds": None, "server": FedAvg(), "seed": 5}  # fmt: skip
    return Participation(**{**settings, **changes})


@pytest.mark.parametrize(
    ("seat", "sampled", "received", "views"),
    [
        (ColludingClients(1), SAMPLED, [7], [(7, None)]),
        (ColludingClients(2), SAMPLED, [1, 2, 3, 4, 6, 7], [(7, None)]),
        (CuriousServer(), AMONG_FIVE, [*range(8)], [(7, 0), (7, 1), (7, 4)]),
        (CuriousServer(secure_aggregation=True), AMONG_FIVE, [*range(8)], [(7, None)]),
    ],
    ids=str,
)
def test_the_same_clients_are_sampled_as_ever(
    seat: Seat, sampled: list[list[int]], received: list[int], views: list[tuple]
) -> None:
    takes_part = participation(seat=seat)
    assert [takes_part.sampled(round_) for round_ in range(8)] == sampled
    assert [takes_part.training(round_) for round_ in range(8)] == [[c for c in of if c < 5] for of in sampled]
    assert [round_ for round_ in range(8) if takes_part.is_received(round_)] == received
    assert takes_part.observed() == [7]
    assert takes_part.views(takes_part.observed()) == views


def test_rounds_before_the_observed_ones_are_recorded_where_the_server_has_a_memory() -> None:
    for broadcast, recorded in (("participants", [7]), ("all", [6, 7])):
        takes_part = participation(server=FedAvgM(), broadcast=broadcast)
        assert takes_part.recorded() == recorded
    assert list(takes_part.receivers(0)) == [*range(6)]
    assert takes_part.peers(7) == [1, 3]
    with pytest.raises(SettingError, match="only 6 clients can take part"):
        participation(clients_per_round=7).sampled(0)


def test_settings_make_the_fingerprint_that_records_have(noise_images: type[FederatedData]) -> None:
    data = noise_images(num_clients=6, images_per_client=2, attacker_images=0, image_size=16)
    data.setup()
    settings = Federation(rounds=8, clients_per_round=3, seed=5).settings(data)
    settings["data"]["content"] = "the images, whose noise may differ with the version of PyTorch"
    assert fingerprint(settings) == "15e4ff7ac68c"


def test_checkpoints_of_earlier_versions_are_read() -> None:
    checkpoint = {"rounds_done": 1, "model": {}, "kept_buffers": {"0": {}}}
    assert Kept.of(checkpoint) == Kept({"0": {}}, {}, {})
    assert vars(Kept()).keys() == {"kept_buffers", "server_memory", "kept_memory"}  # as they are saved
