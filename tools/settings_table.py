"""Write docs/SETTINGS.md from the code: python tools/settings_table.py [--check]."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402

PAGE = ROOT / "docs" / "SETTINGS.md"
HEAD = """# Settings

Every setting is an environment variable. A wrong value is an error that names it, its value and what is allowed; a misspelt name
is a warning. The log lists them all and stars those that differ from the record. An artifact carries those marked *model* (which
function the weights are) and *score* (how it is scored). Made by `tools/settings_table.py`.

| setting | default | meaning | allowed | carried |
|---|---|---|---|---|
"""


def settings_page() -> str:
    """The page: a table with one line a setting."""
    rows, docs = [], train_gpt.setting_docs()
    for f in fields(train_gpt.Config):
        default = train_gpt.format_setting(f.default) or "(empty)"
        carried = next((mark for mark in ("model", "score") if f.metadata[mark]), "")
        rows.append(f"| {f.name.upper()} | {default} | {docs[f.name]} | {f.metadata['check'].text} | {carried} |")
    return HEAD + "\n".join(rows) + "\n"


def main() -> int:
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != settings_page())
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(settings_page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
