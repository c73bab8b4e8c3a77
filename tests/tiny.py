"""For tests: a bundle of two untrained members, a few pictures, and a copy of this repository with a fast pipeline."""
import atexit
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import yaml

from madeup import PLAIN_GIT, ROOT, committed
from skinlesion.data.metadata import MetadataEncoder
from skinlesion.data.prepared import write_prepared
from skinlesion.data.schema import DatasetInfo
from skinlesion.images import save_png
from skinlesion.model.bundle import Member, save_bundle
from skinlesion.model.fusion import create_model
from skinlesion.taxonomy import get_label_set


def build_bundle(folder, label_set=None, size=64):
    "Write a bundle of an image-only and a fused member."
    torch.set_num_threads(1)
    label_set = label_set or get_label_set("ham10000")
    encoder = MetadataEncoder.fit(
        pd.DataFrame({"age": [30.0, 60.0, 45.0], "sex": ["female", "male", ""], "site": ["back", "scalp", ""]})
    )
    models = {"image": create_model("resnet10t", label_set.num_classes, seed=1),
              "fused": create_model("resnet10t", label_set.num_classes, encoder.dim, "concat", seed=2)}
    members = [Member(name, model.eval(), model.config) for name, model in models.items()]
    return save_bundle(folder, members, label_set, encoder, size, {"note": "untrained"})


def build_prepared(folder, rows, label_set, size=8):
    "A prepared folder of grey squares: `rows` as in splits.csv, further columns are targets."
    folder.parent.mkdir(parents=True, exist_ok=True)
    grey = save_png(np.full((size, size, 3), 128, np.uint8), folder.parent / "grey.png")
    dataset = SimpleNamespace(
        table=rows,
        label_set=label_set,
        info=DatasetInfo("Made up", label_set.to_dict()),
        image_path=lambda image_id: grey,
        mask_path=lambda image_id: None,
    )
    pairs = pd.DataFrame(columns=["image_id_a", "image_id_b", "kind"])
    return write_prepared(folder, dataset, rows.split, pairs, rows[["image_id"]], size)


def build_pictures(folder, names=("a", "b", "c")):
    "Write PNGs of noise over a spot; name -> path."
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:60, :90]
    spot = ((y - 30) ** 2 + (x - 45) ** 2 < 300)[..., None]
    return {
        name: save_png(
            np.clip(np.where(spot, 90, 200) + rng.integers(-40, 40, (60, 90, 3)), 0, 255).astype(np.uint8),
            folder / f"{name}.png",
        )
        for name in names
    }


def run(cwd, *args, check=True, **kwargs):
    "Run a command in `cwd`; its output as text, with the exit status beside it."
    done = subprocess.run(
        [str(a) for a in args],
        cwd=cwd,
        env=plain_environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **kwargs,
    )
    assert not check or done.returncode == 0, done.stdout[-6000:]
    return done


def plain_environment():
    "The environment of a user of the copy: its own code, no settings of the caller, one thread (fastest here)."
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": "",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "OMP_NUM_THREADS": "1",
        **PLAIN_GIT,
    }


def edit_params(repo, change):
    "Apply `change` to the mapping in params.yaml."
    path = repo / "params.yaml"
    params = yaml.safe_load(path.read_text())
    change(params)
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def make_tiny(params):
    "Two epochs, few resamples, one CAM a class: seconds, not minutes. The member `image` can resume after any step."
    params["train"].update(epochs=2, warmup_epochs=1, batch_size=6, augment="none")
    params["train"]["members"]["image"].update(backbone="small_cnn_3", checkpoint_minutes=0.)
    params["base"]["image_size"] = 32
    params["evaluate"].update(resamples=100, views=["none", "flips"], map_images=1)
    params["evaluate"].update(stress=["blur", "ink"], stress_images=20)
    params["explain"].update(images_per_class=1, scorecam_images_per_class=1, methods=["gradcam", "eigencam"])


def copy_repository(to):
    "A repository of the files that git tracks or would add, as they are now, without own settings and own data."
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    for name in names.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    for name in ("params.yaml", "data.dvc"):
        (to / name).write_text(committed(name))
    run(to, "git", "init", "-q", "-b", "main")
    run(to, "git", "config", "user.email", "test@example.org")
    run(to, "git", "config", "user.name", "test")
    run(to, "git", "add", "-A")
    run(to, "git", "add", "-f", ".dvc/remote")
    run(to, "git", "commit", "-qm", "start")


def keep_some_lesions(data):
    "Keep the first three lesions of each class and split of a dataset folder, and every fourth of the others."
    table = pd.read_csv(data / "metadata.csv", dtype=str, keep_default_na=False)
    lesions = table.drop_duplicates("lesion_id")
    place = lesions.groupby(["diagnosis", "split"]).cumcount()
    kept = lesions.lesion_id[(place % 4 == 0) | (place < 3)]
    rows = table[table.lesion_id.isin(kept)]
    rows.to_csv(data / "metadata.csv", index=False)
    info = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(info | {"n_images": len(rows)}))
    for folder in ("images", "masks", "artefacts", "evidence"):
        for path in (data / folder).iterdir():
            if path.stem not in set(rows.image_id):
                path.unlink()


@functools.cache
def trained_repository():
    "A copy with half of the data, where the member `image` is prepared and trained by the tiny setting; made once."
    folder = Path(tempfile.mkdtemp(prefix="pipeline-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    repo = folder / "repo"
    repo.mkdir()
    copy_repository(repo)
    edit_params(repo, make_tiny)
    run(repo, "dvc", "pull", "-q", "data.dvc")
    keep_some_lesions(repo / "data")
    run(repo, "dvc", "add", "-q", "data")
    run(repo, "dvc", "repro", "train@image")
    return repo


def hashes(repo, *folders):
    "SHA-256 by path of every file that a stage vouches for."
    return {str(p.relative_to(repo)): hashlib.sha256(p.read_bytes()).hexdigest()
            for folder in folders for p in sorted((repo / folder).rglob("*"))
            if p.is_file() and p.name not in ("run.json", "failed.ipynb") and ".scratch" not in p.parts}
