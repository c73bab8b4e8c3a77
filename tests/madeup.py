"""A small made-up repository in which every check passes, so that a check can find planted faults only."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from skinlesion.pipeline.closure import write_deps
from skinlesion.pipeline.params import STAGES, parse_params, stage_defaults, stage_parameters

ROOT = Path(__file__).resolve().parents[1]

# For repositories made here: git without the settings of whoever runs the tests (signed commits, hooks).
PLAIN_GIT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}

SETTINGS = """[DEFAULT]
repo = made
lib_name = skinlesion
version = 4.5.6
min_python = 3.11
license = mit
description = made up
author = nobody
author_email = nobody@nowhere.example
copyright = nobody
user = nobody
branch = main
git_url = https://nowhere.example/made
nbs_path = nbs
lib_path = skinlesion
doc_path = _docs
doc_host = https://nowhere.example
doc_baseurl = /made
title = made
recursive = True
black_formatting = False
put_version_in_init = False
allowed_cell_metadata_keys = tags
allowed_metadata_keys =
jupyter_hooks = False
clean_ids = False
"""


def committed(name, root=ROOT):
    "Text of a file in git's last commit, without changes in the working copy; in an unpacked archive, the file itself."
    try:
        shown = subprocess.run(["git", "show", f"HEAD:./{name}"], cwd=root, capture_output=True)
    except FileNotFoundError:
        shown = None  # no git on this machine
    return shown.stdout.decode() if shown and shown.returncode == 0 else (root / name).read_text(encoding="utf-8")


def cell(source, kind="code", tags=None, outputs=None, id=None):
    "One notebook cell; its id comes from its source unless given."
    made = dict(
        cell_type=kind,
        id=id or hashlib.sha256(source.encode()).hexdigest()[:8],
        metadata=dict(tags=tags) if tags else {},
        source=source,
    )
    return made | dict(execution_count=None, outputs=outputs or []) if kind == "code" else made


def notebook(*cells):
    "The text of a notebook, as nbdev_clean leaves it."
    cells = [cell(c) if isinstance(c, str) else c for c in cells]
    for c in cells:
        c["source"] = c["source"].splitlines(True)
    meta = dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    return (
        json.dumps(
            dict(cells=cells, metadata=meta, nbformat=4, nbformat_minor=5), indent=1, sort_keys=True, ensure_ascii=False
        )
        + "\n"
    )


def library(module, *cells):
    "A library notebook that exports `module`."
    return notebook(cell(f"# {module}\n\n> Made up.", "markdown"), f"#| default_exp {module}", *cells)


ADD = '#| export\ndef add(\n    a:int, # a number\n) -> int: # one more\n    "Add one."\n    return a + 1'


def stage_notebook(stage, extra=()):
    "A stage notebook whose parameters are those of the committed params.yaml, or the default where there is one."
    params = parse_params(committed("params.yaml"))
    values = stage_parameters(params, stage, next(iter(params.train.members)) if stage == "train" else None)
    lines = "\n".join(f"{name} = {value!r}  # made up" for name, value in (values | stage_defaults(stage)).items())
    use = "print(\n" + "".join(f"    {name},\n" for name in values) + ")"
    return notebook(
        cell(f"# {stage}", "markdown"),
        cell(lines, tags=["parameters"]),
        "from skinlesion.model.grow import grow  # noqa: F401",
        use,
        *extra,
    )


def remote_object(data, suffix=""):
    "Path of an object in the embedded remote, as DVC names it."
    name = hashlib.md5(data).hexdigest() + suffix
    return f".dvc/remote/files/md5/{name[:2]}/{name[2:]}", name


def embedded_data():
    "data.dvc with one image, and its objects in the remote."
    image = b"\xff\xd8made up\0"
    image_path, image_name = remote_object(image)
    listing = json.dumps([dict(md5=image_name, relpath="images/a.jpg")]).encode()
    list_path, list_name = remote_object(listing, ".dir")
    return {
        "data.dvc": f"outs:\n- md5: {list_name}\n  size: 9\n  nfiles: 1\n  hash: md5\n  path: data\n",
        image_path: image,
        list_path: listing,
    }


def good_files():
    "Name -> content of everything that is written by hand."
    return {
        "settings.ini": SETTINGS,
        "constraints.txt": "numpy==1\n",
        "pyproject.toml": '[project]\nname = "made"\ndynamic = ["version"]\n',
        "params.yaml": committed("params.yaml"),
        "dvc.yaml": (ROOT / "dvc.yaml").read_text(),
        "nbs/index.ipynb": notebook(cell("# made\n\n> Made up.", "markdown")),
        "nbs/00_base.ipynb": library("base", "#| export\nfrom math import sqrt  # noqa: F401", ADD),
        "nbs/data/10_part.ipynb": library(
            "data.part", "#| export\nfrom skinlesion.base import add  # noqa: F401", ADD.replace("add", "part")
        ),
        "nbs/data/11_other.ipynb": library("data.other", ADD.replace("add", "other")),
        "nbs/model/20_grow.ipynb": library(
            "model.grow",
            "#| export\nfrom skinlesion.data.part import part  # noqa: F401",
            ADD.replace("add", "grow"),
            '#| export\nclass Grower:\n    "Grows."\n    def up(self):\n        "Up."\n        return grow(1)',
        ),
        "nbs/use/51_predict.ipynb": library(
            "use.predict", "#| export\nimport json  # noqa: F401", ADD.replace("add", "predict")
        ),
        "nbs/report/89_index.ipynb": library(
            "report.index", "#| export\nfrom skinlesion.base import add  # noqa: F401", ADD.replace("add", "index")
        ),
        "nbs/pipeline/102_reports.ipynb": library("pipeline.reports", ADD.replace("add", "report")),
        **{f"nbs/stages/{stage}.ipynb": stage_notebook(stage) for stage in STAGES},
        **embedded_data(),
    }


def write(root, name, content):
    "Write, or with None delete, one file of the tree."
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def nbdev(root):
    "Export and clean a tree in a process of its own."
    code = "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nbdev failed in {root}:\n{done.stdout}{done.stderr}")


def build(root):
    "Make the whole tree, exported, clean, with a README, tracked by git."
    for name, content in good_files().items():
        write(root, name, content)
    nbdev(root)
    write_deps(root)
    try:
        from skinlesion.pipeline.readme import build_readme
        write(root, "README.md", build_readme(root))
    except ImportError:
        pass
    subprocess.run(["git", "init", "-q"], cwd=root, check=True, env=os.environ | PLAIN_GIT)
    stage_all(root)
    return root


def stage_all(root):
    "Let git track every file of the tree."
    subprocess.run(["git", "add", "-A", "-f"], cwd=root, check=True, env=os.environ | PLAIN_GIT)


def tracked(root, *patterns):
    "Files that git tracks under `root` and that exist, relative to it."
    out = subprocess.run(
        ["git", "ls-files", "-z", "--", *patterns], cwd=root, check=True, capture_output=True, text=True
    ).stdout
    return [Path(name) for name in sorted(set(out.split("\0"))) if name and (root / name).is_file()]


def plant(good, root, faults):
    "Copy a good tree and plant faults: path -> new content, None to delete, or a function of the old text."
    shutil.copytree(good, root)
    for name, fault in faults.items():
        if callable(fault):
            old = (root / name).read_text()
            new = fault(old)
            assert new != old, f"the fault changes nothing in {name}"
            fault = new
        write(root, name, fault)
    stage_all(root)
    return root


def swap(old, new):
    "A fault that replaces some text."
    return lambda text: text.replace(old, new)


def check_tests(checks, faults):
    """The four tests of a module of checks: each passes here and in the made-up tree, and finds every planted fault.

    checks: functions of a root that return sentences; faults: (check, arguments of `plant`, part of the sentence).
    """
    @pytest.mark.parametrize("check", checks, ids=lambda f: f.__name__)
    def test_repository(check, root):
        assert check(root) == []

    @pytest.mark.parametrize("check", checks, ids=lambda f: f.__name__)
    def test_good_tree(check, good_tree):
        assert check(good_tree) == []

    @pytest.mark.parametrize("check, planted, words", faults, ids=lambda x: x.__name__ if callable(x) else "")
    def test_planted(check, planted, words, good_tree, tmp_path):
        problems = check(plant(good_tree, tmp_path / "tree", planted))
        assert any(words in p for p in problems), problems

    def test_every_check_is_tested():
        assert {f.__name__ for f in checks} == {f.__name__ for f, _, _ in faults}
    return test_repository, test_good_tree, test_planted, test_every_check_is_tested
