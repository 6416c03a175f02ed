"""The commands of the README, in-process, on small images."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image
from torch import Tensor

from attack_modules import FeatureInversion
from attack_modules.analytic.typical_head import pink_noise
from attack_modules.attack import AttackError, Reconstruction
from attack_modules.diffusion.classes import CIFAR10
from attack_modules.diffusion.trained.class_conditional import SmallConditional
from attack_modules.enhance.enhancer import Enhancer
from attack_modules.enhance.shortcuts import NAMED
from attack_modules.gradient_matching.gradient_inversion import GradientInversion
from attack_modules.panels import save_png
from cli import AuditTrainer, main, run
from fl_lightning.command_line.former_names import with_todays_names
from fl_lightning.errors import AuditError, MissingFile, SettingError
from fl_lightning.storage import StorageError, load_checkpoint
from fl_lightning.truth import Truth

ROOT = Path(__file__).parent.parent
SMALL = ["--data.image_size", "16", "--trainer.max_steps", "4", "--trainer.val_check_interval", "2",
         "--trainer.accelerator", "cpu"]  # fmt: skip
INVERSION = ["fit", "--config", str(ROOT / "configs/inversion.yaml"), *SMALL]
DEMO = ["fit", "--config", str(ROOT / "configs/demo.yaml"), *SMALL]
TINY = [*INVERSION, "--data.num_clients", "2", "--data.images_per_client", "1"]
PRIOR = "attack_modules.diffusion.trained.photo_prior.DiffusionPrior"
CROPS = "attack_modules.diffusion.trained.photo_crops.PhotoCrops"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also in the background, where shells have it ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for index, image in enumerate(pink_noise(80, (3, 16, 16))):
        save_png(image, tmp_path / "photos" / f"class_{index:02d}" / "a.png")
    return tmp_path / "photos"


def results(version: int, name: str = "inversion") -> dict:
    return json.loads(Path(f"runs/{name}/version_{version}/results.json").read_text())


def test_a_run_leaves_numbers_pictures_and_its_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    main(INVERSION)
    run = Path("runs/inversion/version_0")
    rows = list(csv.DictReader((run / "per_image.csv").open()))
    assert len(rows) == 12
    assert rows[0]["class"] == "astronaut"
    mean = sum(float(row["psnr"]) for row in rows) / 12
    assert results(0)["scores"]["psnr_mean"] == pytest.approx(mean, rel=1e-4)
    assert results(0)["knowledge"]["labels"] == "known"
    assert results(0)["steps"] == 4
    assert len(list((run / "images").glob("*.png"))) == 12
    assert Image.open(run / "images/000.png").size == (16, 16)
    assert Image.open(run / "panel.png").width > 12 * 16
    assert list((run / "checkpoints").glob("*.ckpt"))
    assert not (run / "run.lock").exists()
    printed = capsys.readouterr().out
    assert "an honest-but-curious client (aggregation weight 25%)" in printed
    assert "Its 3 peers hold 12 images" in printed
    assert "2,304 unknowns" in printed
    assert "Pictures and numbers: runs/inversion/version_0" in printed


def test_the_progress_bar_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    main([*INVERSION, "--trainer.enable_progress_bar", "false"])
    assert results(0)["steps"] == 4
    assert "4/4" not in capsys.readouterr().out


def test_a_run_shorter_than_the_time_between_panels_shows_its_end() -> None:
    main([*INVERSION, "--trainer.val_check_interval", "5"])
    assert results(0)["steps"] == 4


def test_panels_and_scores_reach_tensorboard() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main(INVERSION)
    events = EventAccumulator("runs/inversion/version_0")
    events.Reload()
    assert "panel" in events.Tags()["images"]
    assert {"loss", "psnr_mean", "final/psnr_mean"} <= set(events.Tags()["scalars"])


def test_layered_defences_stand_in_the_results() -> None:
    layers = [part for name in ("top_k", "sign", "dp_fed_avg") for part in
              ("--config", str(ROOT / f"configs/defenses/{name}.yaml"))]  # fmt: skip
    main([*TINY, *layers, "--federation.client.defenses.scale", "0.001", "--knowledge.defenses", "unknown"])
    results = json.loads(Path("runs/inversion/version_0/results.json").read_text())
    top_k = {"class": "TopK", "keep": 0.1, "per_layer": True, "error_feedback": False}
    assert results["defenses"] == [top_k, {"class": "Sign", "scale": 0.001}]
    assert [found["class"] for found in results["server_defenses"]] == ["DPFedAvg"]
    assert (results["knowledge"]["defenses"], results["assumed"]["defenses"]) == ("unknown", [])
    (privacy,) = results["privacy"]
    assert (privacy["unit"], privacy["delta"], privacy["trusts_server"]) == ("client", 1e-5, True)
    assert 4 < privacy["epsilon"] < 5.5  # of one Gaussian mechanism with noise multiplier 1


def test_configurations_of_version_0_1_run(tmp_path: Path) -> None:
    """Names of classes and settings have changed since."""
    config = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    config["model"] = {"class_path": "attack_modules.RefinedInversion", "init_args": {"anneal": [0.3, 0.01], "lr": 0.1}}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "old.yaml", *SMALL])
    saved = yaml.safe_load(Path("runs/demo/version_0/config.yaml").read_text())["model"]
    assert saved["init_args"]["prior_limit"] == [0.3, 0.01]
    config = yaml.safe_load((ROOT / "configs/inversion.yaml").read_text())
    config["model"]["init_args"]["scale_factor"] = config["model"]["init_args"].pop("latent_downscale")
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "old.yaml", *SMALL])
    saved = yaml.safe_load(Path("runs/inversion/version_0/config.yaml").read_text())["model"]
    assert saved["init_args"]["latent_downscale"] == 2
    former = {"class_path": "attack_modules.diffusion.small.ConditionalTraining",
              "init_args": {"model": {"class_path": "attack_modules.diffusion.small.SmallConditional"}}}  # fmt: skip
    today = with_todays_names(former)
    assert today["class_path"] == "attack_modules.diffusion.trained.class_conditional.ClassConditionalDiffusion"
    assert today["init_args"]["model"]["class_path"].endswith("trained.class_conditional.SmallConditional")


def test_a_run_without_truth_leaves_what_was_inferred() -> None:
    main(DEMO)
    (record,) = Path("runs/federations").iterdir()
    shutil.rmtree(record / "truth")
    (record / "settings.json").unlink()
    guesses = {"client_lr": 0.003, "server_lr": 1.0, "local_epochs": 3, "batch_size": "null"}
    main([*DEMO, *(f"--knowledge.{name}={value}" for name, value in guesses.items()), "--observation", str(record)])
    rows = list(csv.DictReader(Path("runs/demo/version_1/per_image.csv").read_text().splitlines()))
    assert sorted(int(row["inferred_label"]) for row in rows) == list(range(12))
    assert len({row["peer"] for row in rows}) == 3
    diagnosis = results(1, "demo")["diagnosis"]
    assert diagnosis["num_images"] == diagnosis["disentangled"] == 12
    assert diagnosis["peers"] == 3
    assert diagnosis["images_by_class"] == {str(label): 1 for label in range(12)}


def test_an_enhancement_that_fails_leaves_the_attacks_results(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(Enhancer):
        def enhance(self, reconstruction: Reconstruction, seed: int) -> Tensor:
            raise SettingError("These are too many images.")

    monkeypatch.setitem(NAMED, "semantic", Picky)
    with pytest.raises(SettingError, match="too many images"):
        main([*INVERSION, "--postprocess", "semantic"])
    assert results(0)["scores"]["originals"] == 12
    assert Path("runs/inversion/version_0/panel.png").exists()
    assert Path("runs/inversion/version_0/per_image.csv").exists()


def test_the_time_of_an_attack_includes_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = FeatureInversion.prepare

    def slowly(self: FeatureInversion) -> None:
        time.sleep(2.0)
        prepare(self)

    monkeypatch.setattr(FeatureInversion, "prepare", slowly)
    main(DEMO)
    assert results(0, "demo")["seconds"] > 2.0


def test_a_demo_prints_what_a_person_needs() -> None:
    """In a process of its own, where Lightning's advice would be printed."""
    command = [sys.executable, str(ROOT / "cli.py"), *DEMO]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) <= 20, lines
    assert lines[-1] == "Pictures and numbers: runs/demo/version_0" or "LPIPS" in lines[-1]
    assert not any(word in done.stdout + done.stderr for word in ("Tip", "other params", "UserWarning", "LeafSpec"))


