"""The report of made-up runs: right numbers, readable by machines and people, and never more than was shown."""

import csv
import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from threading import Event

import pytest
import torch

from attack_modules.audit.audit import audit, seconds_of
from attack_modules.audit.conclusions import Conclusions, Interval
from attack_modules.audit.readings import Reading, letter
from attack_modules.audit.redaction import without_names
from attack_modules.audit.study import Cell, Scenario, Study
from attack_modules.audit.workers import Run
from attack_modules.evaluation.finished_run import StrangersOf
from fl_lightning.errors import AuditError, SettingError
from fl_lightning.record import Record
from fl_lightning.storage import StorageError
from fl_lightning.truth import Truth, chosen

VOID = {"meta", "img", "br", "line", "circle"}


class Page(HTMLParser):
    """What matters of a page: balanced tags, texts of pictures, addresses, headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.headings: list[int] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(given)
        if tag[0] == "h" and tag[1:].isdigit():
            self.headings.append(int(tag[1:]))
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action") and value]
        assert tag not in ("script", "link", "iframe", "object")

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def run(study: Study, made: object, out: Path, trial: object = lambda arguments: None, **more: object) -> str:
    arguments = {"title": study.title, "scenarios": study.scenarios, "base": study.base, "settings": study.settings}
    arguments |= {name: more.pop(name) for name in [*more] if name in arguments}
    return audit(
        made, lambda arguments: {"model": {"class_path": "FeatureInversion"}}, trial, given={}, **arguments,
        defences=study.defences, seeds=study.seeds, out=out,
        **{"workers": 2, "command": "python cli.py audit", **more},
    )  # fmt: skip


def test_the_report_says_what_leaked_and_what_failed(study: Study, fake: Callable, tmp_path: Path) -> None:
    said = run(study, fake, tmp_path / "out")
    assert "12 of 12 runs have a result" in said
    text = (tmp_path / "out/report.html").read_text()
    page = Page(text)
    assert not page.open
    assert len(text) < 10 << 20
    assert len(page.images) > 20
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.images)
    assert all(address.startswith("data:") for address in page.addresses)
    assert page.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert "A <small> & made-up study" in page.text
    assert "class <0>" in page.text
    content = json.loads((tmp_path / "out/report.json").read_text())
    groups = {(g["scenario"], g["defence"]): g for g in content["groups"]}
    plain, noisy = groups["told", "none"], groups["told", "noise"]
    assert (plain["leaked"], plain["images"], plain["above_chance"]) == (18, 18, True)
    assert plain["leaked_share"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "count": 3}
    assert plain["letter"] == "E"
    assert groups["not told", "none"]["letter"] == "C"
    assert (plain["seat"], groups["not told", "none"]["seat"]) == ("an honest-but-curious client", None)
    assert "an honest-but-curious client reconstructed 18 of 18" in content["verdict"][0]
    assert not noisy["above_chance"]
    assert "no proof of protection" in " ".join(content["verdict"])
    assert [failure[0] for failure in content["failures"]] == [
        "told, defence: noise", "not told, defence: noise",
    ]  # fmt: skip
    assert "it is noise" in content["failures"][0][1]
    (pair,) = content["comparisons"]
    assert pair["told"] == {"labels": ["known", "inferred"], "label_counts": ["known", "inferred"]}
    (advice,) = [action for action in content["actions"] if "noise" in action["what"]]
    assert advice["what"].startswith("Consider the defence 'noise' in 'told', 'not told', and audit it against an")
    assert advice["evidence"].count("leaked 100% without and ") == 2
    assert [client["leaked"] for client in content["clients"]] == [9, 9]
    assert plain["confirmed"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "count": 3}
    assert noisy["confirmed"]["mean"] <= noisy["confirmed_by_others"]["mean"] + 0.2
    assert plain["confirmed_by_others"]["mean"] < 0.5 < noisy["confirmation_area"]["high"]
    assert [(of["of"], of["images"], of["leaked"], of["clients"]) for of in content["persons"]] == [
        ("Ann Mueller", 6, 6, [0]), ("Bo", 6, 6, [0, 1]),
    ]  # fmt: skip
    assert (plain["persons_seen"]["mean"], noisy["persons_seen"]["mean"]) == (1.0, 0.0)
    assert page.text.count("What leaked most") == page.text.count("The median") == 4
    assert "Ann Mueller" in page.text
    for word in (" safe", "secure against", "protects"):
        assert word not in page.text.lower()
    rows = list(csv.DictReader((tmp_path / "out/cells.csv").read_text().splitlines()))
    assert len(rows) == 12
    assert [row["leaked"] for row in rows if row["defence"] == "none"] == ["6"] * 6
    assert rows[0]["command"].startswith("python cli.py fit --config")


def test_a_redacted_report_shows_no_original_and_no_name(study: Study, fake: Callable, tmp_path: Path) -> None:
    settings = study.settings | {
        "data.csv": "ann mueller.csv", "data.root": "mueller", "data.partition": {"class_path": "mueller.ann.Split"},
        "federation.client.lr": 0.25, "federation.initial_weights": "mueller",
    }  # fmt: skip

    def one_fails(place: Path) -> Run:
        def one(cell: Cell, folder: Path, threads: int, stop: Event) -> tuple[int, str]:
            if cell == study.cells()[0]:
                return 1, "'ann mueller.csv' lists private_7.png, which cannot be read."
            return fake(place)(cell, folder, threads, stop)

        return one

    study = replace(study, settings=settings)
    command = "python cli.py audit --config mueller.yaml --redact --data.csv 'ann mueller.csv' --workers 2"
    said = run(study, one_fails, tmp_path / "out", redact=True, command=command)
    assert "11 of 12 runs have a result" in said
    files = {name: (tmp_path / "out" / name).read_text() for name in ("report.html", "report.json", "cells.csv")}
    for text in files.values():
        for secret in ("private_", "class <", "class &lt;", "ueller", "Bo<", '"Bo"', str(tmp_path)):
            assert secret not in text
    pictures = Page(files["report.html"]).images
    assert {image["alt"].split(" of ")[0] for image in pictures} == {"Reconstruction"}
    content = json.loads(files["report.json"])
    assert [(of["of"], of["leaked"]) for of in content["persons"]] == [("person 1", 4), ("person 2", 4)]
    assert content["provenance"]["command"] == (
        "python cli.py audit --config LEFT_OUT --redact --data.csv LEFT_OUT --workers 2"
    )
    words = shlex.split(content["cells"][1]["command"])
    assert {"--data.csv=LEFT_OUT", "--federation.client.lr=0.25", "--knowledge.labels=known", "LEFT_OUT"} <= set(words)


def test_what_may_name_a_file_is_left_out_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "anna").mkdir()
    words = [
        "--config=configs/demo.yaml", "--config=configs/mine.yaml", "--a.lr=1e-3", "--a.on=true", "--a.b=null",
        "--model=attack_modules.feature_inversion.inversion.FeatureInversion", "--a=x.png", "--b=anna", "--c=[0, d/e]",
        "--d={csv: anna, seed: 3}", "--e=16-mixed", "--f=[", "--g=2026-11-27",
    ]  # fmt: skip
    assert without_names(words) == [
        "--config=configs/demo.yaml", "--config=LEFT_OUT", "--a.lr=1e-3", "--a.on=true", "--a.b=null",
        "--model=attack_modules.feature_inversion.inversion.FeatureInversion", "--a=LEFT_OUT", "--b=LEFT_OUT",
        '--c=[0, "LEFT_OUT"]', '--d={"csv": "LEFT_OUT", "seed": 3}', "--e=16-mixed", "--f=LEFT_OUT", "--g=LEFT_OUT",
    ]  # fmt: skip


def test_what_has_no_result_is_said_and_nothing_is_concluded_from_it(
    study: Study, fake: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def some(place: Path) -> Run:
        def one(cell: Cell, folder: Path, threads: int, stop: Event) -> tuple[int, str]:
            return (1, "`model.lr` is <b>, but") if cell.seed == 1 else fake(place)(cell, folder, threads, stop)

        return one

    run(study, some, out)
    cells = study.cells()
    picture = cells[0].folder(out) / "run/images/001.png"
    picture.write_bytes(picture.read_bytes()[:100])
    (cells[1].folder(out) / "run/results.json").write_text("{")
    (cells[-1].folder(out) / "cell.json").unlink()
    readings = [Reading.of(cell, out, StrangersOf(), False) for cell in cells]
    assert [reading.status for reading in readings].count("unreadable") == 2
    said = run(study, some, out, budget="0.001s")
    content = json.loads((out / "report.json").read_text())
    assert "001.png" in json.dumps(content["failures"])
    assert "`model.lr` is <b>, but" in json.dumps(content["failures"])
    begun = "6 of 12 runs have no result" in said
    assert begun or "7 of 12 runs have no result" in said
    assert begun != ("The budget of 0.001s leaves 1 run for later" in capsys.readouterr().out)
    assert any("`--retry`" in action["what"] for action in content["actions"])
    assert any("at least 3 seeds" in action["what"] for action in content["actions"])
    assert not Page((out / "report.html").read_text()).open
    assert "10 of 12 runs have a result" in run(study, fake, out, retry=True)  # the two damaged ones stay


def test_a_study_without_any_result_concludes_nothing(study: Study, tmp_path: Path) -> None:
    said = run(study, lambda out: lambda cell, folder, threads, stop: (1, "No."), tmp_path)
    assert "nothing is concluded" in said
    page = Page((tmp_path / "report.html").read_text())
    assert "Failed: No." in page.text


def test_rounds_without_originals_are_judged_by_the_attack_alone(study: Study, fake: Callable, tmp_path: Path) -> None:
    run(study, fake, tmp_path)
    for record in (tmp_path / "federations").iterdir():
        shutil.rmtree(record / "truth")
    said = run(study, fake, tmp_path)
    assert "No originals were at hand" in said
    assert "36 of 72 reconstructed images certain or likely" in said
    assert "No originals to compare with." in Page((tmp_path / "report.html").read_text()).text


def test_a_study_whose_folder_was_moved_is_reported_as_before(study: Study, fake: Callable, tmp_path: Path) -> None:
    run(study, fake, tmp_path / "here")
    first = json.loads((tmp_path / "here/report.json").read_text())
    (tmp_path / "here").rename(tmp_path / "there")
    run(study, fake, tmp_path / "there")
    second = json.loads((tmp_path / "there/report.json").read_text())
    assert (second["verdict"], second["groups"]) == (first["verdict"], first["groups"])
    assert "18 of 18" in second["verdict"][0]


def test_what_a_server_saw_of_each_client_is_compared_with_that_clients_originals(
    study: Study, fake: Callable, tmp_path: Path
) -> None:
    run(study, fake, tmp_path)
    cell = study.cells()[0]
    record, path = Record(tmp_path / "federations" / cell.federation), cell.folder(tmp_path) / "run/results.json"
    whole = Truth.load(record.truth(0))
    for client in (0, 1):
        own = whole.clients == client
        replace(
            whole, pixels=whole.pixels[own], labels=whole.labels[own], clients=whole.clients[own],
            sources=chosen(whole.sources, own),
        ).save(record.truth(0, client))  # fmt: skip
    for file in record.directory.glob(f"truth/{record.truth(0).name}.*"):
        file.unlink()
    assert not Reading.of(cell, tmp_path, StrangersOf(), False).compared
    path.write_text(json.dumps(json.loads(path.read_text()) | {"observed_rounds": [0, 0], "observed_clients": [0, 1]}))
    assert Reading.of(cell, tmp_path, StrangersOf(), False).leaked == 6


def test_a_missing_template_engine_leaves_the_tables(
    study: Study, fake: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(SettingError, match=r"curious-client\[audit\]"):
        run(study, fake, tmp_path)
    said = capsys.readouterr().out
    assert said.index("Warning: report.html needs Jinja2") < said.index("[1/12]")  # before the work, not after it
    assert (tmp_path / "cells.csv").exists()
    assert json.loads((tmp_path / "report.json").read_text())["verdict"]


def test_a_full_disk_leaves_the_report_as_far_as_it_goes(
    study: Study, fake: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = replace(study, seeds=[0])
    run(study, fake, tmp_path)
    before = (tmp_path / "report.html").read_text()

    def full(source: Path, target: Path, last: str, replace: Callable = os.replace) -> None:
        if last in target.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    for last, left in (("report.html", "cells.csv, report.json"), ("", "nothing")):
        monkeypatch.setattr(os, "replace", partial(full, last=last))
        with pytest.raises(AuditError, match=f"No space left on device.*Written all the same: {left}"):
            run(study, fake, tmp_path)
        assert "6 of 6 images" in capsys.readouterr().out.replace("\n", " ")  # the verdict is said all the same
    assert (tmp_path / "report.html").read_text() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_study_that_breaks_off_is_reported(
    study: Study, fake: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(place: Path) -> Run:
        def one(cell: Cell, folder: Path, threads: int, stop: Event) -> tuple[int, str]:
            if cell.seed == 1:
                raise StorageError("Could not write.")
            return fake(place)(cell, folder, threads, stop)

        return one

    with pytest.raises(StorageError, match="Could not write"):
        run(study, breaks, tmp_path, workers=1)
    assert "4 of 12 runs have a result. The report:" in capsys.readouterr().out.replace("\n", " ")
    assert (tmp_path / "report.html").exists()


def test_nothing_is_run_of_a_study_that_cannot_be_read(study: Study, fake: Callable, tmp_path: Path) -> None:
    for more, words in (
        ({"workers": 0}, "`workers` is 0"),
        ({"budget": "soon"}, "`budget` is 'soon'"),
        ({"observation": tmp_path / "no"}, "Correct `--observation`"),
        ({"strangers": tmp_path}, "no images in class folders"),
        ({"redact": True, "scenarios": [Scenario("a", grid={"data.csv": ["anna.csv"]})]}, "values of `data.csv` into"),
    ):
        with pytest.raises(AuditError, match=words):
            run(study, fake, tmp_path / "out", **more)
    assert run(study, fake, tmp_path / "out", dry_run=True).startswith("Nothing was run")
    assert not (tmp_path / "out").exists()


def test_defences_that_observed_rounds_rule_out_are_not_missed(
    study: Study, fake: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = replace(study, scenarios=[replace(study.scenarios[0], defences=["none", "noise"])])
    (tmp_path / "rounds").mkdir()
    run(both, fake, tmp_path / "out", dry_run=True, observation=tmp_path / "rounds")
    assert "1 scenario, 1 defence, 3 seeds: 3 runs" in capsys.readouterr().out


def test_intervals_times_and_letters() -> None:
    assert Interval.of([0.2, None, 0.4]) == Interval(pytest.approx(0.3), 0.2, 0.4, 2)
    three = Interval.of([1.0, 2.0, 3.0])  # t quantile 4.3027 of 2 degrees of freedom, over the root of 3
    assert three.high - three.mean == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert Interval.of([0.9, 1.0, 1.0], 0.0, 1.0).high == 1.0
    assert Interval.of([None]) is None
    assert [seconds_of(text) for text in ("90s", "30m", "1.5h")] == [90, 1800, 5400]
    told = {"labels": "inferred", "label_counts": "inferred", "client_lr": "known"}
    assert letter({"model": {"init_args": {"detail": True}}}, told) == "D"
    assert letter({"postprocess": "direct"}, told) == "D"
    assert letter({"model": {"init_args": {"guidance": None}}}, told) == "C"
    assert letter({}, {"labels": "inferred", "client_lr": "guessed"}) == "B"


def test_images_that_strangers_cannot_judge_are_not_called_safe(study: Study, fake: Callable, tmp_path: Path) -> None:
    """Radiographs beside photographs: each is nearer to any other than to a stranger."""
    run(study, fake, tmp_path)
    readings = [replace(Reading.of(cell, tmp_path, StrangersOf(), False), chance=1.0) for cell in study.cells()]
    found = Conclusions.of(study, readings)
    assert not any(group.above_chance for group in found.groups)
    first = found.verdict()[0]
    assert "18 of 18 reconstructions are as near to their originals as pictures that a person recognises" in first
    assert "is not decided" in first
    assert "No attack" not in first
    assert "`--strangers FOLDER" in found.actions()[0].what
    said = dict(found.failures())
    assert "is not decided" in said["told, defence: none"]
    assert "no proof that nothing leaks" in said["told, defence: noise"]


def test_a_group_is_above_chance_where_a_binomial_test_says_so(study: Study, fake: Callable, tmp_path: Path) -> None:
    run(study, fake, tmp_path)
    readings = [Reading.of(cell, tmp_path, StrangersOf(), False) for cell in study.cells()]
    found = Conclusions.of(study, readings)
    assert found.worst.defence.name == "none"
    assert {group.above_chance for group in found.groups if group.defence.name == "noise"} == {False}
    assert 6 / (6 + 128) <= readings[0].chance < 0.5  # the strangers are photographs, which pink noise is not
    assert torch.tensor([row.psnr for row in readings[0].rows]).min() > 30
    assert readings[0].copies == readings[0].recognisable == 6
    for reading in readings[:4]:
        reading.results["scores"]["labels_found"] = 0.0  # counts in the mean over the 6 runs that infer labels
    assert any("read 67% of the labels right, over 6 runs" in action.evidence for action in found.actions())
