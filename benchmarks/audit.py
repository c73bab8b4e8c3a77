"""Time the audit of HAM10000 against decoding the same images and nothing else.

    python benchmarks/audit.py [FOLDER]

FOLDER, or else the environment variable HAM10000, names the folder that holds HAM10000 as its publisher lays it out.
Without either it is ../shared/data/ham10000, and where that is absent nothing is timed.
Baseline, in the same run: every image and mask read through the gate by one process. The audit does that too, in two
processes, and measures each image, searches duplicates, fits models in folds and draws a page. The audit runs in a
separate process, so that its peak memory is measured alone. Target: 7,064 images in 150 s on 2 cores.
"""
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from skinlesion.files import repo_root

def processor():
    "Seconds of processor time of this process and of those it waited for."
    return sum(
        use.ru_utime + use.ru_stime for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )

def decode(root):
    "Read every image and mask, one after the other."
    from skinlesion.data.schema import read_dataset
    from skinlesion.images import read_image, read_mask
    dataset = read_dataset(root)
    start = time.perf_counter()
    cpu = processor()
    for image_id in dataset.table.image_id:
        read_image(dataset.image_path(image_id))
        if dataset.mask_path(image_id):
            read_mask(dataset.mask_path(image_id))
    return dict(seconds=time.perf_counter() - start, cpu=processor() - cpu, images=len(dataset))

def audit(root, out):
    "The whole audit, and how long its parts take."
    from skinlesion.audit.audit import audit_dataset, scan_images
    from skinlesion.data.schema import read_dataset
    from skinlesion.report.audit_page import write_audit
    start = time.perf_counter()
    cpu = processor()
    laps = {}
    def lap(name):
        laps[name] = time.perf_counter() - start - sum(laps.values())
    dataset = read_dataset(root)
    lap('read the table')
    scan = scan_images(dataset, workers=2)
    lap('measure the images')
    made = audit_dataset(dataset, scan=scan)
    lap('findings')
    write_audit(made, dataset, out)
    lap('write the page')
    own, children = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return dict(
        seconds=time.perf_counter() - start,
        cpu=processor() - cpu,
        laps=laps,
        peak=own,
        peak_worker=children,
        findings=len(made.findings),
        severities={s: sum(f.severity == s for f in made.findings) for s in ('stop', 'warning', 'note')},
    )

def apart(*args):
    "The result of this script in a process of its own."
    done = subprocess.run([sys.executable, __file__, *map(str, args)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])

def compare(folder, scratch):
    "Both, one after the other, and the ratio."
    from skinlesion.data.collections import import_ham10000
    import_ham10000(folder, scratch/'data')
    plain = apart('--decode', scratch/'data')
    full = apart('--audit', scratch/'data', scratch/'audit')
    print(f"decode alone, 1 process: {plain['seconds']:6.1f} s wall, {plain['cpu']:.1f} s processor, "
          f"{plain['images'] / plain['seconds']:.0f} images/s with their masks")
    print(
        f"audit, 2 processes:      {full['seconds']:6.1f} s wall, {full['cpu']:.1f} s processor, "
        f"{plain['images'] / full['seconds']:.0f} images/s; "
        + ', '.join(f'{name} {seconds:.1f} s' for name, seconds in full['laps'].items())
    )
    print(
        f"peak memory {full['peak']:.0f} MiB, {full['peak_worker']:.0f} MiB in the largest worker; "
        f"findings: {full['severities']}"
    )
    print(
        f"ratio audit / decode: {full['seconds'] / plain['seconds']:.1f} wall, "
        f"{full['cpu'] / plain['cpu']:.1f} processor; "
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; target 150 s: "
        f"{'met' if full['seconds'] <= 150 else 'missed'}"
    )

def main():
    if sys.argv[1:2] == ['--decode']:
        return print(json.dumps(decode(sys.argv[2])))
    if sys.argv[1:2] == ['--audit']:
        return print(json.dumps(audit(*sys.argv[2:])))
    named = sys.argv[1] if len(sys.argv) > 1 else os.environ.get('HAM10000')
    folder = Path(named) if named else repo_root().parent/'shared'/'data'/'ham10000'
    remedy = (
        f"{folder}: no such folder; name the one that holds HAM10000's archives and table: python "
        "benchmarks/audit.py FOLDER"
    )
    if folder.is_dir():
        with tempfile.TemporaryDirectory(prefix='audit.') as scratch:
            compare(folder, Path(scratch))
    elif named:
        sys.exit(remedy)
    else:
        print(f"skipped: {remedy}")

if __name__ == '__main__':
    main()
