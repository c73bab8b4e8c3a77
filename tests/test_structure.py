"""The shape of the library: floors, imports, cells, stages.

Each check is also run on a tree with that fault planted, so none can pass by being blind.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from madeup import ADD, cell, check_tests, library, nbdev, notebook, plant, stage_notebook, swap, tracked
from skinlesion.pipeline.closure import library_imports, python_source, stage_problems
from skinlesion.pipeline.params import STAGES, ParamsError, check_stage_parameters, stage_defaults

FLOORS = (
    "", "stats", "data", "synthetic", "audit", "model", "evaluate", "explain", "report", "use", "apps", "pipeline"
)
FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef
HEAVY = (
    r"(lightning|pytorch_lightning|dvc|dvclive|papermill|jupyter\w*|notebook|nbconvert|ipykernel|voila|fastapi"
    r"|albumentations)"
)


def cells(root, path, kind="code"):
    "Cells of a notebook with their source as one text."
    return [
        c | dict(source="".join(c["source"]))
        for c in json.loads((root / path).read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == kind
    ]


def exported(root, path):
    "Sources of the cells that nbdev exports, without their directives."
    sources = [c["source"] for c in cells(root, path) if re.search(r"^#\| ?export", c["source"], re.M)]
    return ["\n".join(line for line in s.splitlines() if not line.startswith("#|")) for s in sources]


def libraries(root):
    "Notebook -> (number, room, module path) of the numbered notebooks."
    found = {}
    for path in tracked(root, "nbs/*.ipynb"):
        match = re.fullmatch(r"(\d+)_(\w+)", path.stem)
        if match and path.parts[1] not in ("lessons", "guide"):
            room = path.parent.relative_to("nbs").as_posix().strip(".")
            found[path] = int(match[1]), room, Path("skinlesion", room, f"{match[2]}.py")
    return found


def check_floors(root):
    "Imports never climb the floors, and in a room go to lower numbers; stage notebooks never reach into the pipeline."
    books = libraries(root)
    problems = []
    number = {module: (n, room) for n, room, module in books.values()}
    for path, (n, room, _) in books.items():
        for module in library_imports(path, root):
            if module not in number:
                continue  # check_modules tells
            below, floor = number[module]
            if FLOORS.index(floor) > FLOORS.index(room):
                problems.append(f"{path} imports {module}: {room or 'the ground'} may not climb to {floor}")
            if floor == room and (below > n or (below == n and books[path][2] != module)):
                problems.append(f"{path} imports {module}, number {below}; import from numbers below {n}")
    for path in set(tracked(root, "nbs/*.ipynb")) - set(books):
        floor = "apps" if path.parts[1] in ("stages", "apps") else FLOORS[-1]
        problems += [f"{path} imports {module}: above {floor}" for module in library_imports(path, root)
                     if module in number and FLOORS.index(number[module][1]) > FLOORS.index(floor)]
    return problems


def check_modules(root):
    "Every module has the one notebook its path says; rooms are known, numbers differ, package files are empty."
    books = libraries(root)
    problems = []
    modules = {module for _, _, module in books.values()}
    for path, (n, room, module) in books.items():
        wanted = ".".join(module.with_suffix("").parts[1:])
        if room not in FLOORS:
            problems.append(f"{path}: no room {room!r}; rooms are {', '.join(FLOORS[1:])}")
        if f"#| default_exp {wanted}" not in [c["source"].strip() for c in cells(root, path)]:
            problems.append(f"{path} does not export {wanted}")
        if sum(n == other for other, _, _ in books.values()) > 1:
            problems.append(f"{path}: number {n} is taken twice")
    for path in tracked(root, "skinlesion/*.py"):
        if path.name == "__init__.py" and path not in modules and (root / path).read_text().strip():
            problems.append(f"{path} is not empty")
        if path.name not in ("__init__.py", "_modidx.py") and path not in modules:
            problems.append(f"{path}: no notebook nbs/.../NN_{path.stem}.ipynb makes it")
    return problems


ROOMS_WITH_ARGUMENTS = ("stats", "data", "synthetic", "audit", "model", "evaluate", "explain")


def check_rooms_take_arguments(root):
    "The rooms from stats to explain read neither YAML nor the environment."
    forbidden = (
        r"^\s*(import|from)\s+(yaml|ruamel|dvc|papermill)\b|\bos\.(environ\[|environ\.get|getenv)|"
        r"""["'](\S*/)?params\.yaml["']"""
    )
    return [
        f"{path}: {found[0].strip()!r}; hand it in as an argument"
        for path, (_, room, _) in libraries(root).items()
        if room in ROOMS_WITH_ARGUMENTS
        for source in exported(root, path)
        for found in re.finditer(forbidden, source, re.M)
    ]


