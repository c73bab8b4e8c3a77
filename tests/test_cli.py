"""The commands in processes of their own: what they print, what they write, how they end."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from skinlesion.audit.findings import Finding
from skinlesion.data.schema import DatasetInfo, write_dataset
from skinlesion.evaluate.abstention import LockedAbstention
from skinlesion.evaluate.benchmarks import split_digest
from skinlesion.evaluate.decisions import ConformalSets
from skinlesion.explain.choice import MapChoice
from skinlesion.report.templates import Picture
from skinlesion.evaluate.policy import Policy
from skinlesion.data.tables import read_predictions, write_predictions
from skinlesion.evaluate.scorecard import scorecard
from skinlesion.images import encode_png, read_image, save_png
from skinlesion.model.bundle import load_bundle, save_bundle
from skinlesion.pipeline.cli import app
from skinlesion.taxonomy import CHALLENGES, get_label_set
from skinlesion.use.predict import Predictor
from tiny import build_bundle, build_pictures


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    pictures = build_pictures(folder)
    (folder / "people.csv").write_text("image_id,age,sex,site\na,61,f,Back\nb,,,\nc,40,male,scalp\n")
    return folder, build_bundle(folder / "bundle"), pictures


def cli(*words):
    "Run a command here; (exit code, stdout, stderr)."
    ended = CliRunner().invoke(app, [str(word) for word in words])
    return ended.exit_code, ended.stdout, ended.stderr


def cli_process(*words):
    "Run a command in a process of its own; (exit code, stdout, stderr)."
    done = subprocess.run(
        [sys.executable, "-m", "skinlesion.pipeline.cli", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout, done.stderr


def test_predict_writes_the_table_that_evaluation_reads(made):
    folder, bundle, pictures = made
    code, out, err = cli_process(
        "predict",
        *pictures.values(),
        "--bundle",
        bundle,
        "--metadata",
        folder / "people.csv",
        "--csv",
        folder / "out.csv",
    )
    assert code == 0, err
    assert "3 picture(s)" in out and "never for diagnosis" in out
    table = read_predictions(folder / "out.csv", get_label_set("ham10000"))
    direct = Predictor(bundle).predict(pictures["a"], 61, "female", "back")
    assert table.image_id.tolist() == ["a", "b", "c"] and table.predicted[0] == direct.predicted
    assert abs(table.p_mel[0] - direct.probabilities["mel"]) < 1e-7
    first = (folder / "out.csv").read_bytes()
    words = ("predict", folder, "--bundle", bundle, "--metadata", folder / "people.csv", "--csv", folder / "out.csv")
    CliRunner().invoke(app, [str(w) for w in words])
    assert (folder / "out.csv").read_bytes() == first  # a folder of the same pictures, the same bytes


@pytest.fixture(scope="module")
def unsure(made):
    "The bundle, made to abstain on every picture."
    loaded = load_bundle(made[1])
    policy = replace(
        Policy.plain(loaded.names, 7),
        abstention=LockedAbstention(1.0, 0.1, 0.1, 40, 30), # nothing is as sure as that
        conformal=ConformalSets("split", "lac", 0.9, (0.86,) * 7, (40,) * 7),
    )
    members = list(loaded.members)
    kept = (loaded.label_set, loaded.encoder, loaded.image_size, {})
    return save_bundle(made[0] / "unsure", members, *kept, policy=policy.to_dict())


def test_an_exported_bundle_answers_alike_and_without_torch(made, tmp_path):
    folder, bundle, pictures = made
    out = tmp_path / "exported"
    code, said, err = cli("export", *pictures.values(), "--bundle", bundle, "--out", out)
    assert code == 0 and "on 3 images the same classes as in torch" in said, err
    tables = {}
    for name, where in (("torch", bundle), ("onnx", out)):
        table = tmp_path / f"{name}.csv"
        words = (*pictures.values(), "--bundle", where, "--metadata", folder / "people.csv", "--csv", table)
        assert cli("predict", *words)[0] == 0
        tables[name] = pd.read_csv(table)
    both = tables["torch"].filter(like="p_"), tables["onnx"].filter(like="p_")
    assert np.abs(both[0] - both[1]).to_numpy().max() < 1e-5 and len(both[0]) == 3
    assert tables["onnx"].urgency.isin(["routine", "soon", "urgent"]).all()
    assert "every member loads on ONNX Runtime" in cli("verify", out)[1]
    assert "every member loads in torch" in cli("verify", bundle)[1]
    # One flipped bit of a graph is found, and the bundle that is exported is never replaced.
    graph = out / "image.image.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    code, _, err = cli("verify", out)
    assert code == 1 and "'image.image.onnx' has changed" in err
    code, _, err = cli("export", *pictures.values(), "--bundle", bundle, "--out", bundle)
    assert code == 1 and "name a new folder, or an older export" in err


def test_advise_writes_a_page_whose_urgency_is_that_of_the_rules(made, unsure):
    picture = made[2]["a"]
    for where, words in ((made[1], ("--age", 61)), (unsure, ())):
        direct = Predictor(where).predict(picture, *words[1:])
        code, page, err = cli("advise", picture, "--bundle", where, *words)
        assert code == 0, err
        assert f"**Urgency: {direct.triage.urgency}.** {direct.triage.referral}" in page
        assert "never for diagnosis" in page and page.count("\n## ") == 9
    german = cli("advise", picture, "--bundle", unsure, "--language", "de")[1]
    assert "Dringlichkeit" in german and german.count("\n## ") == 9
    code, _, err = cli("advise", picture, "--bundle", unsure, "--language", "fr")
    assert code == 1 and "language 'fr' is not known" in err
    code, _, err = cli("advise", picture, "--bundle", unsure, "--endpoint", "http://example.org/v1")
    assert code == 1 and "unencrypted over a network" in err
    # A server that does not answer leaves the page of the package, and says so.
    code, page, err = cli("advise", picture, "--bundle", unsure, "--endpoint", "http://127.0.0.1:9/v1")
    assert code == 0 and "the endpoint: it gives no readable answer" in err and page.count("\n## ") == 9
    assert Predictor(unsure).predict(picture).abstain_reason in err and "endpoint" not in page


def test_predict_says_how_many_pictures_get_no_answer(made, unsure, tmp_path):
    _, bundle, pictures = made
    for name, told in ((bundle, False), (unsure, True)):
        code, out, err = cli("predict", pictures["a"], "--bundle", name, "--csv", tmp_path / "out.csv")
        assert code == 0 and ("1 of them without an answer" in out) == told, err
        assert ("1 picture(s), no answer 1" in out) == told  # an abstention is counted for no class


@pytest.mark.parametrize("target", [(), ("--class", "mel")])
def test_explain_abstains_where_predict_does(made, unsure, tmp_path, target):
    picture = made[2]["a"]
    code, out, err = cli("explain", picture, "--bundle", unsure, "--out", tmp_path / "map.png", *target)
    direct = Predictor(unsure).predict(picture)
    assert code == 0, err
    assert out.splitlines()[:2] == [
        f"no answer: {direct.abstain_reason}",
        f"it would have predicted: {direct.predicted} ({direct.confidence:.0%})",
    ]
    assert out.splitlines()[2].startswith("prediction set, made to contain the true diagnosis of 90% of lesions like")
    assert "\npredicted:" not in f"\n{out}"
    assert Predictor(unsure).explain(picture, target="mel").prediction == direct


def test_metadata_that_no_member_reads_is_said(made, tmp_path):
    folder, bundle, pictures = made
    loaded = load_bundle(bundle)
    alone = save_bundle(tmp_path / "alone", [loaded.find("image")], loaded.label_set, None, loaded.image_size, {})
    words = (pictures["a"], "--metadata", folder / "people.csv", "--bundle")
    for name, told in ((bundle, False), (alone, True)):
        for command in (["predict", "--csv", tmp_path / "out.csv"], ["explain", "--out", tmp_path / "map.png"]):
            code, out, err = cli(*command, *words, name)
            assert code == 0 and ("--metadata is not used: no member of this bundle reads" in out) == told, err


def test_explain_draws_over_the_picture_as_it_was_taken(made):
    folder, bundle, pictures = made
    code, out, err = cli(
        "explain",
        pictures["a"],
        "--bundle",
        bundle,
        "--method",
        "eigencam",
        "--layer",
        "layer3",
        "--class",
        "Melanoma",
        "--metadata",
        folder / "people.csv",
        "--out",
        folder / "map.png",
    )
    assert code == 0, err
    assert "Eigen-CAM of the mean over 2 models, at layer3, which knows no class" in out
    assert (
        read_image(folder / "map.png").shape == (60, 90, 3)
        and (read_image(folder / "map.png") != read_image(pictures["a"])).any()
    )


def test_explain_writes_the_files_of_each_picture(made, unsure, tmp_path):
    folder, bundle, pictures = made
    maps = tmp_path / "maps"
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a", "b"):
        shutil.copy(pictures[name], photos)
    (photos / "cut.jpg").write_bytes(pictures["a"].read_bytes()[:300])
    words = ("explain", photos, "--bundle", unsure, "--out", maps, "--layer", "layer3", "--html")
    code, out, err = cli(*words)  # a bad picture stops it before anything is written
    assert code == 1 and "1 of the 3 images cannot be read" in err and "cut.jpg" in err and not maps.exists()
    maps.mkdir()
    (maps / "a.json").write_text("of an earlier run")
    (maps / "notes.txt").write_text("of mine")
    code, out, err = cli(*words, "--skip-bad")
    assert code == 0 and "skipped: " in err and "1 skipped, named above" in out, err
    kinds = ("json", "map.npy", "overlay.png", "side.png")
    expected = [f"{name}.{kind}" for name in "ab" for kind in kinds]
    assert sorted(path.name for path in maps.iterdir()) == [*expected, "index.html", "notes.txt"]
    direct = Predictor(unsure).explain(pictures["b"], layer="layer3")
    assert json.loads((maps / "b.json").read_text()) == direct.to_dict()
    assert np.array_equal(np.load(maps / "b.map.npy"), direct.cam)
    assert (read_image(maps / "b.overlay.png") == direct.overlay()).all()
    page = (maps / "index.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2 == page.count(direct.prediction.abstain_reason)
    assert direct.sentence in page and "<script" not in page and "://" not in page
    unmeasured = "The map is Grad-CAM, which was not measured for this bundle"
    assert out.count(unmeasured) == 1 == page.count(unmeasured)
    assert "a:\nno answer: " in out and "b:\nno answer: " in out and "never for diagnosis" in out
    first = {path.name: path.read_bytes() for path in maps.iterdir()}
    assert cli(*words, "--skip-bad")[0] == 0
    assert {path.name: path.read_bytes() for path in maps.iterdir()} == first
    # What a folder holds and is not read ends as in predict.
    (photos / "cut.jpg").unlink()
    (photos / "c.zip").write_bytes(b"PK\3\4")
    assert cli(*words[:-1])[0] == 3


SPOT = np.hypot(*(np.mgrid[:60, :90] - np.array([30, 45])[:, None, None])) < 17 # as `build_pictures` draws it


@pytest.fixture
def outlines(tmp_path):
    "Masks of the pictures a and b in a folder; name -> path."
    folder = tmp_path / "outlines"
    return {name: save_png(SPOT.astype(np.uint8) * 255, folder / f"{name}.png") for name in "ab"}


def test_explain_measures_the_map_on_the_lesion(made, outlines, tmp_path):
    "A folder of masks, or one for one picture: the scores stand in the JSON, the sentence and the page."
    _, bundle, pictures = made
    maps = tmp_path / "maps"
    words = ("--bundle", bundle, "--method", "eigencam", "--mask")
    code, out, err = cli(
        "explain", pictures["a"], pictures["b"], *words, outlines["a"].parent, "--out", maps, "--html"
    )
    assert code == 0, err
    page = (maps / "index.html").read_text()
    for name in "ab":
        direct = Predictor(bundle).explain(pictures[name], "eigencam", mask=SPOT)
        assert json.loads((maps / f"{name}.json").read_text()) == direct.to_dict()
        assert direct.scores["energy_inside"] > .5 and abs(direct.scores["lesion_share"] - SPOT.mean()) < 1e-3
        assert f"; {direct.scores['energy_inside']:.0%} of it lies inside the outline, where" in direct.sentence
        assert direct.sentence in out and direct.sentence in page
    one = shutil.copy(outlines["a"], tmp_path / "outline.png")  # one file may have any name
    code, out, err = cli("explain", pictures["a"], *words, one, "--out", tmp_path / "map.png")
    assert code == 0 and "of it lies inside the outline" in out, err


def test_a_mask_that_cannot_be_used_is_named_and_nothing_is_lost(made, outlines, tmp_path):
    _, bundle, pictures = made
    small = save_png(SPOT[1:].astype(np.uint8) * 255, outlines["b"])
    folder = small.parent
    wrong_size = f"{small}: the mask has 90 x 59 pixels, but its picture {pictures['b']} has 90 x 60"
    maps = tmp_path / "maps"
    maps.mkdir()
    (maps / "a.json").write_text("of an earlier run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for names, mask, out, expected in (
        ("ab", folder, maps, f"1 of 2 mask(s) cannot be used; correct them, or leave the masks out:\n  {wrong_size}"),
        ("abc", folder, maps, f"c.png: there is no such mask for {pictures['c']}"),
        ("ab", small, maps, f"{small}: one mask cannot be that of 2 pictures; give a folder with a mask for each"),
        ("ab", tmp_path / "outlins", maps, "outlins: no such mask, nor a folder of masks; check the path."),
        ("a", outlines["a"], outlines["a"], "a.png: the mask itself lies there; choose another place"),
        ("a", pictures["a"], maps, "a.png: this is the picture itself; give the mask of its lesion"),
    ):
        chosen = [pictures[name] for name in names]
        code, _, err = cli("explain", *chosen, "--bundle", bundle, "--out", out, "--mask", mask)
        assert code == 1 and expected in err and "Traceback" not in err, err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_explain_draws_the_map_that_was_chosen(made, tmp_path):
    _, bundle, pictures = made
    loaded = load_bundle(bundle)
    choice = MapChoice("layercam", dict(image="layer3", fused="layer2"), "the best of three", ())
    kept = (loaded.members, loaded.label_set, loaded.encoder, loaded.image_size, {})
    save_bundle(tmp_path / "mapped", *kept, maps=choice.to_dict())
    words = ("explain", pictures["a"], "--bundle", tmp_path / "mapped", "--out", tmp_path / "maps")
    code, out, err = cli(*words)
    assert code == 0 and "The map was chosen on validation: the best of three.\n" in out, err
    assert json.loads((tmp_path / "maps" / "a.json").read_text())["method"] == "layercam"
    assert "chosen on validation" not in cli(*words, "--method", "gradcam")[1]
    assert json.loads((tmp_path / "maps" / "a.json").read_text())["method"] == "gradcam"


def test_doctor_finds_what_a_tree_lacks(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    (tree / ".dvc").mkdir(parents=True)
    (tree / "settings.ini").touch()
    (tree / "constraints.txt").write_text("torch==0.1\nno-such-package==2.0\n")
    (tree / "data.dvc").write_text("outs:\n- md5: 00aa.dir\n")
    (tree / ".dvc/config").write_text("[core]\n    remote = own\n['remote \"own\"']\n    url = 100%remote\n")
    (tmp_path / "site/half-1.0.dist-info").mkdir(parents=True)  # a package whose removal stopped halfway
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.chdir(tree)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    code, out, _ = cli("doctor")
    assert code == 1, out
    for sentence in (
        "1 of 2 missing, such as no-such-package 2.0; 1 of another version, such as torch ",
        "this tree is no git repository, as after a download of its ZIP; DVC needs one",
        "remote lacks 1 of the 1 objects of data.dvc, such as 00aa.dir",
    ):
        assert sentence in out
    subprocess.run(["git", "init", "-q"], check=True)
    # By the first, git's own tests have a clone of another user; the others hide a safe.directory of this machine.
    for name, value in dict(TEST_ASSUME_DIFFERENT_OWNER="1", CONFIG_GLOBAL=os.devnull, CONFIG_NOSYSTEM="1").items():
        monkeypatch.setenv(f"GIT_{name}", value)
    code, out, _ = cli("doctor", "--problems")
    assert f"what to do:  git config --global --add safe.directory {tree}\n" in out, out
    assert code == 1 and {line.split()[0] for line in out.splitlines()} == {"problem", "what", "problems:"}, out


@pytest.mark.parametrize("words, said", [
    (["verify", "nowhere"], "nothing to verify here"),
    (["predict", "missing.png", "--bundle", "B", "--csv", "o.csv"], "missing.png: no such image file"),
    (["predict", "a.png", "--bundle", "nowhere", "--csv", "o.csv"], "nowhere"),
    (["predict", "a.png", "a.png", "--bundle", "B", "--csv", "o.csv"], "a.png is given twice, by itself or in a"),
    (["predict", ".", "b.png", "--bundle", "B", "--csv", "o.csv"], "b.png is given twice, by itself or in a folder"),
    (
        ["predict", "a.png", "--bundle", "B", "--csv", "o.csv", "--metadata", "short.csv"],
        "short.csv: column 'site' is missing",
    ),
    (["explain", "a.png", "--bundle", "B", "--method", "gradcm", "--out", "m.png"], "Did you mean 'gradcam'?"),
    (["explain", "a.png", "b.png", "--bundle", "B", "--out", "m.png"], "cannot hold the maps of 2 pictures"),
    (["explain", "a.png", "a.png", "--bundle", "B", "--out", "maps"], "a.png is given twice, by itself or in a"),
    (["explain", "a.png", "--bundle", "B", "--out", "."], "the pictures themselves lie there; choose another place"),
    (["explain", "a.png", "--bundle", "B", "--opacity", "2", "--out", "maps"], "opacity is 2.0; choose a number"),
    (["explain", "a.png", "--bundle", "B", "--class", "mela", "--out", "m.png"], "Did you mean 'mel'?"),
    (
        ["explain", "a.png", "--bundle", "B", "--layer", "layer9", "--out", "m.png"],
        "layer 'layer9' is not in this model",
    ),
    (["evaluate", "--bundle", "B", "--data", "nowhere", "--out", "o"], "nowhere"),
    (["models", "resnet5O"], "Did you mean"),
    (["models", "--fetch"], "--fetch needs the names of backbones"),
    (["models", "swinv2_tiny_window8_256", "--size", "30"], "cannot take images of 30x30 pixels"),
    (["import", "ham10000", "nowhere", "--out", "data"], "nowhere")])
def test_an_error_is_one_sentence_and_nothing_is_written(made, words, said, monkeypatch):
    folder, bundle, _ = made
    (folder / "short.csv").write_text("image_id,age,sex\na,1,f\n")
    before = sorted(p.name for p in folder.iterdir())
    monkeypatch.chdir(folder)
    ended = CliRunner().invoke(app, [str(bundle) if w == "B" else w for w in words])
    assert (
        ended.exit_code == 1
        and said in ended.stderr
        and ended.stderr.startswith("error: ")
        and "Traceback" not in ended.output
    )
    assert sorted(p.name for p in folder.iterdir()) == before


def test_debug_shows_the_traceback_and_misspelling_is_2(made):
    assert "Traceback" in cli_process("--debug", "verify", "nowhere")[2]
    ends = [
        CliRunner().invoke(app, words).exit_code
        for words in (["verfy"], ["predict"], ["predict", "a.png", "--bundl", "x"])
    ]
    assert ends == [2, 2, 2]


def test_verify_tells_sound_from_changed(made, tmp_path):
    _, bundle, _ = made
    code, out, _ = cli("verify", bundle)
    assert code == 0 and out.startswith("ok: ") and "image, fused" in out
    changed = build_bundle(tmp_path / "bundle")
    data = bytearray((changed / "image.safetensors").read_bytes())
    data[-1] ^= 1
    (changed / "image.safetensors").write_bytes(bytes(data))
    code, _, err = cli("verify", changed)
    assert code == 1 and "image.safetensors" in err


def test_skip_bad_lists_what_it_left_out(made):
    folder, bundle, pictures = made
    bad = folder / "bad"
    bad.mkdir(exist_ok=True)
    (bad / "z.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    words = [str(w) for w in ("predict", pictures["a"], bad / "z.jpg", "--bundle", bundle, "--csv", bad / "o.csv")]
    code, _, err = cli(*words, bad / "gone.jpg")
    assert code == 1 and not (bad / "o.csv").exists()
    assert "2 of the 3 images cannot be read; correct them, or leave them out with --skip-bad:\n" in err
    assert [line.split(": ")[0] for line in err.splitlines()[-2:]] == [f"  {bad / name}.jpg" for name in ("z", "gone")]
    ended = CliRunner().invoke(app, [*words, "--skip-bad"])
    assert ended.exit_code == 0 and "skipped: " in ended.stderr and "z.jpg" in ended.stderr
    assert "1 skipped, named above: pictures that cannot be read" in ended.stdout
    assert pd.read_csv(bad / "o.csv").image_id.tolist() == ["a"]


def test_a_folder_stands_for_its_pictures_whatever_their_suffix(made, tmp_path):
    "A JPEG or PNG of any name is answered; what is not read is named, counted, and changes the exit code."
    _, bundle, pictures = made
    folder = tmp_path / "photos"
    picture = pictures["a"].read_bytes()
    odd = {"e.HEIC": b"x", "f.gif": b"GIF89a", "g.jpg": b"\0\0\0\x18ftypavif"}
    others = dict.fromkeys(("notes.txt", "Thumbs.db", ".DS_Store", "table.csv"), b"BMI,age")
    for name, data in (dict.fromkeys(("a.JPG", "b.jfif", "c", "d.dat", "more/x.png"), picture) | odd | others).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    words = ("predict", folder, "--bundle", bundle, "--csv", tmp_path / "o.csv")
    code, out, err = cli(*words)
    assert code == 3 and pd.read_csv(tmp_path / "o.csv").image_id.tolist() == ["a", "b", "c", "d.dat"]
    assert err.splitlines() == [
        f"left out: {folder}/{name}" for name in (
            "e.HEIC: HEIC is not read; export it as JPEG or PNG",
            "f.gif: GIF is not read; export it as JPEG or PNG",
            "g.jpg: AVIF is not read; export it as JPEG or PNG",
            "more: a folder of pictures below the one named; name it too",
        )
    ]
    assert "4 left out, named above" in out and "4 other file(s) in the folders are no pictures" in out
    assert cli(*words, "--skip-bad")[0] == 0


def test_models_measures_what_is_asked_for():
    code, out, _ = cli("models", "small_cnn_3", "small_cnn_4", "--size", 32)
    lines = [line.split() for line in out.splitlines()]
    assert (
        code == 0
        and [line[0] for line in lines] == ["backbone", "small_cnn_3", "small_cnn_4"]
        and all(float(line[4]) >= 0 for line in lines[1:])
    )
    assert cli("models", "small_cnn_3", "--size", 32, "--no-time")[1].splitlines()[1].split()[4] == "-"


@pytest.mark.slow
def test_models_lists_all_that_are_tested_by_name():
    from skinlesion.model.backbones import TESTED
    code, out, err = cli("models", "--no-time", "--size", 64)
    listed = [line.split()[0] for line in out.splitlines()[1:]]
    assert code == 0 and sorted([*listed, "vit_small_patch14_dinov2"]) == sorted(
        [*TESTED, "small_cnn_3", "small_cnn_4"]
    )
    assert "left out: backbone 'vit_small_patch14_dinov2' cannot take images of 64x64 pixels" in err


@pytest.fixture
def dataset(tmp_path):
    "A dataset folder of four pictures."
    ids = ["a", "b", "c", "d"]
    blank = dict.fromkeys(("lesion_id", "patient_id", "diagnosis_confirm_type", "age", "sex", "site"), "")
    table = pd.DataFrame(dict(image_id=ids, diagnosis=["mel", "nv"] * 2) | blank)
    pictures = {i: encode_png(np.full((8, 9, 3), 40 * k, np.uint8)) for k, i in enumerate(ids)}
    return write_dataset(tmp_path / "data", DatasetInfo("made", "ham10000"), table, pictures).root


@pytest.mark.parametrize("severity, code", [("stop", 3), ("warning", 0), (None, 0)])
def test_an_audit_ends_with_3_where_it_stops_the_pipeline(dataset, tmp_path, monkeypatch, severity, code):
    asked = {}
    findings = [Finding("note-first", "note", "Nothing to fear.", 4, 0)]
    if severity:
        findings.append(Finding("exact-duplicate", severity, "2 pictures are one.", 4, 2, remedy="remove one"))
    def audit_dataset(dataset, **options):
        asked.update(options)
        return SimpleNamespace(findings=findings)
    def write_audit(audit, dataset, out):
        out.mkdir()
        (out / "audit.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "skinlesion.audit.audit", SimpleNamespace(audit_dataset=audit_dataset))
    monkeypatch.setitem(sys.modules, "skinlesion.report.audit_page", SimpleNamespace(write_audit=write_audit))
    (tmp_path / "splits.csv").write_text("image_id,split\nd,test\nc,valid\nb,train\na,train\n")
    words = ["audit", dataset, "--split", tmp_path / "splits.csv", "--seed", 7, "--out", tmp_path / "out"]
    ended = CliRunner().invoke(app, [str(w) for w in words])
    assert ended.exit_code == code, ended.output
    assert (asked["seed"], asked["split"].tolist(), asked["predictions"]) == (
        7,
        ["train", "train", "valid", "test"],
        None,
    )
    first = ended.stdout.splitlines()[0]
    assert first.startswith(f"{severity}") if severity else first.startswith("note")
    assert (tmp_path / "out" / "audit.json").is_file() and ("what to do: remove one" in ended.stdout) == (
        severity == "stop"
    )


@pytest.mark.slow
def test_an_audit_of_pictures_that_were_planted(tmp_path):
    "From the command that draws to the command that finds."
    words = (
        "--n-images",
        140,
        "--exact-duplicates",
        4,
        "--duplicate-splits",
        "other",
        "--duplicate-lesions",
        "new",
        "--crossing-lesions",
        2,
    )
    assert cli("import", "synthetic", *words, "--out", tmp_path / "planted")[0] == 0
    code, out, err = cli("audit", tmp_path / "planted", "--out", tmp_path / "audit")
    stops = [line.split()[1] for line in out.splitlines() if line.startswith("stop ")]
    assert code == 3 and "lesion-crosses-splits" in stops and "duplicates-across-splits" in stops, (out, err)
    assert (tmp_path / "audit" / "audit.json").is_file() and (tmp_path / "audit" / "report.html").is_file()


@pytest.mark.parametrize("words, said", [
    (["--split", "gone.csv"], "gone.csv: no such table; check the path"),
    (["--split", "short.csv"], "image 'd' of "),
    (["--predictions", "gone.csv"], "gone.csv"),
    (["--out", "short.csv"], "short.csv: this is a file; choose a folder for audit.json"),
])
def test_an_audit_that_cannot_begin(dataset, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.csv").write_text("image_id,split\na,train\nb,train\nc,valid\n")
    ended = CliRunner().invoke(app, ["audit", str(dataset), *words])
    assert ended.exit_code == 1 and said in ended.stderr and "Traceback" not in ended.output


def test_download_fetches_into_the_one_path(tmp_path, monkeypatch):
    from skinlesion.data import collections
    fetched = []
    def download_source(name, folder, progress=None):
        fetched.append((name, folder))
        raise collections.DownloadError("x.zip: the publisher's server cannot be reached; run it again")
    monkeypatch.setattr(collections, "download_source", download_source)
    def call(*paths):
        return CliRunner().invoke(
            app, ["import", "isic2019", *map(str, paths), "--out", str(tmp_path / "out"), "--download"]
        )
    ended = call(tmp_path / "new")
    assert ended.exit_code == 1 and "cannot be reached" in ended.stderr and fetched == [("isic2019", tmp_path / "new")]
    assert (
        "2 paths were given; give one" in call(tmp_path, tmp_path / "b").stderr
        and not (tmp_path / "out").exists()
        and len(fetched) == 1
    )
    assert "write OLD=NEW" in call(tmp_path / "new", "--map", "moles").stderr and len(fetched) == 1
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert (
        "the folder is not empty and is no dataset folder" in call(tmp_path / "new").stderr and len(fetched) == 1
    ) # before gigabytes come


def test_map_is_read_once_for_each_word(tmp_path):
    words = ["import", "folder", str(tmp_path), "--out", str(tmp_path / "out"), "--map"]
    assert "--map 'moles': write OLD=NEW, such as --map 'moles=nv'" in CliRunner().invoke(app, [*words, "moles"]).stderr
    assert "disagree; keep one" in CliRunner().invoke(app, [*words, "a=nv", "--map", "a=mel"]).stderr


def test_help_imports_nothing_slow():
    code = (
        "import sys; from typer.testing import CliRunner; from skinlesion.pipeline.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "print([m for m in ('torch', 'pandas', 'numpy', 'matplotlib', 'lightning', 'fastapi', "
        "'papermill') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_refusals_that_need_no_pixels_do_not_wait_for_torch(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("{}")
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.zip").write_bytes(b"PK\3\4")
    (tmp_path / "short.csv").write_text("image_id,age\na,1\n")
    (tmp_path / "p.csv").write_text("image_id,p_mel,p_benign\na,1,0\n")
    (tmp_path / "l.csv").write_text("image_id,diagnosis\na,melanma\n")
    ends = "--bundle bundle --csv o.csv"
    words = [
        f"predict gone.png {ends}", f"predict a.png a.png {ends}", f"predict a.zip {ends}", f"predict empty {ends}",
        f"predict a.png {ends} --format isc", f"predict a.png {ends} --metadata short.csv",
        "predict a.png --bundle gone --csv o.csv", "predict a.png --bundle empty --csv o.csv",
        "explain gone.png --bundle bundle --out m.png", "explain a.png --bundle gone --out m.png",
        "fit gone --out run", "fit empty --out run --epochs 1 --warmup-epochs 1", "fit empty --out run --loss focall",
        "evaluate short.csv short.csv --out scored", "evaluate p.csv l.csv --out scored",
    ]
    code = (
        "import sys; from typer.testing import CliRunner; from skinlesion.pipeline.cli import app\n"
        "for words in sys.argv[1:]:\n"
        "    assert CliRunner().invoke(app, words.split()).exit_code == 1, words\n"
        "    assert 'torch' not in sys.modules, words"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_notebooks_are_checked_without_the_grammar_of_addresses():
    "Two seconds of each command less; a notebook that is none is still refused."
    code = (
        "import sys; import skinlesion.pipeline.console, nbformat; assert 'lark' not in sys.modules\n"
        "try: nbformat.validate(dict(cells=[dict(cell_type='pie')], metadata={}, nbformat=4, nbformat_minor=5))\n"
        "except nbformat.ValidationError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "refused", done.stderr


def test_run_belongs_to_the_tree_it_is_called_in(tmp_path):
    "Another checkout's code is handed over to."
    (tmp_path / "settings.ini").write_text("[DEFAULT]\n")
    package = tmp_path / "skinlesion" / "pipeline"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "cli.py").write_text("import sys\nprint('the other tree runs', sys.argv[1:])\n")
    (tmp_path / "deep").mkdir()
    code = "import sys; sys.argv = ['skinlesion', 'run', 'prepare']; from skinlesion.pipeline.cli import app; app()"
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path / "deep",
        env={**os.environ, "PYTHONPATH": here},
    )
    assert done.stdout.strip() == "the other tree runs ['run', 'prepare']", done.stderr


def test_evaluate_measures_a_bundle_elsewhere(made, dataset, tmp_path):
    "What it answers is what `predict` answers; an option of tables, and shares it cannot use, are refused."
    _, bundle, _ = made
    words = ["evaluate", "--bundle", bundle, "--data", dataset, "--out", tmp_path / "out", "--resamples", 40]
    code, out, err = cli(*words)
    assert code == 0 and "4 images of 4 lesions" in out and "no figures of its own test to compare with" in out, err
    table = pd.read_csv(tmp_path / "out/predictions.csv")
    predictor = Predictor(bundle)
    assert table.predicted.tolist() == [predictor.predict(dataset / f"images/{i}.png").predicted for i in "abcd"]
    assert json.loads((tmp_path / "out/metrics.json").read_text())["all"]["accuracy"]["n"] == 4
    assert "What changes elsewhere" in (tmp_path / "out/report.html").read_text()
    for more, said in (
        (["--priors", "estimate"], "does not state on how many images of each class it was calibrated"),
        (["--split", "test"], "it belongs to tables"),
    ):
        code, _, err = cli(*words, *more)
        assert code and said in err.replace("\n", " "), err
    assert cli("evaluate", "--bundle", bundle, "--out", tmp_path / "no")[0] == cli("evaluate")[0] == 2


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    "Predictions of two splits by a made-up reader, and labels of more images than that."
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    codes = get_label_set("melanoma").codes
    truth = pd.DataFrame(
        dict(
            image_id=[f"i{k}" for k in range(160)],
            lesion_id=[f"l{k // 2}" for k in range(160)],
            diagnosis=[codes[k // 2 % 2] for k in range(160)],
            age=rng.integers(20, 80, 160),
            sex=["female", "male"] * 80,
        )
    )
    score = (.3 + .4 * (truth.diagnosis == "mel") + rng.normal(0, .2, 160)).clip(.01, .99).round(4)
    split = np.where(np.arange(160) // 2 % 4 < 2, "test", "valid")
    said = truth[["image_id"]].assign(p_benign=1 - score, p_mel=score, split=split)[:150]
    write_predictions(said, folder / "p.csv")
    truth.to_csv(folder / "l.csv", index=False)
    return folder, said, truth


def evaluate(folder, *words):
    "The command on the two tables, few resamples."
    return CliRunner().invoke(
        app, ["evaluate", str(folder / "p.csv"), str(folder / "l.csv"), "--resamples", "40", *map(str, words)]
    )


def test_evaluate_scores_a_split_of_two_tables(tables, tmp_path):
    folder, said, truth = tables
    ended = evaluate(folder, "--split", "test", "--out", tmp_path / "out", "--benchmark", "our-clinic@224")
    assert ended.exit_code == 0, ended.output
    test = said[said.split == "test"]
    card = scorecard(test, truth[truth.image_id.isin(test.image_id)], get_label_set("melanoma"), 40)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for name in ("accuracy", "balanced_accuracy", "auroc_macro", "ece_debiased", "log_loss"):
        assert written["all"][name] == card[name]
    assert written["all"]["malignant"]["sensitivity"] == card["malignant"]["sensitivity"]
    assert (
        f"{len(test)} images of {card['accuracy']['n_lesions']} lesions" in ended.stdout
        and "metrics.json, report.html" in ended.stdout
    )
    rows = truth[truth.image_id.isin(test.image_id)].assign(split="test")
    assert written["benchmark"] == dict(
        name="our-clinic", variant="", resolution="224", split_sha256=split_digest(rows), leak=None
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "not reported" in page and "<script" not in page and "img-src data:" in page


def test_evaluate_knows_the_usual_words_for_splits(tables, tmp_path, monkeypatch):
    folder, said, truth = tables
    monkeypatch.setattr("skinlesion.report.clinical.write_evaluation", lambda result, *_, **__: kept.append(result))
    kept = []
    words = dict(test="Test", valid="validation")
    said.assign(split=said.split.map(words)).to_csv(tmp_path / "p.csv", index=False)
    truth[:150].to_csv(tmp_path / "l.csv", index=False)
    for more in ((), ("--split", "Test")):
        assert evaluate(tmp_path, "--out", tmp_path / "out", *more).exit_code == 0
    assert (
        kept[0].part == "test" and {*kept[0].cards} == {"", "valid", "test"} and "decisions" in kept[0].blocks
    )
    n = int((said.split == "test").sum())
    assert kept[1].cards[""]["accuracy"]["n"] == n
    # Whether the rows of valid are there or not, the split that was tested on is the same one.
    assert kept[0].blocks["benchmark"] == kept[1].blocks["benchmark"]


def test_evaluate_leaves_out_only_when_asked_and_says_so(tables, tmp_path, monkeypatch):
    monkeypatch.setattr("skinlesion.report.clinical.draw_picture", lambda draw, alt: Picture(b"", alt, 100))
    folder, _, _ = tables
    ended = evaluate(folder, "--out", tmp_path / "out")
    assert ended.exit_code == 1
    assert (
        "10 image(s) of the labels have no prediction, 0 prediction(s) have no label, such as 'i150', "
        "'i151'" in ended.stderr
    )
    assert not any(tmp_path.iterdir())
    (tmp_path / "facts.json").write_text('{"setting": "one made-up clinic"}')
    ended = evaluate(folder, "--partial", "--facts", tmp_path / "facts.json", "--out", tmp_path / "out")
    assert (
        ended.exit_code == 0
        and "10 image(s) of the labels have no prediction, 0 prediction(s) have no label; they were left out"
        in ended.stderr
    )
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    page = (tmp_path / "out" / "report.html").read_text()
    assert written["all"]["accuracy"]["n"] == 150 and ended.stdout.startswith("split test: ")
    assert {*written["splits"]} == {"valid", "test"} and {*written["subgroups"]} >= {"age_band", "sex"}
    assert "they were left out" in page and "one made-up clinic" in page


@pytest.mark.slow
def test_evaluate_gives_the_same_bytes_in_another_process(tables, tmp_path):
    folder, _, _ = tables
    for name in ("one", "two"):
        words = (
            "evaluate",
            folder / "p.csv",
            folder / "l.csv",
            "--partial",
            "--resamples",
            40,
            "--out",
            tmp_path / name,
        )
        assert cli_process(*words)[0] == 0
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and {"metrics.json", "report.html", "roc.csv"} <= {*one}


def test_evaluate_says_that_malignancy_is_not_stated(tables, tmp_path, monkeypatch):
    folder, said, truth = tables
    monkeypatch.setattr(
        "skinlesion.report.clinical.write_evaluation", lambda result, *_, **__: kept.update(result.metrics())
    )
    kept = {}
    write_predictions(said[["image_id"]].assign(p_mole=said.p_benign, p_wart=said.p_mel), tmp_path / "p.csv")
    truth[:150].assign(diagnosis=truth.diagnosis.map(dict(benign="mole", mel="wart"))).to_csv(
        tmp_path / "l.csv", index=False
    )
    ended = evaluate(tmp_path, "--out", tmp_path / "out")
    assert (
        ended.exit_code == 0
        and "classes mole, wart: the label set does not state which are malignant" in ended.stderr
        and "does not say which" in ended.stdout
    )
    assert kept["all"]["accuracy"]["value"] is not None and kept["all"]["malignant"]["auroc"]["value"] is None

# Confidences and true class of 17 and 22 images, ISIC_0035060 and on; below 2019's, score and validation weight too.
# The numbers are random (numpy), rounded until some tie. What follows each table was printed by the challenge's own
# scorer, isic-challenge-scoring 5.8.0 (in an environment of its own: it needs Python 3.13, pandas < 3, numpy < 2.4),
# called as `isic-challenge-scoring classification truth.csv submission.csv`.
OFFICIAL = dict(
    isic2018=(
        """
