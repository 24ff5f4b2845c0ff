"""Collect runs into results/, and draw the figures from what is there.

    python results/draw.py runs/ALE-Pong-v5__* runs/Hopper-v5__*/random   # add these rows and curves, then draw
    python results/draw.py table.csv chart.csv                            # the same of runs that W&B exported
    python results/draw.py                                                # draw only

A row of atari.csv or mujoco.csv is a run's summary.json with the command that made it, or that of the random policy's
evaluation; a curve is what the run logged to TensorBoard, in curves/. A run that is there already is replaced. W&B
exports two kinds of CSV: its table of runs, which gives rows, and the chart of charts/episodic_return over global_step,
which gives curves. The runs that are named on the command line are drawn thick and black.

paper_figures.csv holds the paper's own curves (Figures 2, 3, 5 and 6), 21 points each, read off the images of its
figures pixel by pixel; about 1 % of the axis, worse where curves overlap, empty where one is hidden.
"""

import argparse
import csv
import json
import math
import re
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
        writer = csv.DictWriter(file, max(rows, key=len), restval="")
        writer.writeheader()
        writer.writerows(rows)


def add_row(table: Path, row: dict) -> None:
    """Into a table, in place of what it has of the same run."""
    rows = [old for old in (read_csv(table) if table.exists() else []) if old["run"] != row["run"]]
    write_csv(table, [*rows, row])


