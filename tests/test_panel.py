"""The CAM explorer as a page: Voila serves it, the kernel computes."""
import json
import re
import shutil
import urllib.request
from dataclasses import replace
from types import SimpleNamespace

import ipywidgets
import pandas as pd
import pytest

from skinlesion.apps.panels import SECTIONS, CamExplorer, explorer_page, open_explorer
from skinlesion.data.prepared import write_prepared
from skinlesion.evaluate.abstention import LockedAbstention
from skinlesion.evaluate.policy import Policy
from skinlesion.explain.neighbours import training_cases
from skinlesion.files import read_json, write_json, write_sums
from skinlesion.images import MAX_BYTES
from skinlesion.model.bundle import save_bundle
from skinlesion.pipeline.pictures import serve_explorer
from skinlesion.synthetic.truth import make_synthetic
from skinlesion.use.predict import Predictor
from tiny import build_bundle, build_pictures


def fetch(address):
    "The page and its headers."
    with urllib.request.urlopen(address, timeout=120) as answer:
        return answer.read().decode(), answer.headers


def texts(widget):
    "Every text and label of a page's widgets."
    own = [str(getattr(widget, name, "")) for name in ("value", "description")]
    return own + [t for child in getattr(widget, "children", ()) for t in texts(child)]


def visible_text(widget):
    "All texts of a page, in order."
    return " ".join(texts(widget))


@pytest.fixture
def project(root, tmp_path):
    "A project that holds the page's notebook, its settings and nothing else."
    (tmp_path / "nbs/apps").mkdir(parents=True)
    for name in ("settings.ini", "voila.json"):
        shutil.copy(root / name, tmp_path)
    shutil.copy(root / "nbs/apps/cam_explorer.ipynb", tmp_path / "nbs/apps")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A project with drawn lesions, prepared, and a bundle that holds the nearest cases."
    folder = tmp_path_factory.mktemp("trained")
    dataset = make_synthetic(folder / "data", n_images=60, size=(60, 80), seed=3)
    pairs = pd.DataFrame(columns=["image_id_a", "image_id_b", "kind"])
    measured = dataset.table[["image_id"]]
    prepared = write_prepared(folder / "artifacts/prepared", dataset, dataset.table.split, pairs, measured, 64)
    bundle = Predictor(build_bundle(folder / "untrained")).bundle
    ensemble = SimpleNamespace(prepared=prepared, models=list(bundle.members), folded=False)
    cases = training_cases(ensemble)
    kept = bundle.members, bundle.label_set, bundle.encoder, 64, {}
    save_bundle(folder / "artifacts/ensemble", *kept, cases=cases.to_files())
    return folder, dataset


def accordion_of(page):
    "The folded sections of a page."
    return next(widget for widget in page.children if isinstance(widget, ipywidgets.Accordion))


CONTROLS = ("Picture", "Upload a picture", "Age", "Sex", "Site", "Member", "Method", "Layer", "Class", "Opacity")


def test_without_a_bundle_it_says_what_to_run(tmp_path):
    text = open_explorer(tmp_path).value
    assert "no bundle to explain yet" in text and "make repro" in text


def test_with_a_bundle_it_has_its_controls_and_says_what_it_is_not_for(tmp_path):
    build_bundle(tmp_path / "artifacts/ensemble")
    found = texts(open_explorer(tmp_path))
    assert [name for name in CONTROLS if name not in found] == []
    assert "Probabilities" in " ".join(found) and "never for diagnosis" in " ".join(found)


def test_an_abstention_comes_before_what_would_have_been_predicted(tmp_path):
    bundle = build_bundle(tmp_path / "bundle")
    pictures = build_pictures(tmp_path)
    policy = replace(Policy.plain(["image", "fused"], 7), abstention=LockedAbstention(.99, .1, .1, 60, 50))
    write_json(bundle / "bundle.json", read_json(bundle / "bundle.json") | dict(policy=policy.to_dict()))
    write_sums(bundle)
    explorer = CamExplorer(Predictor(bundle), pictures)
    text = visible_text(explorer_page(explorer))
    assert explorer.prediction.abstain and explorer.prediction.abstain_reason.startswith("the answer is unsure")
    order = ("No prediction for this picture:", "the answer is unsure", "It would have predicted")
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert "Predicted:" not in text


