"""Collect runs into results/, and draw the figures from what is there.

    python results/draw.py runs/ALE-Pong-v5__* runs/Hopper-v5__*/random   # add these rows and curves, then draw
    python results/draw.py table.csv chart.csv                            # the same of runs that W&B exported
    python results/draw.py                                                # draw only

A row is a run's summary.json with the command that made it; in atari.csv where its environment is one of ALE's, else in
mujoco.csv. A curve is what the run logged to TensorBoard, in curves/. A run that is there already is replaced. What
evaluate.py leaves in RUN/random and RUN/evaluation gives rows too: the second one's score takes the place of the run's
own in the tables. A run that has not ended gives its curve and a row as of its last checkpoint: `finished` and
`final_*` are empty, `return_of_last_20_episodes` (of training, as of every run) has what there is, and no table counts
it.

W&B exports two kinds of CSV: its table of runs, which gives rows, and the chart of charts/episodic_return over
global_step, which gives curves. The runs that are named on the command line are drawn thick.

Figures show the mean over seeds and their range. Runs of other lengths than the longest true-reward runs of a task, and
those of the scripts' first generation (their rows have a params_sha256) beside newer ones of the same length, are left
out of tables and figures; it is said how many. For ablations and for imperfect teachers, the longest of theirs decide.

paper_figures.csv holds the paper's own curves (Figures 2, 3, 5 and 6), 21 points each, read off the images of its
figures pixel by pixel; about 1 % of the axis, worse where curves overlap, empty where one is hidden.
"""

import argparse
import csv
import json
import logging
import math
import pickle
import re
import shlex
from collections import Counter, defaultdict
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
COLUMNS = re.findall(
    r"\w+",
    """
    finished script algorithm total_timesteps env_id feedback labels ablation teacher_beta teacher_gamma teacher_mistake
    teacher_skip teacher_equal seed pairs_per_step device global_step labels_used asked skipped ties labels_loaded
    wall_seconds sps final_return_mean final_return_std final_episodes return_of_last_20_episodes
    reward_accuracy_heldout reward_correlation reward_loss pg_loss v_loss entropy params_sha256 commit run hardware
    command
    """,
)
LOGGED = {
    "charts/episodic_return": "return",
    "losses/entropy": "entropy",
    "labels/used": "labels",
    "labels/ties": "ties",
    "reward_model/accuracy_heldout": "accuracy_heldout",
    "reward_model/correlation": "correlation",
}
LOGGED_LAST = {  # tag -> column, for the row of a run that has not ended
    "labels/used": "labels_used",
    "labels/skipped": "skipped",
    "reward_model/accuracy_heldout": "reward_accuracy_heldout",
    "reward_model/correlation": "reward_correlation",
    "reward_model/loss": "reward_loss",
    "losses/policy_loss": "pg_loss",
    "losses/value_loss": "v_loss",
    "losses/entropy": "entropy",
}
plt.rc("font", size=13)
plt.rc("legend", fontsize=12)


# ---- Rows and curves -------------------------------------------------------------------------------------------------
def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict]) -> None:
    """In the order of COLUMNS; others, as they come, behind."""
    path.parent.mkdir(exist_ok=True)
    given = dict.fromkeys(name for row in rows for name in row)
    with open(path, "w", newline="") as file:
        names = [name for name in COLUMNS if name in given] + [name for name in given if name not in COLUMNS]
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def add_row(table: Path, row: dict) -> None:
    """Into a table, in place of what it has of the same run."""
    rows = [old for old in (read_csv(table) if table.exists() else []) if old["run"] != row["run"]]
    write_csv(table, [*rows, row])


def table_of(env_id: str) -> Path:
    """By the environment, not by the script: that may be somebody's copy, and have any name."""
    return HERE / ("atari.csv" if "ALE/" in env_id else "mujoco.csv")


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


def read_events(run_dir: Path) -> dict[str, dict[int, float]]:
    """tag -> step -> value. A resumed run logs some steps twice: the later value counts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # else it warns of every resumed run
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def pasteable(command: str) -> str:
    """A run's command line without the places of one machine: no --runs-dir, and other runs by their names alone."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.replace("_", "-")
        if name in ("--runs-dir", "--preferences", "--reward-model"):
            value = value if equals else next(words, "")
            kept += [] if name == "--runs-dir" else [name, Path(value).name]
        else:
            kept.append(word)
    return shlex.join(kept)


