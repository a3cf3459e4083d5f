"""Writes the visual search set: python -m pixel_jax.search_set OUT --photographs /usr/share/wallpapers."""

import argparse
import pathlib

from pixel_jax.search_set.items import TIERS
from pixel_jax.search_set.photographs import PhotographError
from pixel_jax.search_set.writing import SetConfig, write_set
from pixel_jax.terminal import say


def main() -> None:
    """Writes the set that the command line describes."""
    parser = argparse.ArgumentParser(prog="python -m pixel_jax.search_set", description=__doc__)
    parser.add_argument("out", type=pathlib.Path, help="the folder to write")
    parser.add_argument("--photographs", help="a folder of large photographs, such as unpacked wallpapers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiers", nargs="+", default=list(TIERS), choices=list(TIERS))
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of items of each tier")
    flags = parser.parse_args()
    try:
        note = write_set(flags.out, SetConfig(flags.photographs, flags.seed, tuple(flags.tiers), flags.share))
    except (PhotographError, ValueError) as error:
        parser.error(str(error))
    say(f"{sum(note['items'].values())} items about {len(note['photographs'])} photographs are in {flags.out}.")
    if note["left_out"]:
        say(f"{len(note['left_out'])} files of {flags.photographs} were left out; {flags.out / 'set.json'} says why.")


main()