def test_a_section_is_filled_when_it_is_opened(trained, one_thread):
    folder, _ = trained
    sections = accordion_of(open_explorer(folder))
    titles = ("If age, sex or site were different", "Most similar training lesions", "What is measured in the lesion")
    assert (sections.titles, sections.selected_index) == (titles, None)
    assert [body.value for body in sections.children] == ["", "", ""]
    shown = []
    for index in range(3):
        sections.selected_index = index
        shown.append(sections.children[index].value)
    assert [body.value for body in sections.children[:2]] == ["", ""]
    assert [html.count("data:image/png") for html in shown] == [1, 5, 1]
    assert 'alt="Probability of each class over age' in shown[0] and "not the disease" in shown[0]
    assert shown[1].count("similarity 0.") + shown[1].count("similarity 1.00") == 5
    assert "outline given" in shown[2] and "asymmetry of shape" in shown[2]


def test_the_own_lesion_is_no_similar_one_and_training_is_counted(trained, one_thread):
    folder, dataset = trained
    training = dataset.table[dataset.table.split == "train"]
    training = training.assign(path=training.image_id.map(dataset.image_path))
    own = training.iloc[0]
    predictor = Predictor(folder / "artifacts/ensemble")
    explorer = CamExplorer(predictor, {own.image_id: own.path}, training, training=training)
    explorer.section = "nearest"
    assert len(explorer.detail) == 5 and own.lesion_id not in set(explorer.detail.lesion_id)
    explorer.section = "what_if"
    back = explorer.detail[explorer.detail.value == "back"].iloc[0]
    assert back.n_training == training.lesion_id[training.site == "back"].nunique()


def test_a_section_names_what_is_missing(tmp_path, one_thread):
    bundle = build_bundle(tmp_path / "bundle")
    explorer = CamExplorer(Predictor(bundle), build_pictures(tmp_path))
    sentences = {}
    for name in SECTIONS:
        explorer.section = name
        sentences[name] = explorer.detail
    assert "training images are not here. Run `make repro`" in sentences["what_if"]
    assert "has no nearest cases" in sentences["nearest"]
    assert sentences["traits"].mask == "estimated"
    assert explorer.error == "" and explorer.prediction is not None
    loaded = Predictor(bundle).bundle
    save_bundle(bundle, loaded.members[:1], loaded.label_set, None, 64, {})
    explorer = CamExplorer(Predictor(bundle), build_pictures(tmp_path))
    sections = accordion_of(explorer_page(explorer))
    sections.selected_index = 0
    assert "reads the image alone" in sections.children[0].value


def test_voila_serves_the_page(project):
    build_bundle(project / "artifacts/ensemble")
    with serve_explorer(project) as address:
        page, headers = fetch(address)
    assert "CAM explorer" in page and "Traceback" not in page
    # The widgets themselves reach the browser through the kernel; the page holds their place.
    assert "application/vnd.jupyter.widget-view+json" in page and "Error" not in page.partition("<main")[2]
    # The page may load from its own machine alone: it works without a network, and no picture leaves.
    assert headers["Content-Security-Policy"].startswith("default-src 'self';")


def test_every_picture_of_the_image_gate_can_be_uploaded(root):
    "A picture goes to the kernel in one message, and a message over the limit would kill the page."
    settings = json.loads((root / "voila.json").read_text())["Voila"]["tornado_settings"]
    page = settings["websocket_max_message_size"]
    lab = re.search(r'websocket_max_message_size": (\d+)', (root / "Makefile").read_text())
    assert page == int(lab[1]) >= MAX_BYTES + (1 << 20)
    policy = settings["headers"]["Content-Security-Policy"]
    assert "http" not in policy and "*" not in re.sub(r"ws://(localhost|127\.0\.0\.1):\*", "", policy)
