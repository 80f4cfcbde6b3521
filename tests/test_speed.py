"""Every measurement runs, and what it compares is equal. How long anything takes is not asserted."""

import re

import pytest

from lib.experiments.speed import main

SMALL = ["--patch_size", "32", "32", "--fms_init", "4", "--levels", "3"]
COMMANDS = {
    "step": [*SMALL, "--batch_size", "2"],
    "epoch": [*SMALL, "--batch_size", "2", "--batches", "2", "--num_workers", "0"],
    "data": ["--patch_size", "32", "32", "--volumes", "2"],
    "predict": SMALL,
    "evaluate": [],
}
RATIO = re.compile(r"(.+ / .+?) +(\d+\.\d{3})  \((\d+\.\d{3}) - (\d+\.\d{3})\)")


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return tmp_path_factory.mktemp("phantom")


@pytest.mark.parametrize("command", COMMANDS)
def test_it_runs_and_prints_ratios(command, phantom, capsys):
    folders = ["--data_path", str(phantom / "data"), "--cache_path", str(phantom / "cache")]
    assert main([command, *COMMANDS[command], *folders, "--repeats", "1" if command == "predict" else "2"]) == 0
    printed = capsys.readouterr().out
    ratios = [match for line in printed.splitlines() if (match := RATIO.fullmatch(line))]
    assert ratios
    for match in ratios:
        middle, low, high = map(float, match.groups()[1:])
        assert 0 <= low <= middle <= high
    if command == "step":
        losses = re.search(r"ours (\S+), literal (\S+); largest relative difference of a gradient: (\S+)", printed)
        assert float(losses[1]) == pytest.approx(float(losses[2]), rel=1e-5)
        assert float(losses[3]) < 1e-4
    if command == "data":
        assert float(re.search(r"largest difference of a voxel: (\S+)", printed)[1]) < 1e-3
    if command == "predict":
        differ, n = re.search(r"voxels whose label differs: (\d+) of (\d+)", printed).groups()
        assert int(differ) <= 1e-4 * int(n)  # the two norms round differently, and the network knows nothing
    if command == "evaluate":
        assert float(re.search(r"largest difference from medpy: (\S+)", printed)[1]) < 1e-9
