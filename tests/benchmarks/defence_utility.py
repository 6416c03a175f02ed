"""What defences cost: accuracy of a federation of LeNet5 on CIFAR-10 with each of them, as rows of a table.

    python tests/benchmarks/defence_utility.py ARCHIVE notebooks/defence_utility.csv --seeds 0 1 2

takes CIFAR-10 as JPEG files in an archive or folder, at 16x16 pixels so that a row takes a minute, and appends the rows
that the table lacks, seed by seed, so that it can be stopped and called again. `--images`, `--rounds` and `--defences`
choose less or more.
"""

import argparse
import csv
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fl_lightning.allocation import keep_freed_memory
from fl_lightning.client import LocalTraining
from fl_lightning.data import CIFAR10, IID, ImageSet
from fl_lightning.defenses import (
    DPSGD,
    QSGD,
    AdaptiveClipping,
    Augmentation,
    ClientDefense,
    Clipping,
    DPFedAvg,
    Dropout,
    FedProx,
    GaussianNoise,
    Mixup,
    Quantization,
    RandomK,
    ServerDefense,
    Sign,
    TopK,
)
from fl_lightning.federation import Federation
from fl_lightning.record import Record
from fl_lightning.storage import load_checkpoint

COLUMNS = ("defence", "seed", "rounds", "images_per_client", "accuracy", "epsilon")
SHOWN = 500
"""Test images on which the progress after each round is shown; accuracies in the table are of all 10,000."""
NORM = 0.3
"""About the norm of a client's update in the first rounds at the settings below."""


@dataclass(frozen=True)
class Setting:
    """What a row's federation has beside the settings that all share."""

    client: list[ClientDefense] = field(default_factory=list)
    server: list[ServerDefense] = field(default_factory=list)
    optimizer: str = "SGD"
    lr: float = 0.02


SETTINGS = {
    "none": Setting(),
    "noise rho 1": Setting([GaussianNoise(rho=1.0)]),
    "noise rho 3": Setting([GaussianNoise(rho=3.0)]),
    "noise rho 10": Setting([GaussianNoise(rho=10.0)]),
    "noise rho 30": Setting([GaussianNoise(rho=30.0)]),
    "top-k 10 %": Setting([TopK(keep=0.1)]),
    "top-k 1 %": Setting([TopK(keep=0.01)]),
    "int4": Setting([Quantization(bits=4)]),
    "QSGD 4": Setting([QSGD(levels=4)]),
    "sign": Setting([Sign()]),
    "clipping 0.1": Setting([Clipping(norm=0.1 * NORM)]),
    "mixup 0.4": Setting([Mixup(lam=0.4)]),
    "crop and flip": Setting([Augmentation(crop=4)]),
    "dropout 0.5": Setting([Dropout()]),
    "Adam": Setting(optimizer="Adam", lr=0.001),
    "DP-FedAvg z 0.01": Setting(server=[DPFedAvg(norm=NORM, noise_multiplier=0.01)]),
    "DP-FedAvg z 1": Setting(server=[DPFedAvg(norm=NORM, noise_multiplier=1.0)]),
    "DP-SGD z 1": Setting([DPSGD(max_grad_norm=1.0, noise_multiplier=1.0)]),
    "top-k 1 %, error feedback": Setting([TopK(keep=0.01, error_feedback=True)]),
    "random-k 10 %": Setting([RandomK(keep=0.1)]),
    "QSGD 1": Setting([QSGD(levels=1)]),
    "int8": Setting([Quantization(bits=8)]),
    "FedProx mu 1": Setting([FedProx(mu=1.0)]),
    "adaptive clipping": Setting(server=[AdaptiveClipping(initial=NORM)]),
}


def data_of(root: Path, seed: int, images: int) -> tuple[CIFAR10, ImageSet]:
    """Ten clients with so many images each, with a part of the test set; and all of it."""
    data = CIFAR10(root=root, num_clients=10, images_per_client=images, image_size=16, partition=IID(), seed=seed)
    data.setup()
    whole = data.test_set
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:SHOWN]
    data.__dict__["test_set"] = ImageSet(whole.pixels[chosen], whole.labels[chosen])  # a cached property
    return data, whole


def row_of(name: str, data: CIFAR10, test: ImageSet, seed: int, rounds: int) -> dict[str, object]:
    """Run a federation with a defence and test its last model."""
    setting = SETTINGS[name]
    training = LocalTraining(
        lr=setting.lr,
        local_epochs=1,
        batch_size=10,
        momentum=0.9 if setting.optimizer == "SGD" else 0.0,
        optimizer=setting.optimizer,
        defenses=setting.client,
    )
    federation = Federation(client=training, rounds=rounds, server_defenses=setting.server, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        federation.run(data, Path(folder))
        model = federation.initial_model(data)
        model.load_state_dict(load_checkpoint(Record(Path(folder)).checkpoint)["model"])
    with torch.no_grad():
        correct = [(model(images).argmax(1) == labels) for images, labels in test.dataloader(500)]
    guarantees = [defense.privacy(rounds, 1) for defense in [*setting.client, *setting.server]]
    epsilon = next((f"{found.epsilon:.4g} ({found.unit})" for found in guarantees if found), "")
    accuracy = torch.cat(correct).double().mean().item()
    images = len(data.clients[0])
    return dict(zip(COLUMNS, (name, seed, rounds, images, f"{accuracy:.4f}", epsilon), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--defences", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    given = parser.parse_args()
    keep_freed_memory()
    done = set()
    if given.table.exists():
        done = {(row["defence"], int(row["seed"])) for row in csv.DictReader(given.table.open())}
    for seed in given.seeds:
        missing = [name for name in given.defences if (name, seed) not in done]
        if not missing:
            continue
        data, test = data_of(given.root, seed, given.images)
        for name in missing:
            row = row_of(name, data, test, seed, given.rounds)
            print(row, flush=True)
            with given.table.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
