"""The command line: `python cli.py {fit,validate,test,predict,federate,audit} --config X.yaml`, and `observe`."""

import gc
import os
import signal
import sys

if __name__ == "__main__":  # until all is imported, Ctrl-C ends the program without a word
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

# PyTorch reads it while it is imported. Threads that spin while they wait make a small step on two cores of a busy
# machine take nine times as long (`tests/benchmarks/README.md`).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from argparse import ArgumentError
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

import attack_modules
import fl_lightning.data
import fl_lightning.models  # noqa: F401
from attack_modules.attack import Attack, Reconstruction
from attack_modules.audit.audit import audit
from attack_modules.audit.workers import Program
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.enhance.postprocessing import Postprocessing
from attack_modules.enhance.shortcuts import NAMED, all_that_can_be
from attack_modules.evaluation.callback import Evaluation
from attack_modules.evaluation.progress import Progress
from attack_modules.evaluation.run_directory import NotLogged, runs_of
from attack_modules.panels import save_images
from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRounds, RoundsSummary
from attack_modules.threat_model.recorded import record_round
from fl_lightning.allocation import keep_freed_memory, release_freed_memory, release_libraries
from fl_lightning.command_line.audit import PURPOSE as AUDIT_PURPOSE
from fl_lightning.command_line.audit import run_audit
from fl_lightning.command_line.checks import (
    refuse_foreign_checkpoint,
    refuse_missing_accelerator,
    refuse_unfit_machine,
    refuse_unfit_numbers,
    refuse_unwritable,
)
from fl_lightning.command_line.explanations import explain
from fl_lightning.command_line.foreign_errors import for_the_user, from_libraries_alone, refused_by_trainer, short
from fl_lightning.command_line.former_names import with_todays_names
from fl_lightning.command_line.given import Given, UsageError
from fl_lightning.command_line.observe import PURPOSE, observe
from fl_lightning.command_line.plain_output import speak_plainly
from fl_lightning.data import FederatedData
from fl_lightning.errors import SettingError
from fl_lightning.federation import Federation
from fl_lightning.memory import forecast
from fl_lightning.record import Record

DESCRIPTION = (
    f"Audit of federated learning. Beside the commands below, `observe --help`: {PURPOSE} And `audit --help`: "
    f"{AUDIT_PURPOSE}"
)
LOAD_YAML = get_loader("yaml")
SEEDED = ("data.init_args", "model.init_args", "federation")
"""Settings whose `seed` is that of `seed_everything` unless they have their own."""
EVALUATES = ("validate", "test", "predict")
"""Commands that look at what a checkpoint holds."""


class AuditTrainer(Trainer):
    """Lightning's Trainer, which can also run a federation alone."""

    def federate(self, model: LightningModule | None = None, datamodule: LightningDataModule | None = None) -> None:
        """Run the federation alone: accuracy by round to TensorBoard, and the Observations to disk."""
        release_libraries()
        datamodule.prepare_data()
        print(f"Record of the federation: {datamodule.record.directory}")


