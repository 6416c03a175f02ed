"""What defences cost: accuracy of a federation of LeNet5 on CIFAR-10 with each of them, as rows of a table.

    python tests/benchmarks/defence_utility.py ARCHIVE notebooks/defence_utility.csv --seeds 0 1 2

takes CIFAR-10 as JPEG files in an archive or folder, at 16x16 pixels so that a row takes minutes: 10 clients, one local
epoch in batches of 32 at rate 0.02 with momentum 0.9 (Adam: rate 0.001).
"""

import tempfile
from functools import lru_cache, partial
from pathlib import Path

import torch
from defence_settings import settings
from defence_table import arguments, fill

from fl_lightning.allocation import keep_freed_memory
from fl_lightning.client import LocalTraining
from fl_lightning.data import CIFAR10, IID, ImageSet
from fl_lightning.federation import Federation
from fl_lightning.record import Record
from fl_lightning.storage import load_checkpoint

SHOWN = 500
"""Test images on which the progress after each round is shown; accuracies in the table are of all 10,000."""
SETTINGS = settings(norm=0.3)


@lru_cache(maxsize=1)
def data_of(root: Path, seed: int, images: int) -> tuple[CIFAR10, ImageSet]:
    """Ten clients with so many images each, with a part of the test set; and all of it."""
    data = CIFAR10(root=root, num_clients=10, images_per_client=images, image_size=16, partition=IID(), seed=seed)
    data.setup()
    whole = data.test_set
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:SHOWN]
    data.__dict__["test_set"] = ImageSet(whole.pixels[chosen], whole.labels[chosen])  # a cached property
    return data, whole


def row_of(name: str, seed: int, root: Path, images: int, rounds: int, accelerator: str) -> dict[str, object]:
    """Run a federation with a defence and test its last model."""
    (data, test), setting = data_of(root, seed, images), SETTINGS[name]
    adam = setting.optimizer == "Adam"
    training = LocalTraining(
        lr=0.001 if adam else 0.02,
        local_epochs=1,
        batch_size=32,
        momentum=0.0 if adam else 0.9,
        optimizer=setting.optimizer,
        label_smoothing=setting.label_smoothing,
        defenses=setting.client,
    )
    federation = Federation(
        client=training, rounds=rounds, server_defenses=setting.server, seed=seed, accelerator=accelerator
    )
    with tempfile.TemporaryDirectory() as folder:
        federation.run(data, Path(folder))
        model = federation.initial_model(data)
        model.load_state_dict(load_checkpoint(Record(Path(folder)).checkpoint)["model"])
    with torch.no_grad():
        correct = torch.cat([model(images).argmax(1) == labels for images, labels in test.dataloader(500)])
    guarantees = [defense.privacy(rounds, 1) for defense in [*setting.client, *setting.server]]
    epsilon = next((f"{found.epsilon:.4g} ({found.unit})" for found in guarantees if found), "")
    accuracy = f"{correct.double().mean().item():.4f}"
    return {"rounds": rounds, "images_per_client": images, "accuracy": accuracy, "epsilon": epsilon}


if __name__ == "__main__":
    keep_freed_memory()
    parser = arguments(__doc__.splitlines()[0], SETTINGS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--accelerator", default="cpu", help="what clients train on: cpu, gpu, auto")
    given = parser.parse_args()
    columns = ("defence", "seed", "rounds", "images_per_client", "accuracy", "epsilon")
    told = {name: getattr(given, name) for name in ("root", "images", "rounds", "accelerator")}
    fill(given, columns, partial(row_of, **told))