def so_far(run_dir: Path, run: dict, logged: dict[str, dict[int, float]]) -> dict:
    """The row of a run that has not ended: its arguments, what its last checkpoint counts, and what it logged last."""
    import torch

    progress = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)["progress"]
    args = run["args"]
    batch = args["num_envs"] * args["num_steps"]
    row = args | {name: progress[name] for name in ("global_step", "asked", "wall_seconds")} | {"finished": None}
    row |= {"feedback": "oracle" if args["oracle"] else "human" if args["human"] else "true-reward"}
    row |= {"script": run["script"], "commit": run["commit"], "returns": progress["returns"]}
    row |= {"total_timesteps": math.ceil(args["total_timesteps"] / batch) * batch}
    row |= {"sps": progress["iteration"] * batch / max(progress["seconds"], 1e-9)}
    last = {tag: [v for step, v in values.items() if step <= row["global_step"]][-1:] for tag, values in logged.items()}
    row |= {column: last[tag][0] for tag, column in LOGGED_LAST.items() if last.get(tag)}
    if args.get("preferences"):
        lines = (run_dir / "preferences" / "answers.jsonl").read_text().splitlines()
        row["labels_loaded"] = sum('"loaded": true' in line for line in lines)
    row["ties"] = round(row.get("labels_used", 0) * (last.get("labels/ties") or [0])[0])
    return row


def collect(folder: Path, table: str | None = None, **columns) -> set[str]:
    """Add a run's row to its table, and its curves to curves/<run>.csv. Out: its name.

    folder: a run's directory, or the random/ or evaluation/ that evaluate.py left in it.
    """
    evaluated = folder.resolve().name if folder.resolve().name in ("random", "evaluation") else ""
    run_dir = folder.resolve().parent if evaluated else folder.resolve()
    run = json.loads((run_dir / "args.json").read_text())
    args, command, logged = run.get("args", {}), pasteable(run["command"]), {}
    if evaluated:
        score = json.loads((folder / "summary.json").read_text())
        command = f"python evaluate.py {shlex.quote(run_dir.name)}{' --random' * (evaluated == 'random')}"
        for flag, name, default in (("episodes", "final_episodes", "eval_episodes"), ("seed", "seed", "seed")):
            command += f" --{flag} {score[name]}" if score.get(name) != args.get(default, score.get(name)) else ""
        if not (run_dir / f"{run['script']}.py").exists():  # of the first generation of the scripts
            command = f"python {run['script']}.py --evaluate {run_dir.name} --random"
    else:
        logged = read_events(run_dir)
    if evaluated == "random":
        row = score
    else:
        ended = (run_dir / "summary.json").exists()
        row = json.loads((run_dir / "summary.json").read_text()) if ended else so_far(run_dir, run, logged)
        if evaluated:
            scores = {name: value for name, value in score.items() if name.startswith("final_")}
            row |= scores | ({} if score["global_step"] == row["global_step"] else {"finished": None})
        elif not row["finished"]:
            print(f"{folder} has not ended, step {row['global_step']:,}: it is drawn, and counts in no table")
    row["algorithm"] = "A2C" if "rmsprop_alpha" in args else "PPO"
    if row.get("returns"):
        row["return_of_last_20_episodes"] = float(np.mean(row["returns"][-20:]))
    name = f"{run_dir.name}/{evaluated}".rstrip("/")
    row = {column: "" if row.get(column) in (None, math.inf) else row[column] for column in COLUMNS}
    row |= {"run": name, "hardware": run["hardware"], "command": command} | columns
    add_row(HERE / table if table else table_of(row["env_id"]), row)
    kept = {name: logged[tag] for tag, name in LOGGED.items() if tag in logged}
    if kept:
        write_curve(run_dir.name, kept)
    return {name}


