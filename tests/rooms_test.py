"""Who may import whom, read from the imports in the sources, lazy ones too."""

import ast
import pathlib
import re
import sys

import pytest
from build_check import imported_modules

ROOT = pathlib.Path(__file__).resolve().parents[1]
PORTS = ROOT / "ports"

MAY_IMPORT = {
    "checks": set(),
    "files": {"checks"},
    "timing": set(),
    "schedule": set(),
    "cache": set(),
    # What a level computes is defined once, in schedule.
    "selection": {"schedule"},
    "metrics": set(),
    "flops": {"schedule"},
    "kernels": set(),
    "attention": {"kernels"},
    "parallel": {"attention"},
    "model": {"attention"},
    "entry": {"attention", "cache", "kernels", "model"},
    "solvers": {"schedule"},
    "video": {"metrics"},
    "report": set(),
    "methods": {
        *("attention", "cache", "entry", "flops", "model", "schedule", "selection", "solvers"),
    },
    "progress": set(),
    "step": {"methods", "model", "solvers"},
    "denoise": {"methods", "model", "progress", "schedule", "solvers", "step"},
    # Many runs of the loop at once: it is to search what denoise is to a user.
    "population": {"denoise", "methods", "model", "schedule", "solvers", "step"},
    # The fitness is an argument: search knows nothing of the loop that it scores.
    "search": {"flops", "metrics", "report", "schedule"},
}
"""Room -> rooms it may import, beside itself and FLOOR."""

FLOOR = {"checks", "files", "timing"}
"""What every room stands on."""

PORTS_MAY_IMPORT = {
    "checkpoints": set(),
    "text": {"checkpoints"},
    "pipeline": {"checkpoints", "text"},
    "training": {"checkpoints", "pipeline", "text"},
    # A port: what is the model's own. It trains with what all trainings share.
    "wan": {"checkpoints", "pipeline", "text", "tiny", "training"},
    # A model that ships, with all that it was trained by.
    "tiny": {"checkpoints", "pipeline", "text", "training", "wan"},
}
"""The same of astraea_ports; every room may ask its registry, `__init__`."""

DOORS = {"__init__", "bench", "cli"}
"""They may import every room."""

KNOW_THE_PORTS = {"bench", "cli"}

STUDIES = ROOT / "notebooks/studies"

PEERS = STUDIES / "peers"
"""Scripts by themselves, each with the library that it times."""


def room_of(path):
    """The room that a file of astraea_jax belongs to: its module, or its sub-package."""
    return path.relative_to(ROOT / "astraea_jax").parts[0].removesuffix(".py")


def sources(folder):
    return sorted(folder.rglob("*.py"))


def rooms_imported(path, root):
    """Rooms of astraea_jax that a file imports; the package's own front door is `__init__`."""
    for module in imported_modules(path, root):
        package, *names = module.split(".")
        if package == "astraea_jax":
            is_room = names and (names[0] in MAY_IMPORT or names[0] in DOORS)
            yield names[0] if is_room else "__init__"


def offences(root=ROOT):
    for path in sources(root / "astraea_jax"):
        room = path.relative_to(root / "astraea_jax").parts[0].removesuffix(".py")
        if room in DOORS:
            continue
        if room not in MAY_IMPORT:
            yield f"{path.name}: room {room!r} has no rule here"
            continue
        for other in sorted(set(rooms_imported(path, root)) - {room} - FLOOR - MAY_IMPORT[room]):
            yield f"{path.relative_to(root)} imports {other}"


def test_rooms_import_only_what_they_may():
    assert list(offences()) == []


def ports_offences(root=PORTS):
    for path in sources(root / "astraea_ports"):
        room = path.relative_to(root / "astraea_ports").parts[0]
        if room == "__init__.py":
            continue
        if room not in PORTS_MAY_IMPORT:
            yield f"{path.name}: room {room!r} of the ports has no rule here"
            continue
        modules = [module.split(".") for module in imported_modules(path, root)]
        others = {names[1] for names in modules if names[0] == "astraea_ports" and names[1:]}
        for other in sorted(others & {*PORTS_MAY_IMPORT} - {room} - PORTS_MAY_IMPORT[room]):
            yield f"{path.relative_to(root)} imports {other}"


def test_rooms_of_the_ports_import_only_what_they_may():
    assert list(ports_offences()) == []


