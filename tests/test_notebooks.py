"""The notebooks run from their first cell to their last."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbconvert.preprocessors import ExecutePreprocessor

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_executed_and_short(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image" in kind for cell in code for output in cell.outputs for kind in output.get("data", {}))
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert path.stat().st_size < 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path) -> None:
    shared = NOTEBOOKS.parents[1] / "shared"
    if "shared/data" in path.read_text() and not shared.exists():
        pytest.skip(f"{shared} is absent; it is data of its own, not part of this repository")
    copy = tmp_path / "repository" / "notebooks"
    copy.mkdir(parents=True)
    (tmp_path / "shared").symlink_to(shared)
    for folder in ("attack_modules", "fl_lightning", "checkpoints"):
        (copy.parent / folder).symlink_to(NOTEBOOKS.parent / folder)
    for file in (path, *NOTEBOOKS.glob("*.csv")):
        shutil.copy(file, copy)
    notebook = nbformat.read(copy / path.name, as_version=4)
    ExecutePreprocessor(timeout=900).preprocess(notebook, {"metadata": {"path": str(copy)}})