def collect_export(path: Path) -> set[str]:
    """Add what W&B exported: rows from its table of runs, or curves from a chart of the return. Out: runs' names."""
    rows = read_csv(path)
    if not rows:
        raise ValueError("it has no rows")
    if "Name" in rows[0] and "script" in rows[0]:
        rows = [row for row in rows if row["script"]]  # else it has not ended yet: its summary is missing
        for row in rows:
            kept = {name: row[name] for name in COLUMNS if name in row}
            kept |= {"run": row["Name"], "command": "exported from W&B", "finished": row["finished"].capitalize()}
            kept |= {"algorithm": "A2C" if row.get("rmsprop_alpha") else "PPO"}
            add_row(table_of(row["env_id"]), kept)
        return {row["Name"] for row in rows}
    charts = [name for name in rows[0] if name.endswith(" - charts/episodic_return")]
    if "global_step" not in rows[0] or not charts:
        raise ValueError("neither W&B's table of runs nor its chart of charts/episodic_return over global_step")
    for name in charts:
        values = {int(float(row["global_step"])): float(row[name]) for row in rows if row[name]}
        write_curve(name.removesuffix(" - charts/episodic_return"), {"return": values})
    return {name.removesuffix(" - charts/episodic_return") for name in charts}


# ---- The paper's numbers ---------------------------------------------------------------------------------------------
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
# Labels -> mean over the paper's eight tasks of (score - random) / (true-reward score - random), 20M steps (Fig. 2)
PAPER_NORMALISED = {"350": 0.72, "700": 0.96, "1400": 1.04}
TASKS = [task for task in PAPER_TASKS if "ALE" not in task] + ["InvertedPendulum-v5"]


def paper_curve(figure: int, env_id: str, curve: str) -> tuple[list[float], list[float]]:
    """Share of the x axis, and score, of a curve in the paper."""
    points = [
        (float(row["fraction_of_x_axis"]), float(row["value"]))
        for row in read_csv(HERE / "paper_figures.csv")
        if (row["figure"], row["task"], row["curve"]) == (str(figure), PAPER_TASKS.get(env_id), curve) and row["value"]
    ]
    return [x for x, _ in points], [y for _, y in points]


# ---- Which rows stand side by side -----------------------------------------------------------------------------------
PERFECT = {"teacher_beta": np.inf, "teacher_gamma": 1, "teacher_mistake": 0, "teacher_skip": 0, "teacher_equal": 0}


def imperfect(row: dict) -> list[str]:
    """The flags that made a run's teacher an imperfect one: such a run stands in no table of plain ones."""
    given = {name: row.get(name) for name in PERFECT if row.get(name)}
    return [f"{name.replace('_', ' ')} {value}" for name, value in given.items() if float(value) != PERFECT[name]]


def algorithm(row: dict) -> str:
    """Rows of the first generation have no such column, but the script's name."""
    return row.get("algorithm") or ("A2C" if row.get("script", "").startswith("a2c") else "PPO")


def first_generation(row: dict) -> bool:
    return bool(row.get("params_sha256"))


def budget(row: dict) -> tuple[int, bool]:
    """Steps, and whether by today's scripts. Longer and newer is greater."""
    return int(float(row.get("total_timesteps") or 0)), not first_generation(row)


def ended(row: dict) -> bool:
    """Whether a row's score counts."""
    return bool(row["final_return_mean"]) and (row["feedback"] == "random" or row.get("finished", "True") == "True")


def is_baseline(row: dict) -> bool:
    return row["feedback"] == "true-reward"


def is_ablation(row: dict) -> bool:
    return row["ablation"] not in ("", "none")


def of_one_budget(rows: list[dict], decides=is_baseline) -> list[dict]:
    """Without the runs that have more or fewer steps than the longest run of their task that decides and has ended, or
    are of another generation."""
    budgets: dict[tuple[str, str], tuple] = {}
    for row in rows:
        if decides(row) and ended(row):
            task = row["env_id"], algorithm(row)
            budgets[task] = max(budget(row), budgets.get(task, (0, False)))
    return [
        row
        for row in rows
        if not row.get("total_timesteps") or budget(row) == budgets.get((row["env_id"], algorithm(row)), budget(row))
    ]


def last_scores(rows: list[dict]) -> list[dict]:
    """The rows whose score counts: of each run its evaluation, if there is one, and of each seed the last run."""
    rows = [row for row in rows if ended(row)]
    evaluated = {row["run"].removesuffix("/evaluation") for row in rows if row.get("run", "").endswith("/evaluation")}
    kept = {}
    for number, row in enumerate(row for row in rows if row.get("run") not in evaluated):
        what = ("env_id", "feedback", "labels", "ablation", "labels_loaded", "total_timesteps", *PERFECT)
        key = (algorithm(row), first_generation(row), *(row.get(name) for name in what))
        seed = row.get("seed") if row["feedback"] != "random" else None
        kept[(*key, seed or f"row {number}")] = row
    return list(kept.values())


