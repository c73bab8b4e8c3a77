"""The stage runner killed, out of space, failing, run twice. Each test runs a small notebook in its own small tree."""
import hashlib
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from skinlesion.pipeline.runner import StageError, run_lock, run_notebook, run_stage

REPO = Path(__file__).resolve().parent.parent
PARAMETERS = dict(seed=3, data_dir='data', out_dir='artifacts/toy', report_dir='reports/toy')
WORK = '''
    from pathlib import Path
    Path(out_dir, 'new.txt').write_text(f'seed {seed}, data {Path(data_dir, "a.csv").read_text()}')
    Path(report_dir, 'metrics.json').write_text('{"a": {"value": 1}}')
    print('written to', Path(out_dir).resolve())
'''


def make_tree(root, *cells):
    "A repository with data, earlier outputs, and a stage notebook whose code cells are `cells`."
    for name, text in {
        'data/a.csv': '1',
        'artifacts/toy/old.txt': 'old',
        'reports/toy/metrics.json': '{"a": {"value": 0}}',
        'reports/toy/report.html': '<p>old</p>',
        'reports/toy/failed.ipynb': 'of an earlier failure',
    }.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_text(text)
    write_notebook(root, *cells)
    return root


def write_notebook(root, *cells):
    "Write the stage notebook."
    source = '\n'.join(f'{k} = {v!r}  # a word on {k}' for k, v in (PARAMETERS | {'seed': 0}).items())
    nb = new_notebook(cells=[new_markdown_cell('# Toy\n\n> Does it run?', id='title'),
                             new_code_cell(source, id='params', metadata={'tags': ['parameters']})])
    for i, cell in enumerate(cells or [WORK]):
        nb.cells += [
            new_markdown_cell(f'## Step {i + 1}', id=f'head{i}'),
            new_code_cell(textwrap.dedent(cell).strip(), id=f'step{i}'),
        ]
    (root/'nbs').mkdir(exist_ok=True)
    nbformat.write(nb, root/'nbs/toy.ipynb')


def run(root, stream=None, **changes):
    "Run the notebook of a tree."
    call = dict(
        notebook='nbs/toy.ipynb',
        parameters=PARAMETERS,
        inputs=['data'],
        outputs=['artifacts/toy', 'reports/toy'],
        report_dir='reports/toy',
        root=root,
        stream=stream or io.StringIO(),
    )
    run_notebook(**(call | changes))


def contents(root, *leave_out):
    "Sum of every file of outputs and reports."
    files = [
        p
        for top in ('artifacts', 'reports')
        for p in (root / top).rglob('*')
        if p.is_file() and p.name not in leave_out
    ]
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def fails(root, **changes):
    "Run a tree that must fail; what was printed. The old bytes stand, and no scratch is left."
    before = contents(root, 'failed.ipynb')
    log = io.StringIO()
    with pytest.raises(StageError) as info:
        run(root, log, **changes)
    assert contents(root, 'failed.ipynb') == before
    assert info.value.exit_code != 0
    assert not [*(root/'.work/stages').glob('*')]
    return log.getvalue()


def test_success_replaces_every_output_whole(tmp_path):
    root = make_tree(tmp_path)
    log = io.StringIO()
    run(root, log)
    assert sorted(contents(root)) == ['artifacts/toy/new.txt', 'reports/toy/executed.ipynb', 'reports/toy/metrics.json',
                                      'reports/toy/report.html', 'reports/toy/run.json']
    assert (root/'artifacts/toy/new.txt').read_text() == 'seed 3, data 1'
    assert re.fullmatch(r'(toy  cell \d/3  "[\w ]+"  \d+\.\d s\n){3}', log.getvalue())
    assert not (root/'artifacts/toy').is_symlink() and not [*(root/'.work/stages').iterdir()]