class AuditCLI(LightningCLI):
    """LightningCLI with a federation beside data and model, and the subcommand `federate`."""

    peak_memory: int | None = None
    """Bytes that a run of `fit` takes at most beside the program; None if it is not known."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(AuditTrainer, "trainer")
        parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)

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

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "federate": {"model", "datamodule"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:
        given = Given.read(sys.argv[1:] if args is None else args)
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise explain(error, self._subcommand_parsers, given) from error
        settings = self.config[self.config.subcommand]
        refuse_unfit_numbers(settings.as_dict())
        ckpt_path = settings.get("ckpt_path")
        if ckpt_path is not None:  # also Lightning's words `best` and `last`: a new run has neither
            refuse_foreign_checkpoint(Path(ckpt_path))

    def before_instantiate_classes(self) -> None:
        self.as_given = self.config.clone()  # this is saved, so that its seeds go on following `seed_everything`
        settings = self.config[self.config.subcommand]
        for arguments in filter(None, map(settings.get, SEEDED)):
            if arguments.get("seed", 0) is None:
                arguments.seed = int(settings.seed_everything)
        trainer = settings.trainer
        interval, steps = trainer.val_check_interval, trainer.max_steps
        if isinstance(interval, int) and 0 < steps < interval:  # Lightning refuses it; the end is looked at anyway
            trainer.val_check_interval = steps
        if trainer.enable_progress_bar is False:  # else Lightning refuses ours
            callbacks = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [c for c in callbacks if not isinstance(c, RichProgressBar)]

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            if for_the_user(error) or not from_libraries_alone(error):
                raise
            raise SettingError(f"A class that the settings name cannot be made: {short(error, 300)}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init[self.subcommand]
        asked = settings.trainer
        self._refuse_no_steps(asked)
        if asked.logger is False:  # what is not logged needs a directory of its own all the same
            kwargs["logger"] = NotLogged(asked.default_root_dir or "runs", type(self.model).__name__)
        self.config = self.as_given
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except Exception as error:
            if not from_libraries_alone(error):
                raise
            raise refused_by_trainer(error, asked, self._parser(self.subcommand).get_defaults().trainer) from error
        refuse_unfit_machine(trainer, asked.precision, isinstance(self.model, Attack))
        evaluation = next(callback for callback in trainer.callbacks if isinstance(callback, Evaluation))
        self.evaluation = evaluation
        evaluation.seed = settings.seed_everything
        enhancer = settings.postprocess
        if enhancer == "compare":
            evaluation.postprocessing = Postprocessing(*all_that_can_be())
        elif enhancer != "none":
            named = enhancer if isinstance(enhancer, Enhancer) else NAMED[enhancer]()
            evaluation.postprocessing = Postprocessing({"enhanced": named})
        return trainer

    def _refuse_no_steps(self, trainer: Any) -> None:
        """Refuse settings of the trainer with which nothing would be run, or be left of a run."""
        if self.subcommand != "fit":
            return
        attacks = isinstance(self.model, Attack)
        if trainer.max_steps == 0 or (attacks and trainer.max_steps < 1):
            raise SettingError(
                f"`trainer.max_steps` is {trainer.max_steps}, so nothing would be run. Give the number of steps, at "
                "least 1."
            )
        if trainer.max_epochs == 0:
            raise SettingError("`trainer.max_epochs` is 0, so nothing would be run. Give at least 1, or leave it out.")
        if trainer.check_val_every_n_epoch == 0:  # Lightning would divide by it
            raise SettingError("`trainer.check_val_every_n_epoch` is 0. Give at least 1, or leave it out.")
        if attacks and trainer.fast_dev_run:
            raise SettingError(
                "`trainer.fast_dev_run` keeps nothing of a run, but an attack is run for its images. For a short "
                "trial, give `--trainer.max_steps 1` instead."
            )

    def after_instantiate_classes(self) -> None:
        settings: Any = self.config_init[self.subcommand]
        attacked = self.model is None or isinstance(self.model, Attack)  # other models train on the images themselves
        if self.model is None and self.subcommand != "federate":
            raise UsageError(
                f"`{self.subcommand}` needs a `model:`, e.g. `--model GradientInversion`, or a file of configs/."
            )
        foreign = settings.observation is not None and Record(settings.observation).foreign
        federated = isinstance(self.datamodule, FederatedData) or (foreign and self.datamodule is None)
        if (attacked or self.subcommand == "federate") and not federated:
            raise SettingError(
                f"`{self.subcommand}` needs federated images, but `data` is "
                f"{'missing' if self.datamodule is None else type(self.datamodule).__name__}. Give, for instance, "
                "`--data ImageFolder --data.root FOLDER`, or `--data Photographs`; rounds of another system need none."
            )
        if not attacked and self.datamodule is None:
            raise UsageError(
                f"{type(self.model).__name__} trains on images, but `data` is not given. Name the data module of its "
                "configuration in configs/, or another with `--data`."
            )
        if not attacked and settings.postprocess != "none":
            raise SettingError(
                f"`postprocess` enhances what an attack reconstructs, but {type(self.model).__name__} is no attack. "
                "Leave it out, or choose a `model` such as FeatureInversion."
            )
        runs = runs_of(self.trainer)  # not `log_dir`, for which Lightning would settle the run's number already now
        if isinstance(self.model, Attack) and runs is None:
            raise SettingError(
                "`trainer.logger` gives the run no folder for its results. Choose TensorBoardLogger or CSVLogger, or "
                "false for none."
            )
        if runs is not None and self.subcommand != "federate":
            refuse_unwritable(runs, "--trainer.logger.save_dir")
        if attacked or self.subcommand == "federate":
            self._observe(settings)

    def _observe(self, settings: Any) -> None:
        """Take the federation's record as the data, and refuse what cannot be attacked."""
        data = self.datamodule
        clients = None if data is None else data.num_clients
        if clients == 1 and settings.federation.seat.members(clients):  # a curious server attacks a single client too
            raise SettingError(
                f"`data.num_clients` is {clients}, the attacker alone, so there is no peer to attack. Set it to at "
                "least 2."
            )
        rounds = ObservedRounds(settings.knowledge, settings.federation, data, settings.observation)
        self.datamodule = rounds
        if not rounds.foreign:
            refuse_missing_accelerator(settings.federation.accelerator)
        if not rounds.record.directory.is_dir():
            refuse_unwritable(rounds.record.directory, "--observation")
        if isinstance(self.model, Attack) and self.subcommand != "federate":
            summary = rounds.summary()
            device = self.trainer.strategy.root_device.type
            self.model.check(summary, self.trainer.world_size, device)
            if self.subcommand == "fit" and device == "cpu":
                self.peak_memory = self._peak_memory(settings.federation, data, summary)
            self.evaluation.postprocessing.check(summary)
            if self.subcommand in EVALUATES and not settings.ckpt_path:
                rank_zero_warn(f"`{self.subcommand}` without `--ckpt_path` looks at the attack's start, step 0.")

    def _peak_memory(self, federation: Federation, data: FederatedData | None, rounds: RoundsSummary) -> int | None:
        """Bytes that the run takes at most beside the program, as far as that is known of the attack."""
        foreign = self.datamodule.foreign
        told = [assumed.num_images for assumed in rounds.assumptions if assumed.num_images]
        images = max(told, default=1) if foreign else sum(map(len, data.clients))
        attack = self.model.peak_memory(rounds, images)
        if attack is None:
            return None
        ready = foreign or self.datamodule.record.checkpoint.exists()
        return max(attack, 0 if ready else federation.peak_memory(data))

    def _make_directory(self) -> None:
        self.evaluation.make_directory(self.trainer)

    before_validate = before_test = before_predict = _make_directory

    def before_fit(self) -> None:
        if self.peak_memory is not None and self.trainer.is_global_zero:
            release_freed_memory()  # of the trial of the model, which is no part of the program
            release_libraries()
            print(forecast(self.peak_memory), flush=True)
        self._make_directory()

    def after_fit(self) -> None:
        if status := self.evaluation.interruption.status:
            sys.exit(status)
        if self.trainer.global_step == 0:
            rank_zero_warn(
                "No step was run, so there is no result: the settings of `trainer` leave no data or no time."
            )

    def after_predict(self) -> None:
        """Write the reconstructed images, and nothing else: a prediction reads no truth."""
        directory = Path(self.trainer.log_dir) / "images"
        for found in self.trainer.predict_loop.predictions or []:
            if isinstance(found, Reconstruction) and self.trainer.is_global_zero:
                save_images(found.images, directory)
                print(f"{len(found.images)} reconstructed images, without scores: {directory}", flush=True)


