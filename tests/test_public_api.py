"""What users may rely on: the names of ``import kvloom``, and the one tree of errors."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import kvloom
import kvloom_proto
import kvloom_store
from kvloom import errors

FAMILIES = {"FormatError": 10, "StoreError": 20, "EngineError": 30, "SessionError": 40}
# Errors that live beside the one function that raises them.
LOCAL = {"kvloom_store.planner.StateDamaged", "kvloom_store.planner.StateInexact", "kvloom.config.ConfigError"}

ERRORS = [getattr(errors, name) for name in errors.__all__]
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)


def test_every_public_name_can_be_had():
    for name in kvloom.__all__:
        assert getattr(kvloom, name) is not None

    assert kvloom.__all__ == sorted(set(kvloom.__all__))
    assert dir(kvloom) == sorted(kvloom.__all__)


def test_type_checkers_see_the_names_that_there_are():
    """The lazy table, the imports for type checkers and ``__all__`` are one list, written three times."""
    tree = ast.parse(inspect.getsource(kvloom))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: each.module for each in block.body for alias in each.names}

    assert seen == {name: f"kvloom.{home}" for name, home in kvloom._HOME.items()}
    assert set(kvloom.__all__) == {*kvloom._HOME, "errors", "__version__"}


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        kvloom.nonsense  # noqa: B018


def test_star_imports_bring_what_is_public():
    names = {}
    exec("from kvloom import *", names)

    assert set(kvloom.__all__) <= set(names)


@each_error
def test_each_error_belongs_to_kvloom_alone(error):
    assert issubclass(error, errors.KVLoomError)
    outside = [base for base in error.__mro__ if base.__module__.partition(".")[0] not in _packages()]
    assert outside == [Exception, BaseException, object]


@each_error
def test_each_error_is_documented_where_users_look(error):
    assert error.__doc__
    assert re.search(rf"\b{error.__name__}\b", errors.__doc__), f"{error.__name__} is not in kvloom.errors' docstring"


@each_error
def test_each_error_has_its_family_and_the_family_an_exit_code(error):
    if error is errors.KVLoomError:
        assert error.exit_code == 1
        return
    [family] = [name for name in FAMILIES if issubclass(error, getattr(errors, name))]
    assert error.exit_code == FAMILIES[family]
    assert re.search(rf"\b{family}\s+{error.exit_code}\b", errors.__doc__)


def test_no_error_hides_elsewhere():
    for package in (kvloom_proto, kvloom_store, kvloom):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    found = {error for error in _below(errors.KVLoomError) if error.__module__.partition(".")[0] in _packages()}
    strays = {error for error in found if error not in ERRORS}

    assert {f"{error.__module__}.{error.__name__}" for error in strays} <= LOCAL
    for error in strays:
        assert error.exit_code in FAMILIES.values()


def test_the_documented_tree_names_no_error_that_is_gone():
    documented = set(re.findall(r"\b[A-Z]\w+[a-z]\w*\b", errors.__doc__.partition("KVLoomError")[2]))
    classes = {name for name in documented if re.search(r"[a-z][A-Z]", name)}

    assert classes <= set(errors.__all__)


def test_the_version_is_the_one_of_the_distribution():
    from importlib.metadata import version

    assert kvloom.__version__ == version("kvloom")
    assert Path(kvloom.__file__).with_name("py.typed").is_file()


def _packages():
    return {"kvloom", "kvloom_store", "kvloom_proto"}


def _below(error):
    for child in error.__subclasses__():
        yield child
        yield from _below(child)