def test_two_runs_give_the_same_bytes(tmp_path):
    body = WORK + '''
    import sys, warnings, pandas as pd, matplotlib.pyplot as plt
    warnings.warn(f'look at {Path.cwd()}')
    print(object(), file=sys.stderr); print(hash('text'))
    plt.figure(figsize=(1, 1)); plt.plot([1, 2]); plt.show()
    pd.DataFrame({'a': [1, 2]}).style.highlight_max()
    '''
    one = make_tree(tmp_path/'one', body)
    two = make_tree(tmp_path/'somewhere/else', body)
    run(one), run(two)
    first = contents(one, 'run.json')
    assert contents(two, 'run.json') == first
    time.sleep(1.1)
    run(one)
    assert contents(one, 'run.json') == first
    for file in ('executed.ipynb', 'report.html'):
        text = (one/'reports/toy'/file).read_text()
        assert str(tmp_path) not in text and '.work' not in text and 'ipykernel_' not in text


def test_failure_keeps_the_old_and_says_what_to_do(tmp_path):
    log = fails(make_tree(tmp_path, WORK, 'def check(x):\n    raise ValueError(f"row 17: {x}")\ncheck("mela")'))
    assert 'toy failed in cell 4 of 4, "Step 2":' in log and 'def check(x):' in log
    assert 'ValueError: row 17: mela' in log and '\x1b' not in log and str(tmp_path) not in log
    assert 'jupyter lab reports/toy/failed.ipynb' in log and 'dvc repro' in log
    failed = nbformat.read(tmp_path/'reports/toy/failed.ipynb', as_version=4)
    assert failed.cells[-1].outputs[0].ename == 'ValueError' and len(failed.cells) == 7
    write_notebook(tmp_path)
    run(tmp_path)
    assert not (tmp_path/'reports/toy/failed.ipynb').exists()


@pytest.mark.parametrize('parameters, said', [
    ({**PARAMETERS, 'sead': 1},
     "nbs/toy.ipynb: parameter 'sead' is not in its parameters cell (seed, data_dir, out_dir, report_dir). "
     "Did you mean 'seed'?"),
    ({'seed': 1}, "'data_dir', 'out_dir', 'report_dir', which params.yaml does not give")])
def test_misspelt_parameter_touches_nothing(tmp_path, parameters, said):
    root = make_tree(tmp_path)
    before = contents(root)
    with pytest.raises(StageError, match=re.escape(said)):
        run(root, parameters=parameters)
    assert contents(root) == before and not (root/'.work').exists()


@pytest.mark.parametrize('cell, said', [
    ('pass', 'wrote nothing to its output artifacts/toy'),
    (WORK + '    Path("artifacts/other").write_text("x")', 'wrote artifacts/other, which is no output of its stage')])
def test_outputs_are_what_was_declared(tmp_path, cell, said):
    assert said in fails(make_tree(tmp_path, cell))


def test_missing_input_is_named(tmp_path):
    assert 'nbs/toy.ipynb reads artifacts/prepared, which is not there' in fails(
        make_tree(tmp_path), inputs=['artifacts/prepared']
    )


def test_dead_kernel_is_a_failure(tmp_path):
    log = fails(make_tree(tmp_path, 'import os; os.kill(os.getpid(), 9)'))
    assert 'toy failed in cell 3 of 3' in log and 'died' in log


def test_lock_names_its_holder(tmp_path):
    root = make_tree(tmp_path)
    before = contents(root)
    with run_lock(root, 'prepare'):
        with pytest.raises(StageError, match=f"toy: the stage 'prepare' is running here, pid {os.getpid()}"):
            run(root)
    assert contents(root) == before
    run(root)


def test_kernel_imports_the_library_of_its_tree(tmp_path):
    root = make_tree(tmp_path, WORK + '    import skinlesion\n    print(skinlesion.__file__)')
    (root/'skinlesion').mkdir()
    (root/'skinlesion/__init__.py').write_text('')
    run(root)
    assert '"skinlesion/__init__.py\\n"' in (root/'reports/toy/executed.ipynb').read_text()


