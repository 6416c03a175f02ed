"""A study of a thousand runs: what each costs beside its own work, and its report."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from attack_modules.audit.audit import audit
from attack_modules.audit.study import Scenario, Study


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Where others compute on the same cores, several threads wait for each other at each of many small sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["federation.client.lr", "knowledge.client_lr"])
def test_a_thousand_runs_cost_little_beside_their_work(study: Study, fake: Callable, tmp_path: Path, name: str) -> None:
    """All in one scenario's grid, of federations or of knowledge, which is where costs could be quadratic."""
    many = Scenario("many", grid={name: [round(0.001 * i, 3) for i in range(1, 168)]})

    def report(**more: object) -> float:
        began = time.monotonic()
        audit(
            fake, lambda arguments: {"model": {"class_path": "FeatureInversion"}}, lambda arguments: None,
            "python cli.py audit", {},
            study.title, [many], study.base, study.settings, study.defences, [0, 1, 2], tmp_path, workers=2, **more,
        )  # fmt: skip
        return time.monotonic() - began

    whole = report()
    alone = report(report_only=True)
    print(f"{name}: {whole:.1f} s for 1002 runs of a few milliseconds and their report, {alone:.1f} s for that alone")
    assert alone < 30
    assert (whole - alone) / 1002 < 0.1
    assert (tmp_path / "report.html").stat().st_size < 10 << 20