LOOKING = """
import os, sys
class Torch:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.exit(os.environ["OMP_WAIT_POLICY"])
sys.meta_path.insert(0, Torch())
import cli
"""


def test_waiting_threads_sleep_unless_the_user_says_otherwise() -> None:
    """It is settled before PyTorch is imported, which reads it then."""
    asked = {**os.environ, "PYTHONPATH": str(ROOT)}
    asked.pop("OMP_WAIT_POLICY", None)
    for given, found in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        done = subprocess.run([sys.executable, "-c", LOOKING], env=asked | given, capture_output=True, text=True)
        assert done.stderr.strip() == found


def test_the_record_is_reused_and_the_saved_configuration_runs_again() -> None:
    main(INVERSION)
    (record,) = Path("runs/federations").iterdir()
    written = (record / "observed/round_0000.safetensors").stat().st_mtime_ns
    main(["fit", "--config", "runs/inversion/version_0/config.yaml"])
    assert (record / "observed/round_0000.safetensors").stat().st_mtime_ns == written
    assert results(0)["scores"] == results(1)["scores"]


@pytest.mark.parametrize("every", ["2", "3", "10"])
def test_scores_are_recomputed_from_the_last_checkpoint(every: str) -> None:
    """Of the last of 4 steps, also where it is no multiple of `checkpoint_every` or there are fewer."""
    run = [*INVERSION[1:], "--model.checkpoint_every", every]
    main(["fit", *run])
    main(["test", *run, "--ckpt_path", "runs/inversion/version_0/checkpoints/last.ckpt"])
    assert results(1)["scores"] == pytest.approx(results(0)["scores"], rel=1e-4)


