"""Options of the benchmarks, what they work on, and the one table that they print."""

import os
from pathlib import Path

import pytest
import torch
from setting import PEERS, Setting, Table

from attack_modules.threat_model.knowledge import Knowledge
from attack_modules.threat_model.observed import ObservedRounds
from fl_lightning.allocation import keep_freed_memory
from fl_lightning.client import LocalTraining
from fl_lightning.data import ImageFolder
from fl_lightning.federation import Federation


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("curious client")
    group.addoption("--images", type=int, default=64, help="Images of the peers, a multiple of 4.")
    group.addoption("--image-size", type=int, default=128)
    group.addoption("--rounds", type=int, default=3, help="Interleaved repetitions, of which the median is shown.")
    group.addoption("--attack-steps", type=int, default=100, help="Steps of gradient matching.")
    group.addoption("--data-root", default=os.environ.get("CURIOUS_CLIENT_IMAGES"), help="FOLDER/<class>/*.jpg")


@pytest.fixture(scope="session")
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    option = request.config.getoption
    if not option("--data-root") or not Path(option("--data-root")).is_dir():
        pytest.skip("No images: give --data-root FOLDER (FOLDER/<class>/*.jpg) or set CURIOUS_CLIENT_IMAGES.")
    images, size = option("--images"), option("--image-size")
    data = ImageFolder(
        root=option("--data-root"), num_clients=PEERS + 1, images_per_client=images // PEERS, image_size=size, seed=0
    )
    federation = Federation(client=LocalTraining(lr=0.003, local_epochs=3), seed=0)
    rounds = ObservedRounds(Knowledge(), federation, data, tmp_path_factory.mktemp("record"))
    rounds.prepare_data()
    rounds.setup()
    return Setting(rounds, images, size, option("--rounds"), option("--attack-steps"))


ROWS = pytest.StashKey[list[tuple[str, ...]]]()


def pytest_configure(config: pytest.Config) -> None:
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    config.stash[ROWS] = []


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    return Table(request.config.stash[ROWS])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if rows:
        option = config.getoption
        terminalreporter.write_line(
            f"\n{option('--images')} images at {option('--image-size')}x{option('--image-size')}, seed 0, "
            f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, medians of {option('--rounds')}.\n"
        )
        for row in [("what", "value", "ratio", "remark"), ("---",) * 4, *rows]:
            terminalreporter.write_line(f"| {' | '.join(row)} |")