def check_stages(root):
    "dvc.yaml names exactly what the notebooks read and write."
    return stage_problems(root)


def parameters_cell(root, path):
    "Values of the one cell tagged `parameters`, or a ValueError."
    found = [c for c in cells(root, path) if "parameters" in c["metadata"].get("tags", [])]
    if len(found) != 1:
        raise ValueError(f"{path} has {len(found)} cells tagged `parameters`; it needs one")
    values = {}
    for node in ast.parse(found[0]["source"]).body:
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise ValueError(f"{path}: `{ast.unparse(node)}` in the parameters cell is no plain `name = value`")
        try:
            values[node.targets[0].id] = ast.literal_eval(node.value)
        except ValueError:
            raise ValueError(f"{path}: {node.targets[0].id} in the parameters cell is no literal") from None
    return values


def names_read(tree):
    "Names whose values a syntax tree takes."
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def check_stage_notebooks(root):
    "A stage notebook has the typed parameters with valid defaults, uses each, exports nothing, defines little."
    problems = []
    for stage in STAGES:
        path = Path(f"nbs/stages/{stage}.ipynb")
        if path not in tracked(root, "nbs/stages"):
            problems.append(f"{path} is not there, or git does not track it")
            continue
        tree = ast.parse(python_source(root / path))
        values = {}
        try:
            values = check_stage_parameters(stage, parameters_cell(root, path), str(path))
        except (ParamsError, ValueError) as e:
            problems.append(str(e))
        problems += [
            f"{path}: {name} is {values[name]!r} in the parameters cell, and {default!r} where "
            "params.yaml leaves it out; make them the same"
            for name, default in stage_defaults(stage).items()
            if values and values[name] != default
        ]
        read = names_read(tree)
        problems += [f"{path} never uses the parameter {name}" for name in sorted(set(values) - read)]
        if exported(root, path):
            problems.append(f"{path} exports; move that to a library notebook")
        problems += [
            f"{path}: {node.name} has more than three lines; move it to a library notebook"
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.end_lineno - node.lineno > 2
        ]
    return problems


def check_lessons(root):
    "A lesson is numbered, shows and lets do, and exports nothing."
    problems = []
    for path in tracked(root, "nbs/lessons/*.ipynb"):
        if not re.fullmatch(r"\d\d_\w+", path.stem):
            problems.append(f"{path}: name it NN_subject, so that lessons have an order")
        exports = exported(root, path) or any("default_exp" in c["source"] for c in cells(root, path))
        if exports:
            problems.append(f"{path} exports; a lesson only teaches")
        words = "\n".join(c["source"] for c in cells(root, path, "markdown"))
        problems += [f"{path} has no {what}" for what, pattern in (("title", r"^# "), ("exercise", r"^##.*[Ee]xercise"))
                     if not re.search(pattern, words, re.M)]
    return problems


