"""Scores an attack against the ground truth, and writes a run's results."""

import importlib.metadata
import platform
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torchvision.transforms.functional import pil_to_tensor

from attack_modules.attack import Attack, Reconstruction
from attack_modules.diffusion.classes import CIFAR10
from attack_modules.enhance.postprocessing import Postprocessing
from attack_modules.evaluation.cifar10_classifier import Cifar10Recogniser
from attack_modules.evaluation.metrics import attribution, score
from attack_modules.evaluation.perceptual import Lpips
from attack_modules.evaluation.recognisers import Recogniser, Recognises
from attack_modules.evaluation.report import Outcome, comparison, panel, save_images, table
from attack_modules.evaluation.run_directory import claim
from fl_lightning.storage import atomic_path, write_json, write_text
from fl_lightning.truth import Truth

PACKAGES = ("torch", "lightning", "torchvision", "torchmetrics")
"""Whose versions are written into the results."""


class Evaluation(Callback):
    """Scores an attack, with ground truth where there is one, and leaves pictures and numbers in the run directory.

    During the run, panels and mean scores go to TensorBoard. At its end, `results.json`, `per_image.csv`, `panel.png`
    and `images/NNN.png` are written, and then those of each enhancement. Modules that are not attacks are ignored.

    Args:
        postprocessing: enhancements to run at the end, each with a row of the panel, scores and a misfit of its own.
        seed: of the enhancements.
    """

    def __init__(self, postprocessing: Postprocessing | None = None, seed: int = 0) -> None:
        self.postprocessing = postprocessing or Postprocessing()
        self.seed = seed
        self.seconds = 0.0  # of the attack, over all resumed parts
        self._started = 0.0
        self._lock: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._started = time.perf_counter()  # the closed form runs before the first step
        if isinstance(pl_module, Attack) and stage != "predict":
            directory = Path(trainer.log_dir)  # the same in all processes
            with pl_module.ranks.fail_together():
                self._lock = claim(directory) if trainer.is_global_zero else None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._lock:
            self._lock.unlink(missing_ok=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds + (time.perf_counter() - self._started if self._started else 0.0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, Attack) and trainer.is_global_zero:
            print(self._introduction(trainer, pl_module), flush=True)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(outputs, Reconstruction) or trainer.sanity_checking or not trainer.is_global_zero:
            return
        began = time.perf_counter()
        truth = self._truth(trainer)
        images, labels = outputs.images.cpu(), outputs.labels.cpu()
        outcome = Outcome(images, labels, truth and score(images, truth.images, labels, truth.labels))
        means = {name: value for name, value in outcome.numbers().items() if name in ("psnr_mean", "ssim_mean")}
        pl_module.log_dict(means, batch_size=1, rank_zero_only=True)
        if "psnr_mean" in means:
            pl_module.log("psnr", means["psnr_mean"], prog_bar=True, logger=False, batch_size=1, rank_zero_only=True)
        if isinstance(trainer.logger, TensorBoardLogger):
            picture = pil_to_tensor(panel(truth, {"reconstruction": outcome}, outputs.peers))
            trainer.logger.experiment.add_image("panel", picture, trainer.global_step)
        self._started += time.perf_counter() - began  # evaluation is not the attack's time

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = self.state_dict()["seconds"]
        self._started = 0.0
        if isinstance(pl_module, Attack):
            self._report(trainer, pl_module, pl_module.reconstruction())

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, Reconstruction):
            self._report(trainer, pl_module, outputs)

    def _truth(self, trainer: Trainer) -> Truth | None:
        """The ground truth of all observed rounds, if it lies beside them."""
        record = trainer.datamodule.record
        stems = [record.truth(round_) for round_ in record.observed_rounds]
        if not all(stem.with_suffix(".json").exists() for stem in stems):
            return None
        return Truth.union([Truth.load(stem) for stem in stems])

    def _introduction(self, trainer: Trainer, attack: Attack) -> str:
        rounds = ", ".join(str(seen.observation.round) for seen in attack.observed_rounds)
        weight = attack.observed_rounds[-1].observation.own_weight
        truth = self._truth(trainer)
        peers = f" Its {len(truth.clients.unique())} peers hold {len(truth.labels)} images." if truth else ""
        return (
            f"Attacker: an honest-but-curious client (aggregation weight {weight:.0%}) that observed round {rounds}."
            f"{peers}\n{trainer.datamodule.knowledge.introduction()}\n{attack.introduction()}"
        )

    def _report(self, trainer: Trainer, attack: Attack, reconstruction: Reconstruction) -> None:
        directory, memory = Path(trainer.log_dir), _peak_memory_mb(attack.device)
        misfit = attack.misfit(*reconstruction[:2]).cpu()
        enhancements = self.postprocessing.run(attack, reconstruction, self.seed)
        if not trainer.is_global_zero:
            list(enhancements)  # this process's share of the work
            return
        truth = self._truth(trainer)
        recogniser = _recogniser(truth) if truth else None
        lpips = Lpips.if_available() if truth else None
        images, labels = reconstruction.images.cpu(), reconstruction.labels.cpu()
        scorecard = truth and score(images, truth.images, labels, truth.labels, recogniser, lpips)
        raw = Outcome(images, labels, scorecard, misfit)
        outcomes, results = {"reconstruction": raw}, self._results(trainer, attack, raw, memory)
        print(raw.line() if truth else f"{raw.line()}; no ground truth, so no scores.")
        if truth and reconstruction.peers is not None:
            results["attribution"] = attribution(reconstruction.peers, truth.clients, scorecard.assignment)
            print(", ".join(f"{name} {value:.4g}" for name, value in results["attribution"].items()))
        _log(trainer, "final", raw)
        save_images(directory / "images", raw)
        self._write(directory, truth, outcomes, results, reconstruction)  # now: an enhancement may fail
        for enhanced in enhancements:
            if truth:  # an enhanced image is compared with the original that its reconstruction is matched to
                settled = raw.scorecard.assignment
                scorecard = score(enhanced.images, truth.images, None, truth.labels, recogniser, lpips, settled)
            outcome = outcomes[enhanced.name] = Outcome(enhanced.images, labels, scorecard, enhanced.misfit)
            results[enhanced.name] = outcome.results() | {"seconds": round(enhanced.seconds, 3)}
            verb = "Enhanced" if enhanced.name == "enhanced" else enhanced.name.capitalize()
            print(f"{verb} by {enhanced.enhancer} in {enhanced.seconds:.1f} s: {outcome.line()}", flush=True)
            _log(trainer, enhanced.name, outcome)
            save_images(directory / enhanced.name, outcome)
        for name, reason in self.postprocessing.left_out.items():
            print(f"{name.capitalize()} is left out: {reason}")
        if self.postprocessing.compares:
            results["left_out"] = self.postprocessing.left_out
            write_text(directory / "comparison.csv", comparison(results, outcomes))
        if len(outcomes) > 1 or self.postprocessing.compares:
            self._write(directory, truth, outcomes, results, reconstruction)
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

    def _results(self, trainer: Trainer, attack: Attack, raw: Outcome, memory: int | None) -> dict[str, Any]:
        rounds, postprocessing = attack.observed_rounds, self.postprocessing
        assumptions = rounds[-1].assumptions
        private = ("labels", "client_sizes", "sources")
        return {
            "attack": attack.title,
            **raw.results(),
            "diagnosis": attack.diagnosis(),
            "steps": trainer.global_step,
            "seconds": round(self.seconds, 3),
            "peak_memory_mb": memory,
            "knowledge": assumptions.sources,
            "assumed": {name: value for name, value in vars(assumptions).items() if name not in private},
            "observed_rounds": [seen.observation.round for seen in rounds],
            "observation": str(trainer.datamodule.record.directory),
            "postprocess": ", ".join(type(made).__name__ for made in postprocessing.enhancers.values()) or "none",
            "seed": self.seed,
            "precision": str(trainer.precision),
            "device": torch.cuda.get_device_name(attack.device) if attack.device.type == "cuda" else _cpu(),
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        }


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
