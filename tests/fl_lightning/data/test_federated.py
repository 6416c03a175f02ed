"""`FederatedData`: who holds what, its errors, and its place on Lightning's command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from fl_lightning.data import CIFAR10, IID, ByClass, Catalogue, Dirichlet, FederatedData, InOrder
from fl_lightning.federation import Federation


class Numbers(FederatedData):
    """40 images, image i filled with i, of class i % 4; the test set is the same."""

    read: list[int]

    def catalogue(self) -> Catalogue:
        self.read = []
        return Catalogue(torch.arange(40) % 4, ["east", "north", "south", "west"], self._read)

    def test_catalogue(self) -> Catalogue:
        return self.catalogue()

    def _read(self, index: int) -> torch.Tensor:
        self.read.append(index)
        return torch.full(self.image_shape, index, dtype=torch.uint8)


def held(data: FederatedData) -> list[list[int]]:
    data.setup()
    return [client.pixels[:, 0, 0, 0].tolist() for client in data.clients]


def test_only_images_that_somebody_holds_are_read() -> None:
    data = Numbers(num_clients=3, images_per_client=2)
    assert held(data) == [[0, 1], [2, 3], [4, 5]]
    assert data.read == [0, 1, 2, 3, 4, 5]
    assert data.clients[1].labels.tolist() == [2, 3]
    assert data.attacker == 2
    assert data.image_shape == (3, 128, 128)
    assert (data.num_classes, data.class_names) == (4, ["east", "north", "south", "west"])


def test_setup_twice_changes_nothing() -> None:
    data = Numbers(num_clients=2, image_size=8)
    data.setup("fit")
    clients = data.clients
    data.setup("validate")
    assert data.clients is clients


def test_all_images_are_divided_by_default() -> None:
    assert [len(share) for share in held(Numbers(num_clients=3, image_size=8))] == [14, 13, 13]


@pytest.mark.parametrize(
    ("images_per_client", "attacker_images", "sizes"),
    [
        (5, None, [5, 5, 5]),
        (5, 7, [5, 5, 7]),
        (5, 0, [5, 5, 0]),
        ([1, 2, 3], None, [1, 2, 3]),
        ([1, 2, 0], None, [1, 2, 0]),
        ([1, 2, 3], 4, [1, 2, 4]),
        (None, 0, [20, 20, 0]),
        (None, 9, [16, 15, 9]),
    ],
)
@pytest.mark.parametrize("partition", [InOrder(), IID(), Dirichlet(0.5)], ids=lambda p: type(p).__name__)
def test_sizes(
    images_per_client: int | list[int] | None, attacker_images: int | None, sizes: list[int], partition: Any
) -> None:
    data = Numbers(3, images_per_client, attacker_images, image_size=8, partition=partition)
    assert [len(share) for share in held(data)] == sizes
    assert data.clients[-1].pixels.shape[1:] == (3, 8, 8)


def test_the_seed_decides() -> None:
    first, again, other = (held(Numbers(image_size=8, partition=IID(), seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_more_classes_than_the_dataset_has() -> None:
    data = Numbers(image_size=8, num_classes=6)
    data.setup()
    assert data.num_classes == 6
    assert data.class_names[3:] == ["west", "4", "5"]


def test_imagenet_labels() -> None:
    data = Numbers()
    data.class_names = [f"n{index:08d}" for index in range(1000)]
    assert data.imagenet_labels
    data.class_names.reverse()
    assert not data.imagenet_labels
    data.class_names = ["n00000000"] * 1000
    assert not data.imagenet_labels
    data.class_names = [str(index) for index in range(1000)]
    assert not data.imagenet_labels


def test_dataloaders() -> None:
    data = Numbers(num_clients=2, images_per_client=10, image_size=8, pooled_batch_size=16)
    data.setup()
    images = torch.cat([images for images, _ in data.train_dataloader()])
    assert (images[:, 0, 0, 0] * 255).round().sort().values.tolist() == list(range(20))
    assert [len(labels) for _, labels in data.val_dataloader()] == [16, 16, 8]


def test_the_description_is_json_and_follows_every_setting() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"num_clients": 4},
        {"images_per_client": 2},
        {"images_per_client": [1, 2, 3, 4, 5]},
        {"attacker_images": 1},
        {"image_size": 16},
        {"channels": 1},
        {"partition": Dirichlet(0.1)},
        {"partition": Dirichlet(0.2)},
        {"partition": ByClass(1)},
        {"num_classes": 9},
        {"seed": 1},
    ]
    texts = [json.dumps(Numbers(**setting).describe()) for setting in settings]
    assert len(set(texts)) == len(settings)
    assert all(json.loads(text) == Numbers(**setting).describe() for text, setting in zip(texts, settings, strict=True))
    assert Numbers(pooled_batch_size=1).describe() == Numbers().describe()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_clients": 0}, "`data.num_clients` is 0, but at least one client must hold images. Set it to at least 1"),
        ({"num_clients": 1, "attacker_images": 0}, "`data.num_clients` is 1, .* Set it to at least 2"),
        ({"images_per_client": 0}, "`data.images_per_client` is 0, but every victim needs at least one image"),
        ({"images_per_client": -3}, "`data.images_per_client` is -3, but every victim"),
        ({"num_clients": 3, "images_per_client": [1, 0, 1]}, r"`data.images_per_client` is \[1, 0, 1\], but every"),
        ({"num_clients": 3, "images_per_client": [1, 1]}, "has 2 numbers for 3 clients. Give one number per client"),
        ({"num_clients": 2, "images_per_client": [1, -1]}, "The attacker cannot have -1 images"),
        ({"attacker_images": -2}, "The attacker cannot have -2 images. Set `data.attacker_images` to 0 or more"),
        ({"image_size": 7}, "`data.image_size` is 7, but images need at least 8"),
        ({"image_size": 100_000}, "`data.image_size` is 100000, but .* at most 4096 pixels"),
        ({"channels": 2}, "`data.channels` is 2, but images are read as greyscale, with 1 channel, or as RGB, with 3"),
        ({"channels": 0}, "`data.channels` is 0"),
        ({"num_classes": 0}, "`data.num_classes` is 0. Set it to at least 1"),
        ({"num_classes": 10**9}, "`data.num_classes` is 1000000000. .* at most 10000000"),
        ({"seed": -1}, "`data.seed` is -1, but seeds are whole numbers from 0"),
        ({"seed": 2**70}, "`data.seed` is 1180591620717411303424, but"),
        ({"pooled_batch_size": 0}, "`data.pooled_batch_size` is 0. Set it to at least 1"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Numbers(**settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"images_per_client": 16}, "There are 40 images, but 5 clients need 80"),
        ({"num_clients": 41}, "There are 40 images for 41 clients"),
        ({"num_clients": 10**9, "images_per_client": 4}, "There are 40 images for 1000000000 clients"),
        ({"attacker_images": 37}, "The attacker takes 37 of 40 images, which leaves too few for 4 victims"),
        ({"num_classes": 3}, "`data.num_classes` is 3, but the images have labels up to 3. Set it to at least 4"),
    ],
)
def test_what_the_dataset_cannot_give_is_refused_before_reading(settings: dict[str, Any], sentence: str) -> None:
    data = Numbers(**settings)
    with pytest.raises(ValueError, match=sentence):
        data.setup()
    assert data.read == []


def command_line(*args: str) -> FederatedData:
    """What LightningCLI makes of `data` in subclass mode."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")  # brings --print_config
    parser.add_subclass_arguments(FederatedData, "data")
    return parser.instantiate_classes(parser.parse_args(args)).data


