"""Looking at an attack: scores, panels, and the files of a run directory. The only code here that opens the truth.

An enhancement is run here too, after the attack, and seen beside what it was made of.
"""

import csv
import importlib.metadata
import io
import os
import platform
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from attack_modules.attack import Attack, Reconstruction
from attack_modules.diffusion.classes import CIFAR10
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.evaluation.cifar10_classifier import Cifar10Recogniser
from attack_modules.evaluation.metrics import RECOGNITION, Scorecard, attribution, score
from attack_modules.evaluation.perceptual import Lpips
from attack_modules.evaluation.recognisers import Recogniser, Recognises
from attack_modules.panels import draw_panel, save_png
from fl_lightning.errors import AuditError
from fl_lightning.storage import atomic_path, write_json, write_text
from fl_lightning.truth import Truth

OF_ORIGINALS = RECOGNITION[2:]
"""Columns that no enhancement changes."""


class RunDirectoryError(AuditError):
    """The run directory belongs to another run."""


@dataclass(frozen=True)
class Outcome:
    """Images that a run ends with, and what is known of them; all on the CPU."""

    images: Tensor
    """(N, C, H, W) in [0, 1]."""
    labels: Tensor
    """(N,) long."""
    scorecard: Scorecard | None
    """None without a truth."""
    misfit: Tensor | None = None
    """(N,) or (): see `Attack.misfit`."""

    def numbers(self) -> dict[str, float]:
        """What is printed, as far as it is known."""
        shown = ("psnr_mean", "psnr_min", "ssim_mean", "label_accuracy", "recognised_top1", "recognised_top5")
        scores = self.scorecard.summary() if self.scorecard else {}
        numbers = {name: scores[name] for name in shown if name in scores}
        return numbers | ({} if self.misfit is None else {"misfit": self.misfit.mean().item()})


