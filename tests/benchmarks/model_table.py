"""What leaks of real models: the closed form and inversion of each, as rows of a table.

    PYTHONPATH=. python tests/benchmarks/model_table.py train ARCHIVE WEIGHTS --models lenet5 resnet18
    PYTHONPATH=. python tests/benchmarks/model_table.py attack FOLDER notebooks/models.csv --seeds 0 1 2
    PYTHONPATH=. python tests/benchmarks/model_table.py attack ARCHIVE notebooks/models.csv --weights WEIGHTS
    PYTHONPATH=. python tests/benchmarks/model_table.py show notebooks/models.csv

`attack` takes images as FOLDER/<class>/*.jpg for models as initialised (1000 classes for torchvision's), or, with
weights, the test images of CIFAR-10 (a `.tar.gz` of JPEG files): images of distinct classes of 64x64 pixels, one peer
of one image, or two peers of half the images each, and the attacker; one round of one or three full-batch steps, the
first but of transformers, whose last layer begins at 0: there the second.
Nothing is told but the rates, the steps and that batches are full, and, for CIFAR-10, whose ten classes do not tell it
under a head of one layer, the number of images. It appends the rows that the table lacks, so that it
can be stopped and called again. `show` prints the table of notebooks/results.md, a line for all seeds. `train` makes
WEIGHTS/<model>.pt by federated training on CIFAR-10's training images, and trains those there further (`--further`).
"""

import csv
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torchvision.models import VisionTransformer

from attack_modules import BatchStatistics, Convolutions, FeatureInversion, PatchInversion
from attack_modules.attack import Attack, Result
from attack_modules.evaluation.metrics import score
from attack_modules.evaluation.recognisers import Recogniser
from attack_modules.panels import draw_panel
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRounds
from fl_lightning.allocation import keep_freed_memory
from fl_lightning.client import LocalTraining, quiet, silent_trainer
from fl_lightning.data import CIFAR10, IID, ByClass, CIFAR10Test, FederatedData, ImageFolder, ImageSet
from fl_lightning.errors import AuditError
from fl_lightning.federation import Federation
from fl_lightning.models import (
    ClassifierFactory,
    EfficientNetLite0,
    ImageClassifier,
    ImageShape,
    LeNet5,
    TorchvisionClassifier,
    WrappedClassifier,
)
from fl_lightning.record import Record
from fl_lightning.storage import load_checkpoint
from fl_lightning.truth import Truth

SIZES = {1: [1, 2], 4: [2, 2, 2], 16: [8, 8, 4]}
"""Images of the peers together -> of each client, the attacker last."""
SHOWN = 500
"""Test images by which the accuracy of a trained model is told."""


@dataclass(frozen=True)
class Setting:
    """How a model is trained and attacked.

    Attributes:
        model: makes it.
        attack: makes its attack.
        steps: of the attack.
        lr: of the peers' SGD in the observed round.
        observed: which round that is.
        rounds: of training on CIFAR-10; 0 for a model that is not trained here.
        clients: who train.
        images: of each of them.
        training: its rate.
        optimizer: its optimiser.
    """

    model: ClassifierFactory
    attack: Callable[[], Attack]
    steps: int
    lr: float = 0.003
    observed: int = 0
    rounds: int = 0
    clients: int = 4
    images: int = 500
    training: float = 0.02
    optimizer: Literal["SGD", "Adam"] = "SGD"


def with_maps(betas: tuple[float, float] = (0.8, 0.85)) -> FeatureInversion:
    """Of the earliest maps that are shown."""
    return FeatureInversion(betas=betas, convolutions=Convolutions(), statistics=BatchStatistics())


def torchvisions(name: str) -> ClassifierFactory:
    return partial(TorchvisionClassifier, name=name)


def vit_b_16(num_classes: int, image_shape: ImageShape) -> ImageClassifier:
    """torchvision's, which itself refuses images of other than 224 pixels."""
    base = {"patch_size": 16, "num_layers": 12, "num_heads": 12, "hidden_dim": 768, "mlp_dim": 3072}
    arguments = {**base, "image_size": image_shape[1], "num_classes": num_classes}
    return WrappedClassifier(num_classes, image_shape, VisionTransformer, arguments)


