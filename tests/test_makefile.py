"""`make` as its users call it, in a folder of its own: every program it starts is a stub that logs its arguments.

The PATH holds the stubs and a few system tools, so no real Python, DVC or package index can be reached.
"""
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from madeup import ROOT

TOOLS = "awk bash cat cp dirname env find ln mkdir mktemp mv rm rmdir sh sleep stat tee test touch true".split()
MADE = (
    "artifacts/models/m.bin",
    "reports/index.html",
    "reports/evaluate/report.html",
    "reports/train/a/executed.ipynb",
    ".work/scratch",
    "build/x",
)
KEPT = (
    "data/own.txt",
    ".venv/.installed",
    ".dvc/cache/files/x",
    "reports/evaluate/metrics.json",
    "nbs/a.ipynb",
    "params.yaml",
)

# A Python that knows its version, makes a .venv of stubs, and fails at nothing. __VERSION__ and __FIT__ are filled in.
PYTHON = r"""#!/bin/bash
echo "${0##*/} __VERSION__ $*" >> "$STUB_LOG"
case "$*" in
  *version_info*) exit __FIT__ ;;
  --version) echo "Python __VERSION__" ;;
  "-m venv"*) rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python
              for tool in uv dvc pytest nbdev_test; do cp "$STUB_TOOL" .venv/bin/$tool; done ;;
  benchmarks/b.py) exit 3 ;;
esac
"""

# Any other tool. As dvc it brings data/ with two files, wherever it is told to; STUB_DVC says what goes wrong.
TOOL = r"""#!/bin/bash
echo "${0##*/} $*" >> "$STUB_LOG"
[ "${0##*/}" = dvc ] || exit 0
out=
case "$1" in
  get) while [ $# -gt 0 ]; do case "$1" in -o|--out) out=$2 ;; --out=*) out=${1#--out=} ;; esac; shift; done ;;
  pull|checkout) out=data ;;
esac
[ "$1 ${STUB_DVC:-}" != "repro stage" ] || exit 255
[ -n "$out" ] || exit 0
[ ! -e "$out" ] || { echo "stub: $out is in the way" >&2; exit 1; }
mkdir -p "$out"; echo first > "$out/first.txt"
[ "${STUB_DVC:-}" != meanwhile ] || { mkdir -p data; echo own > data/own.txt; }
[ "${STUB_DVC:-}" != killed ] || kill -9 $PPID $$
[ "${STUB_DVC:-}" != fails ] || exit 1
echo second > "$out/second.txt"
"""

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="no make on this machine")