.7 .3 .1 .4 .1 .2 .3 MEL
.3 .8 .4 .6 .2 .4 .4 NV
.2 .0 1.0 .2 .2 .5 .4 BCC
.3 .5 .0 .8 .2 .1 .4 AKIEC
.6 .1 .4 .2 .8 .4 .1 BKL
.5 .4 .4 .5 .3 .9 .5 DF
.1 .5 .2 .3 .1 .4 .6 VASC
.5 .2 .3 .2 .4 .5 .1 DF
.8 .5 .3 .6 .1 .5 .1 MEL
.6 .8 .4 .6 .5 .5 .0 NV
.2 .5 .1 .1 .5 .1 .2 NV
.3 .9 .6 .4 .1 .3 .4 NV
.0 .4 .2 .4 .4 .8 .3 DF
.3 .1 .3 .1 .3 .3 .9 VASC
.2 .0 .3 .1 .8 .2 .2 BKL
.9 .2 .2 .2 .3 .1 .3 MEL
1.0 .3 .4 .6 .5 .4 .5 MEL
""",
        """Overall: 0.9166666666666667
Validation: 0.9166666666666667

Per-category metrics:
       accuracy  sensitivity  specificity      dice   ppv       npv       auc  auc_sens_80        ap
MEL      0.8750     1.000000     0.846154  0.750000  0.60  1.000000  1.000000     1.000000  1.000000
NV       0.9375     0.750000     1.000000  0.857143  1.00  0.923077  0.979167     0.953333  0.916667
BCC      0.9375     1.000000     0.933333  0.666667  0.50  1.000000  1.000000     1.000000  1.000000
AKIEC    0.8125     1.000000     0.800000  0.400000  0.25  1.000000  1.000000     1.000000  1.000000
BKL      1.0000     1.000000     1.000000  1.000000  1.00  1.000000  1.000000     1.000000  1.000000
DF       0.9375     0.666667     1.000000  0.800000  1.00  0.928571  0.974359     0.929231  0.866667
VASC     1.0000     1.000000     1.000000  1.000000  1.00  1.000000  1.000000     1.000000  1.000000

