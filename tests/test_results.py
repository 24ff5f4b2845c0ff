"""The tables and figures of results/: scores against hand-worked numbers, and a user's own run in the figure."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import draw
import numpy as np
import pytest
import torch
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


def write_run(folder, script="my_ppo", env_id="Hopper-v5", progress=None, summary=None, **more):
    """What draw.py reads of a run directory: args.json, events, and a checkpoint or a summary."""
    folder.mkdir(parents=True)
    args = {"env_id": env_id, "oracle": True, "human": False, "true_reward": False, "seed": 1, "labels": 700}
    args |= {"ablation": "none", "num_envs": 16, "num_steps": 128, "total_timesteps": 100_000, "eval_episodes": 10}
    args |= {"teacher_beta": np.inf, "device": "cpu"} | more
    run = {"script": script, "args": args, "commit": "0123456789", "hardware": "a computer"}
    run |= {
        "command": f"python {script}.py --oracle --runs-dir '/secret place' --runs_dir=/x --preferences /home/me/old"
    }
    (folder / "args.json").write_text(json.dumps(run))
    (folder / f"{script}.py").write_text("")
    if progress:
        torch.save({"progress": progress}, folder / "checkpoint.pt")
    if summary:
        (folder / "summary.json").write_text(json.dumps(row(env_id, "oracle", 0, "700") | summary))
    with SummaryWriter(str(folder)) as writer:
        for step, value in ((4000, 100.0), (8000, 300.0), (8000, 500.0), (31000, 900.0)):
            writer.add_scalar("charts/episodic_return", value, step)
        for step, labels in ((8000, 200), (31000, 250)):
            writer.add_scalar("labels/used", labels, step)
            writer.add_scalar("labels/ties", 0.1, step)
    return folder


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty results/, with the paper's curves."""
    shutil.copy(ROOT / "results" / "paper_figures.csv", tmp_path)
    monkeypatch.setattr(draw, "HERE", tmp_path)
    return tmp_path


def test_a_users_own_run_joins_the_table_and_the_figure(results, capsys):
    """The last value of a resumed run's step counts; a run that is collected twice is there once."""
    summary = {"final_return_mean": 4000.0, "total_timesteps": 40000, "labels_used": 700, "finished": True}
    summary |= {"returns": [*[0.0] * 5, *[10.0, 20.0] * 10], "iteration": 20, "max_grad_norm": 0.5}
    run_dir = write_run(results / "runs" / "mine", summary=summary)
    for _ in range(2):
        assert draw.collect(run_dir) == {"mine"}
    (found,) = draw.read_csv(results / "mujoco.csv")
    assert found["run"] == "mine" and found["command"] == "python my_ppo.py --oracle --preferences old"
    assert found["algorithm"] == "PPO" and found["return_of_last_20_episodes"] == "15.0"
    assert set(found) <= set(draw.COLUMNS)  # not every argument, and no list
    curve = draw.read_csv(results / "curves" / "mine.csv")
    assert [(p["step"], p["return"]) for p in curve] == [("20000", "300.0"), ("40000", "900.0")]
    draw.draw_mujoco(set())
    draw.print_mujoco()
    assert (results / "mujoco.png").stat().st_size > 10_000
    assert "| Hopper-v5 | – | – | – | 4,000.0 | – |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "env_id, more, table, algorithm",
    [
        ("ALE/Pong-v5", {}, "atari.csv", "PPO"),
        ("ALE/Pong-v5", {"rmsprop_alpha": 0.99}, "atari.csv", "A2C"),
        ("Hopper-v5", {}, "mujoco.csv", "PPO"),
        ("mytasks:Mine-v0", {}, "mujoco.csv", "PPO"),
    ],
)
def test_a_copy_by_any_name_lands_where_its_environment_belongs(results, env_id, more, table, algorithm):
    summary = {"final_return_mean": 1.0, "total_timesteps": 40000, "finished": True, "seed": 1, "commit": None}
    draw.collect(write_run(results / "mujoco_atari", "a2c_mujoco_atari", env_id, summary=summary, **more))
    (found,) = draw.read_csv(results / table)
    assert found["algorithm"] == algorithm and len(list(results.glob("*.csv"))) == 2
    if table == "atari.csv":
        draw.draw_atari(set())
        assert (results / "ALE-Pong-v5.png").exists()


