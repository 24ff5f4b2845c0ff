"""Collect runs into results/, and draw the figures from what is there.

    python results/draw.py runs/ALE-Pong-v5__*         # add these runs' rows and curves, then draw
    python results/draw.py                             # draw only

A row of atari.csv is a run's summary.json with the command that made it; a curve is what the run logged to TensorBoard,
in curves/. A run that is there already is replaced.
"""

import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
LOGGED = {
    "charts/episodic_return": "return",
    "losses/entropy": "entropy",
    "labels/used": "labels",
    "labels/ties": "ties",
    "reward_model/accuracy_heldout": "accuracy_heldout",
    "reward_model/correlation": "correlation",
}


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="")
        writer.writeheader()
        writer.writerows(rows)


def collect(run_dir: Path) -> None:
    """Add a run's row to atari.csv and its curves, a point per 20,000 steps, to curves/<run>.csv."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = json.loads((run_dir / "args.json").read_text())
    row = json.loads((run_dir / "summary.json").read_text())
    row |= {"run": run_dir.name, "hardware": run["hardware"], "command": re.sub(r" --runs-dir \S+", "", run["command"])}
    table = HERE / "atari.csv"
    rows = [old for old in (read_csv(table) if table.exists() else []) if old["run"] != run_dir.name]
    write_csv(table, [*rows, row])
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    points: dict[int, dict] = defaultdict(lambda: defaultdict(dict))
    for tag, name in LOGGED.items():
        for event in events.Scalars(tag) if tag in events.Tags()["scalars"] else []:
            points[-(-event.step // 20_000) * 20_000][name][event.step] = (
                event.value
            )  # a later one replaces a resumed one's
    curve = [
        {"step": step, **{n: round(float(np.mean(list(point[n].values()))), 4) for n in LOGGED.values() if point[n]}}
        for step, point in sorted(points.items())
    ]
    fill = dict.fromkeys(("step", *LOGGED.values()), "")
    write_csv(HERE / "curves" / f"{run_dir.name}.csv", [fill | point for point in curve])


def draw_atari() -> None:
    """Per game: return, held-out accuracy and correlation of the reward model, and entropy, over steps."""
    rows = read_csv(HERE / "atari.csv")
    for env_id in sorted({row["env_id"] for row in rows}):
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
        for row in (row for row in rows if row["env_id"] == env_id):
            path = HERE / "curves" / f"{row['run']}.csv"
            if not path.exists():
                continue
            curve = read_csv(path)
            label = row["feedback"] + (f", {int(row['labels_used']):,} labels" if row["labels"] != "0" else "")
            label += "" if row["ablation"] == "none" else f", {row['ablation']}"
            colour = "C1" if row["feedback"] == "true-reward" else "C0"

            def line(ax, name, curve=curve, **style):
                xy = [(int(p["step"]) / 1e6, float(p[name])) for p in curve if p[name] not in ("", "nan")]
                if xy:
                    ax.plot(*zip(*xy, strict=True), linewidth=1.2, **style)

            line(axes[0], "return", color=colour, label=f"{label}, seed {row['seed']}")
            line(axes[1], "accuracy_heldout", color=colour)
            line(axes[1], "correlation", color=colour, linestyle=":")
            line(axes[2], "entropy", color=colour)
        axes[0].set_ylabel("return of training episodes (true score)")
        axes[0].legend(fontsize=8)
        axes[1].set_ylabel("held-out accuracy (line), correlation (dots)")
        axes[2].set_ylabel("policy entropy")
        for ax in axes:
            ax.set_xlabel("million agent steps")
            ax.grid(alpha=0.3)
        figure.suptitle(env_id)
        out = HERE / f"{env_id.replace('/', '-')}.png"
        figure.savefig(out, dpi=120)
        plt.close(figure)
        print(out)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        collect(Path(argument))
    draw_atari()