Macro averaged metrics:
accuracy       0.928571
sensitivity    0.916667
specificity    0.939927
dice           0.781973
ppv            0.764286
npv            0.978807
auc            0.993361
auc_sens_80    0.983223
ap             0.969048

Aggregate metrics:
balanced_accuracy    0.916667
""",
    ),
    isic2019=(
        """
.24 .08 .30 .04 .00 .01 .29 .04 .00 MEL 1 0
.07 .41 .03 .04 .03 .18 .07 .03 .14 NV 1 0
.13 .00 .74 .01 .03 .01 .04 .03 .02 BCC 1 1
.01 .04 .01 .26 .09 .01 .38 .19 .00 AK 1 1
.14 .02 .09 .10 .14 .06 .06 .38 .02 BKL 1 1
.02 .00 .00 .00 .07 .55 .30 .02 .03 DF 1 1
.08 .01 .02 .16 .01 .03 .63 .05 .01 VASC 1 1
.05 .09 .07 .02 .23 .01 .01 .27 .26 SCC 1 1
.02 .01 .01 .08 .01 .01 .10 .01 .76 UNK 1 0
.07 .04 .07 .54 .03 .01 .14 .05 .04 VASC 0 0
.03 .01 .01 .01 .01 .02 .01 .61 .30 SCC 1 1
.74 .00 .16 .02 .00 .05 .01 .00 .00 MEL 1 1
.00 .02 .07 .01 .03 .24 .00 .63 .01 SCC 1 0
.01 .01 .04 .07 .52 .04 .11 .06 .14 BKL 1 1
.03 .03 .24 .04 .56 .04 .00 .01 .05 BKL 1 1
.01 .05 .01 .00 .09 .79 .00 .04 .01 DF 1 0
.00 .02 .50 .39 .01 .02 .02 .02 .01 BCC 1 1
.10 .37 .19 .02 .01 .09 .03 .03 .18 UNK 1 0
.97 .01 .00 .01 .01 .00 .00 .00 .00 MEL 1 0
.01 .01 .21 .13 .20 .00 .00 .44 .00 BCC 1 1
.00 .01 .01 .84 .01 .00 .01 .01 .10 AK 0 1
.05 .01 .01 .46 .02 .07 .02 .05 .31 DF 1 0
""",
        """Overall: 0.6296296296296295