def test_a_run_that_has_not_ended_has_a_curve_and_no_score(results, capsys):
    """Its row is of the checkpoint, though more is logged; its end replaces it."""
    progress = {"iteration": 10, "global_step": 24_000, "asked": 210, "seconds": 2.0, "wall_seconds": 5.0}
    run_dir = write_run(results / "runs" / "mine", progress=progress | {"returns": [1.0, 2.0]})
    draw.collect(run_dir)
    (found,) = draw.read_csv(results / "mujoco.csv")
    assert found["finished"] == found["final_return_mean"] == found["teacher_beta"] == ""
    assert (found["return_of_last_20_episodes"], found["labels_used"], found["ties"]) == ("1.5", "200.0", "20")
    assert (found["global_step"], found["asked"], found["sps"]) == ("24000", "210", "10240.0")
    assert (found["total_timesteps"], found["feedback"]) == ("100352", "oracle")  # in whole rollouts
    assert draw.read_curve("mine")[-1]["return"] == "900.0"
    draw.draw_mujoco(set())
    draw.print_mujoco()
    assert "| Hopper-v5 | – | – | – | – | – |" in capsys.readouterr().out
    summary = {"finished": True, "final_return_mean": 7.0, "total_timesteps": 100_352}
    (run_dir / "summary.json").write_text(json.dumps(row("Hopper-v5", "oracle", 0, "700") | summary))
    draw.collect(run_dir)
    (found,) = draw.read_csv(results / "mujoco.csv")
    assert found["finished"] == "True" and found["final_return_mean"] == "7.0"


def test_an_evaluation_takes_the_place_of_the_score_that_training_ended_with(results):
    summary = {"finished": True, "final_return_mean": 7.0, "total_timesteps": 100_352, "global_step": 104_448}
    run_dir = write_run(results / "runs" / "mine", summary=summary | {"seed": 1})
    for name, feedback, step, score in (("random", "random", 0, 1.0), ("evaluation", "oracle", 104_448, 9.0)):
        (run_dir / name).mkdir()
        score = row("Hopper-v5", feedback, score) | {"global_step": step, "final_episodes": 10, "seed": 5}
        (run_dir / name / "summary.json").write_text(json.dumps(score))
        draw.collect(run_dir / name)
    draw.collect(run_dir)
    baseline = row("Hopper-v5", "true-reward", 17) | {"run": "b", "total_timesteps": 100_352, "finished": "True"}
    draw.add_row(results / "mujoco.csv", baseline)
    rows = draw.read_csv(results / "mujoco.csv")
    commands = {found["run"]: found["command"] for found in rows}
    assert commands["mine/random"] == "python evaluate.py mine --random --seed 5"
    assert commands["mine/evaluation"] == "python evaluate.py mine --seed 5"
    assert draw.normalised_scores(rows) == {"700": {"Hopper-v5": [0.5]}}  # (9 - 1) / (17 - 1)
    later = json.loads((run_dir / "evaluation" / "summary.json").read_text()) | {"global_step": 50_000}
    (run_dir / "evaluation" / "summary.json").write_text(json.dumps(later))  # of a checkpoint before the end
    draw.collect(run_dir / "evaluation")
    assert draw.normalised_scores(draw.read_csv(results / "mujoco.csv")) == {"700": {"Hopper-v5": [0.375]}}


