"""The CAM explorer as a page: Voila serves it, the kernel computes."""
import json
import re
import shutil
import urllib.request
from dataclasses import replace

import pytest

from skinlesion.apps.panels import CamExplorer, explorer_page, open_explorer
from skinlesion.evaluate.abstention import LockedAbstention
from skinlesion.evaluate.policy import Policy
from skinlesion.files import read_json, write_json, write_sums
from skinlesion.images import MAX_BYTES
from skinlesion.pipeline.pictures import serve_explorer
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