class SettingsOnly(AuditCLI):
    """Reads a command line and checks its settings, without running it."""

    def before_instantiate_classes(self) -> None:
        pass

    instantiate_classes = after_instantiate_classes = before_instantiate_classes

    def _set_seed(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class Unrun(AuditCLI):
    """Makes and checks all that a command line names, as a run does before its work, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def peak_memory_of(args: list[str]) -> int | None:
    """Bytes that the run of a command line takes at most beside the program; None if that is not known.

    All that the run makes before its work is made, and thrown away.

    Raises:
        AuditError: the run would be refused before its work.
    """
    try:
        return _cli(Unrun, args).peak_memory
    except Exception as error:
        refused = for_the_user(error)
        if refused is None:  # a defect of this program, which the run itself shows in its log
            return None
        raise refused from error
    finally:  # or the program would seem as large as with what was made
        release_freed_memory()
        release_libraries()


def settings_of(args: list[str]) -> dict[str, Any]:
    """The settings that a command line sets, nested as in YAML; errors as those of `main`."""
    read = _cli(SettingsOnly, args)
    return read.config[read.config.subcommand].as_dict()


def main(args: list[str] | None = None) -> AuditCLI | None:
    """Run a command and raise whatever goes wrong; tests and programs call this with a list of arguments."""
    given = sys.argv[1:] if args is None else args
    if given[:1] == ["observe"]:
        print(observe(record_round, given[1:]), flush=True)
        return None
    attack_modules.load_all()
    set_loader("yaml", lambda text: with_todays_names(LOAD_YAML(text)), (yaml.YAMLError,))
    if given[:1] == ["audit"]:
        programs = {"run": partial(Program, Path(__file__)), "check": settings_of, "trial": peak_memory_of}
        print(run_audit(audit, given[1:], **programs), flush=True)
        return None
    return _cli(AuditCLI, args)


def _cli(kind: type[AuditCLI], args: list[str] | None) -> AuditCLI:
    return kind(
        trainer_class=AuditTrainer,
        trainer_defaults={"callbacks": [Progress(), Evaluation()]},
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "description": DESCRIPTION},
        auto_configure_optimizers=False,
        args=args,
    )


def run(args: list[str] | None = None) -> int:
    """Run a command as a user does: what is wrong with its input is one sentence on standard error.

    Returns:
        The exit status: 0 after success, 1 for settings, files or a machine that do not fit, 2 for a command line or a
        configuration that cannot be read, 130 after Ctrl-C. A defect of the program is raised.
    """
    try:
        main(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        refused = for_the_user(error)
        if refused is None:
            raise
        if rank_zero_only.rank == 0:
            print(f"Error: {refused}", file=sys.stderr)
        return 2 if isinstance(refused, UsageError) else 1
    return 0


def command() -> None:
    """The program, as `python cli.py` and, where it is installed from a wheel, `curious-client`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    speak_plainly()
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    status = run()
    gc.collect()
    release_freed_memory()  # beside it, libraries touch 200 MB of pages of theirs as they end
    sys.exit(status)


if __name__ == "__main__":
    command()
