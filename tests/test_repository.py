"""The tracked files: no machine's paths, no secrets, no foreign images, one README, one version.

Each check is also run on a tree with that fault planted.
"""
import configparser
import hashlib
import json
import re
import subprocess

from ruamel.yaml import YAML

from madeup import cell, check_tests, library, plant, remote_object, swap, tracked

REMOTE = ".dvc/remote"

# Put together from pieces, so that this file does not find itself.
FORBIDDEN = {
    "a machine's path": r"(?<![\w.~}\])>$*-])/(?:work|home|root|Users|opt|mnt|srv)/[\w.]",
    "a package index": r"(?i)(?:index-url|find-links|trusted-host)[ =:]+\S*\w+\.\w+|"
                       r"https?://[^\s/\"']*(?:py" r"pi|regis" r"try|artifac" r"tory|nex" r"us)[^\s/\"']*",
    "a machine's address": r"https?://(?!127\.0\.0\.1|0\.0\.0\.0)\d+\.\d+\.\d+\.\d+",
    "a secret": r"AKIA[0-9A-Z]{16}|gh[pousr]_\w{30,}|hf_[A-Za-z]{30,}|xox[abp]-\w{10,}|-----BEGIN [A-Z ]*PRIVATE KEY|"
                r"(?i:password|passwd|api_?key|secret|token)[\"']?\s*[:=]\s*[\"'][^\"'\s{}$<>]{8,}[\"']",
    "something left to do": r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK)\b",
}


def texts(root):
    "Tracked texts as (place, text): a file, or one cell of a notebook with its textual outputs; pictures are left out."
    for path in tracked(root):
        data = (root / path).read_bytes()
        if path.as_posix().startswith(REMOTE) or b"\0" in data:
            continue
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        if path.suffix == ".ipynb":
            yield from ((f"{path} cell {c['id']}", cell_text(c)) for c in json.loads(text)["cells"])
        else:
            yield path.as_posix(), text


def cell_text(c):
    "Everything a person reads in a notebook cell as text."
    parts = ["".join(c["source"])]
    for out in c.get("outputs", []):
        data = {"text": out.get("text", ""), **out.get("data", {})}
        parts += ["".join(v) for k, v in data.items() if k.startswith("text") and isinstance(v, (str, list))]
    return re.sub(r"data:image/[^\"')]*", "", "\n".join(parts))


def finds(root, pattern):
    "Where a pattern stands in the tracked texts, as (place, matched text)."
    return [
        (f"{place} line {text.count(chr(10), 0, m.start()) + 1}", m[0])
        for place, text in texts(root)
        for m in re.finditer(pattern, text)
    ]


def check_texts(root):
    "No machine's path, package index, secret or open task in a tracked text."
    return [
        f"{place} holds {what}: {words!r}"
        for what, pattern in FORBIDDEN.items()
        for place, words in finds(root, pattern)
    ]


def check_version(root):
    "The version stands in settings.ini and nowhere else."
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini", encoding="utf-8")
    version = settings["DEFAULT"].get("version", "")
    if not re.fullmatch(r"\d+\.\d+\.\d+\S*", version):
        return [f"settings.ini: version is {version!r}; write it as 1.2.3"]
    pattern = rf"__version__\s*=\s*[\"']|version[\"']?\s*[:=]\s*[\"']?{re.escape(version)}(?![\w.])"
    return [f"{place} states the version ({words!r}); settings.ini alone does" for place, words in finds(root, pattern)
            if not place.startswith("settings.ini ")]


def check_readme(root):
    "README.md is what nbs/index.ipynb makes it."
    from skinlesion.pipeline.readme import build_readme
    readme = root / "README.md"
    same = readme.is_file() and readme.read_text(encoding="utf-8") == build_readme(root)
    return [] if same else ["README.md differs from nbs/index.ipynb; write it anew with skinlesion.pipeline.readme"]


def committed_data(root):
    "Name of the .dir object of the data that git tracks, or None; a data.dvc that is not committed does not count."
    shown = subprocess.run(["git", "show", ":data.dvc"], cwd=root, capture_output=True, text=True)
    return None if shown.returncode else YAML(typ="safe", pure=True).load(shown.stdout)["outs"][0]["md5"]


def check_remote(root):
    "The embedded remote holds the objects of the default dataset, whole, and no others."
    tracked_objects = {p.as_posix() for p in tracked(root, REMOTE)}
    def place(name):
        return f"{REMOTE}/files/md5/{name[:2]}/{name[2:]}"
    problems = []
    named = set()
    listing = committed_data(root)
    if listing and place(listing) in tracked_objects:
        named = {place(listing), *(place(entry["md5"]) for entry in json.loads((root / place(listing)).read_text()))}
    remedy = "images from elsewhere are never committed: git rm --cached"
    foreign = sorted(tracked_objects - named)
    missing = sorted(named - tracked_objects)
    problems += [f"{path} belongs to no file that data.dvc names; {remedy} {path}" for path in foreign]
    problems += [f"{path} is named by data.dvc and not tracked: git add -f {path}" for path in missing]
    for path in sorted(tracked_objects & named):
        name = "".join(path.split("/")[-2:]).removesuffix(".dir")
        if hashlib.md5((root / path).read_bytes()).hexdigest() != name:
            problems.append(f"{path} does not match its name; fetch it anew")
    return problems