def test_stage_refuses_the_library_of_another_tree(tmp_path):
    (tmp_path/'settings.ini').write_text('[DEFAULT]')
    with pytest.raises(StageError, match='a tree runs its own code'):
        run_stage('prepare', root=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['settings.ini']


def test_values_outside_the_tree_lead_where_they_led(tmp_path):
    (tmp_path/'weights.bin').write_text('far')
    root = make_tree(tmp_path/'repo', WORK + '    print(Path(seed).read_text())')
    run(root, parameters=PARAMETERS | {'seed': '../weights.bin'})
    assert '"far\\n"' in (root/'reports/toy/executed.ipynb').read_text()


# ---- a full disk

def test_full_disk_keeps_the_old(tmp_path):
    disk = tmp_path/'disk'
    disk.mkdir()
    big = WORK + "    with open(Path(out_dir, 'big'), 'wb') as f:\n        for _ in range(64): f.write(bytes(1 << 20))"
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', disk], capture_output=True).returncode == 0:
        try:
            log = fails(make_tree(disk, big))
            assert 'No space left on device' in log and 'Free some space' in log
            assert nbformat.read(disk/'reports/toy/failed.ipynb', as_version=4).cells[-1].outputs
        finally:
            subprocess.run(['umount', disk], check=True)
    else: # without the right to mount, a limit on the size of files stops the write
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, limit[1]))
        try:
            assert 'File too large' in fails(make_tree(disk, big))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_full_disk_while_the_report_is_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('skinlesion.pipeline.runner.render_report', full)
    log = fails(make_tree(tmp_path))
    assert 'No space left on device' in log and 'Free some space' in log


def test_failed_swap_puts_all_outputs_back(tmp_path, monkeypatch):
    rename = os.rename
    def refuse(old, new):
        if str(new).endswith('repo/reports/toy') and 'tree' in str(old):
            raise OSError(28, 'No space left on device')
        rename(old, new)
    root = make_tree(tmp_path/'repo')
    monkeypatch.setattr(os, 'rename', refuse)
    assert 'No space left on device' in fails(root)


# ---- going on after a kill

STEPS = '''
    import os
    from pathlib import Path
    kept = Path('.work/resume/steps')
    done = begun = int(kept.read_text()) if kept.exists() else 0
    if done: print(f'↻ going on after step {done}')
    for step in range(1, 6):
        print(f'step {step}, 9 seconds left', end='\\r')
        if step > done: kept.write_text(str(step))
        print(f'step {step} of 5')
        if os.environ.get('DIE_AFTER') == str(step): os.kill(os.getpid(), 9)
    Path(out_dir, 'new.txt').write_text('five steps')
    Path(report_dir, 'metrics.json').write_text('{"a": {"value": 1}}')
    Path(os.environ['BEGUN']).write_text(str(begun));
'''


@pytest.fixture
def begun(tmp_path, monkeypatch):
    "The file that says after which step a run of STEPS began."
    monkeypatch.setenv('BEGUN', str(tmp_path/'begun'))
    return tmp_path/'begun'


def die(root, monkeypatch, step, **changes):
    "A run whose kernel is killed after a step."
    monkeypatch.setenv('DIE_AFTER', str(step))
    log = fails(root, **changes)
    monkeypatch.delenv('DIE_AFTER')
    return log


def kept(root):
    return sorted(
        p.relative_to(root / '.work/cache/resume').as_posix()
        for p in (root / '.work/cache/resume').rglob('*')
        if p.is_file()
    )


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, begun):
    "Twice killed; what it says of that stands in the log and in no output. When it is done nothing is kept."
    undisturbed = make_tree(tmp_path/'a', STEPS)
    killed = make_tree(tmp_path/'b', STEPS)
    log = io.StringIO()
    run(undisturbed)
    assert begun.read_text() == '0'
    die(killed, monkeypatch, 2)
    assert [p.endswith('/steps') for p in kept(killed)] == [True]
    die(killed, monkeypatch, 4)
    run(killed, log)
    assert begun.read_text() == '4' and 'toy  ↻ going on after step 4' in log.getvalue()
    assert contents(killed, 'run.json') == contents(undisturbed, 'run.json')
    outputs = nbformat.read(killed/'reports/toy/executed.ipynb', as_version=4).cells[-1].outputs
    assert [o.text for o in outputs if o.output_type == 'stream'] == [''.join(f'step {i} of 5\n' for i in range(1, 6))]
    assert not kept(killed) and not [*(killed/'.work/cache/resume').iterdir()]


