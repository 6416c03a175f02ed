"""A study becomes cells: their order, their names, and what is no study."""

from dataclasses import replace
from pathlib import Path

import pytest

from attack_modules.audit.forecast import PER_CLIENT, PER_PIXEL, START, Work
from attack_modules.audit.study import Defence, Scenario, Study
from fl_lightning.errors import AuditError
from fl_lightning.seats import ColludingClients, CuriousServer
from fl_lightning.storage import described


def test_cells_come_with_the_first_seed_first_and_share_federations(study: Study, tmp_path: Path) -> None:
    cells = study.cells()
    assert [cell.seed for cell in cells] == [0] * 4 + [1] * 4 + [2] * 4
    assert [cell.title for cell in cells[:2]] == ["told / none / seed 0", "told / noise / seed 0"]
    by_place = {(c.scenario.name, c.defence.name, c.seed): c for c in cells}
    assert len({cell.name for cell in cells}) == 12
    assert by_place["told", "none", 0].federation == by_place["not told", "none", 0].federation
    others = (by_place["told", "noise", 0], by_place["told", "none", 1])
    assert all(cell.federation != by_place["told", "none", 0].federation for cell in others)
    placed = cells[0].placed(tmp_path)
    assert placed[:2] == ["--config", str(tmp_path / "base.yaml")]
    assert {"--trainer.max_steps=3", "--knowledge.labels=known", "--seed_everything=0"} <= set(placed)
    assert f"--observation={tmp_path / 'federations' / cells[0].federation}" in placed


def test_values_make_scenarios_and_settings_are_written_as_on_the_command_line(study: Study) -> None:
    partition = {"class_path": "Dirichlet", "init_args": {"alpha": 0.5}}
    grid = {"federation.client.lr": [0.01, 0.1], "federation.client.batch_size": [None, 4]}
    scenario = Scenario("rates", settings={"data.partition": partition}, grid=grid, defences=["none"])
    cells = replace(study, scenarios=[scenario], seeds=[7]).cells()
    assert [c.scenario.name for c in cells] == [
        "rates: lr 0.01, batch_size null", "rates: lr 0.01, batch_size 4",
        "rates: lr 0.1, batch_size null", "rates: lr 0.1, batch_size 4",
    ]  # fmt: skip
    assert '--data.partition={"class_path": "Dirichlet", "init_args": {"alpha": 0.5}}' in cells[0].arguments
    assert "--federation.client.batch_size=null" in cells[0].arguments
    alone = replace(scenario, grid={"federation.client.lr": [0.01, 0.1]})
    assert [s.name for s in replace(study, scenarios=[alone]).expanded()] == ["rates: 0.01", "rates: 0.1"]


def test_a_cell_of_an_edited_configuration_is_another_cell(study: Study, tmp_path: Path) -> None:
    before = study.cells()[0]
    (tmp_path / "base.yaml").write_text("data: {class_path: Photographs}\nmodel: {class_path: GradientInversion}\n")
    after = study.cells()[0]
    assert before.name != after.name
    assert before.federation == after.federation  # its data and federation are the same
    foreign = replace(study, settings={"observation": "record"}).cells()[0]
    assert foreign.federation is None
    assert not any("federations" in word for word in foreign.placed(tmp_path))


def test_the_forecast_counts_the_images_of_those_who_do_not_look() -> None:
    def seconds(seat: dict | None, **data: object) -> float:
        data = {"num_clients": 4, "images_per_client": 5, "image_size": 100} | data
        settings = {"model": {"class_path": "attack_modules.FeatureInversion"}, "data": {"init_args": data},
                    "trainer": {"max_steps": 100}, "federation": {"seat": seat}}  # fmt: skip
        return (Work.of(settings).seconds - START - PER_CLIENT * 4) / PER_PIXEL["FeatureInversion"] / 1e6

    colluding = described(ColludingClients(count=3))
    assert seconds(None) == pytest.approx(15)
    assert seconds(described(CuriousServer())) == pytest.approx(20)
    assert seconds(colluding) == pytest.approx(5)
    assert seconds(described(CuriousServer()), attacker_images=1) == pytest.approx(16)
    assert seconds(colluding, images_per_client=[7, 5, 5, 5]) == pytest.approx(7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scenarios": []}, "`scenarios` is empty"),
        ({"seeds": [1, 1]}, "The seed '1' occurs twice"),
        ({"defences": [Defence("none"), Defence("none")]}, "The defence 'none' occurs twice"),
        ({"scenarios": [Scenario("a", defences=["nine"])]}, "names the defence 'nine'"),
        ({"scenarios": [Scenario("a", defences=[])]}, "'a' has an empty list of `defences`"),
        ({"scenarios": [Scenario("a" * 61)]}, "more than 60 characters"),
        ({"scenarios": [Scenario("a", settings={"trainer.logger": False})]}, "`trainer.logger` is set by the study"),
        ({"defences": [Defence("a", configs=[Path("nowhere.yaml")])]}, "no configuration 'nowhere.yaml'"),
    ],
)
def test_what_is_no_study_is_refused(study: Study, change: dict, words: str) -> None:
    with pytest.raises(AuditError, match=words) as error:
        replace(study, **change)
    assert len(str(error.value)) <= 400
