"""Scores an attack against the ground truth, and writes a run's results."""

import importlib.metadata
import platform
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torchvision.transforms.functional import pil_to_tensor

from attack_modules.attack import Attack, Reconstruction
from attack_modules.diffusion.classes import CIFAR10
from attack_modules.enhance.postprocessing import Postprocessing
from attack_modules.evaluation.cifar10_classifier import Cifar10Recogniser
from attack_modules.evaluation.features import feature_scores, features_of, match_features
from attack_modules.evaluation.interruption import Interruption
from attack_modules.evaluation.metrics import attribution, score
from attack_modules.evaluation.perceptual import Lpips
from attack_modules.evaluation.persons import by_person
from attack_modules.evaluation.recognisers import Recogniser, Recognises
from attack_modules.evaluation.report import Outcome, comparison, panel, table
from attack_modules.evaluation.run_directory import (
    SafeCheckpoints,
    claim,
    make_next_version,
    remove_if_without_results,
)
from attack_modules.panels import save_images
from fl_lightning.allocation import release_freed_memory
from fl_lightning.errors import counted
from fl_lightning.record import describe
from fl_lightning.storage import atomic_path, has_record, unlock, write_json, write_text
from fl_lightning.truth import Truth

TIMED = 2
"""Steps by which the time of the others is told."""
WORTH_TELLING = 20.0
"""Seconds from which on it is."""
PACKAGES = ("torch", "lightning", "torchvision", "torchmetrics")
"""Whose versions are written into the results."""


