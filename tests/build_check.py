"""Checks the BUILD file with nothing but Python.

A BUILD file is Starlark, whose part used here is a subset of Python, so it is run with each rule
replaced by a recorder. What is checked: every name that is used was loaded, every source, data
file and main exists, every `:label` is a target of this file, every .py file belongs to exactly
one target, and the imports written in the sources agree with `deps`, ours and others'.
"""

import ast
import pathlib
import sys
from collections.abc import Iterator

RULES = ("py_binary", "py_library", "py_test")

HUB_NAMES = {
    "PIL": "pillow",
    "orbax": "orbax_checkpoint",
    "skimage": "scikit_image",
    "starlark": "starlark_pyo3",
}
"""Packages whose name to import is not the name to install."""

Targets = dict[str, dict]


def imported_modules(path: pathlib.Path, root: pathlib.Path) -> Iterator[str]:
    """Dotted names that a file imports; `from a import b` gives `a.b`, which may be no module."""
    here = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) - node.level + 1] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def evaluate(root: pathlib.Path) -> Targets:
    """Runs BUILD and returns the attributes of each target; ValueError for what Bazel refuses."""
    targets: Targets = {}
    scope: dict[str, object] = {}

    def rule(kind):
        def record(*, name, **attributes):
            if name in targets:
                raise ValueError(f"two targets named {name!r}")
            targets[name] = {"kind": kind, **attributes}

        return record

    def load(label, *symbols):
        for symbol in symbols:
            if symbol not in RULES or label != f"@rules_python//python:{symbol}.bzl":
                raise ValueError(f"unknown load: {label} {symbol}")
            scope[symbol] = rule(symbol)

    def glob(include, exclude=()):
        dropped = {path for pattern in exclude for path in root.glob(pattern)}
        found = {path for pattern in include for path in root.glob(pattern)} - dropped
        return sorted(
            str(path.relative_to(root))
            for path in found
            if path.is_file() and "__pycache__" not in path.parts
        )

    scope |= {"load": load, "glob": glob, "package": lambda **_: None}
    scope["__builtins__"] = {"len": len, "range": range, "sorted": sorted}
    exec(compile((root / "BUILD").read_text(), "BUILD", "exec"), scope)
    return targets


def problems(root: pathlib.Path, libraries: dict[str, str], folders: list[str]) -> list[str]:
    """Lists what is wrong, one line each.

    Args:
      root: the folder that holds BUILD.
      libraries: dotted prefix of a module of ours -> target that holds it; the longest counts.
      folders: where every .py file must belong to a target.
    """
    targets = evaluate(root)
    return [
        *_bad_paths_and_labels(root, targets),
        *_bad_imports(root, targets, libraries),
        *_bad_owners(root, targets, folders),
    ]


def _bad_paths_and_labels(root: pathlib.Path, targets: Targets) -> Iterator[str]:
    for name, target in targets.items():
        paths = [*target.get("srcs", []), *target.get("data", [])]
        if "main" in target:
            paths.append(target["main"])
        if "main_module" in target:
            paths.append(target["main_module"].replace(".", "/") + ".py")
        for path in paths:
            if not (root / path).is_file():
                yield f"{name}: {path} does not exist"
        for dep in target.get("deps", []):
            if dep.startswith(":") and dep[1:] not in targets:
                yield f"{name}: no target {dep}"


def _reachable(targets: Targets, name: str) -> set[str]:
    """The target, its deps, theirs, ...; third-party ones keep their `@pypi//` label."""
    found, waiting = set(), [name]
    while waiting:
        label = waiting.pop().removeprefix(":")
        if label not in found:
            found.add(label)
            waiting.extend(targets.get(label, {}).get("deps", []))
    return found


def _bad_imports(root: pathlib.Path, targets: Targets, libraries: dict[str, str]) -> Iterator[str]:
    for name, target in targets.items():
        reachable = _reachable(targets, name)
        siblings = {pathlib.Path(path).stem for t in reachable & set(targets)
                    for path in targets[t].get("srcs", [])}  # fmt: skip
        for path in target.get("srcs", []):
            if not (root / path).is_file():
                continue
            wanted = set()
            for module in imported_modules(root / path, root):
                prefixes = [p for p in libraries if f"{module}.".startswith(f"{p}.")]
                package = module.split(".")[0]
                if prefixes:
                    wanted.add(libraries[max(prefixes, key=len)])
                elif package not in sys.stdlib_module_names and package not in siblings:
                    wanted.add("@pypi//" + HUB_NAMES.get(package, package))
            for label in sorted(wanted - reachable):
                yield f"{name}: {path} imports from {label} without a dep on it"


def _bad_owners(root: pathlib.Path, targets: Targets, folders: list[str]) -> Iterator[str]:
    owners: dict[str, list[str]] = {}
    for name, target in targets.items():
        for path in target.get("srcs", []):
            owners.setdefault(path, []).append(name)
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            held = owners.get(str(path.relative_to(root)), [])
            if len(held) != 1:
                yield f"{path.relative_to(root)} is in {held or 'no target'}"
