"""The command line: `python cli.py {fit,validate,test,predict,federate} --config configs/X.yaml`."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

import attack_modules
import fl_lightning.data
import fl_lightning.models  # noqa: F401
from attack_modules.attack import Attack
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.enhance.postprocessing import Postprocessing
from attack_modules.enhance.shortcuts import NAMED, all_that_can_be
from attack_modules.evaluation.callback import Evaluation
from attack_modules.evaluation.progress import Progress
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRounds
from fl_lightning.allocation import keep_freed_memory
from fl_lightning.data import FederatedData
from fl_lightning.errors import AuditError
from fl_lightning.federation import Federation
from fl_lightning.storage import load_checkpoint

FORMER_MODULES = {
    "attack_modules.cifar10_classifier": "attack_modules.evaluation.cifar10_classifier",
    "attack_modules.diffusion.photo_crops": "attack_modules.diffusion.trained.photo_crops",
    "attack_modules.diffusion.prior": "attack_modules.diffusion.trained.photo_prior",
    "attack_modules.diffusion.small": "attack_modules.diffusion.trained.class_conditional",
}
FORMER_CLASSES = {"Cifar10Training": "Cifar10Classifier", "ConditionalTraining": "ClassConditionalDiffusion"}
FORMER_SETTINGS = {"scale_factor": "latent_downscale"}
"""Names in configurations that version 0.1 saved -> today's."""
LOAD_YAML = get_loader("yaml")
QUIET = (
    "The following callbacks returned in `LightningModule.configure_callbacks` will override",
    "Using ModelCheckpoint with manual optimization",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "The '.*_dataloader' does not have many workers",
    "GPU available but not used",
    "The dirpath has changed",
)
"""Warnings of Lightning and PyTorch that ask nothing of the user."""


class AuditTrainer(Trainer):
    """Lightning's Trainer, which can also run a federation alone."""

    def federate(self, model: LightningModule | None = None, datamodule: LightningDataModule | None = None) -> None:
        """Run the federation alone: accuracy by round to TensorBoard, and the Observations to disk."""
        if not isinstance(datamodule, ObservedRounds):
            raise SystemExit("`federate` needs federated images as `data:`, for instance `--data ImageFolder`.")
        datamodule.prepare_data()
        print(f"Record of the federation: {datamodule.record.directory}")


class AuditCLI(LightningCLI):
    """LightningCLI with a federation beside data and model, and the subcommand `federate`."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(AuditTrainer, "trainer")
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"trainer.enable_model_summary": False})
        parser.add_class_arguments(Federation, "federation")
        parser.add_class_arguments(Knowledge, "knowledge")
        parser.add_argument(
            "--observation",
            type=Path | None,
            default=None,
            help="Directory of the federation's record. It is reused if it exists, else simulated; by default a folder "
            "of runs/federations named by the settings.",
        )
        parser.add_argument(
            "--postprocess",
            type=Enhancer | Literal["none", "direct", "gan", "semantic", "compare"],  # so that an error keeps its cause
            default="none",
            help="Enhancement of the images: `none`, one by its short name (attack_modules/enhance/shortcuts.py), "
            "`compare` for all of these that have their weights, or a class with its settings.",
        )
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "federation.seed")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "federate": {"model", "datamodule"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        ckpt_path = self.config[self.config.subcommand].get("ckpt_path")
        if ckpt_path not in (None, "best", "last", "hpc"):
            load_checkpoint(Path(ckpt_path))  # a file that is cut short or foreign is refused before work starts

    def before_instantiate_classes(self) -> None:
        trainer = self.config[self.config.subcommand].trainer
        interval, steps = trainer.val_check_interval, trainer.max_steps
        if isinstance(interval, int) and 0 < steps < interval:  # Lightning refuses it; the end is looked at anyway
            trainer.val_check_interval = steps
        if trainer.enable_progress_bar is False:  # else Lightning refuses ours
            callbacks = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [c for c in callbacks if not isinstance(c, RichProgressBar)]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        settings = self.config_init[self.subcommand]
        evaluation = next(callback for callback in trainer.callbacks if isinstance(callback, Evaluation))
        evaluation.seed = settings.seed_everything
        enhancer = settings.postprocess
        if enhancer == "compare":
            evaluation.postprocessing = Postprocessing(*all_that_can_be())
        elif enhancer != "none":
            named = enhancer if isinstance(enhancer, Enhancer) else NAMED[enhancer]()
            evaluation.postprocessing = Postprocessing({"enhanced": named})
        return trainer

    def after_instantiate_classes(self) -> None:
        attacked = self.model is None or isinstance(self.model, Attack)  # other models train on the images themselves
        if attacked and isinstance(self.datamodule, FederatedData):
            settings: Any = self.config_init[self.subcommand]
            self.datamodule = ObservedRounds(
                settings.knowledge, settings.federation, self.datamodule, settings.observation
            )
            if self.model is not None:
                self.model.check(self.datamodule.summary(), self.trainer.world_size)
        if self.subcommand != "federate" and self.model is None:
            self.parser.error(
                f"`{self.subcommand}` needs a `model:`, e.g. `--model GradientInversion` or a config from configs/."
            )


def with_todays_names(setting: Any) -> Any:
    """A loaded setting with former names of classes and settings replaced by today's, at any depth."""
    if isinstance(setting, list):
        return [with_todays_names(item) for item in setting]
    if not isinstance(setting, dict):
        return setting
    renamed = {FORMER_SETTINGS.get(name, name): with_todays_names(value) for name, value in setting.items()}
    if isinstance(path := renamed.get("class_path"), str):
        module, _, name = path.rpartition(".")
        renamed["class_path"] = f"{FORMER_MODULES.get(module, module)}.{FORMER_CLASSES.get(name, name)}".strip(".")
        arguments = renamed.get("init_args") or {}
        if name.endswith("Inversion") and name != "GradientInversion" and "anneal" in arguments:
            arguments["prior_limit"] = arguments.pop("anneal")
    return renamed


def speak_plainly() -> None:
    """Keep the output to what a user needs: no advertisements, no advice to developers, warnings in one line."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in QUIET:
        warnings.filterwarnings("ignore", message)
    warnings.showwarning = lambda message, *_, **__: print(f"Warning: {message}", file=sys.stderr, flush=True)


def main(args: ArgsType = None) -> AuditCLI:
    """Run the command line; tests call this in-process with a list of arguments."""
    attack_modules.load_all()
    set_loader("yaml", lambda text: with_todays_names(LOAD_YAML(text)), (yaml.YAMLError,))
    return AuditCLI(
        trainer_class=AuditTrainer,
        trainer_defaults={"callbacks": [Progress(), Evaluation()]},
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        args=args,
    )


if __name__ == "__main__":
    speak_plainly()
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    try:
        main()
    except Exception as error:
        cause = error  # jsonargparse wraps what a constructor raises
        while cause and not isinstance(cause, AuditError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        # A sentence for the user, once; a traceback is for defects of the program.
        sys.exit(f"Error: {cause}" if rank_zero_only.rank == 0 else 1)