def test_a_seed_makes_another_federation() -> None:
    main(INVERSION)
    main([*INVERSION, "--seed_everything", "1"])
    assert len(list(Path("runs/federations").iterdir())) == 2
    assert results(1)["seed"] == 1


def test_the_attack_never_reads_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the truth taken away after the federation, the attack ends with the same images."""
    main(INVERSION)
    (record,) = Path("runs/federations").iterdir()
    for path in record.glob("truth/*"):
        path.unlink()
    (record / "settings.json").unlink()  # what is left is as if it came from a real system

    def refuse(stem: Path) -> None:
        raise AssertionError(f"the truth was opened at {stem}")

    monkeypatch.setattr(Truth, "load", refuse)
    guesses = {"labels": "inferred", "label_counts": "inferred", "num_images": 12, "num_clients": 3,
               "client_lr": 0.003, "server_lr": 1.0, "local_epochs": 3, "batch_size": "null"}  # fmt: skip
    knowledge = [f"--knowledge.{name}={value}" for name, value in guesses.items()]
    main([*INVERSION, *knowledge, "--observation", str(record)])
    assert results(1)["scores"] == {}
    assert results(1)["knowledge"]["client_lr"] == "guessed"
    for path in Path("runs/inversion/version_0/images").iterdir():  # 12 photographs of 12 classes: the labels are found
        assert (Path("runs/inversion/version_1/images") / path.name).read_bytes() == path.read_bytes()


def test_demo_is_blind_and_never_reads_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    main([*DEMO, "--trainer.max_steps", "40"])
    assert results(0, "demo")["scores"]["label_accuracy"] == 1
    assert results(0, "demo")["scores"]["psnr_mean"] > 18
    assert results(0, "demo")["knowledge"]["num_images"] == "inferred"
    (record,) = Path("runs/federations").iterdir()
    (record / "settings.json").unlink()
    monkeypatch.setattr(Truth, "load", lambda stem: pytest.fail(f"the truth was opened at {stem}"))
    for path in record.glob("truth/*"):
        path.unlink()
    guesses = {"client_lr": 0.003, "server_lr": 1.0, "local_epochs": 3, "batch_size": "null"}
    knowledge = [f"--knowledge.{name}={value}" for name, value in guesses.items()]
    main([*DEMO, "--trainer.max_steps", "40", *knowledge, "--observation", str(record)])
    for path in Path("runs/demo/version_0/images").iterdir():
        assert (Path("runs/demo/version_1/images") / path.name).read_bytes() == path.read_bytes()


def test_leakage_configuration(image_folder: Path) -> None:
    main(["fit", "--config", str(ROOT / "configs/leakage.yaml"), "--data.root", str(image_folder), *SMALL])
    assert results(0, "leakage")["scores"]["originals"] == 64


@pytest.mark.slow
def test_attribution_names_the_peer_of_every_image_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    run = [*DEMO, "--config", str(ROOT / "configs/attribution.yaml"), "--federation.client.local_epochs", "1",
           "--model.checkpoint_every", "2", "--data.images_per_client", "2"]  # fmt: skip
    main(run)
    assert "6 different ones" in capsys.readouterr().out
    attribution = results(0, "demo")["attribution"]
    assert attribution == {"peers": 3, "clients": 3, "adjusted_rand": 1}
    assert results(0, "demo")["scores"]["originals"] == results(0, "demo")["scores"]["reconstructions"] == 6
    rows = list(csv.DictReader(Path("runs/demo/version_0/per_image.csv").read_text().splitlines()))
    assert len({(row["client"], row["peer"]) for row in rows}) == 3

    main([*run, "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "0"])
    main([*run, "--ckpt_path", "runs/demo/version_1/checkpoints/last.ckpt"])
    for path in Path("runs/demo/version_0/images").iterdir():
        assert (Path("runs/demo/version_2/images") / path.name).read_bytes() == path.read_bytes()


def test_refinement_goes_on_where_it_stopped() -> None:
    run = [*DEMO, "--config", str(ROOT / "configs/refined.yaml"), "--model.checkpoint_every", "2"]
    main(run)
    assert results(0, "demo")["attack"] == "FeatureInversion + Refinement"
    main([*run, "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "0"])
    main([*run, "--ckpt_path", "runs/demo/version_1/checkpoints/last.ckpt"])
    for path in Path("runs/demo/version_0/images").iterdir():
        assert (Path("runs/demo/version_2/images") / path.name).read_bytes() == path.read_bytes()


def test_paper_configuration(image_folder: Path) -> None:
    main(["fit", "--config", str(ROOT / "configs/paper.yaml"), "--data.root", str(image_folder), *SMALL])
    assert results(0, "paper")["scores"]["originals"] == 64
    assert results(0, "paper")["scores"]["labels_found"] == 1


def test_own_images_under_any_attack_configuration(tmp_path: Path) -> None:
    for index, image in enumerate(pink_noise(5, (3, 20, 24))):
        save_png(image, tmp_path / f"own/{index}.png")
    rows = ["path,label,client", "0.png,cat,0", "1.png,dog,0", "2.png,cat,1", "3.png,bird,attacker"]
    (tmp_path / "own/manifest.csv").write_text("\n".join(rows))
    main([*INVERSION, "--data.csv", str(tmp_path / "own/manifest.csv")])
    assert results(0)["scores"]["originals"] == 3
    (tmp_path / "own/manifest.csv").write_text("\n".join([*rows, "gone.png,cat,1"]))
    with pytest.raises(ValueError, match="line 6: there is no image"):
        main([*INVERSION, "--data.csv", str(tmp_path / "own/manifest.csv")])


SMOOTHING = """
import torch
from torch.nn import functional as F
from attack_modules.diffusion.denoiser import Denoiser