def change_file(name, text):
    return lambda root: (root/name).write_text(text) and {}


def more(name, change):
    return pytest.param(change, id=name, marks=pytest.mark.slow)


@pytest.mark.parametrize('change', [
    pytest.param(change_file('weights.bin', 'other'), id='weights'),
    pytest.param(change_file('skinlesion/losses.py', '# mended'), id='code'),
    more('data', change_file('data/a.csv', '2')),
    more('parameter', lambda root: {'parameters': PARAMETERS | {'seed': 4}}),
    more('member', lambda root: {'stage': 'train/b'}),
    more('notebook', lambda root: write_notebook(root, STEPS + '    # mended') or {}),
])
def test_nothing_stale_is_gone_on_from(tmp_path, monkeypatch, begun, change):
    "An input has changed: the run starts anew and drops the state of the killed one, unless it is another member's."
    root = make_tree(tmp_path/'repo', STEPS)
    (root/'skinlesion').mkdir()
    for name in ('__init__.py', 'losses.py'):
        (root/'skinlesion'/name).write_text('')
    (root/'weights.bin').write_text('some')
    options = {'stage': 'train/a', 'parameters': PARAMETERS | {'seed': 'weights.bin'}, 'code': ['skinlesion/losses.py']}
    die(root, monkeypatch, 3, **options)
    changed = options | change(root)
    run(root, **changed)
    assert begun.read_text() == '0'
    assert bool(kept(root)) == (changed['stage'] != 'train/a')


def test_a_failure_before_anything_was_kept_leaves_no_folder(tmp_path):
    root = make_tree(tmp_path, '1 / 0')
    fails(root)
    assert not [*(root/'.work/cache/resume').iterdir()]


# ---- killed

BUSY = '''
    import multiprocessing, os, subprocess, time
    from pathlib import Path
    child = subprocess.Popen(['sleep', '600'])
    worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,))
    worker.start()
    Path({note!r} + '.part').write_text(f'{{os.getpid()}} {{child.pid}} {{worker.pid}}')
    os.rename({note!r} + '.part', {note!r})
    while True:
        Path(out_dir, 'new.txt').write_text(str(time.time()))
        time.sleep(.01)
'''
RUNNER = '''
import sys
sys.path.insert(0, {tests!r})
from test_stages import run
from skinlesion.pipeline.runner import StageError
try: run({root!r}, sys.stderr)
except StageError as error: sys.exit(error.exit_code)
'''


def gone(pid):
    "Whether a process has ended (a zombie has)."
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] in 'ZX'
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(condition, seconds):
    "Wait until `condition()`; whether it came true."
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(.05)
    return condition()


def heed_signals():
    "In the child: undo what a shell in the background or nohup told this test run to ignore."
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


@pytest.fixture
def busy(tmp_path):
    "A runner in a process of its own, inside an endless cell: (root, starter, pids of kernel and its children)."
    if sys.platform != 'linux':
        pytest.skip('reads /proc')
    started = []
    pids = []
    def start(prefix=(), **options):
        note = tmp_path/'pids'
        root = make_tree(tmp_path/'repo', BUSY.format(note=str(note)))
        code = RUNNER.format(tests=str(REPO/'tests'), root=str(root))
        with open(tmp_path/'stderr', 'w') as stderr:
            process = subprocess.Popen(
                [*prefix, sys.executable, '-c', code],
                stderr=stderr,
                env=os.environ | {'PYTHONPATH': str(REPO)},
                preexec_fn=heed_signals,
                **options,
            )
        started.append(process)
        assert wait_for(note.exists, 60), (tmp_path/'stderr').read_text()
        pids.extend(int(p) for p in note.read_text().split())
        return root, process, pids
    yield start
    for process in started:
        process.kill()
        process.wait()
    for pid in pids:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


