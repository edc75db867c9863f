"""The architecture: which package may import which. ``LAYERS`` is the list of floors, the top one first."""

import ast
import graphlib

import pytest
from helpers import ROOT

# A module imports from lower floors and from its own package, never from a neighbour on its floor.
LAYERS = (
    ("__init__",),
    ("integrations",),
    ("distributed", "persistence", "tuning"),
    ("nn",),
    ("prediction",),
    ("functional",),
    ("sampling",),
    ("tables",),
    ("hashing", "optim", "tails"),
    ("data", "metrics", "precision"),
    ("ops",),
    ("options",),
    ("active_set", "checks", "inference_mode", "randomness", "shards", "storage"),
)

# Only ops/ calls operators by name, and it loads the extension. All else calls the functions of ops/.
OTHER_CALLERS = {
    "slide_torch.sampling.traced_step": "defines its operator in Python, where what it runs lives",
}


EXTENSION = "slide_torch._C"


def modules_of(*packages):
    """Paths by module name; a package's own module is its ``__init__``."""
    found = {}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


def for_types_only(tree):
    """The nodes below ``if TYPE_CHECKING:``."""
    return {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }


def imported_names(node, module):
    """Absolute names that an import statement of ``module`` gives: of modules, or of what is in them."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    parts = module.split(".")[: -node.level] if node.level else []
    source = ".".join([*parts, *filter(None, [node.module])])
    if source.split(".")[0] in ("common", "data"):  # the programs' own folder is on their path
        source = f"examples.{source}"
    return [f"{source}.{alias.name}" for alias in node.names]


def imports_of(module, paths, *, types):
    """The modules among ``paths`` that ``module`` imports, at its head or in a function, with the packages
    that are loaded on the way to them. ``types``: also what it imports for the type checker alone."""

    def own_module(name):
        return f"{name}.__init__" if f"{name}.__init__" in paths else name

    tree = ast.parse(paths[module].read_text())
    skipped = set() if types else for_types_only(tree)
    found = set()
    for node in ast.walk(tree):
        for name in [] if node in skipped else imported_names(node, module):
            if name == EXTENSION:
                continue
            while own_module(name) not in paths and "." in name:
                name = name.rpartition(".")[0]
            found.add(own_module(name))
            outer = name.rpartition(".")[0]
            while outer and not module.startswith(f"{outer}."):
                found.add(own_module(outer))
                outer = outer.rpartition(".")[0]
    return found & paths.keys()


def floor_of(module):
    """(which floor of ``LAYERS``, which package or module of it)."""
    room = module.split(".")[1]
    floors = [i for i, floor in enumerate(LAYERS) if room in floor]
    assert len(floors) == 1, f"{module}: expected in one of LAYERS"
    return floors[0], room


LIBRARY = modules_of("slide_torch")


def test_every_module_has_its_floor_and_every_floor_its_modules():
    rooms = {floor_of(module)[1] for module in LIBRARY}
    assert rooms == {room for floor in LAYERS for room in floor}


@pytest.mark.parametrize("module", LIBRARY)
def test_imports_run_downwards(module):
    """Imports for the type checker too: a type is knowledge of another room."""
    floor, room = floor_of(module)
    for imported in imports_of(module, LIBRARY, types=True):
        below, other = floor_of(imported)
        assert other == room or below > floor, f"{module} imports {imported}: not from below"


@pytest.mark.parametrize("packages", [("slide_torch",), ("benchmarks", "examples")], ids=str)
def test_no_circle(packages):
    """Inside a package the type checker may see circles: a part names the type of the whole that it is
    handed, and can still be loaded and read without it."""
    paths = modules_of(*packages)
    graph = {module: imports_of(module, paths, types=False) for module in paths}
    assert sum(map(len, graph.values())) > len(packages) * 20
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def names_in(module):
    """Dotted names that a module uses, and what it imports."""
    for node in ast.walk(ast.parse(LIBRARY[module].read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        yield from imported_names(node, module)


def test_operators_are_called_from_their_own_room():
    by_name = ("torch.ops.slide_torch", EXTENSION, "slide_torch.ops.library.operators")
    callers = {
        module
        for module in LIBRARY
        for name in names_in(module)
        if floor_of(module)[1] != "ops" and f"{name}.".startswith(tuple(f"{n}." for n in by_name))
    }
    assert callers == OTHER_CALLERS.keys()
