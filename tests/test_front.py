"The front door: the lines of README as printed."
import importlib
import json
import re
import shutil

from madeup import ROOT

from skinlesion.synthetic.truth import make_synthetic

SMALL = "backbone='small_cnn_3', pretrained='none', epochs=2, image_size=32, progress=None, "
QUICK = "evaluation=dict(resamples=40, views=['none'], stress=[], ood='none')"


def readme_lines():
    "The library example of README, on a small network without weights from the hub."
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    lines = next(block for block in blocks if "sl.fit" in block)
    printed = "backbone='mobilenetv2_100', pretrained='timm', epochs=8"
    assert printed in lines
    return lines.replace(printed, SMALL + QUICK)


def test_what_the_guide_imports_is_there():
    "Each import of README and of the guide's examples, and each `skinlesion.a.b` that their text names."
    pages = [ROOT / "README.md", *sorted((ROOT / "nbs" / "guide").glob("*.ipynb"))]
    text = "\n".join(path.read_text(encoding="utf-8").replace("\\n", "\n") for path in pages)
    lines = set(re.findall(r"^ *\"?(from skinlesion[\w.]* import [\w, ]+)", text, re.M))
    assert any("write_evaluation" in line for line in lines)
    for line in sorted(lines):
        exec(line, {})
    for module, name in sorted(set(re.findall(r"`skinlesion\.([a-z_.]+)\.([A-Za-z_]+)`", text))):
        assert hasattr(importlib.import_module(f"skinlesion.{module}"), name), (module, name)


def test_a_red_notebook_is_not_hidden_by_green_tests():
    "The line that stands for `make test` ends with the fault of either half."
    for name in ("README.md", "nbs/index.ipynb", "nbs/guide/a_pipeline.ipynb"):
        assert "--path nbs && pytest" in (ROOT / name).read_text(encoding="utf-8"), name


def test_the_lines_of_the_readme_run(tmp_path, monkeypatch, one_thread):
    drawn = make_synthetic(tmp_path / "drawn", n_images=140, size=(48, 64), seed=1)
    for image_id, diagnosis in zip(drawn.table.image_id, drawn.table.diagnosis):
        (tmp_path / "photos" / diagnosis).mkdir(parents=True, exist_ok=True)
        shutil.copy(drawn.image_path(image_id), tmp_path / "photos" / diagnosis)
    shutil.copy(next((tmp_path / "photos" / "mel").iterdir()), tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    exec(readme_lines(), {})
    leaf = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["ensemble"]["accuracy"]
    assert leaf["n"] > 0 and 0 <= leaf["value"] <= 1
    assert "Evaluation of photos" in (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
