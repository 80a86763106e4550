"""Run the seeds of one configuration, or collect runs that are there, and write the record folder from their logs.

    python tools/make_record.py --slug DepthCurriculum --seeds 0,42,1234 --env record.env -- torchrun --standalone --nproc_per_node=8
    python tools/make_record.py --slug SmallCPU --non-record --seeds 0,42,1234 --env small.env --with-artifacts
    python tools/make_record.py --slug DepthCurriculum --seeds 0,42,1234 --runs FOLDER          (collect only)

--env names a file of NAME=VALUE lines, the settings of the configuration without SEED. Every seed runs as
`LAUNCHER train_gpt.py` (what stands after --; plain python without it) with RUN_ID=train_seed<N>, and writes its log and
artifact to the folder --runs; a seed whose log there has an end is not run again. Then records/<track>/<date>_<slug>/ is
written: README.md, submission.json, the logs, plots, and all that a run needs. Every number in it comes from the logs.

It is refused when verify.py's checks of the folder fail: settings, machines or code that differ between the seeds or from
the code here, a missing seed, the cap or a time budget exceeded, a score that does not follow from its log. --non-record
lifts the limits of time, which its README then says; never the others. The folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import logs
import verify
from logs import Group, RunLog

ROOT = Path(__file__).resolve().parent.parent
CODE = ("train_gpt.py", "prepare_caseops_data.py", "caseops_tokenizer.py", "lossless_caps.py", "requirements.txt")
PLACES = {"DATA_DIR", "DATA_PATH", "TOKENIZER_PATH"}  # settings that say where data is: run.sh has them as defaults
NOT_IN_RUN_SH = logs.VARYING | {"ARTIFACT_DIR", "ARTIFACT_PATH", "LOSSES_PATH", "CHECKPOINT_EVERY", "EVAL_ONLY"}


class Refused(ValueError):
    """The runs make no record."""


# ======================================================================================================================
# The runs
# ======================================================================================================================


def read_environment(path: Path | None) -> dict[str, str]:
    """NAME=VALUE lines; blank lines and lines that start with # are none. ValueError for anything else."""
    if path is None:
        return {}
    values = {}
    for count, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, mark, value = line.strip().removeprefix("export ").partition("=")
        if not mark or not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise ValueError(f"{path}, line {count}: {line!r} is not NAME=VALUE")
        values[name] = " ".join(shlex.split(value))
    if "SEED" in values or "RUN_ID" in values:
        raise ValueError(f"{path} sets SEED or RUN_ID: they are set for every seed; name the seeds with --seeds")
    return values


def run_seeds(seeds: Sequence[int], environment: dict[str, str], options: argparse.Namespace) -> None:
    """Run every seed that has no finished log in --runs, one after the other; Refused when one does not end well."""
    launcher, runs = options.launcher or [sys.executable], options.runs.resolve()
    inside = runs.is_relative_to(options.code.resolve())  # then the log names no place of this machine alone
    artifact_dir = runs.relative_to(options.code.resolve()) if inside else runs
    for seed in seeds:
        log = options.runs / f"train_seed{seed}.log"
        if log.exists():
            if (run := begun(log)) and run.final is not None:
                continue
            if run is None:
                log.unlink()  # it would stand in the way of the run, which overwrites none
            elif not log.with_suffix(".state").exists():  # with it, the run goes on from its checkpoint
                raise Refused(f"{log} has no end: the run was cut off. Move it away to run seed {seed} again")
        names = {"SEED": str(seed), "RUN_ID": f"train_seed{seed}", "ARTIFACT_DIR": str(artifact_dir)}
        environ = {**os.environ, **environment, **names}
        print(f"seed {seed}: {shlex.join([*launcher, 'train_gpt.py'])}", flush=True)
        status = subprocess.run([*launcher, "train_gpt.py"], cwd=options.code, env=environ, check=False).returncode
        if status != 0 and not (status == 3 and options.non_record):
            raise Refused(f"seed {seed} ended with exit status {status}; see {log}")


def begun(log: Path) -> RunLog | None:
    """The run of a log, if it trained: one that found no data, say, stands in nobody's way."""
    try:
        run = logs.read_log(log)
    except ValueError:
        return None
    return run if run.train else None