class Evaluation(Callback):
    """Scores an attack, with ground truth where there is one, and leaves pictures and numbers in the run directory.

    During the run, panels and mean scores go to TensorBoard. At its end, `results.json`, `per_image.csv`, `panel.png`
    and `images/NNN.png` are written, and then those of each enhancement. A run that is stopped by Ctrl-C, SIGTERM or an
    error leaves the same of its best so far, without enhancements and with `finished: false`, and prints the command to
    go on; of several processes that end with an error, only the last checkpoint remains. Modules that are not attacks
    are ignored.

    Args:
        postprocessing: enhancements to run at the end, each with a row of the panel, scores and a misfit of its own.
        seed: of the enhancements.
    """

    def __init__(self, postprocessing: Postprocessing | None = None, seed: int = 0) -> None:
        self.postprocessing = postprocessing or Postprocessing()
        self.seed = seed
        self.interruption = Interruption()
        self.seconds = 0.0  # of the attack, over all resumed parts
        self._second_step = 0.0  # when it began
        self._started = 0.0
        self._stopped = False
        self._reported = False
        self._made: Path | None = None
        self._directory = Path()  # of the run; `trainer.log_dir` is a collective call, which one process may not make
        self._lock: FileLock | None = None

    def make_directory(self, trainer: Trainer) -> None:
        """Make the run's directory, to be called before the trainer runs.

        Raises:
            StorageError: it cannot be made.
        """
        self._made = make_next_version(trainer)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._started = time.perf_counter()  # the closed form runs before the first step
        self._stopped = self._reported = False
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpoints()
        if isinstance(pl_module, Attack) and stage != "predict":
            self._directory = Path(trainer.log_dir)  # the same in all processes
            with pl_module.ranks.fail_together():
                self._lock = claim(self._directory) if trainer.is_global_zero else None
            if stage == "fit":
                self.interruption = Interruption()
                self.interruption.listen()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.interruption.end()
        if self._lock:
            unlock(self._lock)
            self._lock = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, Attack) and trainer.is_global_zero:
            if self._reported:
                print(f"The attack's own results are complete: {self._directory}", flush=True)
            elif trainer.state.fn == TrainerFn.FITTING and trainer.global_step > pl_module.steps_loaded:
                self._rescue(trainer, pl_module)
            elif self.interruption.received:
                print("Interrupted before the first step was done, so there is nothing to keep.", flush=True)
        self.teardown(trainer, pl_module, "")
        if self._made:
            with suppress(OSError):  # of a full disk
                for logger in trainer.loggers:
                    logger.finalize("failed")  # it may hold files open
            remove_if_without_results(self._made)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds + (time.perf_counter() - self._started if self._started else 0.0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, Attack) and trainer.is_global_zero:
            print(self._introduction(trainer, pl_module), flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, Attack):
            self.interruption.at_once = False  # a step that is under way ends first
            self.interruption.listen()  # Lightning has set a handler of its own meanwhile

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(pl_module, Attack) and trainer.is_global_zero:
            self._forecast(trainer, pl_module)
        asked = self.interruption.received is not None
        if isinstance(pl_module, Attack) and trainer.strategy.reduce_boolean_decision(asked, all=False):
            trainer.should_stop = self._stopped = True
            trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = 0

    def _forecast(self, trainer: Trainer, attack: Attack) -> None:
        """Say once how long the rest takes if that is long, by the steps after the first, which also warms up."""
        done, now = trainer.global_step - attack.steps_loaded, time.perf_counter()
        if done == 1:
            self._second_step = now
        elif done == 1 + TIMED:
            step, left = (now - self._second_step) / TIMED, max(trainer.max_steps - trainer.global_step, 0)
            verdict = attack.seconds_of_verdict()
            if left * step + verdict > WORTH_TELLING:
                print(
                    f"Time, by forecast: {left * step:.0f} s for the {left} steps that are left, {verdict:.0f} s for "
                    "the verdict, and what scoring takes.",
                    flush=True,
                )

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(outputs, Reconstruction) or trainer.sanity_checking or not trainer.is_global_zero:
            return
        began = time.perf_counter()
        truth = self._truth(trainer, pl_module)
        images, labels = outputs.images.cpu(), outputs.labels.cpu()
        outcome = Outcome(images, labels, truth and score(images, truth.images, labels, truth.labels))
        means = {name: value for name, value in outcome.numbers().items() if name in ("psnr_mean", "ssim_mean")}
        pl_module.log_dict(means, batch_size=1, rank_zero_only=True, logger=trainer.state.fn != TrainerFn.FITTING)
        if trainer.state.fn == TrainerFn.FITTING:  # else by Lightning, which would log them one step too early here
            for logger in trainer.loggers:
                logger.log_metrics(means, trainer.global_step)
        if "psnr_mean" in means:
            pl_module.log("psnr", means["psnr_mean"], prog_bar=True, logger=False, batch_size=1, rank_zero_only=True)
        if isinstance(trainer.logger, TensorBoardLogger):
            picture = pil_to_tensor(panel(truth, {"reconstruction": outcome}, outputs.peers))
            trainer.logger.experiment.add_image("panel", picture, trainer.global_step)
        self._started += time.perf_counter() - began  # evaluation is not the attack's time

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_clock()
        if isinstance(pl_module, Attack):
            self.interruption.at_once = True
            self._report(trainer, pl_module, pl_module.reconstruction())

    def _stop_clock(self) -> None:
        self.seconds = self.state_dict()["seconds"]
        self._started = 0.0

    def _rescue(self, trainer: Trainer, attack: Attack) -> None:
        """Write the best so far of a run that ends with an error, as far as that is still possible."""
        if self._started and trainer.world_size == 1:  # else it failed while it was written, or waits for others
            self._stop_clock()
            self._stopped = True
            try:
                return self._report(trainer, attack, attack.reconstruction())
            except Exception as error:
                print(f"The best so far could not be written: {error}")
        print(self._way_on(trainer), flush=True)

    def _way_on(self, trainer: Trainer) -> str:
        """What continues this run, or evaluates it if all its steps are done."""
        kept, config = trainer.checkpoint_callback, self._directory / "config.yaml"
        written = Path(kept.dirpath).glob("*.ckpt") if kept and kept.dirpath else ()
        newest = max(written, key=lambda path: (path.stat().st_mtime, path.name), default=None)
        checkpoint = newest or trainer.ckpt_path
        if not checkpoint:
            return "It has to start again, since no checkpoint was kept."
        verb = "fit" if trainer.global_step < trainer.max_steps else "test"
        if not config.exists():  # in Python
            return f"To go on: pass ckpt_path={str(checkpoint)!r} to the trainer's `{verb}`."
        command = ["python", sys.argv[0], verb, "--config", str(config), "--ckpt_path", str(checkpoint)]
        return f"To go on: {shlex.join(command)}"

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, Reconstruction):
            self._report(trainer, pl_module, outputs)

    def _truth(self, trainer: Trainer, attack: Attack) -> Truth | None:
        """The ground truth of all observed rounds, if it lies beside them."""
        record = trainer.datamodule.record
        stems = [record.truth(seen.observation.round, seen.client) for seen in attack.observed_rounds]
        if not all(has_record(stem) for stem in stems):
            return None
        return Truth.union([Truth.load(stem) for stem in stems])

    def _introduction(self, trainer: Trainer, attack: Attack) -> str:
        rounds = ", ".join(str(number) for number in dict.fromkeys(s.observation.round for s in attack.observed_rounds))
        weight = attack.observed_rounds[-1].observation.own_weight
        truth, seat = self._truth(trainer, attack), trainer.datamodule.seat
        who = f" (aggregation weight {weight:.0%})" if weight else ""
        peers = ""
        if truth:
            count = len(truth.clients.unique())
            verb = "holds" if count == 1 else "hold"
            peers = f" Its {counted(count, 'peer')} {verb} {counted(len(truth.labels), 'image')}."
        return (
            f"Attacker: {seat.words}{who}; observed round {rounds}.{peers}\n"
            f"{attack.observed_rounds[-1].assumptions.introduction()}\n{attack.introduction()}"
        )

    def _report(self, trainer: Trainer, attack: Attack, reconstruction: Reconstruction) -> None:
        directory, memory = self._directory, _peak_memory_mb(attack.device)
        misfit = attack.misfit(*reconstruction[:2]).cpu()
        verdict = attack.verdict(misfit)
        postprocessing = Postprocessing() if self._stopped else self.postprocessing
        enhancements = postprocessing.run(attack, reconstruction, self.seed)
        if not trainer.is_global_zero:
            list(enhancements)  # this process's share of the work
            return
        images, labels = reconstruction.images.cpu(), reconstruction.labels.cpu()
        save_images(images, directory / "images")  # whatever becomes of the scores
        release_freed_memory()  # what the verdict took
        truth = self._truth(trainer, attack)
        print(verdict.sentence(len(truth.labels) if truth else None), flush=True)
        recogniser = _recogniser(truth) if truth else None
        lpips = Lpips.if_available() if truth else None
        scorecard = truth and score(images, truth.images, labels, truth.labels, recogniser, lpips)
        raw = Outcome(images, labels, scorecard, misfit, verdict)
        outcomes, results = {"reconstruction": raw}, self._results(trainer, attack, raw, truth, memory)
        of = f"Of {int((scorecard.assignment >= 0).sum())} originals found: " if truth else "Without originals: "
        print(of + raw.line())
        whose = scorecard and scorecard.assignment
        if truth and reconstruction.features is not None:
            features = features_of(truth.images, reconstruction.embed, attack.device)
            results["features"] = feature_scores(reconstruction.features, features, reconstruction.seen)
            print(", ".join(f"features {name} {value:.4g}" for name, value in results["features"].items()))
            whose = match_features(reconstruction.features, features, reconstruction.seen)  # images may show nothing
        if truth and reconstruction.peers is not None and (whose >= 0).sum() > 1:
            results["attribution"] = attribution(reconstruction.peers, truth.clients, whose)
            print(", ".join(f"{name} {value:.4g}" for name, value in results["attribution"].items()))
        if truth and (persons := by_person(truth, scorecard)):
            results["persons"] = persons
            print(f"{sum(bool(found['seen']) for found in persons.values())} of {len(persons)} persons can be seen.")
        _log(trainer, "final", raw)
        results["complete"] = not (postprocessing.enhancers or postprocessing.compares)
        self._write(directory, truth, outcomes, results, reconstruction)  # now: an enhancement may fail
        self._reported = True
        for enhanced in enhancements:
            if truth:  # an enhanced image is compared with the original that its reconstruction is matched to
                settled = raw.scorecard.assignment
                scorecard = score(enhanced.images, truth.images, None, truth.labels, recogniser, lpips, settled)
            outcome = outcomes[enhanced.name] = Outcome(enhanced.images, labels, scorecard, enhanced.misfit)
            results[enhanced.name] = outcome.results() | {"seconds": round(enhanced.seconds, 3)}
            verb = "Enhanced" if enhanced.name == "enhanced" else enhanced.name.capitalize()
            print(f"{verb} by {enhanced.enhancer} in {enhanced.seconds:.1f} s: {outcome.line()}", flush=True)
            _log(trainer, enhanced.name, outcome)
            save_images(outcome.images, directory / enhanced.name)
        for name, reason in postprocessing.left_out.items():
            print(f"{name.capitalize()} is left out: {reason}")
        if postprocessing.compares:
            results["left_out"] = postprocessing.left_out
            write_text(directory / "comparison.csv", comparison(results, outcomes))
        if not results["complete"]:
            results["complete"] = True
            self._write(directory, truth, outcomes, results, reconstruction)
        if not results["finished"]:
            print(f"Stopped at step {results['steps']} of {trainer.max_steps}. {self._way_on(trainer)}")
        print(f"Pictures and numbers: {directory}", flush=True)

    def _write(
        self,
        directory: Path,
        truth: Truth | None,
        outcomes: dict[str, Outcome],
        results: dict[str, Any],
        reconstruction: Reconstruction,
    ) -> None:
        write_text(directory / "per_image.csv", table(truth, outcomes, reconstruction))
        with atomic_path(directory / "panel.png") as temporary:
            panel(truth, outcomes, reconstruction.peers).save(temporary, format="png")
        write_json(directory / "results.json", results)

    def _results(
        self, trainer: Trainer, attack: Attack, raw: Outcome, truth: Truth | None, memory: int | None
    ) -> dict[str, Any]:
        rounds, postprocessing = attack.observed_rounds, self.postprocessing
        assumptions = rounds[-1].assumptions
        private = ("labels", "client_sizes", "sources")
        return {
            "attack": attack.title,
            "verdict": raw.verdict.results(),
            **raw.results(),
            "diagnosis": attack.diagnosis(),
            "steps": attack.steps_taken,
            "finished": attack.steps_taken >= trainer.max_steps,
            "seconds": round(self.seconds, 3),
            "peak_memory_mb": memory,
            "knowledge": assumptions.sources,
            "assumed": {name: describe(value) for name, value in vars(assumptions).items() if name not in private},
            **({} if truth is None else _defended(truth, rounds[-1].observation.round + 1)),
            "seat": describe(trainer.datamodule.seat),
            "observed_rounds": [seen.observation.round for seen in rounds],
            "observed_clients": [seen.client for seen in rounds],  # whose update alone each is; null for the mean
            "observation": str(trainer.datamodule.record.directory),
            "postprocess": ", ".join(type(made).__name__ for made in postprocessing.enhancers.values()) or "none",
            "seed": self.seed,
            "precision": str(trainer.precision),
            "device": torch.cuda.get_device_name(attack.device) if attack.device.type == "cuda" else _cpu(),
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        }