Validation: 0.8333333333333333

Per-category metrics:
      accuracy  sensitivity  specificity  dice  ppv       npv       auc  auc_sens_80        ap
MEL   0.947368     0.666667          1.0   0.8  1.0  0.941176  1.000000     1.000000  1.000000
NV    0.947368     0.000000          1.0   0.0  1.0  0.947368  1.000000     1.000000  1.000000
BCC   0.894737     0.333333          1.0   0.5  1.0  0.888889  0.958333     0.875000  0.866667
AK    0.947368     0.000000          1.0   0.0  1.0  0.947368  0.888889     0.888889  0.333333
BKL   0.947368     0.666667          1.0   0.8  1.0  0.941176  0.958333     0.875000  0.866667
DF    0.947368     0.666667          1.0   0.8  1.0  0.941176  0.937500     0.812500  0.833333
VASC  1.000000     1.000000          1.0   1.0  1.0  1.000000  1.000000     1.000000  1.000000
SCC   0.947368     0.666667          1.0   0.8  1.0  0.941176  0.958333     0.875000  0.866667
UNK   0.947368     0.000000          1.0   0.0  1.0  0.947368  0.833333     0.833333  0.250000

Macro averaged metrics:
accuracy       0.947368
sensitivity    0.444444
specificity    1.000000
dice           0.522222
ppv            1.000000
npv            0.943967
auc            0.948302
auc_sens_80    0.906636
ap             0.779630