def check_nbdev(root):
    "nbdev_export and nbdev_clean leave the tree as it is."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)
        kept = [p for p in tracked(root, "nbs", "skinlesion", "settings.ini", "pyproject.toml")]
        for path in kept:
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / path, copy / path)
        nbdev(copy)
        after = [p.relative_to(copy) for p in copy.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        return [
            f"{path}: nbdev_export or nbdev_clean changes it; run both and commit"
            for path in sorted({*kept, *after})
            if path not in kept
            or not (copy / path).exists()
            or (copy / path).read_bytes() != (root / path).read_bytes()
        ]


def patched_class(node):
    "Class that a top-level function is patched into (`@patch`: its first parameter is `self:Class`), or ''."
    if not isinstance(node, FUNCTION):
        return ""
    first = [*node.args.posonlyargs, *node.args.args][:1]
    return ast.unparse(first[0].annotation) if first and first[0].arg == "self" and first[0].annotation else ""


def public_symbols(body):
    "(name as a reader calls it, node) of the public functions, classes, methods and patched methods of a module."
    named = sum(
        [
            ast.literal_eval(n.value)
            for n in body
            if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"
        ],
        [],
    )
    for node in body:
        owner = patched_class(node)
        if owner and not owner.startswith("_") and not node.name.startswith("_"):
            yield f"{owner}.{node.name}", node
        if not isinstance(node, (*FUNCTION, ast.ClassDef)) or node.name not in named:
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            yield from (
                (f"{node.name}.{m.name}", m)
                for m in node.body
                if isinstance(m, FUNCTION) and not m.name.startswith("_")
            )


def check_docstrings(root):
    "Every public function, class and method says what it is."
    return [
        f"{path}: {name} has no docstring"
        for path in tracked(root, "skinlesion/*.py")
        for name, node in public_symbols(ast.parse((root / path).read_text(encoding="utf-8")).body)
        if not ast.get_docstring(node)
    ]


def check_cells(root):
    "Export cells keep imports apart and stay within forty lines; cell ids are there, once each; no star imports."
    problems = []
    for path in tracked(root, "nbs/*.ipynb"):
        ids = [c.get("id") for kind in ("code", "markdown", "raw") for c in cells(root, path, kind)]
        problems += [
            f"{path}: cell id {i!r} is missing or there twice" for i in sorted(set(map(str, ids))) if ids.count(i) != 1
        ]
        for source in exported(root, path):
            nodes = ast.parse(source).body
            first = source.strip().splitlines()[:1]
            imports = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
            if imports and len(imports) < len(nodes):
                problems.append(f"{path}: an export cell mixes imports and code: {first}")
            if any(a.name == "*" for n in imports for a in n.names):
                problems.append(f"{path}: import *: {first}")
            if len(source.strip().splitlines()) > 40:
                problems.append(f"{path}: an export cell has more than forty lines: {first}")
    return problems


def check_outputs(root):
    "No committed notebook holds an error."
    return [
        f"{path}: the output of `{first_line(c)}` is an error: {o.get('ename')}"
        for path in tracked(root, "*.ipynb")
        for c in cells(root, path)
        for o in c["outputs"]
        if o["output_type"] == "error"
    ]


def first_line(c):
    "By which a reader finds a cell."
    return c["source"].splitlines()[0] if c["source"] else ""


def is_picture(output):
    "Whether an output shows a picture, as an image or within HTML."
    data = output.get("data", {})
    inside = "".join(text for kind in ("text/html", "text/markdown") for text in data.get(kind, ""))
    return any(kind.startswith("image/") for kind in data) or re.search(r"data:image/|<svg", inside) is not None


def check_foreign_pictures(root):
    "From the first cell that reads files outside the repository, a committed notebook keeps no picture."
    problems = []
    for path in tracked(root, "*.ipynb"):
        code = cells(root, path)
        first = next((i for i, c in enumerate(code) if re.search(r"""["'/]shared\b""", c["source"])), len(code))
        problems += [
            f"{path}: `{first_line(c)}` keeps a picture after ../shared was read; show numbers or a "
            "figure without its images"
            for c in code[first:]
            if any(map(is_picture, c["outputs"]))
        ]
    return problems


def check_ruff(root):
    "ruff, with the rules of pyproject.toml: 120 columns, one statement a line, no assigned lambdas, no unused names."
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "--quiet"]
    config = Path(__file__).resolve().parents[1] / "pyproject.toml"
    places = [place for place in ("nbs", "tests", "benchmarks") if (root / place).is_dir()]
    done = subprocess.run([*command, "--config", str(config), *places], cwd=root, capture_output=True, text=True)
    return (done.stdout + done.stderr).splitlines()