@pytest.mark.parametrize(
    ("room", "line", "offence"),
    [
        ("pipeline/plan.py", "from astraea_ports.wan import vae", "imports wan"),
        ("text/t5.py", "from astraea_ports import tiny", "imports tiny"),
        ("checkpoints/hub.py", "def f():\n  import astraea_ports.text.t5", "imports text"),
        ("new/thing.py", "", "room 'new' of the ports has no rule here"),
    ],
)
def test_planted_offences_of_the_ports_are_seen(tmp_path, room, line, offence):
    path = tmp_path / "astraea_ports" / room
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    (found,) = ports_offences(tmp_path)
    assert found.endswith(offence)


def test_the_command_line_names_no_port():
    shared = {"checkpoints", "pipeline", "text", "tiny", "training"}
    for path in sources(ROOT / "astraea_jax"):
        modules = [module.split(".") for module in imported_modules(path, ROOT)]
        named = {names[1] for names in modules if names[0] == "astraea_ports" and names[1:]}
        assert not named & {*PORTS_MAY_IMPORT} - shared, path


@pytest.mark.parametrize(
    ("room", "line", "offence"),
    [
        ("search/study.py", "from astraea_jax import denoise", "imports denoise"),
        ("search/study.py", "import astraea_jax.denoise as d", "imports denoise"),
        ("cache.py", "from astraea_jax.schedule import Schedule", "imports schedule"),
        ("cache.py", "from .model import VideoDiT", "imports model"),
        ("methods/dense.py", "def f():\n  from ..denoise import run", "imports denoise"),
        ("model.py", "from astraea_jax import Schedule", "imports __init__"),
        ("metrics.py", "from astraea_jax.cli import main", "imports cli"),
        ("new.py", "", "room 'new' has no rule here"),
    ],
)
def test_planted_offences_are_seen(tmp_path, room, line, offence):
    path = tmp_path / "astraea_jax" / room
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    (found,) = offences(tmp_path)
    assert found.endswith(offence)


def test_only_the_doors_know_the_ports():
    for path in sources(ROOT / "astraea_jax"):
        if room_of(path) not in KNOW_THE_PORTS:
            modules = imported_modules(path, ROOT)
            assert not any(m.split(".")[0] == "astraea_ports" for m in modules), path


def test_ports_do_not_import_the_doors():
    for path in sources(PORTS):
        assert not KNOW_THE_PORTS & set(rooms_imported(path, PORTS)), path


@pytest.mark.parametrize("package", ["torch", "diffusers", "transformers", "tensorflow"])
def test_other_frameworks_are_imported_nowhere(package):
    ours = [*sources(ROOT / "astraea_jax"), *sources(PORTS)]
    ours += [*sources(ROOT / "tests"), *sources(STUDIES)]
    for path in ours:
        if path.parent != PEERS:
            modules = set(imported_modules(path, path.parent))
            assert package not in {m.split(".")[0] for m in modules}, path


def test_peers_are_imported_nowhere_and_import_nothing_of_ours():
    names = {path.stem for path in sources(PEERS)}
    for path in [*sources(STUDIES), *sources(ROOT / "tests")]:
        modules = {m.split(".")[0] for m in imported_modules(path, path.parent)}
        assert not modules & (names | {"peers"}), path
        assert path.parent != PEERS or not modules & {"astraea_jax", "astraea_ports"}, path


def test_the_packages_know_nothing_of_the_studies():
    names = {path.stem for path in sources(STUDIES)} | {"notebooks", "studies", "tests"}
    for path in sources(ROOT / "astraea_jax") + sources(PORTS):
        assert not names & {m.split(".")[0] for m in imported_modules(path, ROOT)}, path
        assert not list(read_outside(path.read_text())), path


def read_outside(source):
    """Texts of a program, its docstrings apart, that name a file of the tests or the notebooks."""
    tree = ast.parse(source)
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    named = re.compile(r"(^|/)(tests|notebooks|studies)(/|$)")
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and node not in docstrings else None
        if isinstance(text, str) and named.search(text):
            yield text


def test_planted_reads_outside_are_seen():
    read = 'ROOT / "tests" / "a.json", open("../notebooks/studies/b.json"), "latests/c"'
    assert {*read_outside(read)} == {"tests", "../notebooks/studies/b.json"}
    assert not list(read_outside('"""As in tests/a_test.py."""'))


def test_figures_are_made_without_pyplot():
    # Its backend is the user's, in a notebook say.
    for path in sources(ROOT / "astraea_jax") + sources(PORTS):
        assert "matplotlib.pyplot" not in set(imported_modules(path, ROOT)), path
        assert "matplotlib.use(" not in path.read_text(), path


def test_no_init_in_the_source_root_of_the_ports():
    # It would make `import ports` work, and with it a second copy of every class.
    assert not (PORTS / "__init__.py").exists()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