def plain(rows: list[dict]) -> list[dict]:
    """The rows that a table may stand side by side."""
    rows = [row for row in rows if not is_ablation(row) and not imperfect(row)]
    return [row for row in rows if not float(row.get("labels_loaded") or 0)]


def described(row: dict) -> str:
    """What paid a run's agent, for a legend."""
    if row["feedback"] == "true-reward":
        return "true reward"
    given = row["labels"] if row.get("finished", "True") != "True" else row.get("labels_used") or row["labels"]
    loaded = [f"{int(float(row['labels_loaded'])):,} loaded"] if float(row.get("labels_loaded") or 0) else []
    by = ["by people"] if row["feedback"] == "human" else []
    ablation = [row["ablation"]] if is_ablation(row) else []
    return ", ".join([f"{int(float(given)):,} labels", *loaded, *by, *ablation, *imperfect(row)])


# ---- Curves in figures -----------------------------------------------------------------------------------------------
NAMED = {"linewidth": 2.2, "zorder": 4}  # runs of the command line
NAMED_COLOURS = ("k", "C4", "C5", "C6", "C8", "C9")  # by turns; the first tells most clearly
PAPER = {"linestyle": "--", "linewidth": 1.5, "zorder": 1}


def named_label(row: dict) -> str:
    """Somebody's copy of a script goes by its own name."""
    stock = ("", "ppo_atari_rlhf", "ppo_mujoco_rlhf", "a2c_atari_rlhf")
    by = algorithm(row) if row.get("script", "") in stock else row["script"]
    return f"{by}, {described(row)}, seed {row['seed']}{', not ended' * (not ended(row))}"


def named_styles(rows: list[dict]) -> dict[str, dict]:
    """Label -> style, of rows of the command line."""
    labels = dict.fromkeys(map(named_label, rows))
    return {label: NAMED | {"color": colour} for label, colour in zip(labels, cycle(NAMED_COLOURS))}


def read_curve(run: str) -> list[dict]:
    path = HERE / "curves" / f"{run}.csv"
    return read_csv(path) if path.exists() else []


def binned(curve: list[dict], name: str) -> tuple[list[float], list[float]]:
    """Steps and means of a column of a run's curve: points of 20,000 steps at first, of 6 % of the steps from then on,
    which look alike on a logarithmic axis."""
    points, edge = [], 0.0
    for point in curve:
        if point[name] in ("", "nan"):
            continue
        step = int(point["step"])
        if step > edge or not points:
            edge = max(step, 1.06 * step - 20_000)
            points.append([])
        points[-1].append((step, float(point[name])))
    means = [np.mean(each, axis=0).tolist() for each in points]
    return [step for step, _ in means], [value for _, value in means]


def plot_runs(ax, runs: list[str], name: str, **style) -> None:
    """The mean of a column over these runs' curves, over millions of steps, and their range behind it."""
    curves = [curve for curve in (binned(read_curve(run), name) for run in runs) if curve[0]]
    if not curves:
        return
    steps = np.unique(np.concatenate([steps for steps, _ in curves]))
    steps = steps[(steps >= max(x[0] for x, _ in curves)) & (steps <= min(x[-1] for x, _ in curves))]
    values = np.stack([np.interp(steps, *curve) for curve in curves])
    ax.plot(steps / 1e6, values.mean(0), **({"linewidth": 2.0, "zorder": 3} | style))
    if len(curves) > 1:
        ax.fill_between(steps / 1e6, values.min(0), values.max(0), color=style["color"], alpha=0.18, linewidth=0)


def plot_paper(ax, millions: int, curve: tuple[list[float], list[float]], **style) -> None:
    """A curve of the paper's, whose x axis ends at so many million steps; nothing where it has none."""
    points = [(millions * share, score) for share, score in zip(*curve, strict=True) if share]
    if points:
        ax.plot(*zip(*points, strict=True), **PAPER, **style)


