"""Says what a wheel holds, and fails where that is more than the two packages, or large."""

import collections
import os
import sys
import zipfile

MOST_BYTES = 23_500_000
PACKAGES = ("astraea_jax/", "astraea_ports/", "astraea_jax-")
"""With the wheel's own `.dist-info`."""


def main(path: str) -> str | None:
    """Prints bytes by folder; returns what is wrong."""
    folders: collections.Counter[str] = collections.Counter()
    with zipfile.ZipFile(path) as wheel:
        for entry in wheel.infolist():
            folders["/".join(entry.filename.split("/")[:-1][:2])] += entry.compress_size
    for folder, size in sorted(folders.items()):
        print(f"{size:>10}  {folder}")
    strange = [folder for folder in folders if not f"{folder}/".startswith(PACKAGES)]
    size = os.path.getsize(path)
    if strange or size > MOST_BYTES:
        return f"expected the packages alone, in {MOST_BYTES} bytes; got {size} and {strange}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