def packs_unrelated(node):
    "Whether an assignment packs values into one tuple that could stand on a line each."
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
        return False
    targets = node.targets[0]
    if not isinstance(targets, ast.Tuple) or len(targets.elts) != len(node.value.elts):
        return False
    if not all(isinstance(target, (ast.Name, ast.Attribute)) for target in targets.elts):
        return False
    assigned = {ast.unparse(target) for target in targets.elts}
    read = {ast.unparse(part) for part in ast.walk(node.value) if isinstance(part, (ast.Name, ast.Attribute))}
    return not assigned & read  # a swap needs its tuple


def nests_ternaries(node):
    "Whether a conditional expression holds another one."
    inside = isinstance(node, ast.IfExp) and [part for part in ast.walk(node) if isinstance(part, ast.IfExp)]
    return bool(inside) and len(inside) > 1


def sources(root):
    "Path, line before the source and source of every code cell, test and benchmark that is plain Python."
    for path in tracked(root, "nbs/*.ipynb"):
        for number, c in enumerate(cells(root, path)):
            if not re.search(r"^\s*[%!]", c["source"], re.M):
                yield f"{path} code cell {number}", c["source"]
    for path in tracked(root, "tests/*.py", "benchmarks/*.py"):
        yield str(path), (root / path).read_text(encoding="utf-8")


def check_one_thing_a_line(root):
    "No conditional expression within another; no tuple that packs unrelated assignments."
    problems = []
    for place, source in sources(root):
        for node in ast.walk(ast.parse(source)):
            if packs_unrelated(node):
                assignments = ast.unparse(node)[:60]
                problems.append(f"{place} line {node.lineno}: give each of these assignments a line: {assignments}")
            if nests_ternaries(node):
                problems.append(f"{place} line {node.lineno}: a conditional expression within another; use `if`")
    return sorted(set(problems))


def check_prepared_files(root):
    "The tables of a prepared folder are opened by `skinlesion.data.prepared` alone."
    name = r"(/|\S*artifacts/prepared/)?((splits|targets|traits|duplicates)\.csv|(encoder|labels)\.json)"
    problems = []
    for place, source in sources(root):
        if place.startswith(("tests/", "nbs/data/31_prepared.ipynb")):
            continue
        texts = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
        problems += [
            f"{place} line {node.lineno}: '{node.value}' by its path; use skinlesion.data.prepared.Prepared"
            for node in texts
            if isinstance(node.value, str) and re.fullmatch(name, node.value)
        ]
    return problems


def check_light_import(root):
    "A prediction needs none of the heavy tools."
    code = (
        "import sys, skinlesion.use.predict as m; print(m.__file__); print(*sorted({n.split('.')[0] "
        "for n in sys.modules}))"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, env=env)
    if done.returncode:
        return [f"import skinlesion.use.predict fails: {done.stderr.strip().splitlines()[-1]}"]
    place, names = done.stdout.splitlines()[-2:]
    if Path(place).resolve() != (root / "skinlesion/use/predict.py").resolve():
        return [f"skinlesion came from {place}"]
    return [f"import skinlesion.use.predict loads {name}" for name in names.split() if re.fullmatch(HEAVY, name)]


CHECKS = [f for name, f in list(globals().items()) if name.startswith("check_") and f.__module__ == __name__]

