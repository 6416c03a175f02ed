"""The GPU script on the CPU, with tiny sizes."""

import gpu
import pytest


@pytest.mark.slow
def test_every_row_runs(capsys: pytest.CaptureFixture[str]) -> None:
    bench = gpu.main(["--device", "cpu", "--tiny"])
    assert bench.failed == 0, bench.rows
    assert len(bench.rows) == 2 * (4 + 1) + 1 + 2 * 4
    exact = [row for row in bench.rows if row[0].endswith("4 images at 16 px, 32-true")]
    assert all("difference to the CPU's images 0.0e+00" in row[4] for row in exact)
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


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu(tmp_path: object) -> None:
    if not gpu.torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    bench = gpu.Bench("cuda", gpu.TINY, tmp_path)
    for make in gpu.ATTACKS.values():
        sizes = gpu.TINY.agreeing, gpu.TINY.agreeing_size, 3
        expected = bench.attacked(make(), *sizes, "cpu", "32-true")
        found = bench.attacked(make(), *sizes, "cuda", "32-true")
        assert (found.images - expected.images).abs().max() < 0.02
