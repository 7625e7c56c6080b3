"""The house rules, read from the source: who may import whom, and what is done nowhere at all."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"kvloom_proto": ROOT / "proto", "kvloom_store": ROOT / "store", "kvloom": ROOT / "sessions"}
BELOW = {
    "kvloom_proto": {"kvloom_proto"},
    "kvloom_store": {"kvloom_store", "kvloom_proto"},
    "kvloom": {"kvloom", "kvloom_store", "kvloom_proto"},
}
# What runs the model, or must see tensors. The first of these are torch through and through; the others import it
# when they are called, so that listing and reading a store costs nothing.
TENSORS = {
    "bits",
    "blocks",
    "current",
    "engine",
    "explore.rounds",
    "layers",
    "live",
    "loop",
    "mending",
    "overwritten",
    "probe",
    "reading",
    "resume",
    "rope",
    "row_layers",
    "shared_attention",
    "siblings",
    "support",
    "transfer",
}
TENSORS_LATE = {"models", "convert", "identity", "sampling", "filters", "scores", "cli.about"}
TRANSFORMERS_LATE = TENSORS_LATE | {"quiet", "template", "template_file", "known_model"}
CACHES = {
    "blocks",
    "layers",
    "loop",
    "overwritten",
    "probe",
    "row_layers",
    "siblings",
}  # loop names the class in a signature, probe makes one


class Import(NamedTuple):
    module: str
    name: str
    late: bool  # within a function
    typing: bool  # under ``if TYPE_CHECKING``
    relative: bool


class Source(NamedTuple):
    package: str
    name: str  # within the package; "" is the package itself
    tree: ast.Module

    @property
    def full(self):
        return f"{self.package}.{self.name}".rstrip(".")

    def imports(self):
        return list(_imports(self.tree))

    def takes(self, library):
        """Imports of a library that happen when the program runs."""
        return [each for each in self.imports() if each.module.partition(".")[0] == library and not each.typing]


def _imports(node, late=False, typing=False):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, "", late, typing, False) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module, relative = child.module or "", child.level > 0
            yield from (Import(module, alias.name, late, typing, relative) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from _imports(ast.Module(child.body, []), late, True)
            yield from _imports(ast.Module(child.orelse, []), late, typing)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, late or inside, typing)


def _sources():
    for package, root in PACKAGES.items():
        for path in sorted((root / package).rglob("*.py")):
            if not path.stem.endswith("_pb2"):
                parts = path.relative_to(root / package).with_suffix("").parts
                name = ".".join(part for part in parts if part != "__init__")
                yield Source(package, name, ast.parse(path.read_text("utf-8"), str(path)))


SOURCES = list(_sources())
every_module = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.full)


@every_module
def test_imports_are_absolute_and_point_downward(source):
    for each in source.imports():
        assert not each.relative, f"relative import of {each.name}"
        package = each.module.partition(".")[0]
        assert package not in BELOW or package in BELOW[source.package], f"imports {each.module}, which is above it"


@every_module
def test_torch_and_transformers_stay_with_the_engine(source):
    for library, late in (("torch", TENSORS_LATE), ("transformers", TRANSFORMERS_LATE)):
        for each in source.takes(library):
            assert source.package == "kvloom", f"{library} is not for {source.package}"
            assert source.name in TENSORS | late, f"{library} is not for {source.full}"
            assert source.name in TENSORS or each.late, f"{library} must be imported within a function here"


@every_module
def test_cache_classes_of_transformers_are_touched_by_few(source):
    used = {e.name for e in source.takes("transformers") if e.name.endswith(("Cache", "Layer")) or "cache" in e.module}
    assert not used or source.full in {f"kvloom.{name}" for name in CACHES}, f"uses {used}"


@every_module
def test_statements_are_built_in_the_store_only(source):
    if source.package == "kvloom_store":
        return
    names = {node.attr for node in ast.walk(source.tree) if isinstance(node, ast.Attribute) and _is(node.value, "sa")}
    assert names <= {"Connection"}, f"builds statements with sa.{names}"
    assert all(e.name in ("", "Connection") for e in source.takes("sqlalchemy"))
    statement = re.compile(
        r"\s*(SELECT\s.+\sFROM|INSERT\s+INTO|UPDATE\s+\w+\s+SET|DELETE\s+FROM|PRAGMA\s)", re.I | re.S
    )
    for text in _texts(source.tree):
        assert not statement.match(text), f"SQL: {text!r}"


@every_module
def test_sqlite_is_named_in_one_module_and_its_index_in_another(source):
    assert not source.takes("sqlite3") or source.full == "kvloom_store.sqlite"
    texts = [text for text in _texts(source.tree) if re.search(r"\bfts5\(|\bVIRTUAL TABLE\b|sqlite_master", text, re.I)]
    assert not texts or source.full in ("kvloom_store.sqlite", "kvloom_store.fulltext"), f"{texts}"
    pragmas = [text for text in _texts(source.tree) if text.lstrip().upper().startswith("PRAGMA")]
    assert not pragmas or source.full == "kvloom_store.sqlite", f"{pragmas}"


@every_module
def test_nothing_that_was_stored_is_ever_executed(source):
    loaders = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    assert not {each.module.partition(".")[0] for each in source.imports()} & loaders
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):
            assert not (_is(node.value, "torch") and node.attr in ("load", "save", "jit", "package")), ast.unparse(node)
        if isinstance(node, ast.Call):
            assert not isinstance(node.func, ast.Name) or node.func.id not in ("eval", "exec"), ast.unparse(node)
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code":
                    assert ast.unparse(keyword.value) == "False"


def test_the_rules_see_what_they_forbid():
    """Else they would hold of anything."""
    text = (
        "from . import x\nimport torch\nif TYPE_CHECKING:\n    import sqlalchemy\ndef f():\n    import transformers\n"
    )
    found = {(e.module, e.late, e.typing, e.relative) for e in Source("kvloom", "new", ast.parse(text)).imports()}

    assert found == {
        ("", False, False, True),
        ("torch", False, False, False),
        ("sqlalchemy", False, True, False),
        ("transformers", True, False, False),
    }
    assert {source.package for source in SOURCES} == set(PACKAGES)
    assert {f"kvloom.{name}" for name in TENSORS | TRANSFORMERS_LATE} <= {source.full for source in SOURCES}


@pytest.mark.parametrize("module", ["kvloom", "kvloom.errors", "kvloom.models", "kvloom.cli", "kvloom_store.database"])
def test_importing_costs_no_model(module):
    heavy = {"torch", "transformers"} | ({"sqlalchemy", "numpy"} if module in ("kvloom", "kvloom.cli") else set())
    code = f"import {module}, sys; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []


def _is(node, name):
    return isinstance(node, ast.Name) and node.id == name


def _texts(tree):
    """Every string of a module that is not documentation."""
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value
