"""The tables and figures of results/: scores against hand-worked numbers, and a user's own run in the figure."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import draw
import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).resolve().parent.parent


def row(env_id, feedback, score, labels="0", ablation="none"):
    columns = {"env_id": env_id, "feedback": feedback, "labels": labels, "ablation": ablation}
    return columns | {"final_return_mean": str(score) if score is not None else ""}


def test_scores_are_normalised_between_the_random_policy_and_the_mean_of_the_baseline():
    rows = [
        row("Hopper-v5", "random", 200),
        row("Hopper-v5", "true-reward", 4100),
        row("Hopper-v5", "true-reward", 4300),
    ]
    rows += [row("Hopper-v5", "oracle", score, "700") for score in (2200, 4200, None)]
    rows += [row("Hopper-v5", "oracle", 0, "700", "no-ensemble"), row("Ant-v5", "oracle", 900, "700")]
    rows += [row("Hopper-v5", "oracle", 0, "700") | {"teacher_mistake": "0.1"}]
    rows += [row("Hopper-v5", "oracle", 3200, "350") | {"teacher_mistake": "0", "teacher_gamma": "1.0"}]
    expected = {"700": {"Hopper-v5": [0.5, 1.0]}, "350": {"Hopper-v5": [0.75]}}
    assert draw.normalised_scores(rows) == expected
    of_steps = [one | {"total_timesteps": "" if one["feedback"] == "random" else "2000896"} for one in rows]
    shorter = row("Hopper-v5", "oracle", 500, "700") | {"total_timesteps": "1001472"}
    assert draw.normalised_scores([*of_steps, shorter]) == expected


def test_imperfect_teachers_stand_beside_the_perfect_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(draw, "HERE", tmp_path)
    perfect = {"teacher_beta": "", "teacher_gamma": "1.0", "teacher_mistake": "0.0", "teacher_equal": "0.0"}
    rows = [row("Reacher-v5", "oracle", score, "700") | perfect for score in (-2, -3)]
    rows += [row("Reacher-v5", "oracle", -4, "700") | perfect | {"teacher_mistake": "0.1"}]
    rows += [row("Reacher-v5", "oracle", -9, "350") | perfect, row("Hopper-v5", "oracle", 1, "700") | perfect]
    draw.write_csv(tmp_path / "mujoco.csv", rows)
    draw.print_teachers()
    expected = ["Reacher-v5, 700 labels, no mistakes: -2.0, -3.0", "Reacher-v5, 700 labels, teacher mistake 0.1: -4.0"]
    assert capsys.readouterr().out.splitlines() == expected


def test_the_interval_draws_seeds_within_each_task():
    assert draw.bootstrap_interval([[0.5], [1.0, 1.0]]) == pytest.approx((0.75, 0.75))
    low, high = draw.bootstrap_interval([[0.0, 1.0], [0.5]])
    assert (low, high) == pytest.approx((0.25, 0.75))  # a quarter of the draws takes the same seed twice


def test_the_rest_of_a_run_is_no_point_of_its_own(tmp_path, monkeypatch):
    """1,472 steps beyond a million were three episodes, and looked like a collapse at the end."""
    monkeypatch.setattr(draw, "HERE", tmp_path)
    draw.write_curve(
        "x", {"return": {1: 2.0, 20_000: 4.0, 20_001: 1.0, 40_000: 3.0, 41_472: 8.0}, "labels": {20_000: 5}}
    )
    points = [(int(p["step"]), p["return"], p["labels"]) for p in draw.read_curve("x")]
    assert points == [(20_000, "3.0", "5.0"), (40_000, "4.0", "")]
    draw.write_curve("short", {"return": {2_048: 1.0}})
    assert [int(p["step"]) for p in draw.read_curve("short")] == [20_000]


def test_the_papers_curves_are_found():
    share, score = draw.paper_curve(2, "Hopper-v5", "real reward")
    assert share[-1] == 1.0 and score[-1] == pytest.approx(4180, abs=50)
    assert draw.paper_curve(2, "InvertedPendulum-v5", "700 syn") == ([], [])


def test_a_users_own_run_joins_the_table_and_the_figure(tmp_path, monkeypatch, capsys):
    """The last value of a resumed run's step counts; a run that is collected twice is there once."""
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "paper_figures.csv", tmp_path / "results")
    monkeypatch.setattr(draw, "HERE", tmp_path / "results")
    run_dir = tmp_path / "Hopper-v5__ppo_mujoco_rlhf__1__20260101-000000"
    run_dir.mkdir()
    run = {"script": "ppo_mujoco_rlhf", "hardware": "a computer", "command": "python x.py --oracle --runs-dir /secret"}
    (run_dir / "args.json").write_text(json.dumps(run))
    summary = row("Hopper-v5", "oracle", 4000.0, "700") | {"total_timesteps": 40000, "labels_used": 700}
    summary |= {"finished": True}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    with SummaryWriter(str(run_dir)) as writer:
        for step, value in ((4000, 100.0), (8000, 300.0), (8000, 500.0), (31000, 900.0)):
            writer.add_scalar("charts/episodic_return", value, step)
    for _ in range(2):
        assert draw.collect(run_dir) == {run_dir.name}
    (found,) = draw.read_csv(tmp_path / "results" / "mujoco.csv")
    assert found["run"] == run_dir.name and found["command"] == "python x.py --oracle"
    curve = draw.read_csv(tmp_path / "results" / "curves" / f"{run_dir.name}.csv")
    assert [(p["step"], p["return"]) for p in curve] == [("20000", "300.0"), ("40000", "900.0")]
    draw.draw_mujoco(set())
    assert (tmp_path / "results" / "mujoco.png").stat().st_size > 10_000
    assert "| Hopper-v5 | – | – | – | 4,000.0 | – |" in capsys.readouterr().out


