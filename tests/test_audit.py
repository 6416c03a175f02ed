"""The command `audit`, from its configuration to its report."""

import json
import shutil
from functools import partial
from pathlib import Path
from threading import Event

import pytest
from torch import nn

import cli
from attack_modules.audit.study import Cell
from cli import main
from fl_lightning.errors import AuditError

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium")
STUDY = """
title: A small study
base: [BASE]
seeds: [0]
settings:
  data.image_size: 16
  data.images_per_client: 2
  trainer.max_steps: 1
  federation.client.local_epochs: 1
  trainer.accelerator: cpu
scenarios:
  - {name: new model, about: The first round.}
defences:
  - {name: none}
  - {name: mini-batches, settings: {federation.client.batch_size: 1}}
"""


def make(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, classes))


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study above; its runs are made in this process, which saves the imports of new ones."""

    class InThisProcess:
        def __init__(self, program: Path, out: Path) -> None:
            self.out = out

        def __call__(self, cell: Cell, folder: Path, threads: int, stop: Event) -> tuple[int, str]:
            try:
                main(["fit", *cell.placed(self.out)])
            except AuditError as error:
                return 1, str(error)
            return 0, ""

    monkeypatch.setattr(cli, "Program", InThisProcess)
    monkeypatch.setattr("attack_modules.evaluation.strangers.CROPS", 8)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(STUDY.replace("BASE", str(ROOT / "configs/demo.yaml")))
    return tmp_path / "study.yaml"


def test_a_study_runs_and_reports(study: Path, capsys: pytest.CaptureFixture) -> None:
    audit = ["audit", "--config", str(study), "--out", "found"]
    main([*audit, "--data.num_clients", "3", "--dry_run"])
    assert "2 runs, 0 of which have ended" in capsys.readouterr().out
    assert not Path("found").exists()
    main([*audit, "--data.num_clients", "3"])
    assert "2 of 2 runs have a result. The report:" in capsys.readouterr().out.replace("\n", " ")
    content = json.loads(Path("found/report.json").read_text())
    assert [cell["originals"] for cell in content["cells"]] == [4, 4]  # of two peers
    assert all(cell["accuracy"] is not None and cell["psnr_mean"] > 10 for cell in content["cells"])
    assert content["groups"][0]["letter"] == "C"
    results = [json.loads(path.read_text()) for path in Path("found").glob("cells/*/run/results.json")]
    assert [found["complete"] for found in results] == [True, True]  # so that a lost cell.json is made up for
    assert not Path("runs").exists()
    main([*audit, "--data.num_clients", "3"])  # nothing is left to do
    assert "2 of which have ended" in capsys.readouterr().out
    record = next(Path("found/federations").iterdir())
    main([*audit[:-1], "foreign", "--observation", str(record), "--dry_run"])
    said = capsys.readouterr().out
    assert "Left out, as the observed rounds have happened: mini-batches." in said
    assert "1 run, 0 of" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model.lr", "fast"], "Scenario 'new model', defence 'none': `model.lr` is 'fast'"),
        (["--federation.clinet.lr=1"], "no setting `--federation.clinet.lr`. Did you mean"),
        (["--data.csv", "nowhere.csv"], "There are no images 'nowhere.csv'"),
        (["--workers", "two"], "workers"),
        (["--worker", "2"], "--worker"),
        (["--scenarios", "[{name: a, setings: {}}]"], "setings"),
        (["--scenarios", "[{name: a"], "`--scenarios` is no list in YAML"),
        (["--config", "{scenarios: 3}"], "scenarios"),
        (["--model.lr"], "`--model.lr` has no value"),
        (["--observation", "nowhere"], "There is no folder 'nowhere'"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(study: Path, more: list[str], words: str) -> None:
    with pytest.raises(AuditError) as error:
        main(["audit", "--config", str(study), "--out", "found", *more])
    assert words in str(error.value)
    assert len(str(error.value)) <= 400
    assert not Path("found").exists()


def test_what_a_run_would_refuse_before_its_work_is_told_before_any_is_run(
    study: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, began = cli.Program.__call__, []

    def noted(program: object, cell: Cell, *where: object) -> tuple[int, str]:
        began.append(cell.defence.name)
        return run(program, cell, *where)

    monkeypatch.setattr(cli.Program, "__call__", noted)
    many = ["audit", "--config", str(study), "--out", "found", "--seeds", "[0, 1]"]
    with pytest.raises(AuditError, match=r"^All runs would be refused. new model / none / seed 0: .* 100 classes"):
        main([*many, "--federation.model", "WrappedClassifier", "--federation.model.module", f"{__name__}.make"])
    assert not Path("found").exists()
    main([*many, "--defences", "[{name: none}, {name: too many, settings: {federation.client.batch_size: 0}}]"])
    said = capsys.readouterr().out
    plan = said[: said.index("Time: ")]
    assert [plan.count(f"Refused, and not run: new model / {name} / seed ") for name in ("none", "too many")] == [0, 2]
    assert "2 of 4 runs have a result." in said
    assert began == ["none", "none"]
    records = [json.loads(path.read_text()) for path in sorted(Path("found").glob("cells/*too-many*/cell.json"))]
    assert [record["status"] for record in records] == ["failed", "failed"]
    assert "batch_size" in records[0]["sentence"]
    main(
        [
            *many,
            "--defences",
            "[{name: none}, {name: too many, settings: {federation.client.batch_size: 0}}]",
            "--retry",
        ]
    )
    assert capsys.readouterr().out.count("Refused, and not run: ") == 2  # tried again
    next(Path("found").glob("cells/*too-many*/cell.json")).unlink()  # as if it was stopped before the last run
    main([*many, "--defences", "[{name: none}, {name: too many, settings: {federation.client.batch_size: 0}}]"])
    said = capsys.readouterr().out
    assert "3 of which have ended" in said
    assert "2 of 4 runs have a result." in said


def test_a_trial_gives_back_the_memory_that_it_took(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would count as the program's own in the forecast: 868 instead of 500 MB, measured of one trial."""
    cli.attack_modules.load_all()
    given = []
    for name in ("release_freed_memory", "release_libraries"):
        monkeypatch.setattr(cli, name, partial(given.append, name))
    taken = cli.peak_memory_of(["fit", "--config", str(ROOT / "configs/demo.yaml"), "--data.image_size", "16"])
    assert taken > 0
    assert given == ["release_freed_memory", "release_libraries"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "images"),
    [("demo", None), ("paper", "imagenet-sample"), ("defences", "cifar10-jpg.tar.gz"), ("own", "imagenet-sample")],
)
def test_all_runs_of_the_standard_studies_can_begin(
    name: str, images: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data = ROOT.parent / "shared" / "data"
    if images is not None and not data.exists():
        pytest.skip(f"{data} is absent; it is data of its own, not part of this repository")
    monkeypatch.chdir(ROOT)
    root = [] if images is None else ["--data.root", str(data / images)]
    main(["audit", "--config", f"configs/audit_{name}.yaml", "--out", str(tmp_path / "out"), *root, "--dry_run"])
    said = capsys.readouterr().out
    assert "Nothing was run" in said
    assert "Refused" not in said


@pytest.mark.skipif(CHROMIUM is None, reason="needs a `chromium` on the path")
@pytest.mark.slow
def test_a_report_opens_in_a_browser(study: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    main(["audit", "--config", str(study), "--out", "found"])
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width in (1280, 400):
            page = browser.new_page(viewport={"width": width, "height": 900})
            said: list[str] = []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("request", lambda request, said=said: said.append(request.url))
            address = Path("found/report.html").resolve().as_uri()
            page.goto(address)
            assert [word for word in said if word != address and not word.startswith("data:")] == []
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert len(browser.new_page().pdf()) > 0
        browser.close()