SETTINGS = {
    "lenet5": Setting(LeNet5, FeatureInversion, 100, rounds=20),
    "resnet18": Setting(
        torchvisions("resnet18"), partial(with_maps, (0.9, 0.99)), 200, 0.01, rounds=10, images=300, training=0.05
    ),
    "resnet34": Setting(torchvisions("resnet34"), partial(with_maps, (0.9, 0.99)), 200, 0.01),
    "resnet50": Setting(torchvisions("resnet50"), partial(with_maps, (0.9, 0.99)), 200, 0.01),
    "alexnet": Setting(
        torchvisions("alexnet"), with_maps, 40, rounds=6, clients=2, images=1000, training=0.0002, optimizer="Adam"
    ),
    "vgg11": Setting(
        torchvisions("vgg11"), with_maps, 100, rounds=4, clients=2, images=800, training=0.0001, optimizer="Adam"
    ),
    "efficientnet_lite0": Setting(EfficientNetLite0, FeatureInversion, 60, 0.0002),
    "mobilenet_v3_small": Setting(torchvisions("mobilenet_v3_small"), with_maps, 60, 0.01),
    "convnext_tiny": Setting(torchvisions("convnext_tiny"), with_maps, 60),
    "vit_b_16": Setting(vit_b_16, PatchInversion, 4, 0.03, observed=1),
}
KEYS = ("model", "state", "told", "images", "steps", "seed")
COLUMNS = (
    *KEYS,
    "counted",
    "labels_right",
    "peers",
    "read",
    "feature_error",
    "psnr",
    "lowest",
    "mean_colour",
    "ssim",
    "top5",
    "certain",
    "likely",
    "unreliable",
    "not_read",
    "wrong",
    "cpu_seconds",
    "reasons",
)


class Ending(Callback):
    """Keeps what an attack has found, and from what, before Lightning moves it."""

    result: Result
    layer: str
    features: torch.Tensor | None = None
    model: torch.nn.Module | None = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.result, self.layer = pl_module.result(), "patches"
        if isinstance(pl_module, FeatureInversion):
            self.features, self.model = pl_module.features.clone(), pl_module.model
            self.layer = pl_module.shown.layer if pl_module.shown else "head"


def row_of(name: str, images: int, steps: int, seed: int, given: Namespace) -> dict[str, Any]:
    """Attack one federation."""
    setting, sizes = SETTINGS[name], SIZES[images]
    weights = given.weights and given.weights / f"{name}.pt"
    common = {"root": given.root, "num_clients": len(sizes), "image_size": 64, "seed": seed}
    data: FederatedData
    if weights:
        data = CIFAR10Test(**common, images_per_client=sizes, partition=ByClass(max(sizes[:-1])))
    else:
        data = ImageFolder(**common, images_per_client=sizes, partition=IID())
    federation = Federation(
        model=setting.model,
        client=LocalTraining(lr=given.lr or setting.lr, local_epochs=steps),
        rounds=setting.observed + 1,
        observed_rounds=[setting.observed],
        seed=seed,
        initial_weights=weights,
    )
    with tempfile.TemporaryDirectory() as folder:
        told = ["known" if given.told != "nothing" else "inferred", "known" if given.told == "labels" else "inferred"]
        knowledge = Knowledge(told[1], told[1], told[0], "inferred")
        rounds = ObservedRounds(knowledge, federation, data, Path(folder))
        rounds.prepare_data()
        rounds.setup()
        truth = Truth.load(rounds.record.truth(setting.observed))
    row: dict[str, Any] = {}
    began = time.process_time()
    try:
        with quiet():
            trainer = silent_trainer(max_steps=setting.steps, accelerator="cpu")
            trainer.callbacks.append(ending := Ending())
            trainer.fit(setting.attack(), datamodule=rounds)
    except AuditError as error:
        return row | {"reasons": f"refused: {error}"}
    row["cpu_seconds"] = f"{time.process_time() - began:.0f}"
    return row | scores(ending, truth, images, weights is None and len(truth.class_names) == 1000, given, name)


