"""Training in several processes: the result of one process, whatever happens to them. Two tests use torchrun itself;
the others start the ranks with the environment variables that it sets, which is faster."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from float64 import in_float64
from niftis import write_patients
from processes import PATIENCE, Fault, Script

from lib.data import DATASETS
from lib.system import distributed

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 3


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A training in one process, in float64; 10 patches in batches of 3, so that of two ranks one is left with none in
    the last batch."""
    folder = tmp_path_factory.mktemp("single")
    cases = DATASETS["acdc"].split_cases("0.5:0.5", 42)
    write_patients(folder / "data", cases["train"][:5] + cases["validation"][:3])
    data = ["--data", "acdc", "--data_path", folder / "data", "--cache_path", folder / "cache", "--split", "0.5:0.5"]
    network = ["--fms_init", 4, "--levels", 3, "--patch_size", 16, 16, "--val_interval", 1, "--num_workers", 0]
    training = ["--batch_size", 3, "--device", "cpu", "--epochs", EPOCHS]

    def argv(output, *more, pruning=("--rho", 1, "--tau_max", 0.3, "--kappa", 1)):
        return [*data, *network, *training, *pruning, "--output", output, *more]

    script = Script("train", argv(folder), folder / "log", prepare=in_float64)
    assert script.end() == 0, script.text
    run = folder / "unnamed" / "acdc" / "1"
    filters = json.loads((run / "history.json").read_text())["filters"]
    assert 92 > filters[0] > filters[-1]
    return SimpleNamespace(folder=folder, argv=argv, run=run)


def start(n, argv, folder, faults=None, different=None, name="rank"):
    """`n` ranks on this machine; `faults` and `different` (more arguments) by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Script(
            "train",
            [*argv, *(different or {}).get(rank, [])],
            folder / f"{name}-{rank}",
            (faults or {}).get(rank),
            environment={key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            prepare=in_float64,
        )
        for rank in range(n)
    ]


def codes(scripts):
    ended = [script.end() for script in scripts]
    assert not any("Traceback" in script.text for script in scripts), "\n".join(script.text for script in scripts)
    return ended


def torchrun(argv, folder, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, ROOT / "tests" / "float64.py", *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ROWS": str(folder)} | environment,
    )


def assert_close(run, expected):
    """The same filters and thresholds in every epoch, and the same weights, but for round-off."""
    assert (run / "out_filters").read_text() == (expected / "out_filters").read_text()
    one, other = (json.loads((folder / "history.json").read_text()) for folder in (run, expected))
    assert one["tau"] == other["tau"] and one.get("patience") == other.get("patience")
    for key in ("train_loss", "val_loss"):
        assert one[key] == pytest.approx(other[key], abs=1e-9)
    a, b = (torch.load(folder / "models" / f"model-{EPOCHS}", weights_only=True) for folder in (run, expected))
    assert list(a) == list(b)
    for key, value in a.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, b[key], rtol=0, atol=1e-9)


def one_resumed(run, folder):
    """Go on in one process."""
    script = Script("train", ["--resume", run], folder / "resumed", prepare=in_float64)
    assert script.end() == 0, script.text


def test_two_ranks_of_torchrun_give_the_weights_of_one_process(tmp_path, single):
    done = torchrun(single.argv(tmp_path), tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first[0]) == EPOCHS  # filters, thresholds, losses and Dice of every epoch
    run = tmp_path / "unnamed" / "acdc" / "1"
    assert_close(run, single.run)
    assert (run / "validation_scores.json").read_text() == json.dumps(first[1], indent=1) + "\n"
    assert list(first[1]["1"]["dice"]) == list(
        json.loads((single.run / "validation_scores.json").read_text())["1"]["dice"]
    )
    assert [path.name for path in run.parent.iterdir()] == ["1"]
    assert len(list(run.glob("events*"))) == 1 and (run / "report.html").exists()
    text = done.stdout + done.stderr
    assert "in 2 processes" in text and text.count("epoch 1/3 |") == 1


def test_a_killed_rank_ends_the_run_which_one_process_then_finishes(tmp_path, single):
    done = torchrun(single.argv(tmp_path, "--num_workers", 2), tmp_path, FAULT="1 2 SIGKILL")
    run = tmp_path / "unnamed" / "acdc" / "1"
    assert done.returncode != 0
    assert f"cannot be reached; to continue: torchrun --nproc_per_node=2 train.py --resume {run}" in done.stdout
    assert "rank 0: another process of this training has ended" in done.stderr
    assert sorted(path.name for path in (run / "models").glob("model-?")) == ["model-1"]
    one_resumed(run, tmp_path)
    assert_close(run, single.run)


@pytest.mark.parametrize("target", ["epoch", "validation"])
def test_a_signal_to_one_rank_stops_all_and_three_ranks_finish(tmp_path, single, target):
    fault = Fault(target, 2, 0, signal.SIGTERM)
    ranks = start(2, single.argv(tmp_path), tmp_path, {1: fault})
    assert codes(ranks) == [143, 143]
    run = tmp_path / "unnamed" / "acdc" / "1"
    said = f"stopped by SIGTERM; to continue: torchrun --nproc_per_node=2 train.py --resume {run}"
    assert [said in rank.text for rank in ranks] == [True, False]
    assert ranks[1].text == ""
    assert codes(start(3, ["--resume", run], tmp_path, name="more")) == [0, 0, 0]
    assert_close(run, single.run)


def test_two_ranks_finish_what_one_process_began(tmp_path, single):
    run = tmp_path / "run"
    shutil.copytree(single.run, run)
    for kind in ("model", "state"):
        (run / "models" / f"{kind}-{EPOCHS}").unlink()
    assert codes(start(2, ["--resume", run, "--num_workers", 2], tmp_path)) == [0, 0]
    assert_close(run, single.run)


def test_two_ranks_prune_to_a_budget_alike(tmp_path, single):
    """As one process that goes on before it is met; the first rank's clock decides."""
    budget = ["--max_flops", "30%", "--max_ms", "1e6", "--prune_between", "0%", "100%"]
    assert codes(start(2, single.argv(tmp_path, pruning=budget), tmp_path)) == [0, 0]
    run = tmp_path / "unnamed" / "acdc" / "1"
    history = json.loads((run / "history.json").read_text())
    assert history["budget_met"] == [False, False, True] and all(history["ms"])
    assert "budget met after epoch 3" in (tmp_path / "rank-0").read_text()
    one = tmp_path / "one"
    shutil.copytree(run, one)
    for kind in ("model", "state"):
        (one / "models" / f"{kind}-{EPOCHS}").unlink()
    one_resumed(one, tmp_path)
    assert_close(one, run)


