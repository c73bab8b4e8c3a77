"Own data as users bring it: folders, tables, Hugging Face data, several datasets as one; and the errors."
import io
import json
import os
import shlex
import shutil
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from skinlesion.data.collections import import_ham10000
from skinlesion.data.schema import DatasetError, DatasetInfo, read_dataset, write_dataset
from skinlesion.data.classes import About
from skinlesion.data.hub import import_hf
from skinlesion.data.importers import Columns, import_csv, import_folder
from skinlesion.data.merge import merge_datasets
from skinlesion.images import encode_png, read_image
from skinlesion.pipeline.cli import app
from skinlesion.taxonomy import LABEL_SETS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def noise(seed=0, size=(12, 16)):
    "A picture that no other seed gives."
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)


def png(seed=0):
    return encode_png(noise(seed))


def jpeg_with_gps(seed=0):
    "A JPEG that is to be turned and carries a place."
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "SECRET-CAMERA"
    Image.fromarray(noise(seed)).save(out, "JPEG", exif=exif)
    return out.getvalue()


def lay(root, *names, **content):
    "Pictures under these names, other files under their own."
    for k, name in enumerate([*names, *content]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.get(name) or png(k))
    return root


def cli(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def refused(folder, expected, call, *args, error=(ValueError, OSError), **options):
    "The call fails with these words, and nothing new stands in the folder, hidden or not."
    before = sorted(str(p) for p in folder.rglob("*"))
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert expected in str(caught.value), caught.value
    assert sorted(str(p) for p in folder.rglob("*")) == before


# ---- class folders


@pytest.mark.parametrize("names, want", [
    (["mel/a.png", "nv/b.png"], {"a": ("mel", ""), "b": ("nv", "")}),
    (["data/train/Melanoma/a.png", "data/test/NEVUS/b.png"], {"a": ("mel", "train"), "b": ("nv", "test")}),
    (["TRAIN/bcc/a.png", "Valid/mel/x/b.png", "validation/bcc/c.png"],
     {"a": ("bcc", "train"), "b": ("mel", "valid"), "c": ("bcc", "valid")}),
    (["all/mel/a.png", "all/nv/deep/deeper/b.png"], {"a": ("mel", ""), "b": ("nv", "")})])
@pytest.mark.parametrize("how", ["folder", "zip", "tar.gz"])
def test_class_folders_in_any_package(tmp_path, names, want, how):
    source = lay(tmp_path / "src", *names)
    if how != "folder":
        packed = tmp_path / f"src.{how}"
        with (zipfile.ZipFile(packed, "w") if how == "zip" else tarfile.open(packed, "w:gz")) as archive:
            for name in names:
                (archive.write if how == "zip" else archive.add)(source / name, name)
        source = packed
    import_folder(source, tmp_path / "out")
    table = read_dataset(tmp_path / "out").table.set_index("image_id")
    assert {i: (r.diagnosis, r.get("split", "")) for i, r in table.iterrows()} == want


def test_folders_given_one_by_one_and_archives_named_after_splits(tmp_path):
    source = lay(tmp_path / "src", "mel/a.png", "nv/b.png")
    assert import_folder([source / "nv", source / "mel"], tmp_path / "one").classes["mel"] == 1
    for split in ("train", "test"):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as z:
            for k, code in enumerate(("mel", "nv")):
                z.writestr(f"{code}/{split}{k}.png", png(len(split) + k))
    import_folder([tmp_path / "train.zip", tmp_path / "test.zip"], tmp_path / "two", about=About(name="two"))
    assert read_dataset(tmp_path / "two").table.split.tolist() == ["train", "train", "test", "test"]


@pytest.mark.parametrize("names, expected", [
    (["mel/a.png", "nv/a.jpg"], "image_id 'a' is there twice: src/mel/a.png and src/nv/a.jpg; remove or rename one"),
    (["train/mel/a.png", "test/mel/a.png", "test/nv/b.png"],
     "image_id 'a' is there twice: src/test/mel/a.png and src/train/mel/a.png"),
    (["mel/a.png", "nv/b.png", "c.png"],
     "src/c.png: it lies in no class folder; allowed are CLASS/image and train|val|test/CLASS/image"),
    (["train/mel/a.png", "train/b.png"], "src/train/b.png: it lies in no class folder"),
    (["train/mel/a.png", "nv/b.png"],
     "src/train/mel/a.png lies below a split and src/nv/b.png does not (1 and 1 images)"),
    (["mel/a.png", "nv/A.png"],
     "src/nv/A.png: image_id 'A' is already in src/mel/a.png; there it is written 'a'"),
    (["mel/a.png", "mel/b.png"], "src: all 2 rows have the diagnosis 'mel'; one class cannot be told from itself"),
    ([], "no image was given"),
    (["photos.rar"],
     "no image was given; allowed are CLASS/image and train|val|test/CLASS/image, in folders or archives; "
     "tables seen: none; of a kind that is not read (a table is CSV, an archive zip or tar): src/photos.rar")])
def test_folders_that_cannot_be_meant(tmp_path, names, expected):
    source = lay(tmp_path / "src", *names)
    source.mkdir(exist_ok=True)
    refused(tmp_path, expected, import_folder, source, tmp_path / "out")


def test_a_folder_with_other_things_in_it(tmp_path):
    source = lay(
        tmp_path / "src",
        "mel/a.png",
        "nv/b.png",
        **{"nv/notes.docx": b"x", "nv/c.png": b"no picture", "nv/Thumbs.db": b"x"},
    )
    with pytest.raises(DatasetError) as caught:
        import_folder(source, tmp_path / "out")
    assert (
        str(caught.value).startswith("src/nv/c.png: its content is no known image")
        and str(caught.value).count("c.png") == 1
    )
    report = import_folder(source, tmp_path / "out", skip_bad=True)
    assert (
        report.n_images == 2
        and sorted(report.other_files) == ["src/nv/Thumbs.db", "src/nv/notes.docx"]
        and "c.png" in report.skipped[0]
    )


def test_pictures_are_known_by_their_content(tmp_path):
    jpeg = jpeg_with_gps()
    files = {
        "mel/a.JPG": jpeg,
        "mel/b.jfif": jpeg,
        "nv/c": jpeg,
        "nv/d.dat": jpeg,
        "nv/e.HEIC": b"heic",
        "nv/f": b"GIF89a",
    }
    report = import_folder(lay(tmp_path / "src", **files), tmp_path / "out")
    assert read_dataset(tmp_path / "out").table.image_id.tolist() == ["a", "b", "c", "d.dat"]
    assert report.unread == tuple(
        f"src/nv/{n} is not read; export it as JPEG or PNG" for n in ("e.HEIC: HEIC", "f: GIF")
    ) and "pictures of a kind that is not read, not imported: 2" in str(report)


# ---- label sets


def test_a_built_in_set_only_where_every_class_is_in_it(tmp_path):
    source = lay(tmp_path / "src", "Melanoma/a.png", "eczema/b.png")
    report = import_folder(source, tmp_path / "own")
    own = read_dataset(tmp_path / "own").label_set
    assert own.codes == ("eczema", "melanoma") and own.names["melanoma"] == "Melanoma" and own.malignant is None
    assert any("what is malignant is not stated" in n for n in report.notes)
    (tmp_path / "classes.csv").write_text("code,name,malignant\nmel,Melanoma,yes\necz,Eczema,no\n")
    import_folder(source, tmp_path / "stated", about=About(labels=tmp_path / "classes.csv"))
    stated = read_dataset(tmp_path / "stated").label_set
    assert stated.codes == ("mel", "ecz") and stated.malignant == {"mel"}
    import_folder(source, tmp_path / "mapped", word_map={"eczema": "bkl"})
    assert read_dataset(tmp_path / "mapped").info.label_set == "ham10000"
    refused(
        tmp_path,
        "src/eczema/b.png: diagnosis 'eczema' is not in label set melanoma",
        import_folder,
        source,
        tmp_path / "out",
        about=About(label_set="melanoma"),
    )
    refused(
        tmp_path,
        "'eczma=nv': the word 'eczma' stands nowhere",
        import_folder,
        source,
        tmp_path / "out",
        word_map={"eczma": "nv"},
    )


@pytest.mark.parametrize("word", ["", " ", "-", "nan", "N/A", "#N/A", "#NAME?", "#DIV/0!", "?", "unknown", "NULL"])
def test_a_word_for_unknown_is_no_class_and_no_patient(tmp_path, word):
    lay(tmp_path / "in", "a.png", "b.png", "c.png", "d.png")
    rows = f"image_id,diagnosis,patient_id,lesion_id\na,mel,{word},{word}\nb,nv,{word},{word}\nc,{word},P1,\nd,nv,P2,\n"
    (tmp_path / "in" / "t.csv").write_text(rows)
    refused(tmp_path, "t.csv row 4: the diagnosis is ", import_csv, tmp_path / "in", tmp_path / "out")
    import_csv(tmp_path / "in", tmp_path / "out", unlabelled=True)
    data = read_dataset(tmp_path / "out")
    assert (data.info.label_set, data.table.diagnosis.tolist()) == ("ham10000", ["mel", "nv", "", "nv"])
    assert data.table.patient_id.tolist() == ["", "", "P1", "P2"] and data.table.lesion_id.tolist() == list("abcd")


def test_a_folder_of_unknown_diagnoses(tmp_path):
    source = lay(tmp_path / "src", "mel/a.png", "nv/b.png", "unknown/c.png")
    refused(tmp_path, "c.png: the diagnosis is 'unknown', which stands for", import_folder, source, tmp_path / "out")
    assert cli("import", "folder", source, "--unlabelled", "--out", tmp_path / "out").exit_code == 0
    assert read_dataset(tmp_path / "out").table.diagnosis.tolist() == ["mel", "nv", ""]


def test_each_cause_has_one_line_with_its_count_and_first_row(tmp_path):
    lay(tmp_path / "in", "p.png")
    rows = [f"i{k},lesion {'abcdefghijklmnopqrstuvwxy'[k % 25]},{900 if k == 7 else 50}" for k in range(3000)]
    (tmp_path / "in" / "t.csv").write_text("\n".join(["image_id,diagnosis,age", "p,melanma,1", *rows, ""]))
    with pytest.raises(DatasetError) as caught:
        import_csv(tmp_path / "in", tmp_path / "out", about=About(label_set="ham10000"), skip_bad=True)
    lines = str(caught.value).splitlines()
    assert lines[0] == "in/t.csv: nothing was imported: 3002 problems" and len(lines) == 1 + 1 + 25 + 1
    assert lines[1].startswith("  in/t.csv row 2: diagnosis 'melanma' is not in label set ham10000")
    assert "Did you mean 'melanoma'?" in lines[1]
    assert lines[2].startswith("  in/t.csv row 3: diagnosis 'lesion a' is not in label set ham10000")
    assert lines[2].endswith("(120 rows)")
    assert any(line.startswith("  in/t.csv row 10: age '900' is not a number") for line in lines)


def test_classes_that_no_model_can_learn_are_told(tmp_path):
    source = lay(tmp_path / "src", "nevus/a.png", "melanoma/b.png", "bcc/c.png")
    report = import_folder(source, tmp_path / "out")
    assert report.notes[1:3] == (
        "the licence was not stated (--licence TEXT); without it the images may not be passed on",
        "left out of training: no image of akiec, bkl, df, vasc",
    )
    assert report.notes[3].startswith("too few lesions for the stage prepare, which needs 3 of a class (train, valid, ")
    only = lay(tmp_path / "only", "unk/a.png", "melanoma/b.png")
    message = "no model can be trained on these images, which needs two classes: no image of ak, bcc"
    refused(tmp_path, message, import_folder, only, tmp_path / "none", about=About(label_set="isic2019"))


@pytest.mark.parametrize("name, size, expected", [
    ("blank.png", (1, 1), "1x1 pixels, less than the 8 allowed for a side"),
    ("strip.png", (3, 2000), "2000x3 pixels, less than the 8 allowed for a side"),
    ("ribbon.png", (10, 400), "400x10 pixels, one side more than 10 times the other")])
def test_a_placeholder_or_a_strip_is_refused_by_name(tmp_path, name, size, expected):
    source = lay(tmp_path / "src", "mel/a.png", "nv/b.png", **{f"nv/{name}": encode_png(noise(9, size))})
    refused(tmp_path, f"src/nv/{name}: {expected}", import_folder, source, tmp_path / "out")
    assert name in import_folder(source, tmp_path / "out", skip_bad=True).skipped[0]


# ---- tables


@pytest.fixture
def clinic(tmp_path):
    "Pictures beside a table that calls its columns otherwise."
    mask = encode_png(np.eye(12, 16) > 0)
    lay(tmp_path / "clinic", "photos/p1.png", "photos/p2.png", "photos/more/p3.png",
        **{"photos/p4.jpg": jpeg_with_gps(), "photos/p2_segmentation.png": mask})
    (tmp_path / "clinic" / "visits.csv").write_text(
        "case;photo;finding;grade;refer;itch;years;place;device\n"
        "C1;photos/p1.png;Acne;mild;yes;7;31;Face;A\nC1;p2;acne ;2;0;;32;;A\n"
        "C2;photos/more/p3.png;Eczema;;No;3;unknown;left arm;007\nC3;p4.jpg;eczema;3.0;;1;;;\n"
    )
    return tmp_path / "clinic"


def test_the_example_of_the_help_works_as_it_stands(tmp_path, monkeypatch):
    "Word for word, with files of the names that it uses."
    lines = cli("import", "csv", "--help").stdout.replace("\\\n", " ").splitlines()
    example = shlex.split(next(line for line in lines if "skinlesion import csv visits.csv" in line))
    monkeypatch.chdir(tmp_path)
    Path("visits.csv").write_text(
        "photo,finding,case,grade,refer\na.png,acne,1,mild,yes\nb.png,eczema,1,Severe,no\nc.png,acne,2,,\n"
    )
    Path("classes.csv").write_text("code,name,malignant\nacn,acne,no\necz,eczema,no\n")
    with zipfile.ZipFile("photos.zip", "w") as z:
        for k, name in enumerate("abc"):
            z.writestr(f"photos/{name}.png", png(k))
    ended = cli(*example[1:])
    assert ended.exit_code == 0, ended.output
    table = read_dataset(tmp_path / "data").table
    assert table[["diagnosis", "severity", "urgent"]].values.tolist() == [
        ["acn", "1", "1"],
        ["ecz", "2", "0"],
        ["acn", "", ""],
    ]
    assert table.patient_id.tolist() == ["1", "1", "2"]
    assert "severity: 'mild' read as '1' in 1 rows" in ended.stdout and "licence: not stated" in ended.stdout


@pytest.mark.parametrize("words, expected", [
    (["mild=1", "rough=2"],
     "visits.csv: --map 'rough=2': the word 'rough' stands nowhere in diagnosis, site, age, severity, urgent."),
    (["mild=one"], "visits.csv row 2: severity 'one' is not a whole number from 0"),
    (["mild=1", "MILD=2"], "--map 'mild=1' and --map 'MILD=2' give one word two meanings"),
    (["mild=1", "left arm=elbo"], "row 4: site 'elbo' is not known"),
    (["mild=1", "left arm=elbo"], "The word comes from --map 'left arm=elbo'; name a known one there"),
    (["mild=1", "left arm=unknown"], None)])
def test_words_of_the_map_occur_and_are_known(tmp_path, clinic, words, expected):
    maps = [w for word in words for w in ("--map", word)]
    ended = cli("import", "csv", clinic, *OWN, *maps, "--out", tmp_path / "out")
    if expected is None:
        assert ended.exit_code == 0, ended.output
        assert read_dataset(tmp_path / "out").table.site.tolist() == ["face", "", "", ""]
    else:
        assert ended.exit_code == 1 and expected in ended.stderr, ended.output
        assert not (tmp_path / "out").exists()


def test_a_class_that_is_nearly_known_is_pointed_out(tmp_path):
    report = import_folder(lay(tmp_path / "src", "melanma/a.png", "nevus/b.png"), tmp_path / "out")
    assert "'melanma' became a class of its own. Did you mean 'melanoma'? Then say so (--map 'OLD=NEW')" in report.notes


OWN = (
    "--image-column",
    "photo",
    "--label-column",
    "finding",
    "--patient-column",
    "case",
    "--severity-column",
    "grade",
    "--urgent-column",
    "refer",
    "--age-column",
    "years",
    "--site-column",
    "place",
)


def test_a_table_of_many_targets_by_the_command(tmp_path, clinic):
    ended = cli(
        "import",
        "csv",
        clinic,
        *OWN,
        "--map",
        "mild=1",
        "--map",
        "left arm=upper extremity",
        "--licence",
        "CC0",
        "--out",
        tmp_path / "out",
    )
    assert ended.exit_code == 0, ended.output
    assert (
        "severity: 'mild' read as '1' in 1 rows" in ended.stdout
        and "columns kept as they are: itch, device" in ended.stdout
    )
    data = read_dataset(tmp_path / "out")
    table = data.table.set_index("image_id")
    assert table.severity.to_dict() == dict(p1="1", p2="2", p3="", p4="3") and table.urgent.to_dict() == dict(
        p1="1", p2="0", p3="0", p4=""
    )
    assert (
        table.device["p3"] == "007"
        and table.itch["p1"] == "7"
        and table.patient_id.tolist() == ["C1", "C1", "C2", "C3"]
    )
    assert (
        table.site.tolist() == ["face", "", "upper extremity", ""]
        and table.age[:2].tolist() == [31, 32]
        and table.age[2:].isna().all()
    )
    assert (data.info.name, data.info.licence, data.label_set.codes) == ("clinic", "CC0", ("acne", "eczema"))
    assert data.mask_path("p2") and not data.mask_path("p1")
    assert (
        read_image(data.image_path("p4")).shape == (16, 12, 3) and b"SECRET" not in data.image_path("p4").read_bytes()
    )


def test_the_images_may_lie_in_an_archive_beside_the_table(tmp_path, clinic):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as z:
        for p in sorted((clinic / "photos").rglob("*.*")):
            z.write(p, p.relative_to(clinic))
    words = ("--map", "mild=1", "--map", "left arm=upper extremity")
    assert (
        cli(
            "import", "csv", clinic / "visits.csv", tmp_path / "photos.zip", *OWN, *words, "--out", tmp_path / "out"
        ).exit_code
        == 0
    )
    assert len(read_dataset(tmp_path / "out")) == 4


GOOD = "image_id,diagnosis\np1,mel\np2,nv\n"


@pytest.mark.parametrize("text, expected", [
    (GOOD + "/etc/passwd,nv\n",
     "t.csv row 4: image '/etc/passwd' is an absolute path; write it relative to the table"),
    (GOOD + "C:\\p4.png,nv\n", "t.csv row 4: image 'C:\\p4.png' is an absolute path"),
    (GOOD + "~/p4.png,nv\n", "t.csv row 4: image '~/p4.png' is an absolute path"),
    (GOOD + "../secret.png,nv\n",
     "t.csv row 4: image '../secret.png' leaves what was given; give the folder it lies in too, or correct the path"),
    (GOOD + "photos/../../secret.png,nv\n", "t.csv row 4: image 'photos/../../secret.png' leaves what was given"),
    (GOOD + "link.png,nv\n", "t.csv row 4: image 'link.png' is a symbolic link; give the file itself"),
    (GOOD + "https://nowhere.example/p.png,nv\n",
     "t.csv row 4: image 'https://nowhere.example/p.png' is an address; fetch the files first"),
    (GOOD + ",nv\n", "t.csv row 4: the image is empty; name its file, or remove the row"),
    (GOOD + "#N/A,nv\n", "t.csv row 4: the image is empty; name its file, or remove the row"),
    (GOOD + "p9,nv\n", "t.csv row 4: there is no image 'p9' in what was given"),
    (GOOD + "p1.png,nv\n", "image_id 'p1' is already in row 2"),
    (GOOD.replace("diagnosis", "dx"), "no table has the columns image_id, diagnosis; tables seen: "),
    (GOOD.replace(",", "|"),
     "no table has the columns image_id, diagnosis; tables seen: in/t.csv (image_id|diagnosis)"),
    ("image_id,diagnosis\n", "there is no row below the header"),
    ("image_id,diagnosis,severity\np1,mel,1\np2,nv,-1\n", "t.csv row 3: severity '-1' is not a whole number from 0"),
    ("image_id,diagnosis,infectious\np1,mel,2\np2,nv,0\n",
     "t.csv row 2: infectious '2' is neither yes nor no; allowed are yes, no, 1, 0"),
    ("image_id,diagnosis,split\np1,mel,train\np2,nv,tset\n",
     "t.csv row 3: split 'tset' is not known; allowed are train, valid, test, external. Did")])
def test_a_table_that_cannot_be_used(tmp_path, text, expected):
    "What the table itself may hold is tested with the schema; here are images, targets and splits."
    lay(tmp_path / "in", "photos/p1.png", "photos/p2.png", "photos/p3.png")
    lay(tmp_path, "secret.png")
    (tmp_path / "in" / "photos" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "in" / "t.csv").write_text(text)
    refused(tmp_path, expected, import_csv, tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("cell, file", [
    ("IMG_0.jpg", "photos/IMG_0.JPG"),
    ("img_0", "photos/IMG_0.jpeg"),
    ("IMG_0.jpg", "photos/IMG_0.png"),
    ("IMG_0.jpg", "photos/IMG_0"),
    ("img_0.jpg", "photos/IMG_0.jpg.jpg"),
    ("IMG_0 .jpg ", "photos/IMG_0.jpg"),
    ("IMG_0.jpg", "photos/ IMG_0 .jpg"),
    ("img%200.jpg", "IMG 0.jpg"),
    ("IMG\u00a00.jpg", "IMG 0.jpg"),
    ("IMG\u200b_0.jpg", "IMG_0.jpg"),
    ("cafe\u0301.jpg", "photos/caf\u00e9.JPG"),
    ("old\\IMG_0.jpg", "photos/IMG_0.jpg"),
    ("Photos /IMG_0.jpg", "photos/IMG_0.jpg"),
    ("C:\\Users\\x\\IMG_0.jpg", "photos/IMG_0.jpg"),
    ("/disk/x/IMG_0.jpg", "photos/IMG_0.jpg"),
    ("https://host.example/IMG_0.jpg?x=1", "photos/IMG_0.jpg"),
    ("../IMG_0.jpg", "photos/IMG_0.jpg")])
def test_a_cell_means_the_one_file_that_differs_in_form_only(tmp_path, cell, file):
    lay(tmp_path / "in", "p1.png", file)
    (tmp_path / "in" / "t.csv").write_text(f"id,file,diagnosis\nA,{cell},mel\nB,p1.png,nv\n", encoding="utf-8")
    report = import_csv(tmp_path / "in", tmp_path / "out", columns=Columns(image="file", id="id"))
    assert report.n_images == 2 and f"'{cell.strip()}' is in/{file}" in report.notes[-1], report.notes


def test_a_name_that_many_folders_hold_is_found_in_its_own_folder_only(tmp_path):
    "Else the diagnosis of one patient would go to the picture of another."
    lay(tmp_path / "in", "patient_1/Image.JPG", "patient_8/image.jpg")
    rows = "id,file,diagnosis\nA,patient_1/image.jpg,mel\nB,patient_7/image.jpg,nv\n"
    (tmp_path / "in" / "t.csv").write_text(rows)
    columns = Columns(image="file", id="id")
    expected = "row 3: there is no image 'patient_7/image.jpg' in what was given; the nearest file is in/patient_"
    refused(tmp_path, expected, import_csv, tmp_path / "in", tmp_path / "out", columns=columns)
    (tmp_path / "in" / "t.csv").write_text(rows.replace("patient_7", "PATIENT_8"))
    import_csv(tmp_path / "in", tmp_path / "out", columns=columns)
    rows = "id,file,diagnosis\nA,IMAGE.jpg,mel\nB,IMAGE.jpg,nv\nC,patient_1/Image.JPG,nv\n"
    (tmp_path / "in" / "t.csv").write_text(rows)
    expected = "row 3: the file in/patient_8/image.jpg is the nearest to 'IMAGE.jpg', but 'IMAGE.jpg' of another row"
    refused(tmp_path, expected, import_csv, tmp_path / "in", tmp_path / "new", columns=columns)


@pytest.mark.parametrize("cell, files, expected", [
    ("IMG_9.jpg", ["IMG_O.jpg"],
     "there is no image 'IMG_9.jpg' in what was given; the nearest file is in/IMG_O.jpg. Correct the name"),
    ("1E+05", ["photos/100000.png"],
     "there is no image '1E+05' in what was given; the nearest file is in/photos/100000.png"),
    ("IMG_1.jpg", ["IMG_1.HEIC"],
     "'IMG_1.jpg' that can be read: in/IMG_1.HEIC is there, but HEIC is not read; export it"),
    ("IMG_1.HEIC", ["IMG_1.HEIC"], "'IMG_1.HEIC' that can be read: in/IMG_1.HEIC is there, but HEIC is not read"),
    ("b/x.jpg", ["a/X.png", "c/x.PNG"], "in/a/X.png and in/c/x.PNG differ; give only the one that is meant"),
    ("P1.JPG", ["a.png"],
     "there is no image 'P1.JPG' in what was given; give its archive or folder, or remove the row")])
def test_a_cell_that_no_file_fits_is_told_the_nearest(tmp_path, cell, files, expected):
    lay(tmp_path / "in", "p1.png", **{f: b"heic" if "HEIC" in f else png(k) for k, f in enumerate(files, 5)})
    (tmp_path / "in" / "t.csv").write_text(f"id,file,diagnosis\nA,{cell},mel\nB,p1.png,nv\n")
    columns = Columns(image="file", id="id")
    refused(tmp_path, expected, import_csv, tmp_path / "in", tmp_path / "out", columns=columns)


def test_every_bad_row_is_named_at_once(tmp_path):
    lay(tmp_path / "in", "p0.png", "p1.png")
    rows = "p0,mel,900,f,yes\np1,nvv,3,x,perhaps\np9,nv,3,f,no\n"
    (tmp_path / "in" / "t.csv").write_text("image_id,diagnosis,age,sex,urgent\n" + rows)
    with pytest.raises(DatasetError) as caught:
        import_csv(tmp_path / "in", tmp_path / "out", about=About(label_set="ham10000"))
    columns = [p.split(":")[1].split()[0] for p in caught.value.problems]
    assert columns == ["age", "diagnosis", "sex", "urgent", "there"], caught.value


def test_columns_that_cannot_be_meant(tmp_path, clinic):
    def check(words, **columns):
        refused(tmp_path, words, import_csv, clinic, tmp_path / "out", columns=Columns(image="photo", **columns))
    check(
        "visits.csv row 1: the column 'yaers' (--age-column) is missing; the table has case, photo, finding",
        label="finding",
        age="yaers",
    )
    check("Did you mean 'years'?", label="finding", age="yaers")
    check(
        "no table has the columns photo, findng; tables seen: clinic/visits.csv (case, photo, finding, ", label="findng"
    )
    text = (clinic / "visits.csv").read_text()
    (clinic / "visits.csv").write_text(text.replace("years", "age").replace("place", "site"))
    check(
        "'itch' (--age-column) is to fill the column 'age', which the table has too; rename that one or leave",
        label="finding",
        age="itch",
    )
    shutil.copy(clinic / "visits.csv", clinic / "copy.csv")
    check(
        "2 tables have the columns photo, finding: clinic/copy.csv, clinic/visits.csv; give only the one that is meant",
        label="finding",
    )


def test_rows_without_a_diagnosis_for_pretraining(tmp_path):
    lay(tmp_path / "in", "p0.png", "p1.png", "p2.png")
    (tmp_path / "in" / "t.csv").write_text("image_id,diagnosis\np0,mel\np1,\np2,nv\n")
    assert cli("import", "csv", tmp_path / "in", "--out", tmp_path / "out").exit_code == 1
    ended = cli("import", "csv", tmp_path / "in", "--unlabelled", "--out", tmp_path / "out")
    assert ended.exit_code == 0 and "1 images without a diagnosis: for pretraining only" in ended.stdout
    data = read_dataset(tmp_path / "out")
    assert data.info.unlabelled and data.table.diagnosis.tolist() == ["mel", "", "nv"]
    facts = json.loads((tmp_path / "out" / "dataset.json").read_text())
    (tmp_path / "out" / "dataset.json").write_text(json.dumps({k: v for k, v in facts.items() if k != "unlabelled"}))
    with pytest.raises(DatasetError, match="row 3: the diagnosis is empty"):
        read_dataset(tmp_path / "out")
    (tmp_path / "in" / "t.csv").write_text("image_id\np0\np1\np2\n")
    import_csv(tmp_path / "in", tmp_path / "none", unlabelled=True)
    assert read_dataset(tmp_path / "none").table.diagnosis.tolist() == [""] * 3


def test_a_table_in_parts_is_skipped_where_asked(tmp_path):
    lay(tmp_path / "in", "p0.png", "p1.png", **{"p2.png": b"\x89PNG cut"})
    (tmp_path / "in" / "t.csv").write_text("image_id,diagnosis\np0,mel\np1,nv\np2,nv\np3,nv\n")
    report = import_csv(tmp_path / "in", tmp_path / "out", skip_bad=True)
    assert report.n_images == 2 and [s.split(":")[0] for s in report.skipped] == ["in/t.csv row 4", "in/t.csv row 5"]


# ---- Hugging Face


@pytest.fixture(scope="module")
def library():
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    datasets.disable_progress_bars()
    return datasets


def hub_rows(library, ids, **more):
    "Pictures with a class, as a Hugging Face dataset."
    words = {k: library.Value("string") for k in more}
    features = library.Features(image=library.Image(), dx=library.ClassLabel(names=["melanoma", "naevus"]), **words)
    rows = dict(image=[dict(bytes=png(i), path=None) for i in ids], dx=[i % 2 for i in ids], **more)
    return library.Dataset.from_dict(rows, features=features)


def test_parquet_with_splits(tmp_path, library):
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for split, ids in dict(train=range(4), validation=range(4, 6), test=range(6, 8)).items():
        hub_rows(library, ids, age=["50"] * len(ids)).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    ended = cli("import", "hf", tmp_path / "hub", "--out", tmp_path / "out", "--licence", "CC0")
    assert ended.exit_code == 0 and ended.stderr == "", ended.output
    table = read_dataset(tmp_path / "out").table
    assert table.split.value_counts().to_dict() == dict(train=4, valid=2, test=2) and (table.age == 50).all()
    assert table.image_id.tolist()[:2] == ["test-000000", "test-000001"] and table.diagnosis.tolist()[:2] == [
        "mel",
        "nv",
    ]
    assert (read_image(read_dataset(tmp_path / "out").image_path("train-000003")) == noise(3)).all()


def test_a_saved_dataset_that_was_shuffled(tmp_path, library):
    data = hub_rows(library, range(6), image_id=[f"i{k}" for k in range(6)]).shuffle(seed=1)
    data.save_to_disk(tmp_path / "saved")
    import_hf(tmp_path / "saved", tmp_path / "out")
    made = read_dataset(tmp_path / "out")
    assert all((read_image(made.image_path(f"i{k}")) == noise(k)).all() for k in range(6))
    assert made.table.set_index("image_id").diagnosis.to_dict()["i3"] == "nv"


def test_plain_parquet_of_another_writer(tmp_path, library):
    rows = pd.DataFrame(dict(picture=[png(0), png(1)], grade=[2, 1], dx=["mel", "nv"], file=["a.png", "b.png"]))
    rows.to_parquet(tmp_path / "rows.parquet")
    expected = "0 columns hold pictures; name one (--image-column) of picture, grade, dx, file"
    refused(tmp_path, expected, import_hf, tmp_path / "rows.parquet", tmp_path / "out")
    columns = dict(image="picture", label="dx", severity="grade")
    import_hf(tmp_path / "rows.parquet", tmp_path / "out", columns=columns)
    assert read_dataset(tmp_path / "out").table.severity.tolist() == ["2", "1"]


def test_pictures_that_are_broken_or_only_paths(tmp_path, library):
    features = library.Features(image=library.Image(), dx=library.Value("string"))
    held = [dict(bytes=png(0), path=None), dict(bytes=png(1)[:99], path=None), dict(bytes=png(2), path=None)]
    library.Dataset.from_dict(dict(image=held, dx=["mel", "nv", "nv"]), features=features).to_parquet(
        tmp_path / "cut.parquet"
    )
    refused(
        tmp_path,
        "cut.parquet[1]: truncated or damaged PNG",
        import_hf,
        tmp_path / "cut.parquet",
        tmp_path / "out",
        columns=Columns(label="dx"),
    )
    report = import_hf(tmp_path / "cut.parquet", tmp_path / "out", columns=Columns(label="dx"), skip_bad=True)
    assert report.n_images == 2
    lay(tmp_path, "secret.png")
    (tmp_path / "paths").mkdir()
    for k, path in enumerate((tmp_path / "secret.png", tmp_path / "paths" / ".." / "secret.png")):
        rows = pd.DataFrame(
            dict(image=[dict(bytes=None, path=str(path)), dict(bytes=png(1), path="")], dx=["mel", "nv"])
        )
        rows.to_parquet(tmp_path / "paths" / "rows.parquet")
        refused(
            tmp_path,
            "paths[0]: it holds no picture, only the path",
            import_hf,
            tmp_path / "paths",
            tmp_path / "new",
            columns=Columns(label="dx"),
        )


def test_what_cannot_be_fetched_or_read(tmp_path, library):
    with mock.patch.object(library, "load_dataset", side_effect=ConnectionError("no answer")):
        ended = cli("import", "hf", "somebody/skin", "--out", tmp_path / "out")
    assert ended.exit_code == 1 and ended.stderr.count("\n") == 1
    assert (
        "'somebody/skin' is no file or folder here, and could not be fetched from the hub "
        "(ConnectionError: no answer)" in ended.stderr
    )
    (tmp_path / "text.parquet").write_text("hello")
    ended = cli("import", "hf", tmp_path / "text.parquet", "--out", tmp_path / "out")
    assert "not readable as a Hugging Face dataset" in ended.stderr and ended.stderr.count("\n") == 1
    (tmp_path / "empty").mkdir()
    assert (
        "no Parquet file and no saved dataset in this folder"
        in cli("import", "hf", tmp_path / "empty", "--out", tmp_path / "out").stderr
    )
    assert "gone: no such file or folder" in cli("import", "hf", tmp_path / "gone", "--out", tmp_path / "out").stderr
    with mock.patch.dict("sys.modules", datasets=None):
        assert (
            "not installed; pip install 'skinlesion[hf]'"
            in cli("import", "hf", tmp_path / "empty", "--out", tmp_path / "out").stderr
        )
    assert not (tmp_path / "out").exists()


# ---- several as one


def made(folder, name, rows, label_set="ham10000", licence="CC0", **more):
    "A dataset folder; rows are (image_id, lesion_id, patient_id, diagnosis, seed of the picture)."
    table = pd.DataFrame([r[:4] for r in rows], columns=["image_id", "lesion_id", "patient_id", "diagnosis"])
    table = table.assign(diagnosis_confirm_type="", age="", sex="", site="", **more)
    return write_dataset(
        folder / name, DatasetInfo(name, label_set, licence), table, {r[0]: png(r[4]) for r in rows}
    ).root


def test_a_shared_picture_ties_the_lesions_of_two_sources(tmp_path):
    "Were the ids only prefixed, b and c would count as two lesions, and could stand on both sides of a split."
    one = made(tmp_path, "one", [("a", "L1", "", "mel", 0), ("b", "L1", "", "mel", 1), ("x", "L2", "P", "nv", 2)])
    two = made(tmp_path, "two", [("a", "K7", "Q", "mel", 0), ("c", "K7", "Q", "mel", 3), ("y", "L2", "P", "nv", 4)])
    report = merge_datasets([one, two], tmp_path / "out")
    table = read_dataset(tmp_path / "out").table.set_index("image_id")
    assert report.n_images == 5 and table.lesion_id["b"] == table.lesion_id["c"] == table.lesion_id["a"]
    assert table.lesion_id["x"] != table.lesion_id["y"] and table.patient_id["x"] != table.patient_id["y"]
    assert table.patient_id["a"] == table.patient_id["c"] != "" and table.source.to_dict()["y"] == "two"


def test_layers_columns_and_licences_travel(tmp_path):
    one = made(
        tmp_path, "one", [("a", "", "", "mel", 0), ("b", "", "", "nv", 1)], licence="CC BY-NC 4.0", severity=["1", "2"]
    )
    two = made(
        tmp_path, "two", [("c", "", "", "ak", 2), ("d", "", "", "nv", 3)], "isic2019", licence="", camera=["X", ""]
    )
    (one / "masks").mkdir()
    (one / "masks" / "a.png").write_bytes(encode_png(np.eye(12, 16) > 0))
    ended = cli("import", "merge", one, two, "--label-set", "ham10000", "--out", tmp_path / "out")
    assert ended.exit_code == 0, ended.output
    assert (
        "the licence of 'one' (CC BY-NC 4.0) allows no commercial use" in ended.stdout
        and "the licence of 'two' is not known" in ended.stdout
    )
    data = read_dataset(tmp_path / "out")
    assert data.info.licence == "one: CC BY-NC 4.0; two: unknown" and data.mask_path("a")
    assert data.table.diagnosis.tolist() == ["mel", "nv", "akiec", "nv"]
    assert data.table.severity.tolist() == ["1", "2", "", ""] and data.table.camera.tolist() == ["", "", "X", ""]


def test_datasets_that_do_not_go_together(tmp_path):
    one = made(tmp_path, "one", [("a", "", "", "mel", 0), ("b", "", "", "nv", 1)])
    two = made(tmp_path, "two", [("a", "", "", "mel", 5), ("d", "", "", "scc", 3)], "isic2019")
    refused(
        tmp_path,
        "say which set both are to be read in (--label-set NAME, or --labels FILE)",
        merge_datasets,
        [one, two],
        tmp_path / "out",
    )
    refused(
        tmp_path,
        "1 images of class 'scc' of 'two' have no place in label set ham10000",
        merge_datasets,
        [one, two],
        tmp_path / "out",
        about=About(label_set="ham10000"),
    )
    refused(
        tmp_path,
        "image_id 'a' names different pictures in 'one' and 'two'",
        merge_datasets,
        [one, two],
        tmp_path / "out",
        about=About(label_set="isic2019"),
    )
    refused(
        tmp_path,
        "--map 'scc=foo': diagnosis 'foo' is not in label set ham10000",
        merge_datasets,
        [one, two],
        tmp_path / "out",
        about=About(label_set="ham10000"),
        word_map=dict(scc="foo"),
    )
    (two / "images" / "d.png").unlink()
    refused(
        tmp_path,
        "two/metadata.csv row 3: there is no images/d.jpg or .png",
        merge_datasets,
        [one, two],
        tmp_path / "out",
    )


def test_ids_that_differ_in_case_are_kept_apart(tmp_path):
    "On a disk that ignores case the second picture would take the place of the first."
    one = made(tmp_path, "one", [("x", "", "", "mel", 0), ("a", "", "", "nv", 1)])
    two = made(tmp_path, "two", [("A", "", "", "mel", 2), ("y", "", "", "nv", 3)])
    expected = (
        "image_id 'a' of 'one' and 'A' of 'two' would be one file on a disk that ignores case; put the "
        "dataset before such ids with --prefix-on-co"
    )
    refused(tmp_path, expected, merge_datasets, [one, two], tmp_path / "out")
    merge_datasets([one, two], tmp_path / "out", prefix_on_collision=True)
    data = read_dataset(tmp_path / "out")
    assert data.table.image_id.tolist() == ["x", "one-a", "two-A", "y"]
    assert (read_image(data.image_path("one-a")) == noise(1)).all() and (
        read_image(data.image_path("two-A")) == noise(2)
    ).all()


def test_a_class_that_holds_more_is_not_read_as_the_narrower(tmp_path):
    """HAM10000's akiec holds Bowen's disease, which ISIC 2019 counts as scc.

    Of the 224 images of akiec beside this repository, 126 are scc there.
    """
    one = made(tmp_path, "one", [("a", "", "", "akiec", 0), ("b", "", "", "nv", 1)])
    two = made(tmp_path, "two", [("c", "", "", "ak", 2), ("d", "", "", "scc", 3)], "isic2019")
    refused(
        tmp_path,
        "1 images of class 'akiec' of 'one' have no place in label set isic2019",
        merge_datasets,
        [one, two],
        tmp_path / "out",
        about=About(label_set="isic2019"),
    )
    merge_datasets([one, two], tmp_path / "out", about=About(label_set="isic2019"), word_map=dict(akiec="ak"))
    assert read_dataset(tmp_path / "out").table.diagnosis.tolist() == ["ak", "nv", "ak", "scc"]


def test_a_mapped_class_is_reported_by_a_merge(tmp_path):
    one = made(tmp_path, "one", [("a", "", "", "mel", 0), ("b", "", "", "nv", 1)])
    two = made(tmp_path, "two", [("c", "", "", "scc", 2), ("d", "", "", "scc", 3), ("e", "", "", "nv", 4)], "isic2019")
    report = merge_datasets([one, two], tmp_path / "out", about=About(label_set="ham10000"), word_map=dict(scc="akiec"))
    assert "class 'scc' of 'two' read as akiec: 2 images" in report.notes and report.classes["akiec"] == 2


# ---- synthetic, and what others gave


def test_a_synthetic_set_by_the_command(tmp_path):
    ended = cli(
        "import",
        "synthetic",
        "--per-class",
        3,
        "--size",
        "64x48",
        "--seed",
        3,
        "--shortcut",
        "none",
        "--out",
        tmp_path / "out",
    )
    assert ended.exit_code == 0, ended.output
    data = read_dataset(tmp_path / "out")
    assert (tmp_path / "out" / "truth.json").is_file() and read_image(
        data.image_path(data.table.image_id[0])
    ).shape == (48, 64, 3)
    assert set(data.table.diagnosis) == set(LABEL_SETS["ham10000"].codes)
    assert (
        "--size '64': write WIDTHxHEIGHT"
        in cli("import", "synthetic", "--size", "64", "--out", tmp_path / "new").stderr
    )
    assert (
        cli("import", "synthetic", "--shortcut", "rulr", "--out", tmp_path / "new").exit_code == 1
        and not (tmp_path / "new").exists()
    )


@pytest.mark.parametrize("source", ["folder", "csv", "merge", "hf"])
def test_a_full_disk_leaves_what_was_there(tmp_path, source):
    data = lay(tmp_path / "in", "mel/a.png", "nv/b.png")
    (data / "t.csv").write_text("image_id,diagnosis\na,mel\nb,nv\n")
    roots = [made(tmp_path, n, [(f"{n}1", "", "", "mel", 0), (f"{n}2", "", "", "nv", 1)]) for n in ("one", "two")]
    if source == "hf":
        datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
        hub_rows(datasets, range(2)).to_parquet(tmp_path / "in" / "rows.parquet")
    words = dict(folder=[data], csv=[data], merge=roots, hf=[data / "rows.parquet"])[source]
    assert cli("import", source, *words, "--out", tmp_path / "out").exit_code == 0
    before = {p: p.read_bytes() for p in sorted((tmp_path / "out").rglob("*.*"))}
    with mock.patch("skinlesion.data.schema._put", side_effect=OSError(28, "No space left on device")):
        ended = cli("import", source, *words, "--out", tmp_path / "out")
    assert ended.exit_code == 1 and "the disk is full while writing" in ended.stderr
    assert {p: p.read_bytes() for p in sorted((tmp_path / "out").rglob("*.*"))} == before
    assert sorted(os.listdir(tmp_path)) == ["in", "one", "out", "two"]


def test_an_import_that_is_interrupted_leaves_what_was_there(tmp_path):
    data = lay(tmp_path / "in", "mel/a.png", "nv/b.png", "nv/c.png")
    import_folder(data, tmp_path / "out")
    before = {p: p.read_bytes() for p in sorted((tmp_path / "out").rglob("*.*"))}
    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt
    for out in ("out", "new"):
        with pytest.raises(KeyboardInterrupt):
            import_folder(data, tmp_path / out, about=About(name="in"), progress=interrupt)
    assert {p: p.read_bytes() for p in sorted((tmp_path / "out").rglob("*.*"))} == before and sorted(
        os.listdir(tmp_path)
    ) == ["in", "out"]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no real images beside this repository (../shared/data)")
def test_the_publishers_table_as_any_table(tmp_path):
    "Read by its columns it gives what its own importer gives, but for ages of 0, which that importer reads as missing."
    import_ham10000(SHARED / "ham10000", tmp_path / "ham")
    columns = Columns(label="dx", confirm="dx_type", site="localization")
    import_csv(SHARED / "ham10000", tmp_path / "csv", columns=columns)
    known = read_dataset(tmp_path / "ham").table
    read = read_dataset(tmp_path / "csv").table
    pd.testing.assert_frame_equal(known.drop(columns="age"), read.drop(columns="age"))
    assert (read.age[~((known.age == read.age) | known.age.isna() & read.age.isna())] == 0).all()