def check_ignored(root):
    "Git tracks neither data, nor artifacts, nor what a run leaves behind."
    pattern = (
        r"(data|artifacts|\.venv|\.work)/.*|\.dvc/(cache|tmp|config\.local).*|.*/(__pycache__|\.ipynb_checkpoints)/.*|"
        r"reports/(.*/)?(report\.html|index\.html|executed\.ipynb|failed\.ipynb|run\.json)"
    )
    return [
        f"{path} is tracked; git rm --cached {path}" for path in tracked(root) if re.fullmatch(pattern, path.as_posix())
    ]


CHECKS = [f for name, f in list(globals().items()) if name.startswith("check_") and f.__module__ == __name__]

FOREIGN, _ = remote_object(b"somebody's skin")
IMAGE, _ = remote_object(b"\xff\xd8made up\0")
NB = "nbs/model/20_grow.ipynb"
# Texts with a fault, put together by `+` for the same reason as the patterns.
WORK_PATH = "/wo" + "rk/main/nbs"
HOME_PATH = "/ho" + "me/someone"
ROOT_PATH = "/ro" + "ot/x"
OWN_INDEX = "--extra-index" + "-url https://mirror.nowhere.example/simple"
INDEX_ADDRESS = "https://py" + "pi.nowhere.example/simple"
NUMBERED_ADDRESS = "http:/" + "/10.1.2.3:8080/"
API_KEY = "api_key" + " = 'abcdefgh1234'"
TOKEN = "ghp_" + "a1" * 18
KEY_FILE = "-----BEGIN RSA" + " PRIVATE KEY-----"
OPEN_TASK = "TO" + "DO: more"
VERSION_LINE = "__version__ " + "= '1'"
PRINTS_A_PATH = cell("x", outputs=[dict(output_type="stream", name="stdout", text=[f"at {ROOT_PATH}\n"])])
FAULTS = [
    (check_texts, {"notes.md": f"first\nsee {WORK_PATH}\n"}, "notes.md line 2 holds a machine's path"),
    (check_texts, {"Makefile": f"x:\n\tls {HOME_PATH}\n"}, "Makefile line 2 holds a machine's path"),
    (check_texts, {NB: library("model.grow", PRINTS_A_PATH)}, "holds a machine's path"),
    (check_texts, {"constraints.txt": f"{OWN_INDEX}\n"}, "holds a package index"),
    (check_texts, {"setup.cfg": f"url = {INDEX_ADDRESS}\n"}, "holds a package index"),
    (check_texts, {"setup.cfg": f"url = {NUMBERED_ADDRESS}\n"}, "holds a machine's address"),
    (check_texts, {"conf.py": f"{API_KEY}\n"}, "holds a secret"),
    (check_texts, {"conf.py": f"x = '{TOKEN}'\n"}, "holds a secret"),
    (check_texts, {"key.pem": f"{KEY_FILE}\n"}, "holds a secret"),
    (check_texts, {NB: library("model.grow", f"x = 1 # {OPEN_TASK}")}, "line 1 holds something left to do"),
    (check_version, {"settings.ini": swap("version = 4.5.6", "version = four")}, "version is 'four'"),
    (
        check_version,
        {"pyproject.toml": swap('dynamic = ["version"]', 'version = "4.5.6"')},
        "pyproject.toml line 3 states the version",
    ),
    (check_version, {"skinlesion/base.py": f"{VERSION_LINE}\n"}, "skinlesion/base.py line 1 states the version"),
    (check_readme, {"README.md": "# Something else\n"}, "README.md differs from nbs/index.ipynb"),
    (check_readme, {"README.md": None}, "README.md differs from nbs/index.ipynb"),
    (check_remote, {FOREIGN: b"somebody's skin"}, f"{FOREIGN} belongs to no file that data.dvc names"),
    (check_remote, {f"{REMOTE}/face.jpg": b"\xff\xd8"}, "face.jpg belongs to no file"),
    (check_remote, {IMAGE: None}, f"{IMAGE} is named by data.dvc and not tracked"),
    (check_remote, {IMAGE: b"another"}, f"{IMAGE} does not match its name"),
    (
        check_remote,
        {"data.dvc": f"outs:\n- md5: {'0' * 32}.dir\n  path: data\n"},
        f"{IMAGE} belongs to no file that data.dvc names",
    ),
    (check_ignored, {"data/images/a.jpg": b"\xff\xd8"}, "data/images/a.jpg is tracked"),
    (check_ignored, {"reports/train/image/run.json": "{}"}, "run.json is tracked"),
]


test_repository, test_good_tree, test_planted, test_every_check_is_tested = check_tests(CHECKS, FAULTS)


def test_harmless_texts(good_tree, tmp_path):
    "What only looks like a fault is let through."
    harmless = (
        'root/work/x, https://example.org/home/page, "{root}/opt/x", /path/to/python3, '
        'http://127.0.0.1:8000, token = get_token(), data/work/x'
    )
    assert check_texts(plant(good_tree, tmp_path / "tree", {"notes.md": harmless})) == []


def test_own_data_is_no_fault(good_tree, tmp_path):
    "Own data recorded in the working copy, not committed, leaves the check of the embedded remote alone."
    tree = plant(good_tree, tmp_path / "tree", {})
    (tree / "data.dvc").write_text(f"outs:\n- md5: {'1' * 32}.dir\n  path: data\n")
    assert check_remote(tree) == []
