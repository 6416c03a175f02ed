"""The GPU script on the CPU, with tiny sizes."""

import re

import gpu
import pytest


@pytest.mark.slow
def test_every_row_runs(capsys: pytest.CaptureFixture[str]) -> None:
    bench = gpu.main(["--device", "cpu", "--tiny"])
    assert bench.failed == 0, bench.rows
    assert len(bench.rows) == 2 * (1 + 4 + 1 + 2 + 4 + 1) + 3
    small = [row for row in bench.rows if row[0].endswith("4 images at 16 px, 32-true")]
    differences = {row[0].split(", 4 images")[0]: float(re.search("images ([0-9.e+-]+);", row[4])[1]) for row in small}
    assert differences.pop(gpu.RANKS) < 1e-4
    assert list(differences.values()) == [0.0] * 4
    assert all(float(row[3].split()[0]) > 10 for row in bench.rows if row[0].startswith("inversion of given features"))
    printed = capsys.readouterr().out
    assert "| what | time | peak memory | PSNR | remark |" in printed
    assert printed.count("|---|---|---|---|---|") == 1


def test_a_failing_row_does_not_end_the_table(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    bench = gpu.Bench("cpu", gpu.TINY, tmp_path)

    def broken() -> tuple[str, ...]:
        raise RuntimeError("CUDA error: no kernel image\nand more")

    bench.row("first", broken)
    bench.row("second", lambda: ("1 ms", "", "", ""))
    assert bench.failed == 1
    assert bench.rows == [
        ("first", "failed: RuntimeError", "", "", "CUDA error: no kernel image"),
        ("second", "1 ms", "", "", ""),
    ]
