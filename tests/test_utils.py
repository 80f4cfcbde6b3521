from lib.utils import resume_command


def test_the_command_that_continues_a_run(monkeypatch):
    assert resume_command("runs/a b") == "python train.py --resume 'runs/a b'"
    monkeypatch.setattr("lib.utils.distributed.world_size", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resume_command("run") == "torchrun --nproc_per_node=4 train.py --resume run"