def _defended(truth: Truth, rounds: int) -> dict[str, Any]:
    """The defences, and what differential privacy they guarantee after so many rounds, for `results.json`."""
    client, server, epochs = truth.training.defenses, truth.server_defenses, truth.training.local_epochs
    guarantees = [found for defense in [*client, *server] if (found := defense.privacy(rounds, epochs))]
    named = {"defenses": describe(client), "server_defenses": describe(server)}
    return named | {"privacy": [asdict(found) for found in guarantees]}


def _recogniser(truth: Truth) -> Recognises | None:
    """A classifier of the true classes that takes no part in any attack, if there is one."""
    if truth.imagenet_labels:
        return Recogniser()
    return Cifar10Recogniser() if tuple(truth.class_names) == CIFAR10 else None


def _log(trainer: Trainer, prefix: str, outcome: Outcome) -> None:
    if isinstance(trainer.logger, TensorBoardLogger) and outcome.scorecard:
        scores = {f"{prefix}/{name}": value for name, value in outcome.scorecard.summary().items()}
        trainer.logger.log_metrics(scores, trainer.global_step)


def _peak_memory_mb(device: torch.device) -> int | None:
    """Peak memory of this process, or of the GPU if the attack ran on one, in MiB; None where it is not counted."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20


def _cpu() -> str:
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
