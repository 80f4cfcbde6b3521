"""Every measurement runs, and what it compares is equal. How long anything takes is not asserted."""

import argparse
import re
import subprocess

import pytest

from lib.experiments import speed, speed_parts
from lib.experiments.speed import main

SMALL = ["--patch_size", "32", "32", "--fms_init", "4", "--levels", "3"]
COMMANDS = {
    "step": [*SMALL, "--batch_size", "2"],
    "rate": [*SMALL, "--batch_size", "2", "--matrix", "64"],
    "epoch": [*SMALL, "--batch_size", "2", "--batches", "2", "--num_workers", "0"],
    "data": ["--patch_size", "32", "32", "--volumes", "2"],
    "predict": SMALL,
    "runtimes": [*SMALL, "--batch_size", "2"],
    "evaluate": [],
}
RATIO = re.compile(r"(.+ / .+?) +(\d+\.\d{3})  \((\d+\.\d{3}) - (\d+\.\d{3})\)")


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return tmp_path_factory.mktemp("phantom")


@pytest.mark.parametrize("command", COMMANDS)
def test_it_runs_and_prints_ratios(command, phantom, capsys):
    folders = ["--data_path", str(phantom / "data"), "--cache_path", str(phantom / "cache")]
    assert (
        main([command, *COMMANDS[command], *folders, "--repeats", "1" if command in ("predict", "runtimes") else "2"])
        == 0
    )
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
    if command == "runtimes":
        assert all(float(apart) < 1e-4 for apart in re.findall(r"softmax maps within (\S+)", printed))
        assert printed.count("torch / openvino") == printed.count("torch / onnxruntime") == 2
    if command == "evaluate":
        assert float(re.search(r"largest difference from medpy: (\S+)", printed)[1]) < 1e-9


def test_busy_compares_openmps_own_waiting_with_ours(monkeypatch, capsys):
    """The time of a step is made up, the busy processes are not."""
    running, started = [], subprocess.Popen
    monkeypatch.setattr(speed_parts.subprocess, "Popen", lambda *args: running.append(started(*args)) or running[-1])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def made_up(policy, _args):
        assert all(process.poll() is None for process in running)
        return {None: 0.4, "PASSIVE": 0.1}[policy.get("OMP_WAIT_POLICY")] * (1 + len(running))

    monkeypatch.setattr(speed_parts, "in_new_process", made_up)
    monkeypatch.setattr(speed, "n_cores", lambda: 3)
    assert main(["busy", "--repeats", "2"]) == 0
    printed = capsys.readouterr().out
    for where, ms in (("quiet", "100.000"), ("busy", "400.000")):
        ratio = rf"{where}, OpenMP's own waiting / {where}, ours +4\.000  \(4\.000 - 4\.000\)\n"
        assert re.search(ratio + rf"{where}, ours +{ms} ms", printed)
    assert len(running) == 3 and all(process.poll() is not None for process in running)


def test_a_step_is_timed_in_a_process_whose_threads_wait_as_openmp_lets_them(monkeypatch):
    """OpenMP tells how often a thread looks before it sleeps."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    told, run = [], subprocess.run
    monkeypatch.setattr(speed_parts.subprocess, "run", lambda *args, **how: told.append(run(*args, **how)) or told[-1])
    settings = {"device": "cpu", "data": "phantom", "threads": 1, "fms_init": 4, "levels": 3, "batch_size": 2}
    args = argparse.Namespace(**settings, steps=1, patch_size=(32, 32))
    assert 0 < speed_parts.in_new_process({}, args) < 300
    if "GOMP_SPINCOUNT" not in told[0].stderr:
        pytest.skip("this is not GNU's OpenMP")
    assert "GOMP_SPINCOUNT = '300000'" in told[0].stderr


@pytest.mark.parametrize("command", ["step", "rate", "epoch", "predict", "busy"])
def test_a_patch_that_fits_no_network_is_refused(command, phantom, capsys):
    folders = ["--data_path", str(phantom / "data"), "--cache_path", str(phantom / "cache")]
    assert main([command, *folders, "--patch_size", "33", "33", "--levels", "3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--patch_size 33 33" in error