def collect(seeds: Sequence[int], folder: Path) -> list[RunLog]:
    """The runs of the seeds among the logs of a folder; Refused if one is missing or there twice."""
    found: dict[int, list[RunLog]] = {}
    for run in filter(None, map(begun, logs.logs_in(folder))):
        if run.seed is not None:
            found.setdefault(run.seed, []).append(run)
    missing = [seed for seed in seeds if seed not in found]
    if missing:
        raise Refused(f"no log of seed {', '.join(map(str, missing))} in {folder} (there are: {sorted(found) or 'none'})")
    for seed in seeds:
        if len(found[seed]) > 1:
            names = ", ".join(run.path.name for run in found[seed])
            raise Refused(f"seed {seed} has several logs: {names}. Choosing among runs is not allowed; keep in one folder only the "
                          "runs of this configuration")
    return [found[seed][0] for seed in seeds]


# ======================================================================================================================
# What is written
# ======================================================================================================================


def submission(group: Group, options: argparse.Namespace) -> dict[str, Any]:
    """The content of submission.json, numbers from the logs alone."""
    loss, loss_std = logs.mean_and_std(group.values("val_loss"))
    bpb, bpb_std = logs.mean_and_std(group.values("val_bpb"))
    first = group.runs[0]
    results = {}
    for run in group.finished:
        final = run.final
        assert final is not None
        results[str(run.seed)] = {
            "val_loss": final.val_loss, "val_bpb": final.val_bpb, "pre_ttt_bpb": final.pre_ttt_bpb, "steps": final.steps,
            "artifact_bytes": final.total_bytes, "train_seconds": round((final.train_ms or 0) / 1e3, 3),
            "eval_seconds": round((final.eval_ms or 0) / 1e3, 3)}
    several = len(group.finished) > 1
    return {
        "author": options.author, "github_id": options.github_id, "name": options.name or options.slug, "blurb": options.blurb,
        "date": date_of(group), "track": track_of(options), "val_loss": loss, "val_bpb": bpb,
        "val_loss_std": loss_std if several else None, "val_bpb_std": bpb_std if several else None,
        "seeds": [run.seed for run in group.runs], "seed_results": results,
        "artifact_bytes_max": max(group.values("total_bytes"), default=None),
        "hardware": hardware(first), "versions": versions(first),
        "code": {file: row["sha256"] for file, row in first.code.items()},
    }


def track_of(options: argparse.Namespace) -> str:
    return verify.OTHER_TRACK if options.non_record else verify.RECORD_TRACK


def date_of(group: Group) -> str:
    """The day of the last run, as the logs have it."""
    dates = [run.run["date"][:10] for run in group.runs if "date" in run.run]
    if not dates:
        raise Refused("the logs do not say on which day the runs were")
    return max(dates)


def hardware(run: RunLog) -> str:
    device, threads = run.run.get("device", "unknown device"), run.run.get("threads")
    cpu = "" if "NVIDIA" in device or threads is None else f" CPU, {threads} thread{'s' if threads != '1' else ''}"
    return f"{run.run.get('ranks', '1')} x {device}{cpu}"


def versions(run: RunLog) -> dict[str, str]:
    return {word: run.run[word] for word in ("torch", "python", "attention") if word in run.run}


def run_environment(run: RunLog, environment: dict[str, str]) -> dict[str, str]:
    """What run.sh sets: every setting of the log that is not at its default, and what --env sets beside the settings."""
    starred = {name: run.settings[name] for name in run.settings if name in run.starred and name not in NOT_IN_RUN_SH}
    beside = {name: value for name, value in environment.items() if name not in run.settings}
    if "+cpu" in run.run.get("torch", "") and "threads" in run.run:
        beside.setdefault("OMP_NUM_THREADS", run.run["threads"])
    return {name: value for name, value in {**beside, **starred}.items() if value}


def run_script(group: Group, environment: dict[str, str], options: argparse.Namespace) -> str:
    """run.sh: the seeds of the record, or those it is called with."""
    values = run_environment(group.runs[0], environment)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(values.items()) if name not in PLACES]
    places = [f': "${{{name}:={portable(value)}}}"; export {name}' for name, value in sorted(values.items()) if name in PLACES]
    seeds = " ".join(str(run.seed) for run in group.runs)
    launcher = launch_words(options) if options.launcher else '"${PYTHON:-python3}"'
    missing = '{ echo "error: no data in $DATA_PATH; DATA_PATH names the folder of the shards" >&2; exit 2; }'
    prepare = [f'[ -d "$DATA_PATH" ] || {options.prepare or missing}'] if "DATA_PATH" in values else []
    return "\n".join([
        "#!/usr/bin/env bash", f"# Runs the seeds of this record ({seeds}), or those given: bash run.sh [SEED...]",
        "# Logs and artifacts go to $ARTIFACT_DIR (./runs). DATA_PATH and TOKENIZER_PATH may say where data is.",
        "set -euo pipefail", 'cd "$(dirname "$0")"', "",
        *exports, *places, ': "${ARTIFACT_DIR:=./runs}"; export ARTIFACT_DIR', "",
        *prepare, f"[ $# -gt 0 ] || set -- {seeds}", 'for seed in "$@"; do',
        f'    SEED=$seed RUN_ID=train_seed$seed {launcher} train_gpt.py', "done", ""])