class Smoothing(Denoiser):
    sigma_min, sigma_max, multiple = 0.01, 10.0, 4

    def __init__(self, window: int = 3) -> None:
        super().__init__()
        self.window = window

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        smooth = F.avg_pool2d(noisy, self.window, 1, self.window // 2, count_include_pad=False)
        return torch.lerp(noisy, smooth, (sigma / (sigma + 0.1)).view(-1, 1, 1, 1))
"""


@pytest.fixture
def direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`configs/postprocess/direct.yaml` with a denoiser that needs no weights."""
    (tmp_path / "smoothing.py").write_text(SMOOTHING)
    monkeypatch.syspath_prepend(tmp_path)
    return ["--config", str(ROOT / "configs/postprocess/direct.yaml"),
            "--postprocess.init_args.denoiser", "smoothing.Smoothing"]  # fmt: skip


def test_enhanced_images_stand_beside_the_reconstructed_ones(
    direct: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*INVERSION, *direct])
    run = Path("runs/inversion/version_0")
    assert len(list((run / "enhanced").glob("*.png"))) == len(list((run / "images").glob("*.png"))) == 12
    assert (run / "enhanced/000.png").read_bytes() != (run / "images/000.png").read_bytes()
    assert results(0)["postprocess"] == "DirectEnhancement"
    enhanced = results(0)["enhanced"]
    assert enhanced["seconds"] > 0
    assert enhanced["misfit"] > 0
    assert enhanced["misfit"] != results(0)["misfit"] > 0
    with (run / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    for column, scores in (("psnr", results(0)["scores"]), ("enhanced_psnr", enhanced["scores"])):
        assert scores["psnr_mean"] == pytest.approx(sum(float(row[column]) for row in rows) / 12, rel=1e-4)
    printed = capsys.readouterr().out
    assert "Enhanced by DirectEnhancement in" in printed
    assert "misfit" in printed

    # A checkpoint can be enhanced without attacking again, and with its own configuration.
    checkpoint = str(run / "checkpoints/last.ckpt")
    main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", checkpoint])
    assert results(1)["scores"] == pytest.approx(results(0)["scores"], rel=1e-4)
    assert results(1)["enhanced"]["scores"] == pytest.approx(enhanced["scores"], rel=1e-3)
    assert results(1)["enhanced"]["misfit"] == pytest.approx(enhanced["misfit"], rel=1e-2)
    main(["test", *INVERSION[1:], "--ckpt_path", checkpoint])
    assert results(2)["postprocess"] == "none"
    assert "enhanced" not in results(2)
    height = Image.open(run / "panel.png").height
    assert height > Image.open("runs/inversion/version_2/panel.png").height  # a row more


def test_leakage_at_full_resolution_is_enhanced_without_truth(direct: list[str]) -> None:
    main([*DEMO, *direct])
    with Path("runs/demo/version_0/per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["misfit"] for row in rows}) == len({row["enhanced_misfit"] for row in rows}) == 12  # image by image
    (record,) = Path("runs/federations").iterdir()
    for path in [record / "settings.json", *record.glob("truth/*")]:
        path.unlink()
    guesses = {"client_lr": 0.003, "server_lr": 1.0, "local_epochs": 3, "batch_size": "null"}
    knowledge = [f"--knowledge.{name}={value}" for name, value in guesses.items()]
    main([*DEMO, *direct, *knowledge, "--observation", str(record)])
    assert results(1, "demo")["scores"] == results(1, "demo")["enhanced"]["scores"] == {}
    assert results(1, "demo")["enhanced"]["misfit"] > 0


def test_the_papers_enhancement_needs_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    paper = ["--config", str(ROOT / "configs/postprocess/direct_paper.yaml")]
    offline = ["--postprocess.init_args.denoiser.init_args.path", "gone.pt",
               "--postprocess.init_args.denoiser.init_args.download", "false"]  # fmt: skip
    with pytest.raises((ValueError, SystemExit, AuditError)):
        main([*INVERSION, *paper, *offline])
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["direct", "direct_paper"])
def test_a_fresh_process_knows_the_classes_that_enhancements_name(name: str) -> None:
    """Here, other tests may have imported what the command alone does not know."""
    command = [sys.executable, str(ROOT / "cli.py"), *DEMO, "--config", str(ROOT / f"configs/postprocess/{name}.yaml")]
    profiled = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([*command, "--print_config"], check=True, capture_output=True, text=True, env=profiled)
    assert "class_path: attack_modules.DirectEnhancement" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch" in loaded
    assert not loaded & {"sklearn", "skimage"}  # a second each: loaded where they are used
    assert ("diffusers" in loaded) == (name == "direct_paper")  # which names one of its classes


def test_federate_shows_accuracy_by_round(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        for label in ("cat", "dog"):
            for index, image in enumerate(pink_noise(count, (3, 32, 32), seed=len(label + split))):
                save_png(image, tmp_path / "cifar" / split / label / f"{index}.png")
    main(["federate", "--config", str(ROOT / "configs/federate_cifar10.yaml"), "--data.root", str(tmp_path / "cifar"),
          "--data.num_clients", "2", "--data.images_per_client", "null", "--federation.rounds", "2",
          "--data.partition", "IID", "--observation", "record"])  # fmt: skip
    assert Path("record/federation.ckpt").exists()
    assert Path("record/observed/round_0001.safetensors").exists()
    assert list(Path("record/tensorboard").glob("events*"))


def test_a_curious_server_attacks_a_single_client_too(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--config", str(ROOT / "configs/demo.yaml"), "--federation.seat", "CuriousServer",
          "--data.num_clients", "1", "--data.images_per_client", "1", "--data.image_size", "16",
          "--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--observation", "alone"])  # fmt: skip
    assert "Its 1 peer holds 1 image." in capsys.readouterr().out


def test_damaged_and_foreign_checkpoints_are_refused_before_work_starts() -> None:
    Path("broken.ckpt").write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(StorageError, match=r"'broken\.ckpt' is no checkpoint of a run"):
        main([*TINY, "--ckpt_path", "broken.ckpt"])
    assert not Path("runs").exists()
    main(TINY)
    checkpoint = ["--ckpt_path", "runs/inversion/version_0/checkpoints/last.ckpt"]
    for changed, difference in (
        ("--seed_everything=1", "model.seed was 0 and is now 1; the observed models are others"),
        ("--knowledge.labels=inferred", "knowledge.labels was 'known' and is now 'inferred'"),
        ("--model.subtract_own=false", "model.subtract_own was True and is now False"),
    ):
        with pytest.raises(AttackError, match=f"does not belong to this attack on this Observation: {difference}"):
            main([*TINY, changed, *checkpoint])
    assert [path.name for path in Path("runs/inversion").iterdir()] == ["version_0"]


def refusal(status: int, command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that a command ends with."""
    assert run(command.split()) == status
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert len(sentence) <= 400 + len("Error: ")
    return sentence.removeprefix("Error: ")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("fti", "'fti' is no command. Did you mean `fit`?"),
        ("fit", "`fit` needs a `model:`, e.g. `--model GradientInversion`, or a file of configs/."),
        ("fit --config nothere.yaml", "There is no configuration 'nothere.yaml'."),
        (
            f"fit --model {PRIOR}",
            "DiffusionPrior trains on images, but `data` is not given.",
        ),
        ("fit --config dmeo.yaml", "There is no configuration 'dmeo.yaml'. Did you mean 'demo.yaml'?"),
        ("fit --config broken.yaml", "'broken.yaml', line 2 is not valid YAML ("),
        ("--config typo.yaml", "`FeatureInversion` has no setting `model.lrr` in 'typo.yaml'. Did"),
        ("--modle X", "There is no setting `--modle`. Did you mean `--model`"),
        ("--trainer.max_step 3", "There is no setting `--trainer.max_step`. Did you mean `--tra"),
        ("--model.lrr 1", "`FeatureInversion` has no setting `model.lrr`. Did you mean `lr`?"),
        ("fit --model.lr 1 --config demo.yaml", "`--model.lr` stands before the `--config` that names its class."),
        ("--model FeatureInversoin", "`model` is 'FeatureInversoin', but must be a subclass of"),
        ("--federation.model LeNet6", "`federation.model` is 'LeNet6', but must be a subclass of"),
        ("--federation.model ResNet", "`federation.model` is 'ResNet', but must be a subclass of"),
        ("--federation.model my.Net", "`federation.model` names my.Net, which cannot be imported"),
        ("--knowledge.labels no", "`knowledge.labels` is 'no', but must be 'known' or 'inferred'"),
        ("--postprocess.denoiser X", "`postprocess.denoiser` is a setting of a class, but `postp"),
        ("--federation.client.lr", "`--federation.client.lr` has no value. Write"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_with_the_nearest_names(
    command: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "configs/demo.yaml", "demo.yaml")
    Path("broken.yaml").write_text("trainer: {max_steps: 3\nmodel: [\n")
    Path("typo.yaml").write_text("model: {class_path: FeatureInversion, init_args: {lrr: 0.1}}\n")
    full = f"fit --config demo.yaml {command}" if command.startswith("-") else command
    assert refusal(2, full, capsys).startswith(sentence)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("--trainer.max_steps 0", "`trainer.max_steps` is 0, so nothing would be run."),
        ("--trainer.fast_dev_run true", "`trainer.fast_dev_run` keeps nothing of a run"),
        ("--trainer.accelerator abacus", "Lightning refuses `trainer.accelerator: abacus`: "),
        ("--federation.accelerator abacus", "`federation.accelerator` is 'abacus', which cannot be used here ("),
        ("--trainer.check_val_every_n_epoch 0", "`trainer.check_val_every_n_epoch` is 0. Give at least 1"),
        ("--model.checkpoint_every 0", "`model.checkpoint_every` is 0, but it must be at least 1."),
        ("--trainer.precision bf16-true", "`trainer.precision` is bf16-true, but attacks solve linear equations"),
        ("--trainer.precision 16-mixed", "`trainer.precision` is 16-mixed, but processors do not compute in float16."),
        ("--trainer.logger.save_dir afile", "Nothing can be written in 'afile/inversion' ("),
        ("--model.betas [0.9,.nan]", "`model.betas` is nan, but must be a finite number"),
        ("--seed_everything -1", "`seed_everything` is -1, but a seed is a whole number from 0 to 4294967295."),
        ("--data.num_clients 1", "`data.num_clients` is 1, the attacker alone, so there is no peer to attack."),
        (f"--data {CROPS} --data.roots [.] --data.validation .", "`fit` needs federated images, but `data` is PhotoCr"),
        ("--model Cifar10Classifier --postprocess direct", "`postprocess` enhances what an attack reconstructs, but"),
        ("--ckpt_path afile", "'afile' is no checkpoint of a run."),
        ("--ckpt_path last", "There is no checkpoint 'last'."),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence(
    settings: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("afile").write_text("text")
    command = f"fit --config {ROOT}/configs/inversion.yaml --trainer.accelerator cpu {settings}"
    assert refusal(1, command, capsys).startswith(sentence)
    assert [path.name for path in Path().iterdir()] == ["afile"]


def test_a_defect_of_this_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientInversion, "check", lambda *_: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        run(TINY)


def test_an_attack_needs_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    configuration = yaml.safe_load((ROOT / "configs/inversion.yaml").read_text())
    del configuration["model"]
    Path("no_model.yaml").write_text(yaml.safe_dump(configuration))
    assert refusal(2, "fit --config no_model.yaml", capsys).startswith("`fit` needs a `model:`")


def test_every_seed_can_be_given_and_else_follows_the_common_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AuditTrainer, "federate", lambda *_, **__: None)
    Path("seeds.yaml").write_text("data: {init_args: {seed: 5}}\nfederation: {seed: 6}\n")
    for own, (data, federation, model) in {
        (): (3, 3, 3),
        ("--config", "seeds.yaml"): (5, 6, 3),
        ("--config", "seeds.yaml", "--federation.seed", "0", "--model.seed", "7"): (5, 0, 7),
    }.items():
        program = main(["federate", *INVERSION[1:3], *own, "--trainer.accelerator", "cpu", "--seed_everything", "3"])
        settings = program.config_init["federate"]
        assert (settings["data"].seed, settings["federation"].seed, program.model.seed) == (data, federation, model)
        saved = program.config["federate"]  # a seed that follows goes on following when this is loaded
        assert saved["federation"].seed == (None if not own else federation)


def test_an_interrupted_attack_leaves_its_best_so_far_and_goes_on(
    interruptible: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(TINY)
    step = GradientInversion.training_step

    def interrupted(self: GradientInversion, batch: int, batch_idx: int) -> None:
        if batch_idx == 2:
            signal.raise_signal(signal.SIGINT)
        step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(GradientInversion, "training_step", interrupted)
        run(TINY)
    assert ended.value.code == 128 + signal.SIGINT
    assert (results(1)["finished"], results(1)["steps"]) == (False, 3)
    assert (Path("runs/inversion/version_1/panel.png")).exists()
    (command,) = [line for line in capsys.readouterr().out.splitlines() if "To go on: " in line]
    go_on = shlex.split(command.partition("To go on: python ")[2])[1:]  # the program's name is that of the tests
    assert run(go_on) == 0
    assert (results(2)["finished"], results(2)["steps"]) == (True, 4)
    assert results(2)["seconds"] > load_checkpoint(Path(go_on[-1]))["callbacks"]["Evaluation"]["seconds"] > 0
    for path in Path("runs/inversion/version_0/images").iterdir():
        assert (Path("runs/inversion/version_2/images") / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(KeyboardInterrupt):  # as before
        signal.raise_signal(signal.SIGINT)

    go_on[-1] = go_on[-1].replace("version_1", "version_2")
    assert "is finished: all its 4 steps are done, and its results lie in" in refusal(1, shlex.join(go_on), capsys)
    assert not Path("runs/inversion/version_3").exists()
    assert run([*go_on, "--trainer.max_steps", "6"]) == 0
    assert (results(3)["finished"], results(3)["steps"]) == (True, 6)


def test_a_full_disk_leaves_the_best_so_far_and_one_sentence(
    interruptible: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise StorageError("Could not write 'last.ckpt': No space left on device. Free disk space.")

    monkeypatch.setattr("attack_modules.evaluation.run_directory.save_checkpoint", full)
    assert "No space left" in refusal(1, shlex.join([*TINY, "--model.checkpoint_every", "3"]), capsys)
    assert (results(0)["finished"], results(0)["steps"]) == (False, 3)
    assert len(list(Path("runs/inversion/version_0/images").iterdir())) == 1
    with pytest.raises(KeyboardInterrupt):  # an interruption is what it was before the run
        signal.raise_signal(signal.SIGINT)


def test_a_run_that_is_not_logged_keeps_to_a_folder_of_its_own() -> None:
    for number in range(2):
        main([*TINY, "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"])
        assert results(number, "GradientInversion")["steps"] == 4
    assert [path.name for path in Path().iterdir()] == ["runs"]
    assert not list(Path("runs/GradientInversion").rglob("*.ckpt"))


def test_a_prediction_writes_images_without_scores(capsys: pytest.CaptureFixture[str]) -> None:
    main(["predict", *TINY[1:]])
    assert "1 reconstructed images, without scores: runs/inversion/version_0/images" in capsys.readouterr().out
    assert len(list(Path("runs/inversion/version_0/images").iterdir())) == 1
    assert not Path("runs/inversion/version_0/results.json").exists()


def test_all_enhancements_are_compared_or_left_out_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Flipped(Enhancer):
        def enhance(self, reconstruction: Reconstruction, seed: int) -> Tensor:
            return reconstruction.images.flip(3)

    class Picky(Enhancer):
        def enhance(self, reconstruction: Reconstruction, seed: int) -> Tensor:
            raise SettingError("These are too many images.")

    def without_weights() -> Enhancer:
        raise MissingFile("There are no weights.")

    for name, make in {"direct": Flipped, "gan": without_weights, "semantic": Picky}.items():
        monkeypatch.setitem(NAMED, name, make)
    main([*INVERSION, "--postprocess", "compare"])
    run = Path("runs/inversion/version_0")
    assert results(0)["left_out"] == {"gan": "There are no weights.", "semantic": "These are too many images."}
    assert results(0)["postprocess"] == "Flipped, Picky"
    assert len(list((run / "direct").glob("*.png"))) == 12
    raw, direct = csv.DictReader((run / "comparison.csv").open())
    assert (raw["images"], direct["images"]) == ("reconstruction", "direct")
    assert float(direct["psnr_mean"]) == pytest.approx(results(0)["direct"]["scores"]["psnr_mean"], rel=1e-4)
    assert float(raw["psnr_mean"]) > float(direct["psnr_mean"])
    assert direct["label_accuracy"] == ""  # an enhancement infers no labels
    assert "direct_psnr" in next(csv.DictReader((run / "per_image.csv").open()))
    printed = capsys.readouterr().out
    assert "Direct by Flipped in" in printed
    assert "Gan is left out: There are no weights." in printed
    with pytest.raises(SettingError, match="too many images"):  # asked for by name, it has to be there
        main([*INVERSION, "--postprocess", "semantic"])


def test_a_checkpoint_is_judged_as_its_run_was() -> None:
    """Known images are inverted in as many steps as the checkpoint took, of which `test` counts none of its own."""
    demo = ["--config", str(ROOT / "configs/demo.yaml"), "--data.image_size", "16", "--trainer.max_steps", "12",
            "--trainer.val_check_interval", "12", "--trainer.accelerator", "cpu"]  # fmt: skip
    main(["fit", *demo])
    main(["test", *demo, "--ckpt_path", "runs/demo/version_0/checkpoints/last.ckpt"])
    fitted, tested = (
        [float(row["expected_psnr"]) for row in csv.DictReader(path.read_text().splitlines())]
        for path in (Path(f"runs/demo/version_{i}/per_image.csv") for i in (0, 1))
    )
    assert tested == pytest.approx(fitted, abs=0.2)


@pytest.fixture
def small_cifar10(tmp_path: Path) -> list[str]:
    """What `configs/semantic_demo.yaml` takes, with a model that was not trained."""
    for index, image in enumerate(pink_noise(20, (3, 32, 32))):
        save_png(image, tmp_path / "cifar/test" / CIFAR10[index % 10] / f"{index}.png")
    SmallConditional([8], 1).save(tmp_path / "diffusion.safetensors")
    return ["--data.root", str(tmp_path / "cifar"), "--data.images_per_client", "2", "--data.num_clients", "3",
            "--postprocess.init_args.model.init_args.weights", str(tmp_path / "diffusion.safetensors"),
            "--postprocess.init_args.timesteps", "3", "--postprocess.init_args.steps", "3",
            "--trainer.max_steps", "4", "--trainer.val_check_interval", "2",
            "--trainer.accelerator", "cpu"]  # fmt: skip


def test_semantic_demo_configuration(small_cifar10: list[str]) -> None:
    demo = ["--config", str(ROOT / "configs/semantic_demo.yaml"), *small_cifar10]
    main(["fit", *demo])
    run = Path("runs/semantic_demo/version_0")
    assert len(list((run / "enhanced").glob("*.png"))) == 4
    scores = results(0, "semantic_demo")
    assert {"recognised_top1", "psnr_mean"} <= scores["enhanced"]["scores"].keys()
    assert scores["knowledge"]["labels"] == "inferred"
    # `test` runs in inference mode, but the search differentiates.
    main(["test", *demo, "--ckpt_path", str(run / "checkpoints/last.ckpt")])
    assert results(1, "semantic_demo")["enhanced"]["scores"] == pytest.approx(scores["enhanced"]["scores"], rel=1e-2)


def test_semantic_enhancement_refuses_foreign_labels(small_cifar10: list[str]) -> None:
    weights = small_cifar10[small_cifar10.index("--postprocess.init_args.model.init_args.weights") + 1]
    sentence = r"attacked model has 16 classes, but the diffusion model has 10, airplane to t"
    with pytest.raises(SettingError, match=sentence):
        main([*INVERSION, "--postprocess", "SemanticEnhancer", "--postprocess.model", "TrainedConditional",
              "--postprocess.model.weights", weights])  # fmt: skip
