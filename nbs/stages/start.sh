#!/bin/sh
# dvc.yaml starts every stage by this, in the root of the repository: with the Python on the PATH where it has the
# packages, else with the one of .venv; so `dvc repro` also works where .venv was not activated.
# glibc gives large blocks back at once and fetches them anew, which took half of the time of answering on CPUs: keep them.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824
for python in python .venv/bin/python; do
    if "$python" -c 'from importlib.util import find_spec
raise SystemExit(not all(map(find_spec, ("typer", "papermill", "torch"))))' 2>/dev/null; then
        exec "$python" -m skinlesion.pipeline.cli run "$@"
    fi
done
echo "error: neither python on the PATH nor .venv/bin/python has the packages of constraints.txt. Remedy:" \
    'rm -f .venv/.installed; make setup (without make: the lines under "Two commands" in README.md), then the same command again' >&2
exit 1