ERROR = dict(output_type="error", ename="KeyError", evalue="", traceback=[])
PICTURE = dict(
    output_type="display_data", metadata={}, data={"image/png": "iVBORw0KGgo=\n", "text/plain": ["<Figure>"]}
)
INLINE = dict(
    output_type="display_data",
    metadata={},
    data={"text/html": ["<table><tr><td>\n", "<img src='data:image/png;base64,iVBORw0KGgo='>"]},
)
LONG = ADD.replace("    return a + 1", "    a += 1\n" * 36 + "    return a")
NB = "nbs/model/20_grow.ipynb"
PY = "skinlesion/model/grow.py"
PREDICT = "skinlesion/use/predict.py"
TRAIN = "nbs/stages/train.ipynb"
LESSON = "nbs/lessons/01_leak.ipynb"
FAULTS = [
    (
        check_floors,
        {"nbs/00_base.ipynb": library("base", "#| export\nfrom skinlesion.data.part import part", ADD)},
        "the ground may not climb to data",
    ),
    (
        check_floors,
        {"nbs/data/10_part.ipynb": library("data.part", "def f():\n    from skinlesion.data.other import other")},
        "number 11; import from numbers below 10",
    ),
    (
        check_floors,
        {TRAIN: stage_notebook("train", ["import skinlesion.pipeline.reports"])},
        "nbs/stages/train.ipynb imports skinlesion/pipeline/reports.py",
    ),
    (check_modules, {"skinlesion/data/gone.py": "x = 1\n"}, "skinlesion/data/gone.py: no notebook"),
    (check_modules, {NB: library("model.grew", ADD)}, "does not export model.grow"),
    (check_modules, {"nbs/data/20_twin.ipynb": library("data.twin")}, "number 20 is taken twice"),
    (check_modules, {"nbs/attic/90_old.ipynb": library("attic.old")}, "no room 'attic'"),
    (check_modules, {"skinlesion/__init__.py": "x = 1\n"}, "skinlesion/__init__.py is not empty"),
    (
        check_rooms_take_arguments,
        {NB: library("model.grow", "#| export\nimport os", "#| export\nhome = os.environ['HOME']")},
        "os.environ",
    ),
    (check_rooms_take_arguments, {NB: library("model.grow", "#| export\nimport yaml")}, "import yaml"),
    (check_rooms_take_arguments, {NB: library("data.grow", "#| export\nimport yaml")}, "import yaml"),
    (
        check_rooms_take_arguments,
        {NB: library("stats.grow", "#| export\nfrom pathlib import Path", "#| export\np = Path('params.yaml')")},
        "params.yaml",
    ),
    (
        check_stages,
        {"dvc.yaml": swap("        - skinlesion/data/part.py\n", "")},
        "stage train lacks the dep skinlesion/data/part.py",
    ),
    (
        check_stages,
        {"dvc.yaml": swap("      - data\n", "      - data\n      - README.md\n")},
        "stage prepare names the dep README.md",
    ),
    (check_stages, {PY: "from ..data.other import other\n"}, "stage train lacks the dep skinlesion/data/other.py"),
    (check_stages, {"dvc.yaml": swap("        - train.epochs\n", "")}, "stage train lacks the param train.epochs"),
    (check_stage_notebooks, {TRAIN: None}, "train.ipynb is not there"),
    (check_stage_notebooks, {TRAIN: swap("epochs = ", "epoch = ")}, "key 'epoch' is unknown"),
    (
        check_stage_notebooks,
        {TRAIN: lambda text: re.sub(r"batch_size = \d+", "batch_size = 0", text)},
        "batch_size is 0",
    ),
    (
        check_stage_notebooks,
        {TRAIN: lambda text: re.sub(r"batch_size = \d+", "batch_size = 2**5", text)},
        "batch_size in the parameters cell is no literal",
    ),
    (check_stage_notebooks, {TRAIN: swap('"parameters"', '"params"')}, "has 0 cells tagged `parameters`"),
    (
        check_stage_notebooks,
        {TRAIN: swap("clip_norm = 1.0", "clip_norm = 2.0")},
        "clip_norm is 2.0 in the parameters cell, and 1.0 where",
    ),
    (check_stage_notebooks, {TRAIN: swap("    gamma,", "")}, "train.ipynb never uses the parameter gamma"),
    (check_stage_notebooks, {TRAIN: stage_notebook("train", ["#| export\nx = 1"])}, "train.ipynb exports"),
    (
        check_stage_notebooks,
        {TRAIN: stage_notebook("train", ["def f():\n    a = 1\n    b = 2\n    return a"])},
        "f has more than three lines",
    ),
    (check_lessons, {LESSON: library("lessons.leak")}, "01_leak.ipynb exports"),
    (check_lessons, {LESSON: notebook(cell("# A leak", "markdown"), "1 + 1")}, "01_leak.ipynb has no exercise"),
    (check_lessons, {"nbs/lessons/leak.ipynb": notebook("1 + 1")}, "leak.ipynb: name it NN_subject"),
    (check_nbdev, {PY: swap("return a + 1", "return a + 2")}, "skinlesion/model/grow.py: nbdev_export"),
    (
        check_nbdev,
        {NB: swap('"execution_count": null', '"execution_count": 7')},
        "nbs/model/20_grow.ipynb: nbdev_export",
    ),
    (check_docstrings, {PY: swap('    "Add one."\n', "")}, "skinlesion/model/grow.py: grow has no docstring"),
    (check_docstrings, {PY: swap('    "Grows."\n', "")}, "Grower has no docstring"),
    (check_docstrings, {PY: swap('        "Up."\n', "")}, "Grower.up has no docstring"),
    (
        check_docstrings,
        {PY: lambda text: text + "\n@patch\ndef down(self:Grower, by=1):\n    return by\n"},
        "Grower.down has no docstring",
    ),
    (
        check_docstrings,
        {PY: lambda text: text + "\n@patch(as_prop=True)\ndef tall(self:Grower):\n    return 1\n"},
        "Grower.tall has no docstring",
    ),
    (check_cells, {NB: library("model.grow", "#| export\nimport json\nx = 1")}, "mixes imports and code"),
    (check_cells, {NB: library("model.grow", "#| export\nfrom json import *")}, "import *"),
    (check_cells, {NB: library("model.grow", LONG)}, "more than forty lines"),
    (
        check_cells,
        {NB: library("model.grow", cell("x", id="aa"), cell("# x", "markdown", id="aa"))},
        "cell id 'aa' is missing or there twice",
    ),
    (
        check_outputs,
        {NB: library("model.grow", cell("x = {}[0]", outputs=[ERROR]))},
        "the output of `x = {}[0]` is an error: KeyError",
    ),
    (
        check_foreign_pictures,
        {NB: library("model.grow", cell("show(root.parent/'shared'/'a.jpg')", outputs=[PICTURE]))},
        "'a.jpg')` keeps a picture",
    ),
    (
        check_foreign_pictures,
        {NB: library("model.grow", "real = Path('../shared')", "x = read(real)", cell("show(x)", outputs=[PICTURE]))},
        "`show(x)` keeps a picture",
    ),
    (
        check_foreign_pictures,
        {NB: library("model.grow", "real = Path('../shared')", cell("table", outputs=[INLINE]))},
        "`table` keeps a picture",
    ),
    (check_ruff, {"benchmarks/wide.py": "x = '" + 120 * "-" + "'\n"}, "benchmarks/wide.py:1:121: E501"),
    (check_ruff, {NB: library("model.grow", "double = lambda x: 2 * x")}, "E731"),
    (check_ruff, {NB: library("model.grow", "import json")}, "F401"),
    (check_one_thing_a_line, {NB: library("model.grow", "x, y = 1, 2")}, "give each of these assignments a line: "),
    (check_one_thing_a_line, {"tests/test_a.py": "x = 1 if True else (2 if False else 3)\n"}, "within another"),
    (
        check_prepared_files,
        {"benchmarks/a.py": "rows = open(f'{prepared}/splits.csv')\n"},
        "benchmarks/a.py line 1: '/splits.csv' by its path; use skinlesion.data.prepared.Prepared",
    ),
    (check_prepared_files, {TRAIN: stage_notebook("train", ["x = prepared/'encoder.json'"])}, "'encoder.json' by its"),
    (check_light_import, {PREDICT: "import dvc\n"}, "loads dvc"),
    (check_light_import, {PREDICT: "import nothing_at_all\n"}, "No module named 'nothing_at_all'"),
]


test_repository, test_good_tree, test_planted, test_every_check_is_tested = check_tests(CHECKS, FAULTS)


def test_forty_lines_will_do(good_tree, tmp_path):
    "The limit itself is allowed."
    assert (
        check_cells(
            plant(good_tree, tmp_path / "tree", {NB: library("model.grow", LONG.replace("    a += 1\n", "", 1))})
        )
        == []
    )


def test_a_picture_before_the_foreign_data_may_stay(good_tree, tmp_path):
    "Own pictures are no foreign ones, and words that are shared are no folder."
    cells_of = [
        cell("show(made_up)", outputs=[PICTURE]),
        "# each is shared out",
        cell("show(more)", outputs=[PICTURE]),
        "real = root / 'shared'",
    ]
    assert check_foreign_pictures(plant(good_tree, tmp_path / "tree", {NB: library("model.grow", *cells_of)})) == []
