"""Write the README's table of settings from the code: python tools/settings_table.py [--check]."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

BEGIN, END = "<!-- settings: made by tools/settings_table.py -->", "<!-- end of settings -->"


def settings_table() -> str:
    """A Markdown table with one line a setting: name, default, meaning, what is allowed."""
    rows = ["| setting | default | meaning | allowed |", "|---|---|---|---|"]
    for f in fields(train_gpt.Config):
        default = train_gpt.format_setting(f.default)
        rows.append(f"| {f.name.upper()} | {default or '(empty)'} | {f.metadata['doc']} | {f.metadata['check'].text} |")
    return "\n".join(rows)


def with_table(readme: str) -> str:
    """`readme` with the table between its two marks replaced; ValueError if a mark is missing."""
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md has no lines {BEGIN!r} and {END!r}")
    before, rest = readme.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{settings_table()}\n{END}{rest.split(END, 1)[1]}"


def main() -> int:
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        return int(with_table(readme) != readme)
    path.write_text(with_table(readme), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