def write_curve(run: str, columns: dict[str, dict[int, float]]) -> None:
    """curves/<run>.csv: a point per 20,000 steps, the mean of the values of each column by step.

    A rest of under half as many steps joins the last point: of its own it would be the mean of a few episodes.
    """
    end = 20_000 * max(1, round(max(step for values in columns.values() for step in values) / 20_000))
    points: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, values in columns.items():
        for step, value in values.items():
            points[min(-(-step // 20_000) * 20_000, end)][name].append(value)
    rows = [
        dict.fromkeys(("step", *LOGGED.values()), "")
        | {"step": at}
        | {name: round(float(np.mean(values)), 4) for name, values in point.items()}
        for at, point in sorted(points.items())
    ]
    write_csv(HERE / "curves" / f"{run}.csv", rows)


def collect(folder: Path, table: str | None = None, **columns) -> set[str]:
    """Add a run's row to its table, and its curves to curves/<run>.csv. Out: its name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    random = folder.name == "random"  # what --evaluate RUN --random left
    run_dir = folder.parent if random else folder
    run = json.loads((run_dir / "args.json").read_text())
    row = json.loads((folder / "summary.json").read_text())
    if not random and not row["finished"]:
        print(f"{folder} was stopped after {row['global_step']:,} steps: it is drawn, and counts in no table")
    command = f"python {run['script']}.py --evaluate {run_dir.name} --random" if random else run["command"]
    command = re.sub(r" --runs-dir \S+", "", command)
    row |= {"run": f"{run_dir.name}{'/random' * random}", "hardware": run["hardware"], "command": command} | columns
    add_row(HERE / (table or ("mujoco.csv" if "mujoco" in run["script"] else "atari.csv")), row)
    if random:
        return {row["run"]}
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    logged = {name: events.Scalars(tag) for tag, name in LOGGED.items() if tag in events.Tags()["scalars"]}
    # A resumed run logs some steps twice: the later value counts
    write_curve(run_dir.name, {name: {e.step: e.value for e in values} for name, values in logged.items()})
    return {row["run"]}


def collect_export(path: Path) -> set[str]:
    """Add what W&B exported: rows from its table of runs, or curves from a chart of the return. Out: runs' names."""
    rows = read_csv(path)
    if not rows:
        raise ValueError("it has no rows")
    if "Name" in rows[0] and "script" in rows[0]:
        rows = [row for row in rows if row["script"]]  # else it has not ended yet: its summary is missing
        for row in rows:
            table = HERE / ("mujoco.csv" if "mujoco" in row["script"] else "atari.csv")
            kept = {name: row.get(name, "") for name in read_csv(table)[0]}
            kept |= {"run": row["Name"], "command": "exported from W&B", "finished": row["finished"].capitalize()}
            add_row(table, kept)
        return {row["Name"] for row in rows}
    charts = [name for name in rows[0] if name.endswith(" - charts/episodic_return")]
    if "global_step" not in rows[0] or not charts:
        raise ValueError("neither W&B's table of runs nor its chart of charts/episodic_return over global_step")
    for name in charts:
        values = {int(float(row["global_step"])): float(row[name]) for row in rows if row[name]}
        write_curve(name.removesuffix(" - charts/episodic_return"), {"return": values})
    return {name.removesuffix(" - charts/episodic_return") for name in charts}


PAPER_TASKS = {  # without InvertedPendulum, whose reward and length the paper does not give, and Enduro, where all fail
    "Walker2d-v5": "walker",
    "Hopper-v5": "hopper",
    "Swimmer-v5": "swimmer",
    "HalfCheetah-v5": "cheetah",
    "Ant-v5": "ant",
    "Reacher-v5": "reacher",
    "InvertedDoublePendulum-v5": "dpend",
    "ALE/BeamRider-v5": "beamrider",
    "ALE/Breakout-v5": "breakout",
    "ALE/Pong-v5": "pong",
    "ALE/Qbert-v5": "qbert",
    "ALE/Seaquest-v5": "seaquest",
    "ALE/SpaceInvaders-v5": "spaceinv",
}


def paper_curve(figure: int, env_id: str, curve: str) -> tuple[list[float], list[float]]:
    """Share of the x axis, and score, of a curve in the paper."""
    points = [
        (float(row["fraction_of_x_axis"]), float(row["value"]))
        for row in read_csv(HERE / "paper_figures.csv")
        if (row["figure"], row["task"], row["curve"]) == (str(figure), PAPER_TASKS.get(env_id), curve) and row["value"]
    ]
    return [x for x, _ in points], [y for _, y in points]


PERFECT = {"teacher_beta": np.inf, "teacher_gamma": 1, "teacher_mistake": 0, "teacher_skip": 0, "teacher_equal": 0}


def imperfect(row: dict) -> list[str]:
    """The flags that made a run's teacher an imperfect one: such a run stands in no table of plain ones."""
    given = {name: row.get(name) for name in PERFECT if row.get(name)}
    return [f"{name.replace('_', ' ')} {value}" for name, value in given.items() if float(value) != PERFECT[name]]


def of_one_budget(rows: list[dict]) -> list[dict]:
    """Without the runs that have more or fewer steps than their task's last true-reward run."""
    steps = {row["env_id"]: row.get("total_timesteps") for row in rows if row["feedback"] == "true-reward"}
    return [row for row in rows if (own := row.get("total_timesteps")) in ("", None, steps.get(row["env_id"], own))]


def plain(rows: list[dict]) -> list[dict]:
    """The rows that a table may stand side by side."""
    return [row for row in of_one_budget(rows) if row["ablation"] in ("", "none") and not imperfect(row)]


def described(row: dict) -> str:
    """What paid a run's agent, for a legend."""
    if row["feedback"] == "true-reward":
        return "true reward"
    labels = f"{int(float(row.get('labels_used') or row['labels'])):,} labels"
    by = ["by people"] if row["feedback"] == "human" else []
    ablation = [] if row["ablation"] in ("", "none") else [row["ablation"]]
    return ", ".join([labels, *by, *ablation, *imperfect(row)])


NAMED = {"color": "k", "linewidth": 2.2, "zorder": 3}  # runs of the command line


def read_curve(run: str) -> list[dict]:
    path = HERE / "curves" / f"{run}.csv"
    return read_csv(path) if path.exists() else []


def plot_curve(ax, curve: list[dict], name: str, unit: float, **style) -> None:
    """A column of a run's curve over its steps in this unit; nothing where it was never logged."""
    xy = [(int(p["step"]) / unit, float(p[name])) for p in curve if p[name] not in ("", "nan")]
    if xy:
        ax.plot(*zip(*xy, strict=True), **style)


def plot_paper(ax, millions: int, curve: tuple[list[float], list[float]], **style) -> None:
    """A curve of the paper's, whose x axis ends at so many million steps; nothing where it has none."""
    points = [(millions * share, score) for share, score in zip(*curve, strict=True) if share]
    if points:
        ax.plot(*zip(*points, strict=True), "--", **style)


def task_axes(tasks: list[str], height: float):
    """A figure of so many axes, four to a row."""
    rows = math.ceil(len(tasks) / 4)
    figure, axes = plt.subplots(rows, 4, figsize=(15, height * rows), squeeze=False, layout="constrained")
    for ax in axes.flat[len(tasks) :]:
        ax.axis("off")
    return figure, axes


def legend_once(ax) -> None:
    """A legend with an entry per name, however many lines or bars have it."""
    handles = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    ax.legend(handles.values(), handles.keys(), fontsize=8)


def draw_atari(named: set[str]) -> None:
    """Per game: return, the paper's dashed, held-out accuracy and correlation of the reward model, and entropy."""
    rows = read_csv(HERE / "atari.csv")
    for env_id in sorted({row["env_id"] for row in rows}):
        figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
        colours = (f"C{i}" for i in range(10))
        for row in (row for row in rows if row["env_id"] == env_id):
            curve = read_curve(row["run"])
            if not curve:  # the random policy
                continue
            algorithm = row["script"].split("_")[0].upper()
            label = f"{algorithm}, {described(row)}, seed {row['seed']}, {row['commit']}"
            style = NAMED if row["run"] in named else {"color": next(colours), "linewidth": 1.2}
            plot_curve(axes[0], curve, "return", 1e6, label=label, **style)
            plot_curve(axes[1], curve, "accuracy_heldout", 1e6, **style)
            plot_curve(axes[1], curve, "correlation", 1e6, linestyle=":", **style)
            plot_curve(axes[2], curve, "entropy", 1e6, **style)
        for name, curve, colour in (("true reward", "RL", "0.3"), ("5,600 labels", "5.6k syn", "0.6")):
            plot_paper(axes[0], 50, paper_curve(3, env_id, curve), color=colour, label=f"the paper's A2C, {name}")
        axes[0].set_ylabel("return of training episodes (true score)")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        axes[1].set_ylabel("held-out accuracy (line), correlation (dots)")
        axes[2].set_ylabel("policy entropy")
        for ax in axes:
            ax.set_xlabel("million agent steps")
            ax.grid(alpha=0.3)
        axes[0].set_xscale("log")
        axes[0].set_xlim(0.02, 50)
        axes[0].set_xticks([0.02, 0.1, 0.5, 2, 10, 50], ["0.02", "0.1", "0.5", "2", "10", "50"])
        axes[0].minorticks_off()
        figure.suptitle(env_id)
        out = HERE / f"{env_id.replace('/', '-')}.png"
        figure.savefig(out, dpi=120)
        plt.close(figure)
        print(out)


# Labels -> mean over the paper's eight tasks of (score - random) / (true-reward score - random), 20M steps (Fig. 2)
PAPER_NORMALISED = {"350": 0.72, "700": 0.96, "1400": 1.04}
TASKS = [task for task in PAPER_TASKS if "ALE" not in task] + ["InvertedPendulum-v5"]
COLOURS = {"true-reward": "C1", "350": "C2", "700": "C0", "1400": "C3"}


def source(row: dict) -> str:
    return row["labels"] if row["feedback"] == "oracle" else row["feedback"]


def normalised_scores(rows: list[dict]) -> dict[str, dict[str, list[float]]]:
    """labels -> task -> a score per seed: 0 is the random policy's, 1 the mean of the true-reward runs'."""
    runs = defaultdict(list)
    for row in plain(rows):
        if row["final_return_mean"]:
            runs[row["env_id"], source(row)].append(float(row["final_return_mean"]))
    scores: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for (task, labels), returns in runs.items():
        zero, one = runs.get((task, "random")), runs.get((task, "true-reward"))
        if labels in PAPER_NORMALISED and zero and one:
            zero, one = np.mean(zero), np.mean(one)
            scores[labels][task] = [(score - zero) / (one - zero) for score in returns]
    return scores


def bootstrap_interval(per_task: list[list[float]], draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean over tasks, seeds drawn anew within each task."""
    rng = np.random.default_rng(0)
    means = sum(rng.choice(scores, (draws, len(scores))).mean(1) for scores in per_task) / len(per_task)
    return tuple(np.quantile(means, [0.025, 0.975]))


def draw_mujoco(named: set[str]) -> None:
    """Per task, the true return over steps, the paper's dashed; and the table of scores.

    Drawn are the baseline, the paper's numbers of labels, and whatever was named: any teacher, ablation and labels.
    """
    every = read_csv(HERE / "mujoco.csv")
    rows = plain(every)
    tasks = sorted({row["env_id"] for row in every})
    figure, axes = task_axes(tasks, 3.25)
    for ax, task in zip(axes.flat, tasks, strict=False):
        for row in (row for row in every if row["env_id"] == task and row["feedback"] != "random"):
            style = {"color": COLOURS.get(source(row)), "linewidth": 1.0, "label": described(row)}
            if row["run"] in named:
                style = NAMED | {"label": f"{described(row)}, seed {row['seed']}"}
            elif row not in rows or not style["color"]:
                continue
            plot_curve(ax, read_curve(row["run"]), "return", 1e6, **style)
        if ax.lines:
            legend_once(ax)
        for name, curve in (("true-reward", "real reward"), ("700", "700 syn")):
            plot_paper(ax, 20, paper_curve(2, task, curve), color=COLOURS[name], linewidth=1.0, alpha=0.6)
        steps = max(int(row["total_timesteps"] or 0) for row in every if row["env_id"] == task)
        ax.set_title(f"{task}, {steps / 1e6:.2g}M steps")
        ax.grid(alpha=0.3)
        ax.set_xscale("log")
        ax.set_xlim(0.02, 20)
        ax.set_xticks([0.02, 0.1, 0.5, 2, 20], ["0.02", "0.1", "0.5", "2", "20"])
        ax.minorticks_off()
        ax.set_xlabel("million steps (dashed: the paper's)")
    figure.savefig(HERE / "mujoco.png", dpi=110)
    plt.close(figure)
    print(HERE / "mujoco.png")

    missing = []
    print("\n| task | random | true reward | 350 labels | 700 labels | 1400 labels |\n|---|---|---|---|---|---|")
    for task in tasks:
        cells = []
        for name in ("random", "true-reward", "350", "700", "1400"):
            ended = [r for r in rows if r["final_return_mean"] and (r["env_id"], source(r)) == (task, name)]
            found = [f"{float(r['final_return_mean']):,.1f}" for r in ended]
            cells.append(", ".join(found) or "–")
            missing += [] if found else [f"{task} {name}"]
        print(f"| {task} | {' | '.join(cells)} |")
    missing += [f"all of {task}" for task in TASKS if task not in tasks]
    print(f"without a run: {', '.join(missing) or 'none'}")
    for labels, scores in sorted(normalised_scores(rows).items(), key=lambda item: int(item[0])):
        means = [np.mean(seeds) for seeds in scores.values()]
        low, high = bootstrap_interval(list(scores.values()))
        print(
            f"{labels} labels, {len(scores)} tasks: mean {np.mean(means):.2f} [{low:.2f}, {high:.2f}], clipped at 1.5 "
            f"{np.mean(np.minimum(means, 1.5)):.2f}, median {np.median(means):.2f}; paper, 8 tasks: "
            f"{PAPER_NORMALISED[labels]}"
        )


def print_teachers() -> None:
    """The scores of imperfect teachers' runs, beside those of as many right answers."""
    groups: dict[tuple[str, int], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in of_one_budget(read_csv(HERE / "mujoco.csv")):
        if row["feedback"] == "oracle" and row["ablation"] in ("", "none") and row["final_return_mean"]:
            teacher = ", ".join(imperfect(row)) or "no mistakes"
            groups[row["env_id"], int(row["labels"])][teacher].append(f"{float(row['final_return_mean']):,.1f}")
    for (task, labels), teachers in sorted(groups.items()):
        if teachers.keys() - {"no mistakes"}:
            for teacher, scores in teachers.items():
                print(f"{task}, {labels:,} labels, {teacher}: {', '.join(scores)}")


def draw_human() -> None:
    """Per task, the true return over steps and the labels over steps, of runs by --human and of the oracle's."""
    rows = read_csv(HERE / "human.csv")
    tasks = sorted({row["env_id"] for row in rows})
    figure, axes = plt.subplots(2, len(tasks), figsize=(5.5 * len(tasks), 6), squeeze=False, layout="constrained")
    for column, task in zip(axes.T, tasks, strict=True):
        for i, row in enumerate(row for row in rows if row["env_id"] == task):
            curve = read_curve(row["run"])
            for ax, name in zip(column, ("return", "labels"), strict=True):
                plot_curve(ax, curve, name, 1e6, color=f"C{i}", linewidth=1.2, label=row["labeller"])
                ax.set_ylabel("true return" if name == "return" else "labels")
                ax.set_xlabel("million steps")
                ax.grid(alpha=0.3)
        column[0].set_title(task)
        column[0].legend(fontsize=8)
    figure.savefig(HERE / "human.png", dpi=110)
    plt.close(figure)
    print(HERE / "human.png")


def draw_labels() -> None:
    """Normalised score against the number of labels: mean over tasks with its interval, tasks, and the paper's mean."""
    scores = normalised_scores(read_csv(HERE / "mujoco.csv"))
    figure, ax = plt.subplots(figsize=(6, 4.6), layout="constrained")
    labels = sorted(scores, key=int)
    for i, task in enumerate(sorted({task for tasks in scores.values() for task in tasks})):
        found = [(int(n), np.mean(scores[n][task])) for n in labels if task in scores[n]]
        ax.plot(*zip(*found, strict=True), "o-", color=f"C{i}", alpha=0.35, markersize=3, label=task)
    means = [np.mean([np.mean(seeds) for seeds in scores[n].values()]) for n in labels]
    bounds = np.array([bootstrap_interval(list(scores[n].values())) for n in labels]).reshape(-1, 2)
    around = np.abs(bounds.T - means) if labels else None
    ax.errorbar([int(n) for n in labels], means, around, color="k", marker="o", capsize=3, label="mean")
    ax.plot(
        [int(n) for n in PAPER_NORMALISED], PAPER_NORMALISED.values(), "k--", alpha=0.6, label="the paper's, 8 tasks"
    )
    ax.set_xscale("log", base=2)
    ax.set_xticks([350, 700, 1400], ["350", "700", "1400"])
    ax.set_xlabel("labels")
    ax.set_ylabel("0: random policy, 1: true reward")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(HERE / "labels.png", dpi=120)
    plt.close(figure)
    print(HERE / "labels.png")


ABLATIONS = {  # ours -> the paper's
    "none": "original",
    "random-queries": "random queries",
    "no-ensemble": "no ensemble",
    "no-online-queries": "no online",
    "no-regularization": "no regularization",
    "no-segments": "no segments",
    "target": "target",
}


def draw_ablations(name: str, labels: int, curves: tuple[int, int], baseline: str) -> None:
    """Normalised score of each ablation as a bar per task, a dot per seed, beside the paper's.

    curves: the paper's figures of the baseline and of its ablations. Its scores are scaled by our random policy and its
    own baseline, ours by that of our own.
    """
    rows = [row for row in of_one_budget(read_csv(HERE / f"{name}.csv")) if not imperfect(row)]
    rows = [row for row in rows if row["final_return_mean"]]
    runs = defaultdict(list)
    for row in rows:
        if row["feedback"] != "oracle" or int(row["labels"]) == labels:
            what = row["ablation"] if row["feedback"] == "oracle" else row["feedback"]
            runs[row["env_id"], what].append(float(row["final_return_mean"]))
    ablated = {task for task, what in runs if what in ABLATIONS and what != "none"}
    tasks = sorted(task for task in ablated if {(task, "random"), (task, "true-reward")} <= runs.keys())
    for task in sorted(ablated - set(tasks)):
        print(f"{task}: ablations, but no rows of the random policy and of the true reward to scale them by")
    if not tasks:
        print(f"{name}.csv has no ablations yet: no figure of them")
        return
    figure, axes = task_axes(tasks, 4)
    for ax, task in zip(axes.flat, tasks, strict=False):
        zero, one = np.mean(runs[task, "random"]), np.mean(runs[task, "true-reward"])
        paper_one = (paper_curve(curves[0], task, baseline)[1] or [np.nan])[-1]
        for i, (ours, theirs) in enumerate(ABLATIONS.items()):
            scores = [(score - zero) / (one - zero) for score in runs.get((task, ours), [])]
            if scores:
                ax.bar(i - 0.2, np.mean(scores), 0.4, color="C0", label="ours")
                ax.plot([i - 0.2] * len(scores), scores, "k.", markersize=4)
            paper = paper_curve(curves[1], task, theirs)[1]
            if paper:
                ax.bar(i + 0.2, (paper[-1] - zero) / (paper_one - zero), 0.4, color="0.7", label="the paper's")
        ax.set_xticks(range(len(ABLATIONS)), ABLATIONS, rotation=70, fontsize=8)
        ax.set_ylim(-0.5, 2.5)
        ax.set_title(task, fontsize=10)
        ax.grid(axis="y", alpha=0.3)
    legend_once(axes[0, 0])
    for ax in axes[:, 0]:
        ax.set_ylabel("0: random policy, 1: true reward")
    figure.savefig(HERE / f"{name}_ablations.png", dpi=110)
    plt.close(figure)
    print(HERE / f"{name}_ablations.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run directories, and CSVs that W&B exported")
    named: set[str] = set()
    for argument in parser.parse_args().runs:
        try:
            named |= collect_export(argument) if argument.suffix == ".csv" else collect(argument)
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{argument} is neither a run that has ended nor a CSV of W&B's ({error})")
    draw_atari(named)
    draw_mujoco(named)
    print_teachers()
    draw_labels()
    draw_ablations("mujoco", 700, (2, 5), "real reward")
    draw_ablations("atari", 5500, (3, 6), "RL")
    draw_human()