Aggregate metrics:
balanced_accuracy    0.62963
""",
    ),
)


def official_tables(challenge, folder):
    "The two tables of OFFICIAL in the challenge's layout, in a folder."
    columns = list(CHALLENGES[challenge])
    weights = ["score_weight", "validation_weight"] if challenge == "isic2019" else []
    rows = [row.split() for row in OFFICIAL[challenge][0].strip().splitlines()]
    table = pd.DataFrame(rows, columns=[*columns, "truth", *weights])
    table.insert(0, "image", [f"ISIC_{35060 + k:07}" for k in range(len(table))])
    table[["image", *columns]].to_csv(folder / "submission.csv", index=False)
    truth = table[["image", *weights]].join(pd.get_dummies(table.truth, dtype=float)[columns])
    truth.to_csv(folder / "truth.csv", index=False)
    return table


@pytest.mark.parametrize("challenge", OFFICIAL)
def test_official_scores_are_those_of_the_challenge(challenge, tmp_path):
    "Of the challenge's tables and of ours: every character, the image that was withdrawn from 2018 (row 9) included."
    table = official_tables(challenge, tmp_path)
    expected = OFFICIAL[challenge][1]
    codes = CHALLENGES[challenge]
    ours = table.rename(columns={column: f"p_{code}" for column, code in codes.items()} | dict(image="image_id"))
    ours = ours.assign(diagnosis=table.truth.map(codes))[::-1]
    ours.drop(columns="diagnosis").to_csv(tmp_path / "p.csv", index=False)
    ours.drop(columns=[f"p_{code}" for code in codes.values()]).to_csv(tmp_path / "l.csv", index=False)
    for predictions, labels in (("submission.csv", "truth.csv"), ("p.csv", "l.csv")):
        words = ("evaluate", tmp_path / predictions, tmp_path / labels, "--official", challenge)
        assert cli(*words) == (0, expected, "")
    labels = pd.read_csv(tmp_path / "l.csv")
    labels.assign(image_id=labels.image_id + ".JPG").to_csv(tmp_path / "l.csv", index=False)
    code, out, err = cli(*words)
    assert (code, out) == (0, expected) and f"{len(ours)} images are called otherwise in the labels: '" in err


def test_a_class_without_an_image_is_left_out_of_official_scores(tmp_path):
    "ISIC 2019 without UNK, in predictions or in labels; without either option there is nothing to do."
    table = official_tables("isic2019", tmp_path)
    (tmp_path / "labels.csv").write_text(
        "image_id,diagnosis\n" + "".join(f"{i},{t}\n" for i, t in zip(table.image, table.truth) if t != "UNK")
    )
    submission = pd.read_csv(tmp_path / "submission.csv").drop(columns="UNK")
    submission.to_csv(tmp_path / "eight.csv", index=False)
    words = ("evaluate", tmp_path / "eight.csv", tmp_path / "labels.csv", "--partial", "--official", "isic2019")
    code, out, err = cli(*words)
    assert code == 0 and "\nSCC  " in out and "UNK" not in out
    assert "eight.csv: no class unk, so the confidence in UNK is taken as 0\n" in err
    assert "labels.csv: no image of UNK, left out of rows and means; the challenge's own scorer stops there\n" in err
    with (tmp_path / "labels.csv").open("a") as labels: # a row that is not scored
        labels.write("other,wart\n")
    assert cli(*words)[:2] == (0, out)
    assert cli(*words[:-2])[0] == 2 and "give a folder for the evaluation" in cli(*words[:-2])[2]


def test_predict_writes_what_a_challenge_takes(made, tmp_path):
    "The submission of a bundle is its predictions table; of classes that no challenge has there is none."
    folder, bundle, pictures = made
    words = ("predict", *pictures.values(), "--bundle", bundle)
    assert cli(*words, "--csv", tmp_path / "table.csv")[0] == 0
    code, out, err = cli(*words, "--format", "isic", "--csv", tmp_path / "isic.csv")
    assert code == 0 and "3 picture(s)" in out, err
    head, first = (tmp_path / "isic.csv").read_text().splitlines()[:2]
    assert head == "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC" and first.startswith("a,0.")
    table, submission = (read_predictions(tmp_path / name) for name in ("table.csv", "isic.csv"))
    assert table[submission.columns].equals(submission)
    two = build_bundle(tmp_path / "two", get_label_set("melanoma"))
    code, _, err = cli(*words[:-1], two, "--format", "isic", "--csv", tmp_path / "no.csv")
    assert code == 1 and "two, --format isic: no ISIC challenge has the classes benign, mel" in err
