"""The comparison notebook (members of a run, finished experiments) and the command that compares two revisions."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from madeup import PLAIN_GIT
from skinlesion.data.tables import write_predictions
from skinlesion.evaluate.scorecard import compare_predictions
from skinlesion.files import write_json
from skinlesion.model.bundle import save_member
from skinlesion.model.fusion import create_model
from skinlesion.pipeline.cli import app
from skinlesion.pipeline.revisions import read_evaluation
from skinlesion.taxonomy import get_label_set, probability_columns
from tiny import build_prepared

HAM = get_label_set("ham10000")
DVC_YAML = """stages:
  make:
    cmd: rm -rf artifacts/predictions && cp -r made/${skill} artifacts/predictions
    deps: [made]
    params: [skill]
    outs: [artifacts/predictions]
"""


def lesions(n=120):
    "A split table of `n` images of `n` lesions, half of them for validation."
    return pd.DataFrame(
        dict(
            image_id=[f"i{k}" for k in range(n)],
            lesion_id=[f"l{k}" for k in range(n)],
            age="50",
            sex="",
            site="",
            diagnosis=[HAM.codes[k % 7] for k in range(n)],
            split=["valid", "test"] * (n // 2),
        )
    )


def predictions(folder, skill):
    "Tables of the members named in `skill` (the larger, the better the predictions), and of their mean."
    table = lesions()
    rng = np.random.default_rng(0)
    probs = {}
    truth = np.eye(7)[[HAM.index(code) for code in table["diagnosis"]]]
    for name, weight in skill.items():
        scores = np.exp(weight * truth + rng.normal(size=truth.shape))
        probs[name] = scores / scores.sum(1, keepdims=True)
    probs["ensemble"] = sum(probs.values()) / len(probs)
    for name, values in probs.items():
        columns = pd.DataFrame(values, columns=probability_columns(HAM))
        rows = pd.concat([table[["image_id", "lesion_id", "split"]], columns], axis=1)
        write_predictions(rows, Path(folder) / f"{name}.csv")


def make_run(root):
    "A tree that looks like one after `dvc repro`, with two untrained members."
    shutil.copy(Path(__file__).parents[1] / "settings.ini", root)
    build_prepared(root / "artifacts/prepared", lesions(), HAM)
    write_json(root / "artifacts/ensemble/bundle.json", dict(image_size=32))
    for name in ("fused", "image"):
        save_member(root / "artifacts/models" / name, create_model("small_cnn_3", 7, seed=1))


@pytest.fixture
def notebook(root, monkeypatch, capsys):
    "Runs the notebook in a tree, in this process; gives its variables and what it printed."
    def run(tree):
        (tree / "nbs/apps").mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(tree / "nbs/apps")
        torch.set_num_threads(1)
        names = {}
        shown = []
        names["display"] = shown.append
        for cell in json.loads((root / "nbs/apps/compare.ipynb").read_text())["cells"]:
            if cell["cell_type"] != "code":
                continue
            exec(compile("".join(cell["source"]), "compare.ipynb", "exec"), names)  # the project's own notebook
            if "resamples, seed" in "".join(cell["source"]):
                names.update(resamples=200)
        return names | dict(shown=shown, printed=capsys.readouterr().out)
    return run


def test_it_keeps_no_output(root):
    "What it shows is about the runs of one machine."
    assert not any(c.get("outputs") for c in json.loads((root / "nbs/apps/compare.ipynb").read_text())["cells"])


def test_before_a_run_it_says_what_to_run(tmp_path, root, notebook):
    shutil.copy(root / "settings.ini", tmp_path)
    done = notebook(tmp_path)
    assert "no finished run to compare yet. Run: make repro" in done["printed"]
    assert "members: none; at least two are needed" in done["printed"]
    assert done["picks"] == [] and done["shown"] == []


def test_members_of_one_run_are_compared_and_one_is_picked(tmp_path, notebook):
    make_run(tmp_path)
    predictions(tmp_path / "artifacts/predictions", dict(fused=4, image=1))
    done = notebook(tmp_path)
    assert "no experiments are read" in done["printed"]
    assert "0 finished experiment(s); compared: ensemble, fused, image" in done["printed"]
    assert [pick.run for pick in done["picks"]] == ["fused"] and "image is out: balanced_accuracy" in done["printed"]
    assert "ensembles: ensemble; at least two are needed" in done["printed"]
    assert list(done["shown"][0].index) == ["fused", "image"]
    assert done["costs"]["ensemble"]["size_mb"] == 2 * done["costs"]["fused"]["size_mb"]
    # The choice is made on the validation lesions, its quality is measured on the test lesions.
    assert done["members"][0].n.max() == 60 and done["cards"]["fused"]["accuracy"]["n"] == 60


def test_equal_members_differ_in_cost_alone(tmp_path, notebook):
    make_run(tmp_path)
    predictions(tmp_path / "artifacts/predictions", dict(fused=2, image=2))
    pick = notebook(tmp_path)["picks"][0]
    assert pick.left == ("fused", "image") and pick.run == "fused" and "fused stays" in str(pick)


def command(tree, *words):
    "Run git or dvc in a tree."
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, **PLAIN_GIT, "DVC_NO_ANALYTICS": "1", "PATH": path}
    done = subprocess.run(words, cwd=tree, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture(scope="module")
def revisions(tmp_path_factory):
    "A DVC repository with a tag `low`, an experiment `better`, and a tag `other` whose split is another one."
    tree = tmp_path_factory.mktemp("revisions")
    make_run(tree)
    write_json(tree / "reports/evaluate/metrics.json", dict(test={}))
    for skill, image in dict(low=1, high=5).items():
        predictions(tree / "made" / skill, dict(fused=2, image=image))
    (tree / "dvc.yaml").write_text(DVC_YAML)
    (tree / "params.yaml").write_text("skill: low\n")
    command(tree, "git", "init", "-q")
    command(tree, "git", "config", "user.email", "test@example.org")
    command(tree, "git", "config", "user.name", "test")
    command(tree, "dvc", "init", "-q")
    command(tree, "dvc", "add", "-q", "artifacts/prepared")
    command(tree, "dvc", "repro", "-q")
    command(tree, "git", "add", "-A")
    command(tree, "git", "commit", "-qm", "low")
    command(tree, "git", "tag", "low")
    command(tree, "dvc", "exp", "run", "-q", "--name", "better", "-S", "skill=high")
    command(tree, "git", "checkout", "-q", ".")
    command(tree, "dvc", "checkout", "-q")
    build_prepared(tree / "artifacts/prepared", lesions().assign(split=["test", "valid"] * 60), HAM)
    command(tree, "dvc", "add", "-q", "artifacts/prepared")
    command(tree, "git", "commit", "-qam", "other")
    command(tree, "git", "tag", "other")
    return tree


def test_finished_experiments_stand_beside_the_members(revisions, tmp_path, notebook):
    "Experiments are listed by name; a member that one did not change is shown once."
    tree = tmp_path / "tree"
    shutil.copytree(revisions, tree, symlinks=True)
    # At `other` the split of the run is not that of the experiment.
    assert "better/image (its split is another one)" in notebook(tree)["printed"]
    command(tree, "git", "checkout", "-q", "low")
    command(tree, "dvc", "checkout", "-q", "--force")
    done = notebook(tree)
    runs = "ensemble, fused, image, better/ensemble, better/image"
    assert f"1 finished experiment(s); compared: {runs}" in done["printed"]
    assert "left out: better/fused (the same predictions as fused)" in done["printed"]
    assert [pick.run for pick in done["picks"]] == ["better/image", "better/ensemble"]


@pytest.fixture
def compare(monkeypatch):
    "The command, called in a tree: (exit code, stdout, stderr)."
    def run(tree, *words):
        monkeypatch.chdir(tree)
        ended = CliRunner().invoke(app, ["compare", *words])
        if ended.exception and not isinstance(ended.exception, SystemExit):
            raise ended.exception
        return ended.exit_code, ended.stdout, ended.stderr
    return run


def test_an_experiment_is_compared_with_a_tag(revisions, compare):
    code, out, err = compare(revisions, "low", "better", "--resamples", "300")
    assert code == 0, err
    a, b = (read_evaluation(rev, revisions) for rev in ("low", "better"))
    rows = {line.split()[0]: line for line in out.partition("better against")[0].splitlines()[1:]}
    leaf = compare_predictions(b.predictions(), a.predictions(), a.labels(), HAM, 300)["accuracy"]
    assert rows["accuracy"].split()[1:4] == [f"{leaf[k]:.3f}" for k in ("second", "first", "value")]
    assert rows["auroc_macro"].endswith("  better")
    assert "better against low (ensemble, 60 test images of 60 lesions): better in accuracy" in out
    # No training images stand in this split table.
    assert "not known: low (made-up): unknown kind of images, leak between its parts" in out
    # The member that the experiment left alone is the same in both.
    code, out, _ = compare(revisions, "low", "better", "--member", "fused", "--resamples", "50")
    assert code == 0 and out.count("  not distinguishable\n") == len(rows) and "better against low (fused" in out


def test_split_and_member_of_a_comparison_can_be_chosen(revisions, compare):
    chosen = ("--member", "image", "--split", "valid", "--resamples", "300")
    code, out, _ = compare(revisions, "better", "low", *chosen)
    assert code == 0 and "low against better (image, 60 valid images of 60 lesions): worse in accuracy" in out


REFUSALS = {
    "split": (("low", "other"), "low and other may not be compared; split_sha256: low '"),
    "revision": (("low", "nowhere"), "revision 'nowhere': unknown Git revision"),
    "experiment": (("low", "bettr"), "experiments: better. Did you mean 'better'?"),
    "both": (("nowhere", "bettr"), "experiments: better.\nrevision 'bettr': unknown Git revision"),
    "member": (("low", "better", "--member", "imag"), "Did you mean 'image'?"),
    "rows": (("low", "better", "--split", "train"), "revision 'low': no image in split 'train'; it has test, valid"),
}


@pytest.mark.parametrize("words, sentence", REFUSALS.values(), ids=REFUSALS)
def test_revisions_that_cannot_be_compared(revisions, compare, words, sentence):
    code, out, err = compare(revisions, *words)
    assert code == 1 and out == "" and sentence in err
    assert err.startswith("error: ") and "Traceback" not in err


def test_predictions_that_no_cache_holds(revisions, tmp_path, compare):
    shutil.copytree(revisions, tmp_path / "tree", symlinks=True)
    shutil.rmtree(tmp_path / "tree/.dvc/cache")
    for rev in ("low", "better"):
        code, out, err = compare(tmp_path / "tree", "workspace", rev)
        assert code == 1 and f"revision '{rev}': " in err
        assert "neither in git nor in a cache that can be read here; bring them from a remote" in err


def test_a_folder_that_is_no_repository(tmp_path, compare):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    err = compare(tmp_path, "HEAD", "workspace")[2]
    assert "not a git repository, as after a download of its ZIP, so it has no revisions; clone it" in err