def test_command_line(tmp_path: Path) -> None:
    data = command_line(
        "--data=CIFAR10",
        f"--data.root={tmp_path}",
        "--data.images_per_client=[1,2,0]",
        "--data.num_clients=3",
        "--data.partition=Dirichlet",
        "--data.partition.alpha=0.5",
    )
    assert isinstance(data, CIFAR10)
    assert data.image_size == 32
    assert data.describe()["root"] == str(tmp_path)
    assert data.images_per_client == [1, 2, 0]
    assert data.describe()["partition"] == {"class": "Dirichlet", "args": {"alpha": 0.5}}


def test_command_line_takes_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no file '.*mine\.csv'"):  # jsonargparse wraps our sentence
        command_line("--data=Photographs", f"--data.csv={tmp_path / 'mine.csv'}")


def test_help_explains_inherited_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line("--data.help=CIFAR10")
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "or a `.tar.gz` of these",
        "whether torchvision downloads",
        "the attacker included",
        "images are assigned",
    ):
        assert words in text


def test_printed_config_names_the_default_partition(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line("--data=Photographs", "--print_config")
    text = " ".join(capsys.readouterr().out.split())
    assert "partition: class_path: fl_lightning.data.InOrder csv: null" in text


def test_what_does_not_fit_into_memory_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"1000000000 images of 3x4096x4096 need 50331648.0 GB of memory, .* Lower `data.image_size`"
    ):
        Numbers().catalogue().read_all(torch.zeros(1, dtype=torch.long).expand(10**9), (3, 4096, 4096))


def test_images_of_one_class_leak_nothing(noise_images: type[FederatedData], monkeypatch: pytest.MonkeyPatch) -> None:
    one = Catalogue(torch.zeros(64, dtype=torch.long), ["cat"], noise_images(image_size=16).catalogue().read)
    monkeypatch.setattr(noise_images, "catalogue", lambda self: one)
    with pytest.raises(ValueError, match=r"All images are of one class, 'cat', .* set `data\.num_classes` to 2"):
        Federation().settings(noise_images(image_size=16))
    assert Federation().settings(noise_images(image_size=16, num_classes=2))["model"]["init_args"]["num_classes"] == 2