def state_of(name: str, given: Namespace) -> str:
    """Of the weights of a row."""
    return "trained" if given.weights else "pretrained" if name == "efficientnet_lite0" else "initialised"


@torch.no_grad()
def scores(ending: Ending, truth: Truth, images: int, imagenet: bool, given: Namespace, name: str) -> dict[str, Any]:
    """What an attack found, against the truth."""
    found, verdict = ending.result, ending.result.verdict
    card = score(found.images, truth.images, found.labels, truth.labels, Recogniser() if imagenet else None)
    pairs = card.assignment[card.assignment >= 0]
    values, error = card.per_image["psnr"][card.assignment >= 0], ""
    if ending.model and found.labels.sort().values.equal(
        truth.labels.sort().values
    ):  # distinct: they tell what is whose
        features = ending.model.embed(truth.images[truth.labels.argsort()[found.labels.argsort().argsort()]])
        off = (features - ending.features).norm(dim=1) / features.norm(dim=1)
        error = f"{off.median().item():.2g}"
    if given.pictures:
        panel = draw_panel({"original": truth.images[card.assignment >= 0], "found": found.images[pairs]})
        panel.save(given.pictures / f"{name}_{state_of(name, given)}_{images}.png")
    levels = [verdict.levels[index].value for index in pairs.tolist()]
    trusted = [value for level, value in zip(levels, values.tolist(), strict=True) if level in ("certain", "likely")]
    flat = truth.images.mean((2, 3), keepdim=True).expand_as(truth.images)
    return {
        "counted": len(found.images) + verdict.missing,
        "labels_right": round(card.labels_found * images),
        "peers": 1 if found.peers is None else len(found.peers.unique()),
        "read": ending.layer,
        "feature_error": error,
        "psnr": f"{values.mean().item():.1f}",
        "lowest": f"{values.min().item():.1f}",
        "mean_colour": f"{-10 * (flat - truth.images).square().mean((1, 2, 3)).log10().mean().item():.1f}",
        "ssim": f"{card.per_image['ssim'][card.assignment >= 0].mean().item():.2f}",
        "top5": int(card.per_image["recognised_top5"].sum()) if imagenet else "",
        **{level: levels.count(level.replace("_", " ")) for level in ("certain", "likely", "unreliable", "not_read")},
        "wrong": sum(value < given.noise for value in trusted),
        "reasons": "; ".join(verdict.reasons),
    }


def attack(given: Namespace) -> None:
    """Append the rows that the table lacks."""
    done = set()
    if given.table.exists():
        done = {tuple(row[key] for key in KEYS) for row in csv.DictReader(given.table.open())}
    for seed, images, steps, name in product(given.seeds, given.images, given.steps, given.models):
        keys = dict(zip(KEYS, (name, state_of(name, given), given.told, images, steps, seed), strict=True))
        if tuple(map(str, keys.values())) in done:
            continue
        row = keys | row_of(name, images, steps, seed, given)
        print(row, flush=True)
        with given.table.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


def show(given: Namespace) -> None:
    """Print a line for all seeds of a setting, their values between slashes."""
    titles = ["model, state", "images", "steps", "seeds", "counts, labels right", "inverted", "error, %", "PSNR"]
    titles += ["lowest", "mean colour", "SSIM", "top 5", "certain, likely, unreliable, not read", "CPU s"]
    print("|", " | ".join(titles), "|")
    print("|---" * len(titles) + "|")
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in csv.DictReader(given.table.open()):
        groups.setdefault(tuple(row[key] for key in KEYS[:-1]), []).append(row)
    order = list(SETTINGS)
    for (name, state, told, images, steps), rows in sorted(
        groups.items(), key=lambda group: (order.index(group[0][0]), group[0][1], int(group[0][3]), group[0][4])
    ):
        rows.sort(key=lambda row: int(row["seed"]))

        def each(column: str, rows: list[dict[str, str]] = rows) -> str:
            values = [row[column].removeprefix("features.") or "n/a" for row in rows]
            return values[0] if len(set(values)) == 1 else " / ".join(values)

        levels = [sum(int(row[of] or 0) for row in rows) for of in ("certain", "likely", "unreliable", "not_read")]
        errors = [f"{100 * float(row['feature_error']):.2g}" if row["feature_error"] else "n/a" for row in rows]
        right = all(row["counted"] == row["labels_right"] == images for row in rows)
        told = "" if told == "nothing" else f", {told} told"
        seeds = ", ".join(row["seed"] for row in rows)
        cells = [f"{name}, {state}{told}", images, steps, seeds, "yes" if right else "no", each("read")]
        cells += [" / ".join(errors), *map(each, ("psnr", "lowest", "mean_colour", "ssim", "top5"))]
        print("|", " | ".join([*cells, ", ".join(map(str, levels)), each("cpu_seconds")]), "|")