def assert_untouched_and_free(root, before):
    "The old bytes stand, and the next run finds the way free and leaves nothing behind."
    assert contents(root, 'failed.ipynb') == before
    write_notebook(root)
    run(root)
    assert (root/'artifacts/toy/new.txt').read_text() == 'seed 3, data 1'
    assert not [*(root/'.work/stages').iterdir()]


def test_kill_9_takes_the_kernel_and_its_children_along(busy):
    root, process, pids = busy()
    before = contents(root, 'failed.ipynb')
    process.kill()
    assert_untouched_and_free(root, before) # at once: it waits for the remains to go
    assert wait_for(lambda: all(map(gone, pids)), 60), [p for p in pids if not gone(p)]


@pytest.mark.parametrize('shell', ['/bin/sh', 'bash'])
def test_killing_dvc_ends_the_run(busy, shell, monkeypatch):
    if not shutil.which(shell):
        pytest.skip(f'no {shell}')
    monkeypatch.setenv('DVC_STAGE', 'toy')
    # As dvc does it: a process that starts a shell that runs the command; some shells stay in between.
    dvc = "import shlex, subprocess, sys; subprocess.run([sys.argv[1], '-c', shlex.join(sys.argv[2:])])"
    root, process, pids = busy(prefix=[sys.executable, '-c', dvc, shell])
    before = contents(root, 'failed.ipynb')
    runner = int(Path(f'/proc/{pids[0]}/stat').read_text().rsplit(')', 1)[1].split()[1])
    process.kill()
    assert wait_for(lambda: all(map(gone, [runner, *pids])), 60), [p for p in [runner, *pids] if not gone(p)]
    assert_untouched_and_free(root, before)


@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_the_run_in_order(busy, signum, code):
    root, process, pids = busy()
    before = contents(root, 'failed.ipynb')
    process.send_signal(signum)
    process.wait(timeout=60)
    error = (root.parent/'stderr').read_text()
    assert process.returncode == code
    assert wait_for(lambda: all(map(gone, pids)), 60) and not [*(root/'.work/stages').iterdir()]
    assert (
        f'stopped by {signum.name}' in error
        and 'Step 1' in error
        and 'Traceback' not in error
        and 'Task was' not in error
    )
    assert (root/'reports/toy/failed.ipynb').read_text().startswith('{')
    assert_untouched_and_free(root, before)


# ---- the report

class Loads(HTMLParser):
    "Collects what a browser would fetch by itself."
    def __init__(self):
        super().__init__()
        self.found = []
        self.tags = []
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            loads = name in ('src', 'srcset', 'data', 'poster', 'background', 'action', 'formaction')
            if loads and not value.startswith('data:image/'):
                self.found.append((tag, value))
            if name == 'href' and tag not in ('a',):
                self.found.append((tag, value))
            if name.startswith('on') or name == 'style' and 'url' in value:
                self.found.append((tag, name))


def test_report_loads_and_runs_nothing(tmp_path):
    body = (
        WORK
        + '''
    from IPython.display import HTML, Javascript, SVG, Markdown, display
    display(HTML('<img src="http://example.org/x.png" onerror="f()"><script src="http://example.org/x.js"></script><b>kept</b>'))
    display(Javascript('fetch("http://example.org")'), Markdown('![x](http://example.org/y.png)'))
    display(SVG('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'))
    import pandas as pd
    pd.DataFrame({'a': range(3)})
    '''
    )
    root = make_tree(tmp_path, body)
    run(root)
    page = (root/'reports/toy/report.html').read_text()
    loads = Loads()
    loads.feed(page)
    assert loads.found == [] and not {'script', 'link', 'iframe', 'object', 'base', 'form'} & set(loads.tags)
    assert 'fetch(' not in re.sub(r'<details class="code">.*?</details>', '', page, flags=re.S)
    assert '<b>kept</b>' in page and '<html lang="en">' in page and page.count('<h1') == 1
    assert 'a word on seed' in page and 'never for diagnosis' in page and 'id="provenance"' in page
    assert all('alt="' in tag for tag in re.findall(r'<img[^>]*>', page)) and '<img' in page
