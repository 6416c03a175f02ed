"""The project's own promises about itself."""

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {"pytorch": "torch", "jsonargparse": "jsonargparse[signatures]"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_environment_yml_is_in_step_with_pyproject() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    listed = set()
    for entry in [e for e in conda if isinstance(e, str)] + pip:
        name, _, version = entry.partition(">=")
        listed.add(f"{CONDA_NAMES.get(name, name)}>={version}")
    assert f"python{project['requires-python']}" in listed
    assert set(project["dependencies"]) <= listed


def test_imports_go_one_way() -> None:
    for path in (ROOT / "fl_lightning").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (attack_modules|cli)", path.read_text(), re.MULTILINE), path
    for path in (ROOT / "attack_modules").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) cli", path.read_text(), re.MULTILINE), path


def test_only_evaluation_knows_where_the_truth_lies() -> None:
    """No module of an attack imports `Truth`, and none opens a file of `truth/` by other means."""
    for path in (ROOT / "attack_modules").rglob("*.py"):
        if path.name != "callbacks.py":
            assert not re.search(r"fl_lightning\.truth|Truth\b|\.truth\(", path.read_text()), path
