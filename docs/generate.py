"""Write the parts of the documents that follow from the code: python docs/generate.py (--check only looks).

Each part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. A test fails when one is stale.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import sqlalchemy as sa

ROOT = Path(__file__).parent.parent


def schema_tables() -> str:
    """Every table with its docstring and columns."""
    from kvloom_store import schema

    source = ast.parse((ROOT / "store/kvloom_store/schema.py").read_text())
    said: dict[str, str] = {}
    for statement, after in zip(source.body, source.body[1:], strict=False):
        if isinstance(statement, ast.Assign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            said[ast.unparse(statement.targets[0])] = str(after.value.value)
    parts = []
    for table in schema.metadata.tables.values():
        rows = [f"### {table.name}", "", said[table.name], "", "| column | type | |", "|---|---|---|"]
        for column in table.columns:
            notes = ["key"] if column.primary_key else []
            notes += [f"-> {key.target_fullname}" for key in column.foreign_keys]
            notes += ["may be null"] if column.nullable else []
            notes += ["unique"] if column.unique else []
            rows.append(f"| {column.name} | {str(column.type).lower()} | {', '.join(notes)} |")
        unique = [c for c in table.constraints if isinstance(c, sa.UniqueConstraint) and len(c.columns) > 1]
        rows += [f"\nUnique together: {', '.join(column.name for column in each.columns)}." for each in unique]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def limits() -> str:
    """Every named limit of the wire format."""
    source = ast.parse((ROOT / "proto/kvloom_proto/limits.py").read_text())
    rows = ["| limit | value | of |", "|---|---|---|"]
    body = source.body
    for number, statement in enumerate(body):
        if not isinstance(statement, ast.Assign):
            continue
        name = ast.unparse(statement.targets[0])
        value = eval(compile(ast.Expression(statement.value), name, "eval"))
        after = body[number + 1] if number + 1 < len(body) else None
        said = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            said = str(after.value.value).replace("\n", " ")
        rows.append(f"| {name} | {value:,} | {said} |")
    return "\n".join(rows)


PARTS = {
    "store/SCHEMA.md": {"tables": schema_tables},
    "proto/FORMAT.md": {"limits": limits},
}


def rewritten(path: Path) -> str:
    """The document with its generated parts made anew."""
    text = path.read_text()
    for name, make in PARTS[str(path.relative_to(ROOT))].items():
        pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{path} has no part {name!r}")
        text = pattern.sub(lambda found, make=make: found[1] + make() + "\n" + found[2], text)
    return text


def stale() -> list[Path]:
    """The documents that do not say what the code says."""
    return [path for path in (ROOT / name for name in PARTS) if path.read_text() != rewritten(path)]


if __name__ == "__main__":
    if "--check" in sys.argv:
        found = stale()
        print("\n".join(f"stale: {path}" for path in found) or "the documents are current")
        sys.exit(bool(found))
    for name in PARTS:
        (ROOT / name).write_text(rewritten(ROOT / name))
