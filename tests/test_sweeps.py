"""Every sweep file expands to command lines that the scripts' own parsers take, and one of each runs."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from expand import command_lines

import a2c_atari_rlhf as a2c
import ppo_atari_rlhf as atari
import ppo_mujoco_rlhf as mujoco

ROOT = Path(atari.__file__).parent

SCRIPTS = {f"{script.SCRIPT}.py": script for script in (atari, mujoco, a2c)}
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
RUNS = {"figure2_labels": 105, "figure2_true_reward": 35, "figure3_labels": 63, "figure3_true_reward": 21}
RUNS |= {"figure2_labels_pendulum": 15, "figure2_true_reward_pendulum": 5, "figure5_ablations_pendulum": 35}
RUNS |= {"figure5_ablations": 245, "figure6_ablations": 49, "teachers": 36}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_command_of_a_sweep_is_understood(path):
    lines = command_lines(path)
    assert len(lines) == len(set(lines)) == RUNS.get(path.stem, len(lines))
    if path.stem in RUNS:
        assert f"{RUNS[path.stem]} runs" in path.read_text()
    seed = lines[0].split("--seed=")[1].split()[0]
    for line in (line for line in lines if f"--seed={seed} " in line):  # the parser takes its time
        python, program, *flags = shlex.split(line)
        args = SCRIPTS[program].parse_args(flags)
        assert python == "python" and args.track and args.feedback in ("oracle", "true-reward")
        millions = 1 if path.stem == "search" else 2 if "pendulum" in path.stem else 10 if "atari" in program else 5
        assert args.total_timesteps == millions * 1_000_000
        if path.stem in RUNS:
            assert f"of {millions}M steps" in path.read_text().replace("\n#", "")
        for name, given in (flag.removeprefix("--").split("=") for flag in flags):
            assert str(getattr(args, name.replace("-", "_"))) == given


def test_what_is_searched_for_is_logged():
    """W&B's search waits for ever for a metric that no run logs."""
    for path in SWEEPS:
        metric = yaml.safe_load(path.read_text()).get("metric", {}).get("name")
        assert metric is None or f'"{metric}"' in Path(mujoco.__file__).read_text()


@pytest.mark.parametrize("path", [path for path in SWEEPS if "3_true" not in path.stem], ids=lambda path: path.stem)
def test_a_command_of_each_sweep_runs(path, tmp_path, monkeypatch):
    """A few hundred steps of the first one, cut to size; W&B has a test of its own, and so has Atari's true reward."""
    _, program, *flags = shlex.split(command_lines(path)[0])
    script, small = SCRIPTS[program], ["--num-envs", "4", "--num-steps", "32", "--update-epochs", "1", "--track=False"]
    monkeypatch.setattr(script, "evaluate", lambda *_: np.zeros(1))
    monkeypatch.setattr(script, "QUERY_BATCH", 1)
    monkeypatch.setattr(script, "STATISTICS_ROWS", 100)
    flags = [flag for flag in flags if not flag.startswith(("--total-timesteps", "--labels", "--track"))]
    small += ["--pretrain-pairs", "64", "--reward-minibatch-size", "4", "--threads", "1", "--device", "cpu"]
    small += [] if "--true-reward=True" in flags else ["--labels", "4", "--query-pool-steps", "700"]
    small += [] if script is mujoco else ["--segment-length", "5"]
    small += ["--total-timesteps", "1024" if script is mujoco else "384", "--runs-dir", str(tmp_path)]
    assert script.train(script.parse_args([*flags, *small]))["finished"]