class Evaluation(Callback):
    """Scores an attack against the truth, and leaves pictures and numbers in the run directory.

    During the run, panels and mean scores go to TensorBoard; at its end `results.json`, `per_image.csv`, `panel.png`
    and `images/NNN.png` are written. Does nothing for modules that are not attacks.

    Args:
        enhancers: what is made of the reconstructed images at the end, beside them: `<name>/NNN.png`, a row of the
            panel, scores and misfit of its own. Of several, one that cannot enhance these images is left out.
        left_out: enhancements that cannot be made at all, and why.
    """

    def __init__(self, enhancers: dict[str, Enhancer] | None = None, left_out: dict[str, str] | None = None) -> None:
        self.enhancers = enhancers or {}
        self.left_out = left_out or {}
        self.seconds = 0.0  # of attack, over all resumed parts
        self._started = 0.0
        self._lock: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(pl_module, Attack) and stage != "predict":
            directory = Path(trainer.log_dir)  # Lightning asks all processes for it
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
            print(pl_module.introduction(), flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.perf_counter()

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
        pl_module.log_dict(means, prog_bar=True, batch_size=1, rank_zero_only=True)
        if isinstance(trainer.logger, TensorBoardLogger):
            panel = pil_to_tensor(_panel(truth, {"reconstruction": outcome}))
            trainer.logger.experiment.add_image("panel", panel, trainer.global_step)
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
        record = trainer.datamodule.record
        stems = [record.truth(round_) for round_ in record.observed_rounds]
        if not all(stem.with_suffix(".json").exists() for stem in stems):
            return None
        return Truth.union([Truth.load(stem) for stem in stems])

    def _report(self, trainer: Trainer, attack: Attack, reconstruction: Reconstruction) -> None:
        directory, memory = Path(trainer.log_dir), _peak_memory_mb(attack.device)
        misfit = attack.misfit(*reconstruction[:2]).cpu()
        enhancements = self._enhance(attack, reconstruction, trainer.datamodule.federation.seed)
        if not trainer.is_global_zero:
            list(enhancements)  # this process's share of the work
            return
        truth = self._truth(trainer)
        recogniser = _recogniser(truth) if truth else None
        lpips = Lpips.if_available() if truth else None
        images, labels = reconstruction.images.cpu(), reconstruction.labels.cpu()
        scorecard = truth and score(images, truth.images, labels, truth.labels, recogniser, lpips)
        raw = Outcome(images, labels, scorecard, misfit)
        results = self._results(trainer, attack, raw, memory)
        print(f"\n{_line(raw) or 'No truth, so no scores.'}")
        if truth and reconstruction.peers is not None:
            results["attribution"] = attribution(reconstruction.peers, truth.clients, scorecard.assignment)
            print(", ".join(f"{name} {value:.4g}" for name, value in results["attribution"].items()))
        _log(trainer, "final", raw)
        _save_images(directory / "images", raw)
        outcomes = {"reconstruction": raw}
        for name, images, misfit, seconds in enhancements:
            if truth:  # an enhanced image is still of the original that its reconstruction was matched to
                settled = raw.scorecard.assignment
                scorecard = score(images, truth.images, None, truth.labels, recogniser, lpips, settled)
            outcomes[name] = Outcome(images, labels, scorecard, misfit)
            results[name] = _results_of(outcomes[name]) | {"seconds": round(seconds, 3)}
            verb = "Enhanced" if name == "enhanced" else name.capitalize()
            maker = type(self.enhancers[name]).__name__
            print(f"{verb} by {maker} in {seconds:.1f} s: {_line(outcomes[name])}", flush=True)
            _log(trainer, name, outcomes[name])
            _save_images(directory / name, outcomes[name])
        for name, reason in self.left_out.items():
            print(f"{name.capitalize()} is left out: {reason}")

        if truth:
            write_text(directory / "per_image.csv", _table(truth, outcomes, reconstruction.peers))
        if len(self.enhancers) + len(self.left_out) > 1:
            results["left_out"] = self.left_out
            write_text(directory / "comparison.csv", _comparison(results, outcomes))
        with atomic_path(directory / "panel.png") as temporary:
            _panel(truth, outcomes).save(temporary, format="png")
        write_json(directory / "results.json", results)
        print(f"Pictures and numbers: {directory}", flush=True)

    def _enhance(
        self, attack: Attack, reconstruction: Reconstruction, seed: int
    ) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """Name, images, misfit and seconds of every enhancement; all processes must go through them together."""
        for name, enhancer in self.enhancers.items():
            began = time.perf_counter()
            chunks = torch.arange(len(reconstruction.images)).split(enhancer.chunk_size)
            images = torch.zeros_like(reconstruction.images)
            try:
                with attack.ranks.fail_together():
                    for number in attack.ranks.shard(len(chunks)).tolist():
                        part = reconstruction.part(chunks[number])
                        images[chunks[number]] = enhancer.enhance(part, seed).to(images)
            except AuditError as error:
                if len(self.enhancers) + len(self.left_out) == 1:
                    raise
                self.left_out[name] = str(error)
                continue
            images = attack.ranks.reduce(images)
            seconds = time.perf_counter() - began
            yield name, images.cpu(), attack.misfit(images, reconstruction.labels).cpu(), seconds

    def _results(self, trainer: Trainer, attack: Attack, raw: Outcome, memory: int) -> dict[str, Any]:
        observations = attack.observations
        packages = ("torch", "lightning", "torchvision", "torchmetrics")
        return {
            "attack": type(attack).__name__,
            **_results_of(raw),
            "steps": trainer.global_step,
            "seconds": round(self.seconds, 3),
            "peak_memory_mb": memory,
            "knowledge": observations[-1].sources,
            "believed": {
                name: value
                for name, value in vars(observations[-1].beliefs).items()
                if name not in ("labels", "client_sizes")
            },
            "observed_rounds": [observation.round for observation in observations],
            "observation": str(trainer.datamodule.record.directory),
            "postprocess": ", ".join(type(enhancer).__name__ for enhancer in self.enhancers.values()) or "none",
            "seed": trainer.datamodule.federation.seed,
            "precision": str(trainer.precision),
            "device": torch.cuda.get_device_name(attack.device) if attack.device.type == "cuda" else _cpu(),
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        }


def _recogniser(truth: Truth) -> Recognises | None:
    """A classifier of the true classes that takes no part in any attack, if there is one."""
    if truth.imagenet_labels:
        return Recogniser()
    return Cifar10Recogniser() if tuple(truth.class_names) == CIFAR10 else None


def claim(directory: Path) -> Path:
    """Make a directory this run's own until the returned lock file is deleted.

    Raises:
        RunDirectoryError: a run is writing there, or has left its results.
    """
    if (directory / "results.json").exists():
        raise RunDirectoryError(
            f"'{directory}' holds the results of a finished run. Leave `trainer.logger.version` out to get a new "
            "directory, or delete this one."
        )
    directory.mkdir(parents=True, exist_ok=True)
    lock = directory / "run.lock"
    try:
        with lock.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        owner = lock.read_text()
        if owner.isdecimal() and Path(f"/proc/{owner}").exists() and int(owner) != os.getpid():
            raise RunDirectoryError(
                f"Process {owner} is writing to '{directory}'. Wait for it, or leave `trainer.logger.version` out to "
                "get a new directory."
            ) from None
        lock.write_text(str(os.getpid()))  # left behind by a run that was killed
    return lock


def _results_of(outcome: Outcome) -> dict[str, Any]:
    scores = outcome.scorecard.summary() if outcome.scorecard else {}
    return {"scores": scores, "misfit": outcome.misfit.mean().item()}


def _line(outcome: Outcome) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in outcome.numbers().items())


