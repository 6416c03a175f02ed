"""The project's own promises about itself."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import settings_page
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


def test_the_lowest_version_of_python_is_enough() -> None:
    lowest = re.search(r'requires-python = ">=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    command = [sys.executable, "-c", "from vermin import main; main()", "--no-tips", "--violations"]
    command += [f"--target={lowest}-", "cli.py", "fl_lightning", "attack_modules"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stdout + asked.stderr


ROOMS = [
    ["fl_lightning.errors", "fl_lightning.seeds", "fl_lightning.allocation", "fl_lightning.memory"],
    ["fl_lightning.storage", "fl_lightning.loss"],
    ["fl_lightning.state_files", "fl_lightning.foreign"],
    ["fl_lightning.models"],
    ["fl_lightning.download"],
    ["fl_lightning.data"],
    ["fl_lightning.defenses", "fl_lightning.server_optimizers"],
    ["fl_lightning.client"],
    ["fl_lightning.aggregation", "fl_lightning.observation", "fl_lightning.truth"],
    ["fl_lightning.engines", "fl_lightning.record", "fl_lightning.scores", "fl_lightning.seats"],
    ["fl_lightning.participation"],
    ["fl_lightning.federation"],
    ["fl_lightning"],
    ["attack_modules.threat_model", "attack_modules.panels"],
    ["attack_modules.simulation"],
    ["attack_modules.attack", "attack_modules.priors", "attack_modules.weights"],
    ["attack_modules.analytic", "attack_modules.diffusion"],
    ["attack_modules.feature_inversion", "attack_modules.gradient_matching"],
    ["attack_modules.enhance"],
    ["attack_modules.evaluation"],
    ["attack_modules.audit"],
    ["attack_modules"],
    ["cli"],
]
"""Folders and files, each of which imports from earlier lines and from itself only."""


def room_of(module: str) -> tuple[int, str]:
    """The line of `ROOMS` and the entry that a module belongs to."""
    entries = [(line, entry) for line, row in enumerate(ROOMS) for entry in row]
    fitting = [(line, entry) for line, entry in entries if module == entry or module.startswith(f"{entry}.")]
    return max(fitting, key=lambda found: len(found[1]))


def modules() -> list[tuple[str, ast.Module]]:
    paths = [ROOT / "cli.py", *(ROOT / "fl_lightning").rglob("*.py"), *(ROOT / "attack_modules").rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return [(name, ast.parse(path.read_text())) for name, path in zip(names, paths, strict=True)]


def imports_of(tree: ast.Module) -> list[str]:
    """Modules of this project that are imported anywhere in a module, also inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.split(".")[0] in ("fl_lightning", "attack_modules", "cli")]


def test_imports_go_one_way_between_all_folders() -> None:
    seen = 0
    for module, tree in modules():
        line, entry = room_of(module)
        for imported in imports_of(tree):
            other_line, other = room_of(imported)
            assert other_line < line or other == entry, f"{module} imports {imported}"
            seen += 1
    assert seen > 300


def test_the_top_of_the_attack_has_few_files() -> None:
    assert len(list((ROOT / "attack_modules").glob("*.py"))) <= 5
    assert all(
        (folder / "__init__.py").exists()
        for folder in (ROOT / "attack_modules").rglob("*/")
        if any(folder.glob("*.py"))
    )


def test_only_evaluation_and_what_is_told_import_the_truth() -> None:
    users = {module for module, tree in modules() if "fl_lightning.truth" in imports_of(tree)}
    allowed = ("fl_lightning.", "attack_modules.threat_model.", "attack_modules.evaluation.")
    assert {user for user in users if not user.startswith(allowed)} == set()
    assert any(user.startswith("attack_modules.evaluation.") for user in users)


def test_the_page_of_settings_is_current() -> None:
    assert settings_page.PAGE.read_text() == settings_page.page(), "Run `make settings`."


def test_the_readme_fits_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_weights_lie_in_checkpoints_alone() -> None:
    """Runs of notebooks once left 42 MB of their own checkpoints beside themselves, which were committed."""
    folders = ("attack_modules", "configs", "fl_lightning", "notebooks", "tests")
    suffixes = {".ckpt", ".pt", ".pth", ".safetensors"}
    assert not [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]


@pytest.mark.slow
def test_a_wheel_holds_the_code_the_weights_the_configurations_and_the_program(tmp_path: Path) -> None:
    source = tmp_path / "source"
    kept = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info", "tests", "notebooks")
    shutil.copytree(ROOT, source, ignore=kept)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    code = [path.relative_to(ROOT).as_posix() for room in ("fl_lightning", "attack_modules") for path in
            (ROOT / room).rglob("*") if path.suffix in (".py", ".txt", ".j2")]  # fmt: skip
    assert {"cli.py", *code} <= set(names)
    for folder in ("configs", "checkpoints"):
        shipped = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.*")]
        assert all(any(name.endswith(f"share/curious-client/{path}") for name in names) for path in shipped)
    entries = next(name for name in names if name.endswith("entry_points.txt"))
    assert "curious-client = cli:command" in zipfile.ZipFile(wheel).read(entries).decode()