def test_a_run_that_is_named_stands_out_whatever_taught_it(tmp_path, monkeypatch):
    """Others are drawn in the colour of their labels, and those with other labels, teachers or parts not at all."""
    monkeypatch.setattr(draw, "HERE", tmp_path)
    shutil.copy(ROOT / "results" / "paper_figures.csv", tmp_path)
    runs = {
        "a": ("oracle", "700", "none", "0.0"),
        "b": ("oracle", "700", "none", "0.1"),
        "c": ("human", "30", "none", ""),
    }
    runs |= {"d": ("oracle", "500", "target", "0.0"), "e": ("true-reward", "0", "none", "0.0")}
    rows = [
        row("Hopper-v5", feedback, 1.0, labels, ablation)
        | {"run": run, "teacher_mistake": mistake, "total_timesteps": 40000, "labels_used": labels, "seed": 4}
        for run, (feedback, labels, ablation, mistake) in runs.items()
    ]
    draw.write_csv(tmp_path / "mujoco.csv", rows)
    for run in runs:
        draw.write_curve(run, {"return": {20000: 1.0, 40000: 2.0}})
    drawn, plot = {}, draw.plot_curve

    def seen(ax, curve, name, unit, **style):
        drawn[style["label"]] = style["color"]
        plot(ax, curve, name, unit, **style)

    monkeypatch.setattr(draw, "plot_curve", seen)
    draw.draw_mujoco(set())
    assert drawn == {"700 labels": "C0", "true reward": "C1"}
    drawn.clear()
    draw.draw_mujoco(set("abcd"))
    assert drawn == {
        "700 labels, seed 4": "k",
        "700 labels, teacher mistake 0.1, seed 4": "k",
        "30 labels, by people, seed 4": "k",
        "500 labels, target, seed 4": "k",
        "true reward": "C1",
    }


def test_no_task_is_left_out_however_many_there_are(tmp_path, monkeypatch, capsys):
    """And a run that was stopped before its score was known stands in the way of none."""
    monkeypatch.setattr(draw, "HERE", tmp_path)
    shutil.copy(ROOT / "results" / "paper_figures.csv", tmp_path)
    tasks = [*draw.TASKS, "HumanoidStandup-v5"]
    rows = [row(task, "true-reward", score) | {"total_timesteps": 100} for task in tasks for score in (3.0, "")]
    draw.write_csv(tmp_path / "mujoco.csv", [each | {"run": str(i)} for i, each in enumerate(rows)])
    titles = []
    monkeypatch.setattr(draw.plt, "close", lambda figure: titles.extend(ax.get_title() for ax in figure.axes))
    draw.draw_mujoco(set())
    assert sorted(title.split(",")[0] for title in titles if title) == sorted(tasks) and len(tasks) == 9
    shown = capsys.readouterr().out
    assert all(f"| {task} | – | 3.0 |" in shown for task in tasks)


