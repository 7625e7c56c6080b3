"""The documents say what the code does: generated parts are current, commands and modules are all there."""

from __future__ import annotations

import importlib.util
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current():
    assert generator().stale() == [], "run: python docs/generate.py"


def test_the_readme_is_short_and_names_every_command():
    from kvloom.cli import main

    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") < 200
    commands = main.commands if hasattr(main, "commands") else None
    if commands is None:
        import click

        from kvloom import cli

        group = next(value for value in vars(cli).values() if isinstance(value, click.Group))
        commands = group.list_commands(click.Context(group))
    for name in commands:
        assert re.search(rf"`[^`]*\b{name}\b", readme), f"README.md does not mention kvloom {name}"


def test_the_architecture_page_names_every_module():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    for folder in ("proto/kvloom_proto", "store/kvloom_store", "sessions/kvloom"):
        for path in (ROOT / folder).glob("*.py"):
            if not path.stem.startswith("_") and not path.stem.endswith("_pb2"):
                assert re.search(rf"\b{path.stem}\b", page), f"ARCHITECTURE.md does not mention {path}"


def test_the_format_page_works_its_example_through():
    from kvloom_proto.records import Pass, Schedule, pack

    page = (ROOT / "proto" / "FORMAT.md").read_text()
    example = page[page.index("A worked example") : page.index("## Limits")]
    assert shown_bytes(example) == pack(Schedule((Pass(0, 1024), Pass(1024, 26), Pass(1050, 1, 23))))


def test_the_format_page_works_a_bundle_through():
    from kvloom_proto.bundle import BranchRecord, Encoding, Head, SessionRecord
    from kvloom_proto.frames import Writer

    page = (ROOT / "proto" / "FORMAT.md").read_text()
    file = io.BytesIO()
    writer = Writer(file, Encoding.PROTOBUF)
    for record in (Head(5, "x", False), SessionRecord("a", b"\x80"), BranchRecord("main", None)):
        writer.add(record)
    writer.finish()
    assert shown_bytes(page[page.index("A worked bundle") :]) == file.getvalue()


def shown_bytes(example: str) -> bytes:
    lines = [line for line in example.splitlines() if re.match(r"\s+(?:[0-9a-f]{2} )+", line + " ")]
    return bytes.fromhex("".join(re.match(r"\s+((?:[0-9a-f]{2}\b ?)+)", line)[1] for line in lines).replace(" ", ""))


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("*/*.md")))
def test_files_that_documents_point_to_are_there(path: Path):
    if ".venv" in path.parts:
        pytest.skip("not ours")
    for found in re.findall(r"`((?:proto|store|sessions|tests|examples|docs|benchmarks)/[\w./-]+)`", path.read_text()):
        assert (ROOT / found).exists(), f"{path.name} points to {found}"


def test_the_screenshots_are_of_the_interface_as_it_is(tmp_path: Path):
    """The words of each row, not its style: that is textual's, and may change with it."""
    spec = importlib.util.spec_from_file_location("browse_shots", ROOT / "docs" / "browse_shots.py")
    shots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shots)
    shots.main(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        kept = ROOT / "docs" / "browse" / path.name
        texts = [re.findall(r"<text[^>]*>([^<]*)</text>", each.read_text()) for each in (path, kept)]
        assert texts[0] == texts[1], "run: python docs/browse_shots.py"
        assert "@font-face" not in kept.read_text()