def train(given: Namespace) -> None:
    """Write the weights that are lacking, or train those that exist further."""
    for name in given.models:
        setting, path = SETTINGS[name], given.weights / f"{name}.pt"
        if not setting.rounds or path.exists() != given.further:
            continue
        began = time.process_time()
        data = CIFAR10(
            root=given.root,
            num_clients=setting.clients,
            images_per_client=setting.images,
            image_size=64,
            partition=IID(),
            seed=0,
        )
        data.setup()
        chosen = torch.randperm(len(data.test_set), generator=torch.Generator().manual_seed(0))[:SHOWN]
        test = ImageSet(data.test_set.pixels[chosen], data.test_set.labels[chosen])
        data.__dict__["test_set"] = test  # a cached property
        momentum = 0.9 if setting.optimizer == "SGD" else 0.0
        client = LocalTraining(
            lr=setting.training, local_epochs=1, batch_size=32, momentum=momentum, optimizer=setting.optimizer
        )
        federation = Federation(
            model=setting.model,
            client=client,
            rounds=setting.rounds,
            seed=int(given.further),  # batches in another order
            initial_weights=path if given.further else None,
        )
        with tempfile.TemporaryDirectory() as folder:
            federation.run(data, Path(folder))
            state = load_checkpoint(Record(Path(folder)).checkpoint)["model"]
        model = federation.initial_model(data).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            right = torch.cat([model(images).argmax(1) == labels for images, labels in test.dataloader(250)])
        torch.save(state, path)
        print(
            f"{name}: accuracy {right.double().mean():.3f}, {time.process_time() - began:.0f} CPU seconds", flush=True
        )


if __name__ == "__main__":
    keep_freed_memory()
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(required=True)
    training, attacking = kinds.add_parser("train"), kinds.add_parser("attack")
    training.add_argument("root", type=Path, help="CIFAR-10")
    training.add_argument("weights", type=Path, help="a folder that exists")
    training.add_argument("--further", action="store_true", help="as many rounds more, from the weights that exist")
    training.set_defaults(run=train)
    attacking.add_argument("root", type=Path, help="the images")
    attacking.add_argument("table", type=Path, help="a .csv file, to which the rows are appended that it lacks")
    attacking.add_argument("--weights", type=Path, help="a folder that `train` filled")
    attacking.add_argument("--seeds", type=int, nargs="+", default=[0])
    attacking.add_argument("--images", type=int, nargs="+", choices=SIZES, default=[1, 4, 16])
    attacking.add_argument("--steps", type=int, nargs="+", default=[1, 3], help="local steps of the peers")
    attacking.add_argument("--told", choices=["nothing", "number", "labels"], default="nothing")
    attacking.add_argument("--lr", type=float, help="of the peers, instead of the model's own")
    attacking.add_argument("--noise", type=float, default=18.0, help="PSNR in dB below which a trusted image is wrong")
    attacking.add_argument("--pictures", type=Path, help="a folder that exists, for a panel of each row")
    attacking.set_defaults(run=attack)
    showing = kinds.add_parser("show", help="the table as Markdown")
    showing.add_argument("table", type=Path, help="a .csv file that `attack` filled")
    showing.set_defaults(run=show)
    for one in (training, attacking):
        one.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    given = parser.parse_args()
    given.run(given)
