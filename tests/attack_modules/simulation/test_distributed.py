"""Two processes against one, through the command line."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.io import decode_image

from attack_modules.simulation.distributed import Ranks
from cli import main

ROOT = Path(__file__).parents[3]
SMALL = ["--data.image_size", "16", "--trainer.max_steps", "4", "--trainer.val_check_interval", "4",
         "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
         "--trainer.enable_model_summary", "false", "--model.checkpoint_every", "2"]  # fmt: skip
INVERSION = ["fit", "--config", str(ROOT / "configs/inversion.yaml"), *SMALL, "--trainer.precision", "64-true"]
LEAKAGE = ["fit", "--config", str(ROOT / "configs/demo.yaml"), *SMALL]
RUNS = {
    "merged": INVERSION,
    "batches": [*INVERSION, "--federation.client.batch_size", "3", "--federation.client.momentum", "0.5",
                "--federation.client.weight_decay", "0.1", "--model.restarts", "2"],
    "clients": [*INVERSION, "--model.merged", "false", "--model.objective", "Cosine"],
    "head": [*INVERSION, "--model.simulate", "head"],
    "refined": [*LEAKAGE, "--config", str(ROOT / "configs/refined.yaml"), "--trainer.precision", "64-true"],
    "attribution": [*LEAKAGE, "--config", str(ROOT / "configs/attribution.yaml")],
    "leakage": [*LEAKAGE, "--postprocess", "DirectEnhancement", "--postprocess.chunk_size", "4",
                "--postprocess.schedule", "Karras", "--postprocess.schedule.steps", "2"],
}  # fmt: skip
RESUMED = ["merged", "refined", "leakage"]
STOP = ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "0"]  # the last checkpoint is of step 2
SCRIPT = "import json; from cli import main; [main(arguments) for arguments in json.load(open('several.json'))]"


def named(name: str, arguments: list[str]) -> list[str]:
    return [*arguments, "--trainer.logger.init_args.name", name]


def resumed(name: str, before: int, after: int) -> list[str]:
    checkpoint = f"runs/{name}-stopped-{before}/version_0/checkpoints/last.ckpt"
    return [*named(f"{name}-{before}-{after}", RUNS[name]), "--ckpt_path", checkpoint]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As many as each of two processes gets: sums in another order lead iterated gates elsewhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_chunks_are_halved_where_memory_does_not_suffice() -> None:
    sizes, whole, ranks = [], torch.zeros(11), Ranks()

    def double(chunk: Tensor) -> Tensor:
        sizes.append(len(chunk))
        if len(chunk) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 2.0 * chunk

    ranks.gather(whole, double, 9)
    assert torch.equal(whole, 2.0 * torch.arange(11))
    assert sizes == [9, 4, 2, 2, 2, 2, 2, 1]
    ranks.gather(whole, double, 9)
    assert sizes[8:] == [2, 2, 2, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):  # rows that depend on each other
        ranks.gather(whole, double, 9, divisible=False)
    assert sizes[14:] == [9]


def test_a_chunk_of_one_that_has_no_room_is_an_error() -> None:
    def full(chunk: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        Ranks().gather(torch.zeros(3), full, 2)


PATHS = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="module")
def runs(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of all runs `<name>-<1 or 2 processes>/version_0`, and what the two processes printed."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "several.py").write_text(SCRIPT)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        for name, arguments in RUNS.items():
            main(named(f"{name}-1", arguments))
        for name in RESUMED:
            main(named(f"{name}-stopped-1", [*RUNS[name], *STOP]))
        together = [named(f"{name}-2", arguments) for name, arguments in RUNS.items()]
        together += [named(f"{name}-stopped-2", [*RUNS[name], *STOP]) for name in RESUMED]
        together += [resumed(name, 1, 2) for name in RESUMED]
        two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
        (folder / "several.json").write_text(json.dumps([[*arguments, *two] for arguments in together]))
        done = subprocess.run(
            [sys.executable, "several.py"],
            env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-5000:]
        for name in RESUMED:
            main(resumed(name, 2, 1))
    return folder / "runs", done.stdout


def state(run: Path) -> dict[str, Tensor]:
    checkpoint = torch.load(run / "version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    return checkpoint["state_dict"]


def same_states(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to the rounding of sums in another order, which four steps of Adam carry on: 1.7e-6 in float32."""
    for name, tensor in expected.items():
        tolerance = 1e-7 if tensor.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_find_the_images_of_one(runs: tuple[Path, str], name: str) -> None:
    alone, together = (state(runs[0] / f"{name}-{count}") for count in (1, 2))
    same_states(together, alone)
    scores = [json.loads((runs[0] / f"{name}-{n}/version_0/results.json").read_text()) for n in (1, 2)]
    assert scores[1]["scores"] == pytest.approx(scores[0]["scores"], rel=1e-4)
    assert scores[1]["misfit"] == pytest.approx(scores[0]["misfit"], rel=1e-4)


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("counts", ["1-2", "2-1"])
def test_a_run_goes_on_with_another_number_of_processes(runs: tuple[Path, str], name: str, counts: str) -> None:
    same_states(state(runs[0] / f"{name}-{counts}"), state(runs[0] / f"{name}-1"))


def test_enhanced_images_are_those_of_one_process(runs: tuple[Path, str]) -> None:
    alone, together = (sorted((runs[0] / f"leakage-{n}/version_0/enhanced").iterdir()) for n in (1, 2))
    for one, other in zip(alone, together, strict=True):
        assert (decode_image(one).int() - decode_image(other).int()).abs().max() <= 1  # grey level
    assert len(alone) == 12


def test_everything_is_said_and_written_once(runs: tuple[Path, str]) -> None:
    folder, printed = runs
    count = len(RUNS) + 2 * len(RESUMED)
    assert printed.count("Attacker: an honest-but-curious client") == printed.count("Pictures and numbers: ") == count
    assert printed.count("Told to the attacker") == count
    for run in folder.glob("*-2"):
        assert [version.name for version in run.iterdir()] == ["version_0"]
        assert len(list(run.glob("version_0/events*"))) == 1
        assert not (run / "version_0/run.lock").exists()


def test_what_cannot_be_divided_is_refused_in_one_sentence(tmp_path: Path) -> None:
    arguments = [*INVERSION, "--data.num_clients", "2", "--data.images_per_client", "2", "--model.merged", "false"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *arguments, "--trainer.devices", "2", "--trainer.strategy", "ddp"],
        env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert done.stderr.count("1 peer cannot be divided among 2 processes") == 1
    assert "Traceback" not in done.stderr
