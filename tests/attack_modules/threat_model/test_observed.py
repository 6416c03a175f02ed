"""What an attack can reach: the observed rounds, and not the peers' images."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from attack_modules import FeatureInversion
from attack_modules.evaluation.callback import Evaluation
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRounds
from fl_lightning.data import FederatedData, ImageSet
from fl_lightning.federation import Federation
from fl_lightning.observation import Observation
from fl_lightning.storage import write_json
from fl_lightning.truth import Truth

BLIND = Knowledge(labels="inferred", label_counts="inferred", num_images="inferred", num_clients="inferred")


def reachable(root: object) -> Iterator[tuple[str, object]]:
    """All objects that attributes, items, closures and partial arguments lead to, with their path."""
    found: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", root)]
    while waiting:
        path, thing = waiting.pop()
        if id(thing) in found or isinstance(thing, ModuleType | type | str | bytes | int | float | bool | None):
            continue
        found.add(id(thing))
        yield path, thing
        if isinstance(thing, Tensor):
            continue
        if isinstance(thing, dict):
            waiting += [(f"{path}[{key!r}]", value) for key, value in thing.items()]
        elif isinstance(thing, list | tuple | set | frozenset):
            waiting += [(f"{path}[{index}]", value) for index, value in enumerate(thing)]
        for name, value in getattr(thing, "__dict__", {}).items():
            waiting.append((f"{path}.{name}", value))
        for name in ("func", "args", "keywords", "__self__"):
            if (value := getattr(thing, name, None)) is not None:
                waiting.append((f"{path}.{name}", value))
        for index, cell in enumerate(getattr(thing, "__closure__", None) or ()):
            waiting.append((f"{path}.__closure__[{index}]", cell.cell_contents))


def attacked(noise_images: type, directory: Path) -> tuple[FeatureInversion, Truth]:
    data = noise_images(num_clients=3, images_per_client=2, image_size=16, num_classes=50)
    rounds = ObservedRounds(BLIND, Federation(), data, directory / "record")
    module = FeatureInversion()
    trainer = Trainer(
        max_steps=2, accelerator="cpu", default_root_dir=directory, enable_progress_bar=False, callbacks=[Evaluation()]
    )
    trainer.fit(module, datamodule=rounds)
    return module, Truth.load(rounds.record.truth(0))


def test_no_attribute_leads_to_the_peers_images(noise_images: type, tmp_path: Path) -> None:
    module, truth = attacked(noise_images, tmp_path)
    seen = dict(reachable(module))
    assert any(thing is module.trainer.datamodule.rounds[0].observation for thing in seen.values())  # it looks far
    forbidden = {path: thing for path, thing in seen.items() if isinstance(thing, Truth | FederatedData | ImageSet)}
    assert not forbidden
    for path, thing in seen.items():
        if isinstance(thing, Tensor) and thing.shape == truth.pixels.shape:
            assert not torch.allclose(thing.float(), truth.images, atol=1e-3), path
            assert not torch.equal(thing, truth.pixels), path


def test_the_walk_would_find_them(noise_images: type, tmp_path: Path) -> None:
    data = noise_images(num_clients=3, images_per_client=2, image_size=16)
    rounds = ObservedRounds(BLIND, Federation(), data, tmp_path)  # before `setup`
    assert any(isinstance(thing, ImageSet) for _, thing in reachable(rounds))


def test_what_is_observed_holds_no_labels(noise_images: type, tmp_path: Path) -> None:
    data = noise_images(num_clients=3, images_per_client=2, image_size=16)
    rounds = ObservedRounds(Knowledge(), Federation(), data, tmp_path)
    rounds.prepare_data()
    facts = json.loads((tmp_path / "observed/round_0000.json").read_text())
    assert facts.keys() == {"version", "round", "own_weight", "model", "sha256"}
    rounds.setup()
    assert rounds.rounds[0].assumptions.labels == [0, 1, 2, 3]  # told apart from what was observed


def test_records_of_version_1_load(noise_images: type, tmp_path: Path) -> None:
    data = noise_images(num_clients=3, images_per_client=2, image_size=16)
    rounds = ObservedRounds(Knowledge(), Federation(), data, tmp_path)
    rounds.prepare_data()
    path = tmp_path / "observed/round_0000.json"
    beliefs = {"beliefs": {"client_lr": 0.003, "labels": [0, 1, 2, 3]}, "sources": {"labels": "known"}}
    write_json(path, {**json.loads(path.read_text()), "version": 1, **beliefs})
    truth = tmp_path / "truth/round_0000.json"
    write_json(truth, {name: value for name, value in json.loads(truth.read_text()).items() if name != "sources"})
    rounds.setup()
    assert rounds.rounds[0].observation.round == 0
    assert Truth.load(rounds.record.truth(0)).sources == []


def test_foreign_rounds_need_guesses_and_no_data(noise_images: type, tmp_path: Path) -> None:
    data = noise_images(num_clients=3, images_per_client=2, image_size=16)
    own = ObservedRounds(Knowledge(), Federation(), data, tmp_path / "own")
    own.prepare_data()
    foreign = tmp_path / "foreign/observed"
    foreign.mkdir(parents=True)
    Observation.load(own.record.observation(0)).save(foreign / "round_0000")
    untold = dict.fromkeys(("labels", "label_counts", "num_images", "num_clients"), "inferred")
    guesses = Knowledge(**untold, client_lr=0.003, server_lr=1.0, local_epochs=3, batch_size=None)
    rounds = ObservedRounds(guesses, Federation(), data, tmp_path / "foreign")
    assert rounds.foreign
    rounds.prepare_data()
    rounds.setup()
    assert rounds.rounds[0].assumptions.momentum == 0
    assert rounds.rounds[0].assumptions.introduction().startswith("Told to the attacker: nothing; not told: labels")
    assert rounds.summary().dataset is None
    with pytest.raises(ValueError, match="no truth"):
        ObservedRounds(Knowledge(), Federation(), data, tmp_path / "foreign").setup()
