"""Prints the commands of a section of README.md, one a line, exactly as written there."""

import pathlib
import re
import sys


def commands(text: str, section: str) -> list[str]:
    """Lines of the fenced blocks under `## section`."""
    body = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    blocks = re.findall(r"^```sh\n(.*?)^```$", body.group(1) if body else "", re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


if __name__ == "__main__":
    found = commands(pathlib.Path(sys.argv[1]).read_text(), "Start")
    if len(found) != 2:
        sys.exit(f"expected exactly two commands under '## Start'; got {len(found)}: {found}")
    print("\n".join(found))
