"""What takes memory beside the tensors that are in use, and what a full disk says."""

import errno
import platform
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from fl_lightning import storage
from fl_lightning.allocation import release_freed_memory
from fl_lightning.models import LeNet5
from fl_lightning.observation import build_model, describe_model
from fl_lightning.storage import load_checkpoint, save_checkpoint

SIZE = 2**26


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone tells what it frees")
def test_freed_memory_is_returned_where_it_is_between_what_is_held() -> None:
    freed, held = torch.ones(SIZE // 4), torch.ones(1000)
    del freed
    release_freed_memory()
    again, held_too = torch.ones(SIZE // 4), torch.ones(1000)
    full = resident()
    del again
    release_freed_memory()
    assert full - resident() > SIZE // 2
    assert held.sum() == held_too.sum() == 1000


def test_a_model_of_a_state_initialises_no_parameters() -> None:
    model = LeNet5(10, (3, 16, 16))
    before = torch.get_rng_state()
    built = build_model(describe_model(model), model.state_dict())
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in built.state_dict().items())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is simulated by /dev/full")
@pytest.mark.parametrize("size", [10, 10**6])
def test_a_full_disk_is_named_as_the_cause(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(storage, "atomic_path", lambda path: nullcontext(Path("/dev/full")))
    with pytest.raises(OSError, match="No space left") as refusal:
        save_checkpoint(Path("last.ckpt"), {"model": torch.zeros(size)})
    assert refusal.value.errno == errno.ENOSPC


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.ckpt", {"model": {"weight": torch.arange(5.0)}, "rounds_done": 3})
    found = load_checkpoint(tmp_path / "last.ckpt")
    assert found["rounds_done"] == 3
    assert torch.equal(found["model"]["weight"], torch.arange(5.0))
