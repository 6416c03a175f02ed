"""Writes `configs/README.md`, a page of all settings, from the command line's own parser: `make settings`."""

import inspect
import re
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from jsonargparse import SUPPRESS, ArgumentParser

import attack_modules
import fl_lightning.data
import fl_lightning.defenses
import fl_lightning.engines
import fl_lightning.models
import fl_lightning.seats
import fl_lightning.server_optimizers
from attack_modules.audit.study import Defence, Scenario
from attack_modules.diffusion.trained.class_conditional import ClassConditionalDiffusion, SmallConditional
from attack_modules.diffusion.trained.photo_crops import PhotoCrops
from attack_modules.diffusion.trained.photo_prior import DiffusionPrior
from attack_modules.evaluation.cifar10_classifier import Cifar10Classifier
from attack_modules.threat_model.knowledge import Knowledge
from fl_lightning.data import FederatedData
from fl_lightning.federation import Federation

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "configs/README.md"

INTRODUCTION = """# Settings

*Generated from the command line's parser by `make settings`; a test holds it current. Change the docstrings instead.*

A run is a YAML file, or several: `python cli.py fit --config A.yaml --config B.yaml --section.setting value`, where
later ones win. `--print_config` shows the result, and every run saves it as `config.yaml`. A class is named by
`class_path` with its settings under `init_args`; classes of this project go by their short names. On the command line,
`--model.lr 0.1` changes a setting of the class that was named before.

## Configurations

| file | what it is |
|---|---|
"""


def places(defense: type) -> list[str]:
    """The settings that list a defence."""
    kinds = {
        "federation.client.defenses": fl_lightning.defenses.ClientDefense,
        "federation.server_defenses": fl_lightning.defenses.ServerDefense,
    }
    return [path for path, kind in kinds.items() if issubclass(defense, kind)]


DEFENSES = [
    defense
    for name in fl_lightning.defenses.__all__
    if is_dataclass(defense := getattr(fl_lightning.defenses, name)) and places(defense)
]


SECTIONS = {
    "`federation`: the federation that is simulated": [
        ("federation", Federation),
        ("federation.seat", fl_lightning.seats.CuriousClient),
        ("federation.seat", fl_lightning.seats.ColludingClients),
        ("federation.seat", fl_lightning.seats.CuriousServer),
        ("federation.server", fl_lightning.server_optimizers.FedAvg),
        ("federation.server", fl_lightning.server_optimizers.FedAvgM),
        ("federation.server", fl_lightning.server_optimizers.FedAdam),
        ("federation.server", fl_lightning.server_optimizers.FlowerFedAdam),
        ("federation.server", fl_lightning.server_optimizers.FedYogi),
    ],
    "`knowledge`: what the attacker is told": [("knowledge", Knowledge)],
    "`data`: the clients' images": [
        ("data", FederatedData),
        ("data", fl_lightning.data.ImageFolder),
        ("data", fl_lightning.data.CIFAR10),
        ("data", fl_lightning.data.CIFAR10Test),
        ("data", fl_lightning.data.MNIST),
        ("data", fl_lightning.data.FashionMNIST),
        ("data", fl_lightning.data.Photographs),
        ("data.partition", fl_lightning.data.InOrder),
        ("data.partition", fl_lightning.data.IID),
        ("data.partition", fl_lightning.data.Dirichlet),
        ("data.partition", fl_lightning.data.ByClass),
    ],
    "`federation.model`: global models": [
        ("federation.model", fl_lightning.models.LeNet5),
        ("federation.model", fl_lightning.models.VGG7),
        ("federation.model", fl_lightning.models.ResNet9),
        ("federation.model", fl_lightning.models.ResNet18),
        ("federation.model", fl_lightning.models.TorchvisionClassifier),
        ("federation.model", fl_lightning.models.WrappedClassifier),
    ],
    "`federation.client.defenses`, `federation.server_defenses`": [
        (" and ".join(places(defense)), defense) for defense in DEFENSES
    ],
    "`federation.engine`: where clients train": [
        ("federation.engine", fl_lightning.engines.InProcess),
        ("federation.engine", fl_lightning.engines.Flower),
    ],
    "`model`: attacks": [
        ("model", attack_modules.FeatureInversion),
        ("model.refinement", attack_modules.Refinement),
        ("model.guidance", attack_modules.DiffusionGuidance),
        ("model.rounds", attack_modules.SameImages),
        ("model.rounds", attack_modules.ChangingParticipants),
        ("model", attack_modules.PatchInversion),
        ("model", attack_modules.GradientInversion),
        ("model.objective", attack_modules.SquaredL2),
        ("model.objective", attack_modules.Cosine),
        ("model.priors", attack_modules.TotalVariation),
        ("model.priors", attack_modules.ChromaTotalVariation),
    ],
    "`postprocess`: enhancements": [
        ("postprocess", attack_modules.DirectEnhancement),
        ("postprocess.sampler", attack_modules.DiffPIR),
        ("postprocess.sampler", attack_modules.DDRM),
        ("postprocess.schedule", attack_modules.Karras),
        ("postprocess.schedule", attack_modules.LinearBetas),
        ("postprocess.denoiser", attack_modules.OpenAIDenoiser),
        ("postprocess", attack_modules.SemanticEnhancer),
        ("postprocess.model", attack_modules.TrainedConditional),
        ("postprocess.model", attack_modules.LatentDiffusion),
        ("postprocess", attack_modules.GAN),
        ("postprocess", attack_modules.Restoration),
        ("data", attack_modules.ReconstructedImage),
    ],
    "Studies of `python cli.py audit` (`audit --help` lists the rest)": [
        ("scenarios", Scenario),
        ("defences", Defence),
    ],
    "Training of priors and of the judge": [
        ("data", PhotoCrops),
        ("model", DiffusionPrior),
        ("model", ClassConditionalDiffusion),
        ("model.model", SmallConditional),
        ("model", Cifar10Classifier),
    ],
}

