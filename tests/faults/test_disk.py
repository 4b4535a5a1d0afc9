"""A disk that is really full: a small file system of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pharmacist_ray.cli.process import plain_failures
from tests.faults.disturb import World

pytestmark = pytest.mark.usefixtures("ray_local")
slow = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return the mount point of a file system of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root may mount a small file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Take all but so many bytes."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    ballast.write_bytes(b"\0" * (free.f_bavail * free.f_bsize - leave))
    return ballast


@pytest.mark.parametrize(
    ("stage", "leave"),
    [
        ("ingest", 40_960),
        *(pytest.param(*case, marks=slow) for case in (("score", 40_960), ("score", 0), ("select", 16_384), ("align", 65_536))),
    ],
)
def test_a_full_disk_is_one_line_and_nothing_half_done(
    stage: str, leave: int, calm: World, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {
        "ingest": (),
        "score": ("ingest", "fit"),
        "select": ("ingest", "fit", "scores"),
        "align": ("ingest", "fit", "scores", "selections"),
    }
    world = calm.copy(disk / "run", *before[stage])
    world.values["resources"] = {**world.values["resources"], "workers": 1}
    ballast = fill(disk, leave)
    with pytest.raises(SystemExit) as ended, plain_failures():
        world.stage(stage)
    error = capsys.readouterr().err
    assert ended.value.code == 6, error
    assert "Traceback" not in error
    (line,) = (line for line in error.splitlines() if line.startswith("pharmacist: "))
    assert line.startswith(f"pharmacist: no space is left to write {disk}/run")
    assert line.endswith("; free some, then run the same command again: it goes on")
    made = {
        "ingest": "ingest/candidates",
        "score": "scores",
        "select": "selections/pharmacist",
        "align": "align/pharmacist.sft.s0",
    }
    assert not (world.root / made[stage] / "manifest.json").exists()
    until = time.monotonic() + 20  # tasks that were under way end by themselves
    while list(world.root.rglob("*.tmp")):
        assert time.monotonic() < until, "a half-written file stays"
        time.sleep(0.1)
    assert not (world.aligned / "run").exists()
    for name, content in world.scores().items():
        assert content == calm.scores()[name], "a half-written shard"
    ballast.unlink()
    world.stage(stage)
    if stage == "ingest":
        parts = [sorted((one.root / "ingest" / "candidates" / "rows").iterdir()) for one in (calm, world)]
        assert [part.read_bytes() for part in parts[0]] == [part.read_bytes() for part in parts[1]]
    if stage == "score":
        assert world.scores() == calm.scores()
    if stage == "select":
        assert world.selected() == calm.selected()
    if stage == "align":
        assert [one["step"] for one in world.history()] == [*range(1, 121)]
    assert world.litter() == []