def portable(value: str) -> str:
    """A place as a record may name it: relative as it is; of an absolute one, which only one machine has, its last part."""
    return value if not os.path.isabs(value) else "./data/" + Path(value).name


def markdown_table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def readme(group: Group, results: Sequence[verify.Result], environment: dict[str, str], options: argparse.Namespace) -> str:
    """README.md: claim, seeds, what is new, rules, command, hardware."""
    parts = [f"# {options.name or options.slug}", claim(group), *track_words(group, options), options.blurb,
             "## Seeds", markdown_table(logs.seed_table(group)), SEEDS_NOTE,
             "## Bits a byte at each stage", markdown_table(logs.stage_table(group.runs))]
    if (options.staging / "plot.png").exists():
        parts += ["![loss, score at each stage, running TTT score, step time](plot.png)", "The same on a page: `report.html`."]
    if options.news:
        parts += ["## What is new", options.news.read_text(encoding="utf-8").strip()]
    if options.base:
        base = logs.read_group(str(options.base))
        parts += [f"## Against {base.name}", "```\n" + logs.compare(base, Group(options.slug, group.runs)) + "\n```"]
    table = [["", "rule", ""], *([result.status, result.rule, result.detail.replace("|", "\\|")] for result in results)]
    parts += ["## Rules", markdown_table(table), RULES_NOTE, "## Run it", run_words(group.runs[0], environment, options),
              "## Data, code and hardware", *where_words(group.runs[0])]
    return "\n\n".join(part for part in parts if part) + "\n"


SEEDS_NOTE = "Every figure is read from the logs beside this file; the standard deviation is that of a sample."
RULES_NOTE = ("This table is made from the folder alone; where `tools/verify.py` of the repository was run on data and code too, its "
              "table is `verify.txt`.")


def where_words(run: RunLog) -> list[str]:
    """Paragraphs about data, code and machine."""
    data = run.data
    which = "the published validation set" if data.get("published") == "1" else \
        "**not the published validation set**, so these scores compare with no record"
    count = {name: f"{int(data.get(name, 0)):,}" for name in ("val_docs", "val_tokens", "val_bytes", "train_tokens")}
    code = ", ".join(f"`{file}`{f', packed (to be read: `source/{file}`),' if 'source_sha256' in row else ''} sha256 `{row['sha256']}` "
                     f"({int(row['bytes']):,} bytes)" for file, row in run.code.items())
    with_versions = ", ".join(f"{word} {value}" for word, value in versions(run).items())
    transform = run.settings.get("CASEOPS_VERSION", "lossless_caps_caseops_v1")  # older logs lack it
    return [f"{count['val_docs']} documents, {count['val_tokens']} entries, {count['val_bytes']} bytes, CaseOps `{transform}`: {which}. "
            f"{count['train_tokens']} entries of training data in {data.get('train_shards', '?')} shard(s).",
            f"{code}.", f"{hardware(run)}; {with_versions}."]


def claim(group: Group) -> str:
    bpb, std = logs.mean_and_std(group.values("val_bpb"))
    loss, loss_std = logs.mean_and_std(group.values("val_loss"))
    count = len(group.finished)
    if count == 1:
        return f"**val_bpb {bpb:.5f}**, val_loss {loss:.5f} nats a token; one seed, so nothing is said about its spread."
    return f"**val_bpb {bpb:.5f}** (mean of {count} seeds, std {std:.5f}), val_loss {loss:.5f} nats a token (std {loss_std:.5f})."


