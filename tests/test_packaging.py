"""The wheel, built from the sdist: every module of the three packages, the schema, the type marker; nothing else."""

import importlib.util
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("proto/kvloom_proto", "store/kvloom_store", "sessions/kvloom")
KINDS = {".py", ".pyi", ".proto"}

missing = [name for name in ("build", "hatchling") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed; make install does it")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist and the wheel made from it (which is what ``build`` does when it is not told which to make)."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(built[1]) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def in_packages():
    """What the three packages consist of, as it will lie in the wheel."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found[path.relative_to((ROOT / package).parent).as_posix()] = path.read_bytes()
    return found


def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    packed = {name: content for name, content in wheel.items() if ".dist-info/" not in name}

    assert packed == in_packages()
    assert {"kvloom/py.typed", "kvloom_store/py.typed", "kvloom_proto/py.typed", "kvloom_proto/state.proto"} <= set(
        packed
    )
    assert {Path(name).suffix for name in packed if Path(name).name != "py.typed"} <= KINDS


def test_the_metadata_says_what_users_need(wheel):
    [folder] = {name.partition("/")[0] for name in wheel if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel[f"{folder}/METADATA"].decode())

    assert metadata["Name"] == "kvloom"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert wheel[f"{folder}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert "kvloom = kvloom.cli:main" in wheel[f"{folder}/entry_points.txt"].decode()


def test_the_sdist_holds_what_a_release_is_built_from(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = {name.partition("/")[0] for name in names if "/" in name}

    assert folders == {"proto", "store", "sessions"}
    assert names - {name for name in names if "/" in name} <= {
        "PKG-INFO",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "ARCHITECTURE.md",
        "pyproject.toml",
        ".gitignore",
    }
    assert not [name for name in names if name.endswith((".pyc", ".db", ".log")) or "__pycache__" in name]


def test_constraints_pin_every_dependency_exactly():
    import tomllib

    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    pinned = {name.lower().replace("_", "-") for name in pins}

    assert not any("+" in version for version in pins.values()), "a local tag is found on one machine only"
    for requirement in wanted:
        name = "".join(char for char in requirement.split(";")[0] if char.isalnum() or char in "-_.><=, ")
        name = name.split(">")[0].split("<")[0].split("=")[0].strip().lower().replace("_", "-")
        assert name in pinned, f"{name} is not pinned in constraints.txt"