def test_generations_and_lengths_do_not_mix(results, capsys):
    """The longest true reward's runs that have ended decide, and of equally long ones the newer scripts'."""

    def made(run, feedback, score, steps, sha="", labels="700", finished="True", seed=""):
        more = {"run": run, "total_timesteps": str(steps), "params_sha256": sha, "finished": finished, "seed": seed}
        return row("Hopper-v5", feedback, score, labels if feedback == "oracle" else "0") | more

    rows = [row("Hopper-v5", "random", 0) | {"total_timesteps": "", "finished": ""}]
    rows += [made("a", "true-reward", 10, 100, "f00"), made("b", "oracle", 1, 100, "f00")]
    assert draw.normalised_scores(rows) == {"700": {"Hopper-v5": [0.1]}}
    rows += [made("c", "true-reward", None, 200, finished=""), made("d", "oracle", 8, 200)]
    assert draw.normalised_scores(rows) == {"700": {"Hopper-v5": [0.1]}}
    rows += [made("e", "true-reward", 20, 100), made("f", "oracle", 4, 100)]
    assert draw.normalised_scores(rows) == {"700": {"Hopper-v5": [0.2]}}
    rows += [made("g", "true-reward", 40, 200), made("h", "oracle", 4, 200) | {"labels_loaded": "100"}]
    assert draw.normalised_scores(rows) == {"700": {"Hopper-v5": [0.2]}}
    rows += [made("i", "oracle", 12, 200, seed="3"), made("j", "oracle", 16, 200, seed="3")]
    assert draw.normalised_scores(rows) == {"700": {"Hopper-v5": [0.2, 0.4]}}  # a seed counts once: its last run
    draw.write_csv(results / "mujoco.csv", rows)
    draw.print_mujoco()
    assert "Hopper-v5 0.0001M steps (4)" in capsys.readouterr().out


def test_curves_of_seeds_become_their_mean_and_range(results):
    """Where all seeds have points, in between by interpolation."""
    draw.write_curve("a", {"return": {20_000: 1.0, 60_000: 3.0, 80_000: 9.0}})
    draw.write_curve("b", {"return": {20_000: 2.0, 40_000: 4.0, 60_000: 7.0}})
    ax = draw.plt.figure().add_subplot()
    draw.plot_runs(ax, ["a", "b", "without a curve"], "return", color="k")
    draw.plot_runs(ax, ["a"], "entropy", color="k")  # was never logged
    (line,) = ax.lines
    assert line.get_xydata() == pytest.approx(np.array([[0.02, 1.5], [0.04, 3.0], [0.06, 5.0]]))
    (band,) = ax.collections
    inside = {tuple(point) for point in band.get_paths()[0].vertices.round(6).tolist()}
    assert {(0.02, 1.0), (0.02, 2.0), (0.04, 2.0), (0.04, 4.0), (0.06, 3.0), (0.06, 7.0)} <= inside
    draw.plt.close()


def test_points_are_as_wide_as_they_look_on_a_logarithmic_axis():
    curve = [{"step": str(step), "return": str(step)} for step in range(20_000, 5_000_001, 20_000)]
    steps, values = draw.binned(curve, "return")
    assert values == steps and 50 < len(steps) < 100
    assert steps[:10] == list(range(20_000, 200_001, 20_000)) and steps[-1] > 4_800_000


def test_a_run_that_is_named_stands_out_whatever_taught_it(results, monkeypatch):
    """Others are drawn in the colour of their labels, and those with other labels, teachers or parts not at all."""
    runs = {
        "a": ("oracle", "700", "none", "0.0"),
        "b": ("oracle", "700", "none", "0.1"),
        "c": ("human", "30", "none", ""),
    }
    longer = {"f": 80000}  # no true reward's run is as long: it hides none of the others
    runs |= {"d": ("oracle", "500", "target", "0.0"), "e": ("true-reward", "0", "none", "0.0")}
    runs |= {"f": ("oracle", "1400", "none", "0.0")}
    rows = [
        row("Hopper-v5", feedback, 1.0, labels, ablation)
        | {"run": run, "teacher_mistake": mistake, "labels_used": labels, "seed": 4}
        | {"total_timesteps": longer.get(run, 40000), "script": "mine" if run == "d" else "ppo_mujoco_rlhf"}
        for run, (feedback, labels, ablation, mistake) in runs.items()
    ]
    draw.write_csv(results / "mujoco.csv", rows)
    for run in runs:
        draw.write_curve(run, {"return": {20000: 1.0, 40000: 2.0}})
    drawn, plot = {}, draw.plot_runs

    def seen(ax, runs, name, **style):
        drawn.update({style["label"]: style["color"]} if runs else {})
        plot(ax, runs, name, **style)

    monkeypatch.setattr(draw, "plot_runs", seen)
    draw.draw_mujoco(set())
    assert drawn == {"700 labels": "C0", "true reward": "C1"}
    drawn.clear()
    draw.draw_mujoco(set("abcd"))
    assert drawn == {
        "PPO, 700 labels, seed 4": "k",
        "PPO, 700 labels, teacher mistake 0.1, seed 4": "C4",
        "PPO, 30 labels, by people, seed 4": "C5",
        "mine, 500 labels, target, seed 4": "C6",
        "true reward": "C1",
    }