def track_words(group: Group, options: argparse.Namespace) -> list[str]:
    """For a folder of the other track: that it is no record, and why it could not be one."""
    if not options.non_record:
        return []
    reasons = []
    for what, name in (("training", "train_ms"), ("evaluation", "eval_ms")):
        longest = max(group.values(name), default=0) / 1e3
        if longest > verify.BUDGET_SECONDS:
            reasons.append(f"{what} took {longest:.0f} s, over the {verify.BUDGET_SECONDS} s of a record")
    if group.runs[0].data.get("published") != "1":
        reasons.append("it was not scored on the published validation set")
    if len(group.finished) < verify.SEEDS_OF_A_RECORD:
        reasons.append(f"it has {len(group.finished)} of {verify.SEEDS_OF_A_RECORD} seeds")
    if "H100" not in hardware(group.runs[0]):
        reasons.append(f"it ran on {hardware(group.runs[0])}, not on 8 x H100")
    why = "; ".join(reasons) or "its author entered it so"
    return [f"**This is no record**, and was made with `--non-record`: {why}."]


def run_words(run: RunLog, environment: dict[str, str], options: argparse.Namespace) -> str:
    """How to run the folder, and the command of one seed in full."""
    values = run_environment(run, environment)
    words = [f"{name}={shlex.quote(portable(value) if name in PLACES else value)}" for name, value in sorted(values.items())]
    lines = [" ".join(words[i: i + 4]) for i in range(0, len(words), 4)]
    command = " \\\n      ".join([*lines, f"SEED=$SEED {launch_words(options)} train_gpt.py"])
    return (f"    pip install -r requirements.txt\n    bash run.sh        # all seeds\n    bash run.sh {run.seed}      # one seed\n\n"
            f"It is this command, for each seed:\n\n    {command}")


def launch_words(options: argparse.Namespace) -> str:
    """The launcher by its name, without the folder that it has on this machine."""
    words = options.launcher or ["python3"]
    return shlex.join([Path(words[0]).name, *words[1:]])


# ======================================================================================================================
# The folder
# ======================================================================================================================


def counted_code(runs: Sequence[RunLog], code: Path) -> dict[str, bytes]:
    """The files that the runs counted, train_gpt.py packed by its own --pack where it ran readable, and then that source too.

    Refused unless they are, to the byte, what every log says.
    """
    files = {name: (code / name).read_bytes() for name in {name for run in runs for name in run.code} if (code / name).is_file()}
    source, rows = files.get(verify.CODE_FILE), [run.code.get(verify.CODE_FILE, {}) for run in runs]
    if source is not None and {row.get("source_sha256") for row in rows} == {hashlib.sha256(source).hexdigest()}:
        files |= {verify.CODE_FILE: packed(code, source), f"source/{verify.CODE_FILE}": source}
    elif (code / "source" / verify.CODE_FILE).is_file():
        files[f"source/{verify.CODE_FILE}"] = (code / "source" / verify.CODE_FILE).read_bytes()
    for run in runs:
        for name, row in run.code.items():
            have = hashlib.sha256(files[name]).hexdigest() if name in files else "missing"
            if have != row["sha256"]:
                hashes = f"sha256 {have[:12]}, in the log {row['sha256'][:12]}"
                raise Refused(f"{code / name} is not the code of {run.path.name} ({hashes}): name the folder that has it with --code, or "
                              "run the seeds again")
    return files


@lru_cache(maxsize=1)
def packed(code: Path, source: bytes) -> bytes:
    """What the train_gpt.py of a folder, whose bytes are `source`, packs itself into."""
    return subprocess.run([sys.executable, verify.CODE_FILE, "--pack"], cwd=code, capture_output=True, check=True).stdout


def fill(folder: Path, group: Group, environment: dict[str, str], options: argparse.Namespace) -> None:
    """Put everything into the empty `folder`; Refused if the result breaks a rule."""
    for run in group.runs:
        shutil.copyfile(run.path, folder / f"train_seed{run.seed}.log")
        if options.with_artifacts:
            if not (artifact := run.path.with_suffix(".artifact")).is_file():
                raise Refused(f"no artifact beside {run.path}, and --with-artifacts asks for it")
            shutil.copyfile(artifact, folder / f"train_seed{run.seed}.artifact")
    for file in CODE:
        if (options.code / file).is_file():
            shutil.copy2(options.code / file, folder)
    if (options.code / "tokenizers").is_dir():
        shutil.copytree(options.code / "tokenizers", folder / "tokenizers")
    for name, data in counted_code(group.runs, options.code).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    script = folder / "run.sh"
    script.write_text(run_script(group, environment, options), encoding="utf-8")
    script.chmod(0o755)
    told = submission(group, options)
    (folder / "submission.json").write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    results = verify.check_folder(verify.open_folder(folder))
    results += [verify.Result(verify.UNKNOWN, rule, "needs data and the code: `tools/verify.py FOLDER --data SHARDS --run`")
                for rule in verify.CODE_RULES]
    failed = [f"{result.rule}: {result.detail}" for result in results if result.status == verify.FAIL]
    if failed:
        raise Refused("these runs make no record:\n  " + "\n  ".join(failed))
    draw([Group(options.slug, group.runs)], folder)
    (folder / "README.md").write_text(readme(group, results, environment, options), encoding="utf-8")