def task_axes(tasks: list[str], height: float, **kwargs):
    """A figure of so many axes, four to a row."""
    rows = math.ceil(len(tasks) / 4)
    figure, axes = plt.subplots(rows, 4, figsize=(15, height * rows), squeeze=False, layout="constrained", **kwargs)
    for ax in axes.flat[len(tasks) :]:
        ax.axis("off")
    return figure, axes


def legend_once(figure, **kwargs) -> None:
    """A legend below a figure with an entry per name, however many lines or bars have it."""
    entries = [ax.get_legend_handles_labels() for ax in figure.axes]
    handles = {name: handle for ax in entries for handle, name in zip(*ax, strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", **kwargs)


def step_axis(ax, ticks: tuple[str, ...]) -> None:
    ax.set_xscale("log")
    ax.set_xlim(float(ticks[0]), float(ticks[-1]))
    ax.set_xticks([float(tick) for tick in ticks], ticks)
    ax.minorticks_off()
    ax.grid(alpha=0.3)


def save(figure, name: str) -> None:
    figure.savefig(HERE / name, dpi=110)
    plt.close(figure)
    print(HERE / name)


def newest(rows: list[dict]) -> list[dict]:
    """Without the first generation's, where there are others."""
    return [row for row in rows if not first_generation(row)] or rows


# ---- Atari -----------------------------------------------------------------------------------------------------------
def draw_atari(named: set[str]) -> None:
    """Per game: return, the paper's dashed, held-out accuracy and correlation of the reward model, and entropy."""
    every = [row for row in read_csv(HERE / "atari.csv") if read_curve(row["run"])]
    for env_id in sorted({row["env_id"] for row in every}):
        rows = [row for row in every if row["env_id"] == env_id]
        drawn = newest([row for row in rows if row["run"] not in named])
        drawn = last_scores(drawn) + [row for row in drawn if not ended(row)]
        groups: dict[str, list[str]] = defaultdict(list)  # label -> runs
        for row in drawn:
            label = f"{algorithm(row)}, {described(row)}"
            lengths = {budget(other) for other in drawn if f"{algorithm(other)}, {described(other)}" == label}
            label += f", {budget(row)[0] / 1e6:.2g}M steps" * (len(lengths) > 1)
            label += f", {row['commit']}" * first_generation(row)
            label += "" if ended(row) else f", seed {row['seed']}, not ended"
            if label in groups and not ended(row):  # two runs of one seed differ in what the row does not tell
                label += f", begun at {row['run'].split('__')[-1]}"
            groups[label].append(row["run"])
        own = [row for row in rows if row["run"] in named]
        styles = named_styles(own)
        for row in own:
            groups[named_label(row)].append(row["run"])
        figure, axes = plt.subplots(1, 3, figsize=(14, 5.2), layout="constrained")
        for i, (label, runs) in enumerate(groups.items()):
            style = styles.get(label, {"color": f"C{i}"})
            label += f", {len(runs)} seeds" * (len(runs) > 1)
            plot_runs(axes[0], runs, "return", label=label, **style)
            plot_runs(axes[1], runs, "accuracy_heldout", **style)
            plot_runs(axes[1], runs, "correlation", **style | {"linestyle": ":"})
            plot_runs(axes[2], runs, "entropy", **style)
        for name, curve, colour in (("true reward", "RL", "0.35"), ("5,600 labels", "5.6k syn", "0.65")):
            plot_paper(axes[0], 50, paper_curve(3, env_id, curve), color=colour, label=f"the paper's A2C, {name}")
        titles = ("true return of training episodes", "held-out accuracy (–), correlation (···)", "policy's entropy")
        for ax, title in zip(axes, titles, strict=True):
            ax.set_title(title, fontsize=13)
            ax.set_xlabel("million agent steps")
            step_axis(ax, ("0.02", "0.1", "0.5", "2", "10", "50"))
        axes[1].set_ylim(top=1)
        legend_once(figure, ncols=2)
        figure.suptitle(env_id)
        save(figure, f"{env_id.replace('/', '-').replace(':', '-')}.png")


# ---- MuJoCo ----------------------------------------------------------------------------------------------------------
SOURCES = {"true-reward": "C1", "350": "C2", "700": "C0", "1400": "C3"}


def source(row: dict) -> str:
    return row["labels"] if row["feedback"] == "oracle" else row["feedback"]


def normalised_scores(rows: list[dict]) -> dict[str, dict[str, list[float]]]:
    """labels -> task -> a score per seed: 0 is the random policy's, 1 the mean of the true-reward runs'."""
    runs = defaultdict(list)
    for row in plain(of_one_budget(last_scores(rows))):
        runs[row["env_id"], source(row)].append(float(row["final_return_mean"]))
    scores: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for (task, labels), returns in runs.items():
        zero, one = runs.get((task, "random")), runs.get((task, "true-reward"))
        if labels in PAPER_NORMALISED and zero and one:
            zero, one = np.mean(zero), np.mean(one)
            scores[labels][task] = [(score - zero) / (one - zero) for score in returns]
    return scores


def paper_scores(rows: list[dict], labels: str) -> list[float]:
    """The paper's normalised scores after 20M steps, of the tasks whose curves it has; zero is our random policy's."""
    scores = []
    for task in TASKS:
        zero = [float(row["final_return_mean"]) for row in rows if (row["env_id"], row["feedback"]) == (task, "random")]
        one, score = (paper_curve(2, task, curve)[1] for curve in ("real reward", f"{labels} syn"))
        if zero and one and score:
            scores.append((score[-1] - np.mean(zero)) / (one[-1] - np.mean(zero)))
    return scores


def bootstrap_interval(per_task: list[list[float]], draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean over tasks, seeds drawn anew within each task."""
    rng = np.random.default_rng(0)
    means = sum(rng.choice(scores, (draws, len(scores))).mean(1) for scores in per_task) / len(per_task)
    return tuple(np.quantile(means, [0.025, 0.975]))


def draw_mujoco(named: set[str]) -> None:
    """Per task, the true return over steps, the paper's dashed.

    Drawn are the baseline and the paper's numbers of labels, mean and range over seeds, runs that have not ended as
    thin lines; and whatever was named: any teacher, ablation and number of labels.
    """
    every = [row for row in read_csv(HERE / "mujoco.csv") if read_curve(row["run"])]
    known = [row for row in plain(every) if source(row) in SOURCES]
    all_named = [row for row in every if row["run"] in named]
    styles = named_styles(all_named)
    tasks = sorted({row["env_id"] for row in [*known, *all_named]})
    figure, axes = task_axes(tasks, 3.4)
    for ax, task in zip(axes.flat, tasks, strict=False):
        rows = [row for row in known if row["env_id"] == task]
        own = [row for row in all_named if row["env_id"] == task]
        known_here = [row for row in rows if row not in own]
        longest = max(map(budget, of_one_budget(known_here) or own))
        rows = [row for row in known_here if budget(row) == longest]
        left_out = len(known_here) - len(rows)
        if left_out:
            print(f"{task}: not drawn are {left_out} runs of other lengths, or of the first generation")
        for name, colour in SOURCES.items():
            label = "true reward" if name == "true-reward" else f"{int(name):,} labels"
            found = [row for row in rows if source(row) == name]
            plot_runs(ax, [row["run"] for row in last_scores(found)], "return", color=colour, label=label)
            for row in (row for row in found if not ended(row)):
                plot_runs(ax, [row["run"]], "return", color=colour, linewidth=0.9, label=f"{label}, not ended")
        for row in own:
            label = named_label(row)
            plot_runs(ax, [row["run"]], "return", **styles[label], label=label)
        for name, curve in (("true-reward", "real reward"), ("700", "700 syn")):
            plot_paper(ax, 20, paper_curve(2, task, curve), color=SOURCES[name], alpha=0.6)
        ax.plot([], [], color="0.5", **PAPER, label="the paper's")
        ax.set_title(f"{task.removesuffix('-v5')}, {longest[0] / 1e6:.2g}M", fontsize=13)
        step_axis(ax, ("0.02", "0.1", "0.5", "2", "20"))
    for ax in axes[-1]:
        ax.set_xlabel("million steps")
    for ax in axes[:, 0]:
        ax.set_ylabel("true return")
    legend_once(figure, ncols=3 if all_named else 6)
    save(figure, "mujoco.png")


def print_mujoco() -> None:
    """The tables of scores: a number per seed, and normalised, beside the paper's."""
    every = read_csv(HERE / "mujoco.csv")
    scored = last_scores(every)
    rows, missing = plain(of_one_budget(scored)), []
    tasks = sorted({row["env_id"] for row in every})
    print("\n| task | random | true reward | 350 labels | 700 labels | 1400 labels |\n|---|---|---|---|---|---|")
    for task in tasks:
        cells = []
        for name in ("random", "true-reward", "350", "700", "1400"):
            found = [r["final_return_mean"] for r in rows if (r["env_id"], source(r)) == (task, name)]
            cells.append(", ".join(f"{float(score):,.1f}" for score in found) or "–")
            missing += [] if found else [f"{task} {name}"]
        print(f"| {task} | {' | '.join(cells)} |")
    missing += [f"all of {task}" for task in TASKS if task not in tasks]
    print(f"without a run: {', '.join(missing) or 'none'}")
    within = of_one_budget(scored)
    left_out = Counter(f"{row['env_id']} {budget(row)[0] / 1e6:.2g}M steps" for row in scored if row not in within)
    if left_out:
        print("left out, of other lengths or generations than the true reward's longest runs:")
        print("  " + ", ".join(f"{what} ({number})" for what, number in sorted(left_out.items())))
    for labels, scores in sorted(normalised_scores(every).items(), key=lambda item: int(item[0])):
        low, high = bootstrap_interval(list(scores.values()))
        seeds = sum(map(len, scores.values()))
        ours = summed_up([float(np.mean(seeds)) for seeds in scores.values()])
        print(f"{labels} labels, {len(scores)} tasks, {seeds} runs: {ours}; 95 % of the mean [{low:.2f}, {high:.2f}]")
        paper = paper_scores(rows, labels)
        read_off = f"; {len(paper)} of them, read off: {summed_up(paper)}" if paper else ""
        print(f"  the paper after 20M steps: mean over 8 tasks {PAPER_NORMALISED[labels]}{read_off}")


def summed_up(means: list[float]) -> str:
    clipped = np.mean(np.minimum(means, 1.5))
    return f"mean {np.mean(means):.2f}, clipped at 1.5 {clipped:.2f}, median {np.median(means):.2f}"


def print_teachers() -> None:
    """The scores of imperfect teachers' runs, beside those of as many right answers."""
    groups: dict[tuple[str, int], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in of_one_budget(last_scores(read_csv(HERE / "mujoco.csv")), imperfect):
        if row["feedback"] == "oracle" and not is_ablation(row):
            teacher = ", ".join(imperfect(row)) or "no mistakes"
            groups[row["env_id"], int(row["labels"])][teacher].append(f"{float(row['final_return_mean']):,.1f}")
    for (task, labels), teachers in sorted(groups.items()):
        if teachers.keys() - {"no mistakes"}:
            for teacher, scores in teachers.items():
                print(f"{task}, {labels:,} labels, {teacher}: {', '.join(scores)}")


def draw_labels() -> None:
    """Normalised score against the number of labels: mean over tasks with its interval, tasks, and the paper's mean."""
    scores = normalised_scores(read_csv(HERE / "mujoco.csv"))
    figure, ax = plt.subplots(figsize=(7.5, 6), layout="constrained")
    labels = sorted(scores, key=int)
    for i, task in enumerate(sorted({task for tasks in scores.values() for task in tasks})):
        found = [(int(n), np.mean(scores[n][task])) for n in labels if task in scores[n]]
        name = task.removesuffix("-v5")
        ax.plot(*zip(*found, strict=True), "o-", color=f"C{i}", alpha=0.5, linewidth=1, markersize=4, label=name)
    ax.plot(
        [int(n) for n in PAPER_NORMALISED], PAPER_NORMALISED.values(), "k--", alpha=0.6, label="the paper's, 8 tasks"
    )
    means = [np.mean([np.mean(seeds) for seeds in scores[n].values()]) for n in labels]
    bounds = np.array([bootstrap_interval(list(scores[n].values())) for n in labels]).reshape(-1, 2)
    around = np.abs(bounds.T - means) if labels else None
    style = {"color": "k", "marker": "o", "linewidth": 2.5, "capsize": 4, "label": "mean, 95 %"}
    ax.errorbar([int(n) for n in labels], means, around, **style)
    ax.set_xscale("log", base=2)
    ax.set_xticks([350, 700, 1400], ["350", "700", "1,400"])
    ax.set_xlabel("labels")
    ax.set_ylabel("0: random policy, 1: true reward")
    ax.grid(alpha=0.3)
    legend_once(figure, ncols=3)
    save(figure, "labels.png")


# ---- Ablations, people -----------------------------------------------------------------------------------------------
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
    rows = of_one_budget(last_scores(read_csv(HERE / f"{name}.csv")), is_ablation)
    rows = [row for row in rows if algorithm(row) == "PPO" and not imperfect(row)]
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
    figure, axes = task_axes(tasks, 3.6, sharey=True)
    for ax, task in zip(axes.flat, tasks, strict=False):
        zero, one = np.mean(runs[task, "random"]), np.mean(runs[task, "true-reward"])
        paper_one = (paper_curve(curves[0], task, baseline)[1] or [np.nan])[-1]
        for i, (ours, theirs) in enumerate(ABLATIONS.items()):
            scores = [(score - zero) / (one - zero) for score in runs.get((task, ours), [])]
            if scores:
                ax.bar(i - 0.2, np.mean(scores), 0.4, color="C0", label="ours, a dot per seed")
                ax.plot([i - 0.2] * len(scores), scores, "k.", markersize=6)
            paper = paper_curve(curves[1], task, theirs)[1]
            if paper:
                ax.bar(i + 0.2, (paper[-1] - zero) / (paper_one - zero), 0.4, color="0.7", label="the paper's")
        ax.set_xticks(range(len(ABLATIONS)), [])
        ax.set_ylim(-0.5, 2.5)
        ax.set_title(task.removesuffix("-v5"), fontsize=13)
        ax.axhline(0, color="k", linewidth=0.8)
        ax.grid(axis="y", alpha=0.3)
        if len(tasks) - list(axes.flat).index(ax) <= 4:  # the lowest of its column
            ax.set_xticks(range(len(ABLATIONS)), ABLATIONS, rotation=60, ha="right", rotation_mode="anchor")
    for ax in axes[:, 0]:
        ax.set_ylabel("0: random policy\n1: true reward")
    legend_once(figure, ncols=2)
    save(figure, f"{name}_ablations.png")


def draw_human() -> None:
    """Per task, the true return over steps and the labels over steps, of runs by --human and of the oracle's."""
    rows = read_csv(HERE / "human.csv")
    tasks = sorted({row["env_id"] for row in rows})
    figure, axes = plt.subplots(2, len(tasks), figsize=(6 * len(tasks), 6.4), squeeze=False, layout="constrained")
    for column, task in zip(axes.T, tasks, strict=True):
        shown = newest([row for row in rows if row["env_id"] == task])
        labellers = list(dict.fromkeys(row["labeller"] for row in shown))
        for row in shown:
            curve, i = read_curve(row["run"]), labellers.index(row["labeller"])
            for ax, name in zip(column, ("return", "labels"), strict=True):
                xy = [(int(point["step"]) / 1e6, float(point[name])) for point in curve if point[name]]
                style = {"color": f"C{i}", "linewidth": 2 - 0.6 * (i % 2), "label": row["labeller"]}
                if xy:
                    ax.plot(*zip(*xy, strict=True), **style)
                ax.grid(alpha=0.3)
        column[0].set_title(task)
        column[1].set_xlabel("million steps")
        top = column[0].get_ylim()[1]
        column[0].set_ylim(top=top + 0.16 * (top - column[0].get_ylim()[0]) * len(labellers))
        lines = {line.get_label(): line for line in column[0].lines}  # each labeller once
        column[0].legend(lines.values(), lines, loc="upper left")
    axes[0, 0].set_ylabel("true return")
    axes[1, 0].set_ylabel("labels")
    save(figure, "human.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run directories, and CSVs that W&B exported")
    named: set[str] = set()
    for argument in parser.parse_args().runs:
        try:
            named |= collect_export(argument) if argument.suffix == ".csv" else collect(argument)
        except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            parser.error(f"{argument} is neither a run with a checkpoint or a summary nor a CSV of W&B's ({error})")
    draw_atari(named)
    draw_mujoco(named)
    print_mujoco()
    print_teachers()
    draw_labels()
    draw_ablations("mujoco", 700, (2, 5), "real reward")
    draw_ablations("atari", 5500, (3, 6), "RL")
    draw_human()