def test_no_task_is_left_out_however_many_there_are(results, monkeypatch, capsys):
    """And a run that was stopped before its score was known stands in the way of none."""
    tasks = [*draw.TASKS, "HumanoidStandup-v5"]
    rows = [row(task, "true-reward", score) | {"total_timesteps": 100} for task in tasks for score in (3.0, "")]
    draw.write_csv(results / "mujoco.csv", [each | {"run": str(i)} for i, each in enumerate(rows)])
    for i in range(len(rows)):
        draw.write_curve(str(i), {"return": {20000: 1.0, 40000: 2.0}})
    titles = []
    monkeypatch.setattr(draw.plt, "close", lambda figure: titles.extend(ax.get_title() for ax in figure.axes))
    draw.draw_mujoco(set())
    names = sorted(task.removesuffix("-v5") for task in tasks)
    assert sorted(title.split(",")[0] for title in titles if title) == names and len(tasks) == 9
    draw.print_mujoco()
    shown = capsys.readouterr().out
    assert all(f"| {task} | – | 3.0 |" in shown for task in tasks)


@pytest.mark.parametrize("given", ["nowhere", "README.md", "results/paper_figures.csv", "nowhere.csv"])
def test_what_is_no_run_is_refused_before_anything_is_drawn(given):
    done = subprocess.run([sys.executable, "results/draw.py", given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and given in done.stderr.splitlines()[-1] and not done.stdout


def test_the_papers_atari_curves_stand_at_their_own_steps(results, monkeypatch):
    ours = {"run": "a", "script": "a2c_atari_rlhf", "seed": 1, "commit": "1234567", "labels_used": "5500"}
    ours |= {"total_timesteps": 40000, "params_sha256": "f00"}
    draw.write_csv(results / "atari.csv", [row("ALE/Pong-v5", "oracle", -20.0, "5500") | ours])
    draw.write_curve("a", {"return": {20000: -21.0, 40000: -20.0}})
    drawn = []
    monkeypatch.setattr(draw.plt, "close", lambda figure: drawn.append(figure.axes[0].get_lines()))
    draw.draw_atari(set())
    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn[0]}
    assert lines["A2C, 5,500 labels, 1234567"] == [[0.02, -21.0], [0.04, -20.0]]
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


def test_ablations_stand_beside_the_papers_on_one_scale(results, monkeypatch, capsys):
    rows = [row("Hopper-v5", "random", 200), row("Hopper-v5", "true-reward", 4200)]
    rows += [row("Hopper-v5", "oracle", 2200, "700"), row("Hopper-v5", "oracle", 4200, "350")]
    rows += [row("Hopper-v5", "oracle", score, "700", "target") for score in (200, 2200)]
    rows += [row("Ant-v5", "oracle", 1, "700", "target")]
    rows = [each | {"run": str(i)} for i, each in enumerate(rows)]
    draw.write_csv(results / "mujoco.csv", rows)
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
            assert np.isfinite(float(found["final_return_mean"] or "nan")) or found["finished"] in ("", "False")