def draw(groups: list[Group], folder: Path) -> None:
    """plot.png and report.html, where matplotlib is installed."""
    try:
        logs.plot(groups, folder / "plot.png")
        logs.report(groups, folder / "report.html")
    except ValueError as error:
        print(f"warning: no plots in the folder: {error}", file=sys.stderr)


def make_record(options: argparse.Namespace) -> Path:
    """The new folder; Refused with the reasons if there must not be one."""
    environment = read_environment(options.env)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if not options.non_record and len(set(seeds)) < verify.SEEDS_OF_A_RECORD:
        raise Refused(f"a record needs {verify.SEEDS_OF_A_RECORD} seeds, here are {sorted(set(seeds))}; --non-record makes a folder "
                      "that is no record")
    if options.env is not None:
        run_seeds(seeds, environment, options)
    group = Group(options.slug, collect(seeds, options.runs))
    track = options.records / track_of(options)
    target = track / f"{date_of(group)}_{options.slug}"
    if target.exists():
        raise Refused(f"{target} exists and is not overwritten; choose another --slug")
    track.mkdir(parents=True, exist_ok=True)
    options.staging = Path(tempfile.mkdtemp(prefix=f".{options.slug}.", dir=track))
    try:
        fill(options.staging, group, environment, options)
        options.staging.chmod(0o755)
        options.staging.rename(target)
    finally:
        shutil.rmtree(options.staging, ignore_errors=True)
    return target


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    given = list(sys.argv[1:] if arguments is None else arguments)
    launcher: list[str] = []
    if "--" in given:
        at = given.index("--")
        given, launcher = given[:at], given[at + 1:]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slug", required=True, help="last part of the folder's name: letters, digits, _ and -")
    parser.add_argument("--seeds", default="0,42,1234", help="default 0,42,1234")
    parser.add_argument("--env", type=Path, help="file of NAME=VALUE lines; runs the seeds that are not in --runs yet")
    parser.add_argument("--runs", type=Path, help="folder of logs and artifacts (default runs/SLUG)")
    parser.add_argument("--non-record", action="store_true", help="the other track: no limits of time, data or seeds")
    parser.add_argument("--with-artifacts", action="store_true", help="put the artifacts into the folder too")
    parser.add_argument("--base", type=Path, help="record folder to compare with")
    parser.add_argument("--name", default="", help="title (default: the slug)")
    parser.add_argument("--blurb", default="", help="a sentence or two for README and submission.json")
    parser.add_argument("--news", type=Path, help="Markdown file for the section 'What is new'")
    parser.add_argument("--author", default="", help="for submission.json")
    parser.add_argument("--github-id", default="", help="for submission.json")
    parser.add_argument("--prepare", default="", help="command that run.sh calls where the data is missing")
    parser.add_argument("--code", type=Path, default=ROOT, help="folder of the code (default: this repository)")
    parser.add_argument("--records", type=Path, default=ROOT / "records", help="folder of the tracks")
    options = parser.parse_args(given)
    if not re.fullmatch(r"\w[\w-]*", options.slug):
        parser.error("--slug may have letters, digits, _ and -")
    if not re.fullmatch(r"\d+(,\d+)*", options.seeds):
        parser.error("--seeds are whole numbers with commas between")
    options.launcher = launcher
    options.runs = options.runs or Path("runs") / options.slug
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 if it was refused, 2 for a mistake of the user."""
    logs.print_anything()
    options = parse_arguments(arguments)
    try:
        target = make_record(options)
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # noqa: BLE001  whatever a damaged log can provoke is no traceback
        print(f"error: no folder can be made of these runs: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return 2
    print(logs.headline(logs.read_group(str(target))))
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
