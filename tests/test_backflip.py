"""examples/backflip.py: a task of one's own, as the script trains it."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import ppo_mujoco_rlhf as script
from examples import backflip

TASK = "examples.backflip:HopperBackflip-v0"


@pytest.fixture
def robot():
    robot = gym.make(TASK).unwrapped
    robot.reset(seed=0)
    return robot


def put(robot, height: float, pitch: float, rotation: float):
    qpos, qvel = robot.init_qpos.copy(), np.zeros(6)
    qpos[1:3], qvel[2] = (height, pitch), rotation
    robot.set_state(qpos, qvel)


def test_a_whole_turn_looks_like_none(robot):
    put(robot, 1.25, 0.4, 0)
    before = robot._get_obs()
    put(robot, 1.25, 0.4 - 2 * np.pi, 0)
    np.testing.assert_allclose(robot._get_obs(), before, atol=1e-9)
    np.testing.assert_allclose(before, [1.25, np.sin(0.4), np.cos(0.4), *np.zeros(9)], atol=1e-9)
    assert robot.observation_space.shape == before.shape


@pytest.mark.parametrize(
    ("height", "rotation", "reward"),
    [(1.25, -4, 3.8), (1.25, 4, -3.8), (0.8, -4, 2.0), (0.2, -4, 0.0), (1.9, -4, 4.0), (1.25, 0, 0.0)],
)
def test_reward_is_backward_rotation_while_the_torso_is_up(robot, height, rotation, reward):
    put(robot, height, 0, rotation)
    assert robot._get_rew(0.0, np.zeros(3)) == (pytest.approx(reward), {})


def test_backwards_is_where_the_back_is(robot):
    """The foot points to the right, and in a back flip it leaves the floor to the right: the head goes left."""
    put(robot, 1.25, 0, 0)
    assert robot.data.geom("foot_geom").xpos[0] > 0.05
    put(robot, 1.25, -0.5, 0)
    assert robot.data.geom("foot_geom").xpos[0] > 0.5


def test_the_script_trains_it(tmp_path):
    flags = "--oracle --labels 12 --query-pool-steps 8000 --pretrain-pairs 64 --total-timesteps 4096 --eval-episodes 1"
    command = [*flags.split(), "--env-id", TASK, "--runs-dir", str(tmp_path)]
    summary = script.train(script.parse_args(command))
    assert (summary["labels_used"], summary["env_id"]) == (12, TASK)
    assert script.Envs(script.parse_args(command), 1).episode == 1000
    assert script.parse_args(command).segment_length == 60


def test_what_people_are_asked():
    said = subprocess.run([sys.executable, "-m", "examples.backflip"], cwd=Path(script.__file__).parent, text=True,
                          capture_output=True, check=True)  # fmt: skip
    assert said.stdout.strip() == backflip.INSTRUCTIONS and said.stderr == ""
    assert said.stdout.splitlines()[0].endswith("?")