@pytest.mark.parametrize("given", ["nowhere", "README.md", "results/paper_figures.csv", "nowhere.csv"])
def test_what_is_no_run_is_refused_before_anything_is_drawn(given):
    done = subprocess.run([sys.executable, "results/draw.py", given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and given in done.stderr.splitlines()[-1] and not done.stdout


def test_the_papers_atari_curves_stand_at_their_own_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "HERE", tmp_path)
    shutil.copy(ROOT / "results" / "paper_figures.csv", tmp_path)
    ours = {"run": "a", "script": "a2c_atari_rlhf", "seed": 1, "commit": "1234567", "labels_used": "5500"}
    ours |= {"total_timesteps": 40000}
    draw.write_csv(tmp_path / "atari.csv", [row("ALE/Pong-v5", "oracle", -20.0, "5500") | ours])
    draw.write_curve("a", {"return": {20000: -21.0, 40000: -20.0}})
    drawn = []
    monkeypatch.setattr(draw.plt, "close", lambda figure: drawn.append(figure.axes[0].get_lines()))
    draw.draw_atari(set())
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0]}
    assert lines["A2C, 5,500 labels, seed 1, 1234567"] == [[0.02, -21.0], [0.04, -20.0]]
    assert [2.5, -17.89] in lines["the paper's A2C, true reward"]  # read off at a twentieth of 50M steps
    assert len(lines) == 3 and len(lines["the paper's A2C, 5,600 labels"]) > 5


def test_runs_exported_from_wandb_join_too(tmp_path, monkeypatch):
    """Columns and spellings as its web page downloads them: configuration and summary, and a chart's lines."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(draw, "HERE", tmp_path / "results")
    old = row("Hopper-v5", "random", 200) | {"run": "x", "command": "python x.py", "script": "", "finished": ""}
    draw.write_csv(tmp_path / "results" / "mujoco.csv", [old])
    table = [
        {"Name": "mine", "State": "finished", "lr": "1e-3", "script": "ppo_mujoco_rlhf", "finished": "true"}
        | row("Hopper-v5", "oracle", 4000.0, "700"),
        {"Name": "still running", "State": "running", "script": "", "finished": ""} | row("Hopper-v5", "", None),
    ]
    chart = [{"global_step": step, "mine - charts/episodic_return": value} for step, value in ((4096, 1), (8192, 3))]
    chart = [point | {"mine - charts/episodic_return__MIN": 0} for point in [*chart, {"global_step": 9000}]]
    for name, rows in (("table", table), ("chart", chart), ("other", [{"a": 1}])):
        draw.write_csv(tmp_path / f"{name}.csv", rows)
    for _ in range(2):
        assert draw.collect_export(tmp_path / "table.csv") == {"mine"}
    assert draw.collect_export(tmp_path / "chart.csv") == {"mine"}
    _, new = draw.read_csv(tmp_path / "results" / "mujoco.csv")
    assert new["run"] == "mine" and new["final_return_mean"] == "4000.0" and new["finished"] == "True"
    assert "lr" not in new and new["command"] == "exported from W&B"
    assert [(point["step"], point["return"]) for point in draw.read_curve("mine")] == [("20000", "2.0")]
    with pytest.raises(ValueError, match="neither"):
        draw.collect_export(tmp_path / "other.csv")


def test_ablations_stand_beside_the_papers_on_one_scale(tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / "results" / "paper_figures.csv", tmp_path)
    monkeypatch.setattr(draw, "HERE", tmp_path)
    rows = [row("Hopper-v5", "random", 200), row("Hopper-v5", "true-reward", 4200)]
    rows += [row("Hopper-v5", "oracle", 2200, "700"), row("Hopper-v5", "oracle", 4200, "350")]
    rows += [row("Hopper-v5", "oracle", score, "700", "target") for score in (200, 2200)]
    rows += [row("Ant-v5", "oracle", 1, "700", "target")]
    draw.write_csv(tmp_path / "mujoco.csv", rows)
    heights = {}

    def bar(self, x, height, width, **kwargs):
        heights[round(x, 1)] = height

    monkeypatch.setattr(draw.matplotlib.axes.Axes, "bar", bar)
    draw.draw_ablations("mujoco", 700, (2, 5), "real reward")
    assert "Ant-v5: ablations, but no rows" in capsys.readouterr().out
    assert heights[-0.2] == pytest.approx(0.5) and heights[5.8] == pytest.approx(0.25)  # none and target, seeds' mean
    assert heights[0.2] == pytest.approx((4510 - 200) / (4180 - 200), abs=0.02)  # the paper's original in Figure 5
    assert -0.2 in heights and 0.8 not in heights and 1.2 in heights  # what we have not run, the paper has


def test_what_is_in_the_results_is_of_runs_that_say_how_they_were_made():
    for table in ("atari.csv", "mujoco.csv"):
        rows = draw.read_csv(ROOT / "results" / table)
        assert rows and len({found["run"] for found in rows}) == len(rows)
        for found in rows:
            assert found["command"].startswith("python ") and found["hardware"] and len(found["commit"]) >= 10
            assert np.isfinite(float(found["final_return_mean"] or "nan")) or found["finished"] == "False"
