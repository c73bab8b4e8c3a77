"""`dvc repro` killed while a member is trained, and run again: the same bytes as if nothing had happened.

A kill comes when the run has saved its state after so many epochs and steps, so kills fall into the first epoch,
between the two and into the last one on any machine. The slow series adds start-up, the time after training, and kills
that follow one another.
"""
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
import yaml

from tiny import edit_params, hashes, plain_environment, run, trained_repository

OUTPUTS = "artifacts/models/image", "reports/train/image"


@pytest.fixture
def repo(tmp_path):
    "A copy in which everything before the member `image` is done, and the bytes that its training gave undisturbed."
    done = trained_repository()
    copy = tmp_path / "repo"
    shutil.copytree(done, copy, symlinks=True)
    forget(copy)
    return copy, hashes(done, *OUTPUTS)


def forget(repo):
    "Let DVC and the disk forget that the member was trained."
    lock = yaml.safe_load((repo / "dvc.lock").read_text())
    del lock["stages"]["train@image"]
    (repo / "dvc.lock").write_text(yaml.safe_dump(lock))
    for folder in (".dvc/cache/runs", ".work/cache/resume", *OUTPUTS):
        shutil.rmtree(repo / folder, ignore_errors=True)


class Reached:
    "Whether the run could go on from after so many epochs and steps, or from later."
    def __init__(self, repo, epoch, step):
        self.folder = repo / ".work/cache/resume"
        self.goal = (epoch, step)

    def __call__(self, log):
        for path in self.folder.rglob("state.pt"):
            state = torch.load(path, weights_only=True)
            if (state["epoch"], state["done"]) >= self.goal:
                return True
        return False


def said(words):
    return lambda log: words in log.read_text(errors="replace")


def lock_holder(repo):
    "The process of the runner."
    return yaml.safe_load((repo / ".work/run.lock").read_text())["pid"]


def kill(repo, moment, whom="dvc"):
    "Start `dvc repro`, and kill dvc, the runner or all their processes at the moment; what was printed until then."
    log = repo.parent / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            ["dvc", "repro", "train@image"],
            cwd=repo,
            env=plain_environment(),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 300
        while not moment(log):
            assert process.poll() is None, f"it ended before the moment came:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(.002)
        if whom == "all":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid if whom == "dvc" else lock_holder(repo), signal.SIGKILL)
    finally:
        if whom != "runner" and process.poll() is None:
            process.kill()
        process.wait()
    return log.read_text()


def finish(repo):
    return run(repo, "dvc", "repro", "train@image").stdout


def kept(repo):
    return [p for p in (repo / ".work/cache/resume").glob("*") if p.is_dir()]


def test_killed_in_the_first_epoch_and_in_the_last(repo):
    "One run, killed twice: it goes on twice, ends on the same bytes and leaves nothing behind."
    repo, undisturbed = repo
    kill(repo, Reached(repo, 0, 3))
    assert len(kept(repo)) == 1
    assert "↻" in kill(repo, Reached(repo, 1, 4), "runner")
    assert "↻ going on" in finish(repo)
    assert hashes(repo, *OUTPUTS) == undisturbed
    assert not kept(repo) and "up to date" in finish(repo)


@pytest.mark.slow
@pytest.mark.parametrize("epoch, step, whom", [
    (0, 1, "dvc"), (0, 2, "runner"), (0, 9, "all"), (0, 14, "dvc"),  # of 15 steps an epoch
    (1, 0, "all"), (1, 1, "runner"), (1, 2, "dvc"), (1, 10, "all"), (1, 14, "runner")])
def test_killed_after_a_step(repo, epoch, step, whom):
    "In and around both epochs, whoever is killed."
    repo, undisturbed = repo
    kill(repo, Reached(repo, epoch, step), whom)
    assert "↻ going on" in finish(repo)
    assert hashes(repo, *OUTPUTS) == undisturbed and not kept(repo)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["Running stage", 'cell 1/', '"Training"', '"On lesions', "Updating lock file"])
def test_killed_before_or_after_training(repo, words):
    "While it starts, reads, draws and writes."
    repo, undisturbed = repo
    kill(repo, said(words), "all")
    finish(repo)
    assert hashes(repo, *OUTPUTS) == undisturbed and not kept(repo)


@pytest.mark.slow
def test_killed_again_and_again(repo):
    "A few steps further each time."
    repo, undisturbed = repo
    for i, (epoch, step) in enumerate([(0, 4), (0, 9), (0, 14), (1, 1), (1, 7), (1, 14)]):
        kill(repo, Reached(repo, epoch, step), ["dvc", "runner", "all"][i % 3])
    finish(repo)
    assert hashes(repo, *OUTPUTS) == undisturbed and not kept(repo)


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    lambda p: p["train"].update(learning_rate=1e-3), lambda p: p["train"]["members"]["image"].update(drop_rate=.3),
    lambda p: p["train"]["members"]["image"].update(seed=5)], ids=["common", "member", "seed"])
def test_another_recipe_begins_anew(repo, change):
    "What the killed run left is of no use to it, and is gone when it is done."
    repo, undisturbed = repo
    kill(repo, Reached(repo, 0, 10))
    edit_params(repo, change)
    assert "↻" not in finish(repo)
    after = hashes(repo, *OUTPUTS)
    assert after != undisturbed and not kept(repo)
    forget(repo)
    finish(repo)
    assert hashes(repo, *OUTPUTS) == after


@pytest.mark.slow
def test_other_weights_in_the_file_begin_anew(repo, tmp_path):
    "The name of the file that a member starts from stays, its bytes change: nothing is gone on from."
    import timm
    from safetensors.torch import save_file

    import skinlesion.model.backbones  # noqa: F401  registers small_cnn_3
    repo, _ = repo
    model = timm.create_model("small_cnn_3", num_classes=0)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, str(tmp_path / "start.safetensors"))
    edit_params(repo, lambda p: p["train"]["members"]["image"].update(pretrained="../start.safetensors"))
    kill(repo, Reached(repo, 0, 10))
    save_file({k: v * 2 if v.is_floating_point() else v for k, v in state.items()}, str(tmp_path / "start.safetensors"))
    assert "↻" not in finish(repo) and not kept(repo)
