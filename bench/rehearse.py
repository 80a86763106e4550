"""The dress rehearsal of a record run on a machine without a GPU, and the plan of a whole run.

    bash bench/rehearse.sh [PART...] [NAME=VALUE...]       every part at the record's size on a null CUDA device; see the script
    python bench/rehearse.py plan --gpus 8 [--lengths FILE | --data FOLDER] [--published] [--env FILE] [NAME=VALUE...]

    steps        the warm-up as a run does it, a training step at depths 1, 3 and 4, the optimizer
    evaluate     plain evaluation
    quantize     Hessians, GPTQ, the artifact packed and read again
    ttt_window   a batch of documents with windowed test-time training
    ttt_cache    the same with kept keys and values, captured as CUDA graphs
    sgd          global SGD
    checkpoint   a checkpoint, and a second trainer that resumes from it
    ranks        two ranks over NCCL: the same collectives in the same order
    gpu_NAME     (by name only; gpu for all) a part of bench/gpu.py, not the run: does it get to its end
    depth        (by name only) one step, REHEARSE_DEPTH=4
    mix_order    (by name only) Inductor's mix-order reductions on and off

What the null device is: bench/null_cuda/null_cuda.cpp. torch, Inductor, Triton and ptxas are the real ones for an H100, only
the arithmetic is left out. So the table shows what would fault there, compile late, wait, spill or not fit. Its milliseconds
are reckoned (bench/reckon.py), with FlashAttention 2, and attention's bytes are not in its GB.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import null_hopper  # noqa: E402
import reckon  # noqa: E402
import train_gpt as g  # noqa: E402

PARTS = ("steps", "evaluate", "quantize", "ttt_window", "ttt_cache", "sgd", "checkpoint", "ranks")
GPU_PARTS = ("gpu_checks", "gpu_steps", "gpu_kernels", "gpu_ttt", "gpu_ttt_cache", "gpu_quantize")
ONLY_BY_NAME = (*GPU_PARTS, "depth", "mix_order")
PEAK_LIMIT_GB = 75.0  # of the 80 that an H100 has

# ------------------------------------------------------------------------------------------------------------------ plan


def read_settings(file: Path | None, words: list[str]) -> dict[str, str]:
    """NAME=VALUE lines of a file, then those of the command line; a warning for a name that looks misspelt."""
    lines = [] if file is None else file.read_text().splitlines()
    lines = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")] + words
    if wrong := [line for line in lines if "=" not in line]:
        raise ValueError(f"{wrong[0]!r} is no NAME=VALUE")
    settings = dict(line.split("=", 1) for line in lines)
    for found, meant in g.misspelt_settings(settings):
        print(f"warning: {found} is no setting; did you mean {meant}? It has no effect")
    return settings


def plan_table(parts: list[reckon.Part], world: int) -> str:
    """Each part's seconds and each rank's share of them."""
    lines = ["| part | seconds | of each rank | |", "|---|---|---|---|"]
    for part in parts:
        same = max(part.ranks) - min(part.ranks) < 0.05
        ranks = f"all {world} the same" if same else " ".join(f"{seconds:.1f}" for seconds in part.ranks)
        lines.append(f"| {part.name} | {part.seconds:.1f} | {ranks} | {part.note} |")
    return "\n".join(lines)


def plan(options: argparse.Namespace) -> int:
    """Print the plan; 3 if it is over a budget."""
    settings = read_settings(options.env, options.settings)
    cfg = g.Config.from_env(settings)
    if options.data:
        lengths = reckon.lengths_of_data(replace(cfg, data_path=str(options.data)))
    else:
        lengths = reckon.read_lengths(options.lengths) if options.lengths else reckon.made_up_lengths()
    world, source = options.gpus, options.data or options.lengths or "made up by formula"
    print(f"{world} GPUs; {len(lengths)} documents, {lengths.sum()} tokens, the longest {lengths[0]} ({source})")
    training = reckon.training_parts(cfg, world, options.published)
    plans = reckon.published_plan(cfg, lengths, world) if options.published else g.plan_ttt(cfg, lengths, world)
    testing = reckon.ttt_parts(cfg, lengths, plans, world) if cfg.ttt_enabled else []
    plain = reckon.forward_seconds(cfg, int(lengths.sum()), world)
    peak_gb = reckon.training_gb(cfg, world, reckon.PUBLISHED_MEMORY_VISIT_GB if options.published else reckon.MEMORY_VISIT_GB)
    peak_gb = max(peak_gb, reckon.ttt_gb(cfg)) if testing and not options.published else peak_gb  # logged: while it trained
    ttt = sum(part.seconds for part in testing)
    aside = reckon.Part("plain evaluation" + ", on no clock" * bool(testing), plain, (plain,) * world)
    print(plan_table([*training, aside, *testing], world))
    total = {"train_ms": sum(part.seconds for part in training[:-1]), "hessians_ms": training[-1].seconds, "ttt_ms": ttt,
             "eval_ms": ttt if testing else plain}
    words = [f"{name}:{1e3 * seconds:.0f}" for name, seconds in total.items()]
    print("plan", *words, f"peak_mb:{1e3 * peak_gb:.0f}")
    over = cfg.eval_budget_seconds and total["eval_ms"] > cfg.eval_budget_seconds
    return g.EXIT_OVER_LIMIT if over else 0


# ------------------------------------------------------------------------------------------------------------- rehearsal


def run_part(part: str, settings: dict[str, str], out: Path) -> list[dict]:
    """The rows of a part with these settings, run in a process of its own on the null device; a fault is a row as well."""
    command = [sys.executable, str(Path(__file__).with_name("rehearse_parts.py")), part, str(out)]
    file, began = out / f"{part}.json", time.perf_counter()
    file.unlink(missing_ok=True)
    with (out / f"{part}.txt").open("w") as log:
        env = {**os.environ, **null_hopper.environment(), "REHEARSE_SETTINGS": json.dumps(settings)}
        status = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
    rows = json.loads(file.read_text()) if file.exists() else []
    if status:
        lines = [line for line in (out / f"{part}.txt").read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Invalid\w*|Unsupported\w*)\b", line)]
        rows.append({"part": part, "fault": (errors or lines or [f"exit status {status}"])[-1][:200]})
    print(f"{part}: {time.perf_counter() - began:.0f} s, {'see ' + str(out / part) + '.txt' if status else 'ok'}", flush=True)
    return rows


def failed(row: dict) -> str:
    """What is wrong with a row; empty if nothing."""
    wrong = [row["fault"]] if row["fault"] else []
    wrong += [f"{row[name]} {what}" for name, what in (("breaks", "graph breaks"), ("late", "late graphs")) if row.get(name)]
    wrong += [f"{row['peak_gb']:.1f} GB"] if row.get("peak_gb", 0.0) >= PEAK_LIMIT_GB else []
    return "; ".join(wrong)


def rehearsal_table(rows: list[dict]) -> str:
    """One line a row."""
    lines = ["| part | ok? | graphs | breaks | late | host waits | launches | GB | registers/spilled bytes | GB allocated, taken | "
             "modelled ms | |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if "graphs" not in row:
            lines.append(f"| {row['part']} | **{row['fault']}** |" + " |" * 10)
            continue
        built = " ".join(f"{registers}/{spilled}" for _, _, registers, spilled in row["built"])
        cells = [row["part"], f"**{failed(row)}**" if failed(row) else "ok", row["graphs"], row["breaks"], row["late"], row["waits"],
                 row["launches"], f"{row['gigabytes']:.1f}", built, f"{row['allocated_gb']:.1f}, {row['peak_gb']:.1f}",
                 f"{row['ms']:.1f}", row["note"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def details(rows: list[dict]) -> str:
    """Of every row with a model: its launches by kind, and its largest kernels."""
    lines = []
    for row in rows:
        if not row.get("groups"):
            continue
        lines += ["", f"{row['part']}: {row['ms']:.1f} ms, {row['gigabytes']:.1f} GB", ""]
        lines += ["| kind | launches | GB | modelled ms |", "|---|---|---|---|"]
        lines += [f"| {kind} | {n} | {size / 1e9:.1f} | {1e3 * seconds:.2f} |" for kind, (n, size, seconds) in row["groups"].items()]
        lines += [""] + [f"    {size / 1e6:5.0f} MB, {registers} registers, {spilled} bytes spilled: {name}"
                         for name, size, registers, spilled in row["built"]]
    return "\n".join(lines)


def rehearse(options: argparse.Namespace) -> int:
    """Run the parts, print and write the table; 1 if a row is not as it must be.

    Raises:
        ValueError: a word is neither a part nor a setting.
    """
    settings = read_settings(None, [word for word in options.words if "=" in word])
    g.Config.from_env(settings)
    words = [word for word in options.words if "=" not in word] or PARTS
    parts = [part for word in words for part in (GPU_PARTS if word == "gpu" else (word,))]
    if unknown := set(parts) - {*PARTS, *ONLY_BY_NAME}:
        raise ValueError(f"{sorted(unknown)[0]!r} is no part: {', '.join([*PARTS, *ONLY_BY_NAME, 'gpu'])}")
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [row for part in parts for row in run_part(part, settings, options.out.resolve())]
    table = rehearsal_table(rows)
    (options.out / "table.md").write_text(f"{table}\n{details(rows)}\n")
    print(f"\n{table}\n\nby kind of launch, with the largest kernels: {options.out / 'table.md'}")
    return int(any(failed(row) for row in rows))


# ------------------------------------------------------------------------------------------------------------------ main


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="the rehearsal, on the null CUDA device")
    running.add_argument("words", nargs="*", metavar="PART|NAME=VALUE",
                         help=f"parts ({', '.join([*PARTS, *ONLY_BY_NAME, 'gpu'])}) and settings of train_gpt.py")
    running.add_argument("--out", type=Path, default=Path("runs/rehearsal"), help="folder for logs, launches and the table")
    planning = commands.add_parser("plan", help="what a whole run takes, in seconds, on a CPU")
    planning.add_argument("--gpus", type=int, default=8, help="ranks, one a GPU")
    where = planning.add_mutually_exclusive_group()
    where.add_argument("--lengths", type=Path, help="JSON of document lengths; without it they are made up by formula")
    where.add_argument("--data", type=Path, help="folder of shards whose validation documents are counted")
    planning.add_argument("--published", action="store_true", help="the published code's own batching, to check the model")
    planning.add_argument("--env", type=Path, help="file of NAME=VALUE settings")
    planning.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="settings of train_gpt.py")
    options = parser.parse_args(arguments)
    try:
        return plan(options) if options.command == "plan" else rehearse(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return g.EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