class Folder:
    "A copy of the Makefile with the files it names, beside a folder of stubs."
    def __init__(self, root):
        self.root = root / "repo"
        self.bin = root / "bin"
        self.log = root / "log"
        for folder in (self.root, self.bin):
            folder.mkdir()
        shutil.copy(ROOT / "Makefile", self.root)
        for name in ("constraints.txt", "pyproject.toml", "setup.py", "settings.ini", "data.dvc"):
            (self.root / name).touch()
        for name in ("nbs", "skinlesion", "tests", "benchmarks"):
            (self.root / name).mkdir()
        for name in TOOLS:
            if shutil.which(name):
                (self.bin / name).symlink_to(shutil.which(name))
        self.stub(root / "tool", TOOL)
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(root),
            "STUB_LOG": str(self.log),
            "STUB_TOOL": str(root / "tool"),
        }

    def stub(self, path, text):
        "Write an executable."
        path.write_text(text)
        path.chmod(0o755)

    def python(self, name, version="3.12.1", fits=True):
        "Put a stub Python on the PATH."
        self.stub(self.bin / name, PYTHON.replace("__VERSION__", version).replace("__FIT__", "0" if fits else "1"))
        return self

    def make(self, *words, **env):
        "Run make; (exit code, stdout, stderr), and forget earlier calls of the stubs."
        self.log.write_text("")
        done = subprocess.run(
            [shutil.which("make"), *words],
            cwd=self.root,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    @property
    def calls(self):
        "What the stubs were called with."
        return self.log.read_text().splitlines()

    def write(self, *names):
        "Files whose content is their name."
        for name in names:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(name)

    def data(self):
        "Name -> text of what stands at data/."
        return {
            p.relative_to(self.root / "data").as_posix(): p.read_text()
            for p in (self.root / "data").rglob("*")
            if p.is_file()
        }


@pytest.fixture
def bare(tmp_path):
    "A folder in which no Python can be found."
    return Folder(tmp_path)


@pytest.fixture
def ready(bare):
    "A folder that is set up."
    assert bare.python("python3").make("setup")[0] == 0
    return bare


WHOLE = {"first.txt": "first\n", "second.txt": "second\n"}


# ---- setup

def test_setup_runs_once(bare):
    code, out, err = bare.python("python3").make("setup")
    assert code == 0 and "setting up .venv with Python 3.12.1" in out, err
    assert sum(call.startswith("uv pip install") for call in bare.calls) == 2
    assert (bare.root / ".venv/.installed").exists()
    assert bare.make("setup")[0] == 0 and bare.calls == []


def test_changed_pins_are_installed_into_the_same_venv(ready):
    os.utime(ready.root / "constraints.txt", (2**31, 2**31))
    assert ready.make("setup")[0] == 0
    assert any(call.startswith("uv pip install") for call in ready.calls)
    assert not any("-m venv" in call for call in ready.calls)


def test_an_interrupted_setup_is_run_again(bare):
    bare.python("python3")
    broken = TOOL.replace("[ \"${0##*/}\" = dvc ]", "[ \"${0##*/}\" != uv ] || exit 1; [ \"${0##*/}\" = dvc ]")
    bare.stub(Path(bare.env["STUB_TOOL"]), broken)
    assert bare.make("setup")[0] != 0 and not (bare.root / ".venv/.installed").exists()
    bare.stub(bare.root / ".venv/bin/uv", TOOL)
    assert bare.make("setup")[0] == 0 and (bare.root / ".venv/.installed").exists()


@pytest.mark.parametrize("words", [(), ("PYTHON=python3.9",), ("PYTHON=/nowhere/python3",)])
def test_no_usable_python_names_the_remedy(bare, words):
    bare.python("python3", "3.10.2", fits=False).python("python3.9", "3.9.1", fits=False)
    code, _, err = bare.make(*words, "setup")
    assert code != 0
    for part in ("none of Python 3.11, 3.12 and 3.13", "apt install python3 python3-venv", "make PYTHON="):
        assert part in err
    assert not words or words[0] in err
    assert not (bare.root / ".venv").exists()


def test_the_first_python_that_fits_is_the_one_that_was_chosen(bare):
    bare.python("python3", "3.11.9").python("python3.13", "3.13.1")
    assert "with Python 3.11.9" in bare.make("setup")[1]


def test_the_remedy_for_a_missing_package_installs_again(ready):
    assert ready.make("setup")[0] == 0 and ready.calls == []
    command = re.search(r"Remedy: (.*) make setup", START_FAULT)[1]
    subprocess.run(command, shell=True, cwd=ready.root, check=True)
    assert ready.make("setup")[0] == 0
    assert any("--requirement constraints.txt" in call for call in ready.calls)


def test_an_unfit_python3_is_passed_over(bare):
    bare.python("python3", "3.14.0", fits=False).python("python3.12").python("python3.11", "3.11.9")
    assert "with Python 3.12.1" in bare.make("setup")[1]


def test_a_named_python_of_another_version_makes_the_venv_anew(ready):
    ready.python("python3.11", "3.11.9").write(".venv/old")
    code, out, err = ready.make("PYTHON=python3.11", "setup")
    assert code == 0 and "with Python 3.11.9" in out, err
    assert not (ready.root / ".venv/old").exists() and (ready.root / ".venv/.installed").exists()
    for words in ([], ["PYTHON=python3.11"]):  # no Python named, and the same one again: it stays
        assert ready.make(*words, "setup")[0] == 0
        assert not any("uv" in call or "venv" in call for call in ready.calls), words


def test_the_venv_never_builds_itself(ready):
    "`python` is .venv's own in a recipe; PYTHON=python means the one on the user's PATH."
    ready.python("python", "3.13.5")
    env = {"PATH": f"{ready.root}/.venv/bin:{ready.bin}"}
    assert "with Python 3.13.5" in ready.make("PYTHON=python", "setup", **env)[1]


# ---- data

def test_data_is_fetched_where_there_is_none(ready):
    assert ready.make("data")[0] == 0 and ready.data() == WHOLE


def test_data_that_is_there_is_left_alone(ready):
    ready.write("data/own.txt")
    assert ready.make("data")[0] == 0 and ready.data() == {"own.txt": "data/own.txt"}
    assert not any(call.startswith("dvc") for call in ready.calls)


@pytest.mark.parametrize("how", ["fails", "killed"])
def test_an_interrupted_fetch_is_repeated(ready, how):
    assert ready.make("data", STUB_DVC=how)[0] != 0
    assert not (ready.root / "data").exists()
    assert ready.make("data")[0] == 0 and ready.data() == WHOLE


def test_data_imported_after_an_interrupted_fetch_is_left_alone(ready):
    assert ready.make("data", STUB_DVC="killed")[0] != 0
    ready.write("data/own.txt")
    assert ready.make("data")[0] == 0 and ready.data() == {"own.txt": "data/own.txt"}


def test_data_imported_during_a_fetch_is_left_alone(ready):
    ready.make("data", STUB_DVC="meanwhile")
    assert ready.data() == {"own.txt": "own\n"}


def test_repro_brings_the_data_first(ready):
    assert ready.make("repro")[0] == 0 and ready.data() == WHOLE
    assert ready.calls.index("dvc repro") == max(i for i, call in enumerate(ready.calls) if call.startswith("dvc"))


@pytest.mark.parametrize("target, how", [("data", "fails"), ("repro", "stage")])
def test_a_failure_is_followed_by_what_is_missing_here(ready, target, how):
    assert ready.make(target, STUB_DVC=how)[0] != 0
    assert ready.calls[-1].endswith("-m skinlesion.pipeline.cli doctor --problems")
    assert ready.make(target)[0] == 0 and not any("doctor" in call for call in ready.calls)


# ---- the start of a stage

def start(folder, *words):
    "Start a stage as dvc.yaml does; (exit code, stderr)."
    script = ROOT / "nbs/stages/start.sh"
    folder.log.write_text("")
    command = [shutil.which("sh"), script, *words]
    done = subprocess.run(command, cwd=folder.root, env=folder.env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_a_stage_is_started_by_the_python_that_has_the_packages(bare):
    assert start(bare, "prepare") == (1, START_FAULT)  # there is no Python at all
    bare.python("python3").make("setup")
    assert start(bare, "train", "--member", "a")[0] == 0  # .venv was not activated
    assert bare.calls[-1] == "python 3.12.1 -m skinlesion.pipeline.cli run train --member a"
    for name, runs in (("own", True), ("stray", False)):  # one on the PATH comes first, where it has the packages
        bare.stub(bare.bin / "python", f"#!/bin/bash\necho {name} $* >> \"$STUB_LOG\"\nexit {int(not runs)}\n")
        assert start(bare, "report")[0] == 0 and bare.calls[-1].startswith("own" if runs else "python"), name


START_FAULT = (
    "error: neither python on the PATH nor .venv/bin/python has the packages of constraints.txt. Remedy: "
    'rm -f .venv/.installed; make setup (without make: the lines under "Two commands" in README.md), '
    "then the same command again\n"
)


# ---- the rest

def test_clean_works_on_a_fresh_clone(bare):
    code, _, err = bare.make("clean")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("target, gone", [("clean", ()), ("distclean", (".venv/.installed",))])
def test_clean_removes_what_was_made_and_nothing_else(bare, target, gone):
    bare.write(*MADE, *KEPT)
    assert bare.make(target)[0] == 0
    assert [name for name in MADE if (bare.root / name).exists()] == []
    assert [name for name in KEPT if not (bare.root / name).exists()] == list(gone)


def test_bench_goes_on_after_a_failure_and_fails_at_the_end(ready):
    ready.write("benchmarks/a.py", "benchmarks/b.py", "benchmarks/c.py")
    code, out, err = ready.make("bench")
    assert code != 0 and "failed: benchmarks/b.py\n" in err
    assert [call.split()[-1] for call in ready.calls if "benchmarks/" in call] == [
        "benchmarks/a.py",
        "benchmarks/b.py",
        "benchmarks/c.py",
    ]


def test_tests_run_within_the_venv(ready):
    assert ready.make("test")[0] == 0
    assert [call.split()[0] for call in ready.calls] == ["nbdev_test", "pytest"]


@pytest.mark.parametrize("red, said", [
    ("nbdev_test", "red: notebooks 05_checks.ipynb 99_doctor.ipynb\n"),
    ("pytest", "red: tests (pytest names them above)\n"),
    ("nbdev_test pytest", "red: notebooks 05_checks.ipynb 99_doctor.ipynb; tests (pytest names them above)\n"),
])
@pytest.mark.parametrize("target", ["test", "test-all"])
def test_all_checks_run_and_then_what_is_red_is_said(ready, target, red, said):
    for tool in ("nbdev_test", "pytest"):
        fault = "nbdev Tests Failed On The Following Notebooks:\\n==\\n\\t05_checks.ipynb\\n\\t99_doctor.ipynb\\n"
        text = f"#!/bin/bash\necho {tool} >> \"$STUB_LOG\"\nprintf '{fault}' >&2\nexit {int(tool in red)}\n"
        ready.stub(ready.root / ".venv/bin" / tool, text)
    code, _, err = ready.make(target)
    assert code != 0 and said in err and ready.calls == ["nbdev_test", "pytest"]


def test_help_lists_every_target(bare):
    phony = re.search(r"^\.PHONY: (.*help.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    code, out, _ = bare.make("help")
    assert code == 0 and [line.split()[1] for line in out.splitlines()] == phony
    assert all(len(line.split()) > 2 for line in out.splitlines())
    assert bare.make()[1] == out
