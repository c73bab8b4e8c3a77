"How simulations tell what they counted."
from skinlesion.stats.intervals import wilson_interval


def report(words, hits, runs):
    "Print a share with its interval, for those who run with -s."
    low, high = wilson_interval(hits / runs, runs)
    print(f"{words}: {hits} of {runs}, {hits / runs:.3f} ({low:.3f}-{high:.3f})")
    return low, high
