"""The README says what the code says."""

from __future__ import annotations

import re
import subprocess
import sys

import tiny

import train_gpt as tg


def test_the_page_of_settings_is_made_from_the_code() -> None:
    done = subprocess.run([sys.executable, str(tiny.ROOT / "tools/settings_table.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, "run `python tools/settings_table.py`"


def test_every_setting_says_what_it_does_and_the_packed_file_still_lists_them_all() -> None:
    names = [f.name for f in tg.fields(tg.Config)]
    assert list(tg.setting_docs()) == names and all(tg.setting_docs().values())
    assert [line.split("=")[0].lower() for line in tg.settings_help().splitlines()] == names
    shipped = tg.shipped_source(tg.own_source())
    assert not any(words in shipped for words in tg.setting_docs().values() if len(words) > 30), "in the packed file they cost nothing"


def test_the_command_in_the_readme_is_the_default_run() -> None:
    readme = (tiny.ROOT / "README.md").read_text()
    command = readme[readme.index("NCCL_NET=Socket"): readme.index("SEED=0")]
    settings = dict(re.findall(r"([A-Z_0-9]+)=(\S+)", command))
    assert len(settings) == 19 and tg.Config.from_env(settings) == tg.Config() and not tg.misspelt_settings(settings)


def test_small_settings_are_settings_and_keep_the_topology() -> None:
    lines = [line for line in (tiny.ROOT / "tools/small.env").read_text().splitlines() if line and not line.startswith("#")]
    settings = dict(line.split("=", 1) for line in lines)
    cfg = tg.Config.from_env(settings)
    assert set(settings) <= {f.upper() for f in cfg.__dataclass_fields__}
    for name in ("num_layers", "num_loops", "loop_start", "loop_end", "train_loop_phase_depths", "eval_loop_depth", "parallel_start_layer",
                 "vocab_size", "gated_attn_enabled", "ttt_enabled", "phased_ttt_num_phases", "matrix_bits"):
        assert getattr(cfg, name) == getattr(tg.Config(), name), name