BAD = {
    "a flag": (["--lr", "0"], {}, "--lr"),
    "a batch that is too small": (["--batch_size", 1], {}, "--batch_size 1: is divided among 2 processes"),
    "no data": (["--data_path", "nowhere"], {}, "nowhere"),
    "a GPU by number": (["--device", "cuda:0"], {}, "--device cuda:0"),
    "a flag of one rank": ([], {1: ["--data_path", "nowhere"]}, "nowhere"),
    "different settings": ([], {1: ["--lr", "0.1"]}, "the settings: not the same"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_ends_all_ranks_with_one_line(tmp_path, single, kind):
    more, different, words = BAD[kind]
    ranks = start(2, single.argv(tmp_path, *more), tmp_path, different=different)
    assert codes(ranks) == [2, 2]
    errors = [line for rank in ranks for line in rank.text.splitlines() if ": error: " in line]
    assert len(errors) == 1 and words in errors[0]
    assert not (tmp_path / "unnamed").exists()


def test_a_full_disk_ends_all_ranks_with_one_line(tmp_path, single):
    ranks = start(2, single.argv(tmp_path), tmp_path, {0: Fault("checkpoint", 2, action="limit")})
    assert codes(ranks) == [2, 2]
    assert "cannot be written (File too large)" in ranks[0].text
    assert ranks[1].text == ""
    run = tmp_path / "unnamed" / "acdc" / "1"
    assert codes(start(2, ["--resume", run], tmp_path, name="again")) == [0, 0]
    assert_close(run, single.run)


def test_a_damaged_cache_file_of_one_rank_ends_all_with_one_line(tmp_path, single):
    cache = tmp_path / "cache"
    shutil.copytree(single.folder / "cache", cache)
    fault = Fault("epoch", 2, action="delete", path=next(cache.glob("*/patient*/image.npy")))
    ranks = start(2, single.argv(tmp_path, "--cache_path", cache), tmp_path, {0: fault})
    assert codes(ranks) == [2, 2]
    errors = [line for rank in ranks for line in rank.text.splitlines() if ": error: " in line]
    assert len(errors) == 1 and "is damaged" in errors[0]


def test_environment_variables_without_the_other_processes(tmp_path, single):
    script = Script("train", single.argv(tmp_path), tmp_path / "log", environment={"WORLD_SIZE": "2"})
    assert script.end() == 2
    assert "WORLD_SIZE is 2" in script.text and "torchrun" in script.text and "Traceback" not in script.text


def test_one_process_is_left_as_it_is():
    tensor = torch.rand(3)
    assert distributed.total(tensor) is tensor
    assert distributed.broadcast(tensor, 0) is tensor
    assert distributed.gather((1, "a")) == [(1, "a")]
    assert distributed.broadcast_from_main(0.5) == 0.5
    model = torch.nn.Linear(1, 1)
    assert distributed.parallel(model) is model
    assert distributed.share(7) == slice(0, 7) and distributed.is_main()


@pytest.mark.parametrize(("n", "ranks"), [(10, 4), (3, 2), (1, 3), (0, 2)])
def test_shares_of_a_batch(monkeypatch, n, ranks):
    parts = []
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(range(n)[distributed.share(n)])
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
