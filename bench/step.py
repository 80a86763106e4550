"""The training step of this checkout and of another, side by side on this CPU: seconds of forward and backward, alternating.

    python bench/step.py OTHER [--settings tools/small.env] [--depths 1,4] [--rounds 6]

OTHER is a checkout, or the path of its train_gpt.py. Same first weights, same tokens; the losses must agree to 1e-5.
"""
from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
TOKENS, SEGMENT = 4096, 256


def load(name: str, path: Path) -> ModuleType:
    """A train_gpt.py as a module of its own; the name is also the namespace of its operators."""
    spec = importlib.util.spec_from_file_location(name, path / "train_gpt.py" if path.is_dir() else path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stepper(g: ModuleType, settings: dict[str, str]) -> Callable[[int], tuple[float, float]]:
    """A function from a depth to the seconds of one forward and backward, and its loss."""
    cfg = g.Config.from_env(settings)
    model = g.GPT(cfg)
    model.init_weights(cfg.seed)
    text = np.random.default_rng(0).integers(g.BOS_ID + 1, cfg.vocab_size, TOKENS + 1)
    batch = g.make_batch(text[:-1], text[1:], np.arange(0, TOKENS, SEGMENT), SEGMENT, torch.device("cpu"))

    def step(depth: int) -> tuple[float, float]:
        began = time.perf_counter()
        loss = model(batch, g.loop_schedule(cfg, depth)).mean()
        loss.backward()
        took = time.perf_counter() - began
        model.zero_grad()
        return took, loss.item()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--settings", type=Path, default=ROOT / "tools" / "small.env")
    parser.add_argument("--depths", default="1,4")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    lines = [line for line in options.settings.read_text().splitlines() if line and not line.startswith("#")]
    settings = dict(line.split("=", 1) for line in lines)
    steps = {"other": stepper(load("other_train_gpt", options.other), settings), "this": stepper(load("this_train_gpt", ROOT), settings)}
    status = 0
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {TOKENS} tokens")
    for depth in map(int, options.depths.split(",")):
        losses = [step(depth)[1] for step in steps.values()]  # the first call is not timed
        took = {name: [] for name in steps}
        for _ in range(options.rounds):
            for name, step in steps.items():
                took[name].append(step(depth)[0])
        ratio = statistics.median(a / b for a, b in zip(took["this"], took["other"]))
        status |= abs(losses[0] - losses[1]) > 1e-5
        print(f"depth:{depth} this_s:{statistics.median(took['this']):.3f} other_s:{statistics.median(took['other']):.3f} "
              f"ratio:{ratio:.3f} losses:{losses[0]:.6f},{losses[1]:.6f}")
    return status


if __name__ == "__main__":
    sys.exit(main())
