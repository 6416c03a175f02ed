"""The one door: `python cli.py {fit,validate,test,predict,federate} --config configs/X.yaml`."""

import sys
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

import attack_modules  # noqa: F401 - short class names in YAML
import fl_lightning.data
import fl_lightning.models  # noqa: F401
from attack_modules.attack import Attack
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.enhance.shortcuts import NAMED, all_that_can_be
from attack_modules.evaluation.callback import Evaluation
from fl_lightning.allocation import keep_freed_memory
from fl_lightning.data import FederatedData
from fl_lightning.errors import AuditError
from fl_lightning.federation import Federation
from fl_lightning.knowledge import Knowledge
from fl_lightning.observed import ObservedRounds
from fl_lightning.storage import load_checkpoint


class AuditTrainer(Trainer):
    """Lightning's Trainer, which can also run a federation alone."""

    def federate(self, model: LightningModule | None = None, datamodule: LightningDataModule | None = None) -> None:
        """Run the federation alone: accuracy per round to TensorBoard, and the Observations to disk."""
        datamodule.prepare_data()
        print(f"Record of the federation: {datamodule.record.directory}")


class AuditCLI(LightningCLI):
    """LightningCLI with a federation beside data and model, and the subcommand `federate`."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(AuditTrainer, "trainer")
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(Federation, "federation")
        parser.add_class_arguments(Knowledge, "knowledge")
        parser.add_argument(
            "--observation",
            type=Path | None,
            default=None,
            help="Directory of the federation's record. Reused if it is there, else simulated first; by default a "
            "folder of runs/federations named by the settings.",
        )
        parser.add_argument(
            "--postprocess",
            type=Enhancer | Literal["none", "direct", "gan", "semantic", "compare"],  # so that an error keeps its cause
            default="none",
            help="Enhancement of the images: `none`, one that goes by its name (attack_modules/enhance/shortcuts.py), "
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
        enhancer = self.config_init[self.subcommand].postprocess
        if enhancer != "none":
            evaluation = next(callback for callback in trainer.callbacks if isinstance(callback, Evaluation))
            if enhancer == "compare":
                evaluation.enhancers, evaluation.left_out = all_that_can_be()
            else:
                evaluation.enhancers = {"enhanced": enhancer if isinstance(enhancer, Enhancer) else NAMED[enhancer]()}
        return trainer

    def after_instantiate_classes(self) -> None:
        attacked = self.model is None or isinstance(self.model, Attack)  # other models train on the images themselves
        if attacked and isinstance(self.datamodule, FederatedData):
            settings: Any = self.config_init[self.subcommand]
            self.datamodule = ObservedRounds(
                settings.federation, self.datamodule, settings.knowledge, settings.observation
            )
        if self.subcommand != "federate" and self.model is None:
            self.parser.error(
                f"`{self.subcommand}` needs a `model:`, e.g. `--model GradientInversion` or a config from configs/."
            )


def main(args: ArgsType = None) -> AuditCLI:
    """Run the command line; tests call this in-process with a list of arguments."""
    return AuditCLI(
        trainer_class=AuditTrainer,
        trainer_defaults={"callbacks": [RichProgressBar(), Evaluation()]},
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        args=args,
    )


if __name__ == "__main__":
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
        # A sentence for the user, once; a traceback is for defects of ours.
        sys.exit(f"Error: {cause}" if rank_zero_only.rank == 0 else 1)
