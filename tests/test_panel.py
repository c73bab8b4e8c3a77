"""The CAM explorer as a page: Voila serves it, the kernel answers."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from skinlesion.apps.panels import open_explorer
from tiny import build_bundle


def serve(root, port):
    "A Voila process on the notebook of `root`."
    return subprocess.Popen([sys.executable, "-m", "voila", str(root / "nbs/apps/cam_explorer.ipynb"), "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"],
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"})


def fetch(port):
    "The page, as soon as it is served."
    for _ in range(240):
        try: return urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=120).read().decode()
        except OSError: time.sleep(.5)
    raise AssertionError("Voila served no page")


def texts(widget):
    "Every text and label of a page's widgets."
    own = [str(getattr(widget, name, "")) for name in ("value", "description")]
    return own + [t for child in getattr(widget, "children", ()) for t in texts(child)]


@pytest.fixture
def project(root, tmp_path):
    "A project that holds the page's notebook and nothing else."
    (tmp_path / "nbs/apps").mkdir(parents=True)
    shutil.copy(root / "settings.ini", tmp_path)
    shutil.copy(root / "nbs/apps/cam_explorer.ipynb", tmp_path / "nbs/apps")
    return tmp_path


def test_the_notebook_is_a_page_and_exports_nothing(root):
    sources = ["".join(c["source"]) for c in json.loads((root / "nbs/apps/cam_explorer.ipynb").read_text())["cells"]]
    assert any("open_explorer(repo_root())" in s for s in sources) and not any("default_exp" in s or "#| export" in s for s in sources)


def test_without_a_bundle_it_says_what_to_run(tmp_path):
    said = open_explorer(tmp_path).value
    assert "no bundle to explain yet" in said and "make repro" in said


def test_with_a_bundle_it_has_its_controls_and_says_what_it_is_not_for(tmp_path):
    build_bundle(tmp_path / "artifacts/ensemble")
    shown = " ".join(texts(open_explorer(tmp_path)))
    for word in ("Picture", "Upload", "Age", "Sex", "Site", "Member", "Method", "Layer", "Class", "Opacity", "Probabilities", "never for diagnosis"): assert word in shown, word


def test_voila_serves_the_page(project):
    build_bundle(project / "artifacts/ensemble")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = serve(project, port)
    try: page = fetch(port)
    finally:
        process.terminate()
        process.wait(30)
    assert "Where does the model look?" in page and "Traceback" not in page
    # The widgets themselves reach the browser through the kernel; the page holds their place.
    assert "application/vnd.jupyter.widget-view+json" in page and "Error" not in page.partition("<main")[2]
