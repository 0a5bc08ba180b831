"""The curves of "echo the key": the true score over the steps, by its rule and by a reward model, for several seeds.

    python tools/echo_curves.py [--seeds 1 2 3] [--output docs/images/echo.png]

runs examples/echo's files as they stand, but for folder and seed: ppo.yaml, whose reward is the rule, and reward.yaml
with chain.yaml behind it, whose reward is a model of pairs. A minute and a half a seed on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy
from make_echo_task import KEYS, WORDS, make, score
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "echo"
WINDOW = 10  # steps of a mean
TITLES = {"ppo": "by the rule (best: 1.5)", "chain": "by a reward model of pairs, critic from it"}


def main() -> None:
    """Runs, draws, and says the best mean of ten steps of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "echo.png")
    options = parser.parse_args()
    curves: dict[str, dict[int, list[float]]] = {name: {} for name in TITLES}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make(folder, num_prompts=512, num_pairs=6000, seed=seed)
            for stage in ("ppo", "reward", "chain"):
                subprocess.run(command(stage, folder, seed=seed), check=True, stdout=subprocess.DEVNULL)
            curves["ppo"][seed] = [json.loads(line)["score_mean"] for line in (folder / "ppo/metrics.jsonl").open()]
            curves["chain"][seed] = true_scores(folder / "chain")
        for stage, of_seed in curves.items():
            print(
                f"{stage}, seed {seed}: {of_seed[seed][0]:.3f} at the first step, best mean {best(of_seed[seed]):.3f}"
            )
    draw(curves).savefig(options.output, dpi=110, facecolor="white")
    print(f"wrote {options.output}")


def command(stage: str, folder: Path, *, seed: int) -> list[str]:
    """That runs one of the examples in `folder`."""
    text = (EXAMPLES / f"{stage}.yaml").read_text(encoding="utf-8").replace("runs/echo", str(folder))
    path = folder / f"{stage}.yaml"
    path.write_text(text, encoding="utf-8")
    dumps = ["ppo.dump_rollouts=true"] if stage == "chain" else []
    return [sys.executable, "-m", "megatron_xy", "run", str(path), "--nproc-per-node", "4", f"seed={seed}", *dumps]


def true_scores(run_dir: Path) -> list[float]:
    """The mean of the rule over each step's answers, from the run's dumped rollouts."""
    return [_true_mean(load_file(path)) for path in sorted((run_dir / "rollouts").glob("*.safetensors"))]


def best(scores: Sequence[float]) -> float:
    """The highest mean of ten steps in a row."""
    return float(numpy.convolve(scores, numpy.ones(WINDOW) / WINDOW, "valid").max())


def draw(curves: dict[str, dict[int, list[float]]]) -> Figure:
    """Two panels; thin: steps, thick: means of ten."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (stage, of_seed) in zip(figure.subplots(1, 2, sharey=True), curves.items(), strict=True):
        for number, (seed, scores) in enumerate(of_seed.items()):
            axes.plot(range(1, len(scores) + 1), scores, color=f"C{number}", linewidth=0.6, alpha=0.5)
            means = numpy.convolve(scores, numpy.ones(WINDOW) / WINDOW, "valid")
            axes.plot(range(WINDOW, len(scores) + 1), means, color=f"C{number}", linewidth=2, label=f"seed {seed}")
        axes.set_title(TITLES[stage], loc="left")
        axes.set_xlabel("step")
        axes.set_ylim(0, 1.6)
        axes.grid(axis="y", color="#dddddd")
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("true score, mean of 64 answers")
    return figure


def _true_mean(rollouts: dict[str, Tensor]) -> float:
    mask = rollouts["response_mask"].bool()
    total = 0.0
    for tokens, is_said in zip(rollouts["tokens"], mask, strict=True):
        prompt, said = _words(tokens[: -len(is_said)]), _words(tokens[-len(is_said) :][is_said])
        assert prompt[0] in KEYS, "a prompt begins with its key"
        total += score(prompt[0], said)
    return total / len(mask)


def _words(tokens: Tensor) -> list[str]:
    """What a text of them holds: all but the special ones."""
    return [WORDS[token - 1] for token in tokens.tolist() if 1 <= token <= len(WORDS)]


if __name__ == "__main__":
    main()
