"""The dress rehearsal of a record run on a machine without a GPU, and the plan of a whole run.

    python bench/rehearse.py plan --gpus 8 [--lengths FILE | --data FOLDER] [--published] [--env FILE] [NAME=VALUE...]
"""
from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import reckon  # noqa: E402
import train_gpt as g  # noqa: E402

# ------------------------------------------------------------------------------------------------------------------ plan


def read_settings(file: Path | None, words: list[str]) -> dict[str, str]:
    """NAME=VALUE lines of a file, then those of the command line."""
    lines = [] if file is None else file.read_text().splitlines()
    lines = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")] + words
    if wrong := [line for line in lines if "=" not in line]:
        raise ValueError(f"{wrong[0]!r} is no NAME=VALUE")
    return dict(line.split("=", 1) for line in lines)


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
    for found, meant in g.misspelt_settings(settings):
        print(f"warning: {found} is no setting; did you mean {meant}? It has no effect")
    if options.data:
        lengths = reckon.lengths_of_data(replace(cfg, data_path=str(options.data)))
    else:
        lengths = reckon.read_lengths(options.lengths) if options.lengths else reckon.made_up_lengths()
    world, source = options.gpus, options.data or options.lengths or "made up by formula"
    print(f"{world} GPUs; {len(lengths)} documents, {lengths.sum()} tokens, the longest {lengths[0]} ({source})")
    training = reckon.training_parts(cfg, world)
    plans = reckon.published_plan(cfg, lengths, world) if options.published else g.plan_ttt(cfg, lengths, world)
    testing = reckon.ttt_parts(cfg, lengths, plans, world) if cfg.ttt_enabled else []
    plain = reckon.forward_seconds(cfg, int(lengths.sum()), world)
    visit_gb = reckon.PUBLISHED_MEMORY_VISIT_GB if options.published else reckon.MEMORY_VISIT_GB
    ttt = sum(part.seconds for part in testing)
    aside = reckon.Part("plain evaluation" + ", on no clock" * bool(testing), plain, (plain,) * world)
    print(plan_table([*training, aside, *testing], world))
    total = {"train_ms": sum(part.seconds for part in training[:-1]), "hessians_ms": training[-1].seconds, "ttt_ms": ttt,
             "eval_ms": ttt if testing else plain}
    words = [f"{name}:{1e3 * seconds:.0f}" for name, seconds in total.items()]
    print("plan", *words, f"peak_mb:{1e3 * reckon.peak_gb(cfg, world, visit_gb):.0f}")
    over = cfg.eval_budget_seconds and total["eval_ms"] > cfg.eval_budget_seconds
    return g.EXIT_OVER_LIMIT if over else 0


# ------------------------------------------------------------------------------------------------------------------ main


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
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
        return plan(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return g.EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