GIVEN_BY_DATA = ("image_shape",)
"""Arguments of models that the data determines."""

TRAINER = """
## `trainer`: Lightning's Trainer

| setting | meaning here |
|---|---|
| `trainer.max_steps` | steps of the attack |
| `trainer.val_check_interval` | steps between panels and scores in TensorBoard |
| `trainer.precision` | `32-true`, `16-mixed`, or `bf16-mixed` where the processor or GPU computes in bf16 |
| `trainer.accelerator`, `trainer.devices`, `trainer.strategy` | `cpu`, `gpu`; number of devices; `ddp` for several |
| `trainer.logger.init_args.save_dir`, `.name`, `.version` | the run directory |
| `seed_everything` | seed of the federation, of its data and of the attack |
| `observation` | directory of the federation's record; by default one named by its settings under `runs/federations` |
| `ckpt_path` | a checkpoint from which the attack resumes, to the same images |
"""


def first_paragraph(text: str) -> str:
    return " ".join(inspect.cleandoc(text).split("\n\n")[0].split())


def shown_default(default: Any, optional: bool) -> str:
    if default is None and not optional:
        return "required"
    if hasattr(default, "class_path") or (isinstance(default, dict) and "class_path" in default):
        default = default["class_path"].rpartition(".")[2]
    if isinstance(default, Path) and default.is_absolute():
        default = default.relative_to(ROOT)
    words = {"None": "null", "True": "true", "False": "false"}  # as in YAML
    return f"`{words.get(str(default), default)}`"


def settings_of(path: str, cls: type) -> list[str]:
    """A table row for each setting of a class, but for seeds, which `seed_everything` sets."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, None, fail_untyped=False)
    rows = []
    for action in parser._actions:
        hidden = action.help in (None, SUPPRESS) or action.default == SUPPRESS
        if hidden or action.dest.rpartition(".")[2] in ("help", "seed", *GIVEN_BY_DATA):
            continue
        kind = str(getattr(action, "typehint", None) or getattr(action, "_typehint", None) or action.type)
        meaning = " ".join(action.help.split()).replace("|", "\\|")
        default = shown_default(action.default, "None" in kind or "Optional" in kind)
        rows.append(f"| `{path.split(' and ')[0]}.{action.dest}` | {default} | {meaning} |")
    return rows


def describe(path: str, cls: type) -> list[str]:
    """A heading, the class's summary, and a table of its settings, without those of `FederatedData` repeated."""
    rows = settings_of(path, cls)
    if issubclass(cls, FederatedData) and cls is not FederatedData:
        common = settings_of(path, FederatedData)
        rows = [row for row in rows if row not in common]
    heading = [
        f"### `{cls.__name__}` ({', '.join(f'`{place}`' for place in path.split(' and '))})",
        "",
        first_paragraph(cls.__doc__),
        "",
    ]
    table = ["| setting | default | meaning |", "|---|---|---|", *rows, ""] if rows else []
    return [*heading, *table]


def configurations() -> list[str]:
    """Each configuration with the first sentence of the comment that it begins with."""
    rows = []
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        lines = path.read_text().splitlines()
        comment = " ".join(line[2:] for line in lines[: next(i for i, text in enumerate(lines) if text[:1] != "#")])
        sentence = re.split(r"(?<=[.:])\s", comment)[0].rstrip(".:").replace("|", "\\|")
        rows.append(f"| `{path.relative_to(ROOT)}` | {sentence} |")
    return rows


def page() -> str:
    lines = [INTRODUCTION.rstrip("\n"), *configurations(), TRAINER.rstrip("\n"), ""]
    for title, classes in SECTIONS.items():
        lines += [f"## {title}", ""]
        for path, cls in classes:
            lines += describe(path, cls)
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)}: {len(page().splitlines())} lines", file=sys.stderr)