def _log(trainer: Trainer, prefix: str, outcome: Outcome) -> None:
    if isinstance(trainer.logger, TensorBoardLogger) and outcome.scorecard:
        scores = {f"{prefix}/{name}": value for name, value in outcome.scorecard.summary().items()}
        trainer.logger.log_metrics(scores, trainer.global_step)


def _save_images(directory: Path, outcome: Outcome) -> None:
    for index, image in enumerate(outcome.images):
        save_png(image, directory / f"{index:03d}.png")


def _panel(truth: Truth | None, outcomes: dict[str, Outcome]) -> Image.Image:
    if truth is None:
        return draw_panel({name: outcome.images for name, outcome in outcomes.items()})
    rows, captions = {"original": truth.images}, []
    for name, outcome in outcomes.items():
        rows[name] = outcome.images[outcome.scorecard.assignment.clamp_min(0)]
        rows[name][outcome.scorecard.assignment < 0] = torch.nan
        captions.append([f"{psnr:.1f}" for psnr in outcome.scorecard.per_image["psnr"]])
    return draw_panel(rows, [f"{' / '.join(psnrs)} dB" for psnrs in zip(*captions, strict=True)])


def _table(truth: Truth, outcomes: dict[str, Outcome], peers: Tensor | None) -> str:
    """One row an original, in the peers' order; `peer` is the one that was found, in a numbering of its own."""
    raw = outcomes["reconstruction"]
    assignment, columns = raw.scorecard.assignment, {}
    for name, outcome in outcomes.items():
        prefix = "" if outcome is raw else f"{name}_"
        for score_name, column in outcome.scorecard.per_image.items():
            if outcome is raw or score_name not in OF_ORIGINALS:
                columns[prefix + score_name] = column
        columns[f"{prefix}misfit"] = _misfit_column(outcome, assignment)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["original", "client", "label", "class", "reconstruction", "inferred_label", "peer", *columns])
    for i, j in enumerate(assignment.tolist()):
        label = int(truth.labels[i])
        inferred = int(raw.labels[j]) if j >= 0 else ""
        peer = int(peers[j]) if j >= 0 and peers is not None else ""
        scores = [f"{float(column[i]):.6g}" for column in columns.values()]
        writer.writerow([i, int(truth.clients[i]), label, truth.class_names[label], j, inferred, peer, *scores])
    return text.getvalue()


def _comparison(results: dict[str, Any], outcomes: dict[str, Outcome]) -> str:
    """One row an enhancement, the raw reconstruction first."""
    rows = {name: results if name == "reconstruction" else results[name] for name in outcomes}
    columns = list(results["scores"])
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["images", "seconds", "misfit", *columns])
    for name, row in rows.items():
        scores = [row["scores"].get(column, "") for column in columns]
        writer.writerow([name, row["seconds"], *(f"{v:.6g}" if v != "" else "" for v in [row["misfit"], *scores])])
    return text.getvalue()


def _misfit_column(outcome: Outcome, assignment: Tensor) -> Tensor:
    """(M,) misfit of each original's reconstruction, NaN if it has none; the same for all if it is one of them all."""
    column = outcome.misfit.expand(len(outcome.images))[assignment.clamp_min(0)].clone()
    column[assignment < 0] = torch.nan
    return column


def _peak_memory_mb(device: torch.device) -> int:
    """Peak memory of this process, or of the GPU if the attack ran on one, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20


def _cpu() -> str:
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
