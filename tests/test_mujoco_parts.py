"""The parts of ppo_mujoco_rlhf.py against answers worked out by hand or by a slow reference.

What it shares with ppo_atari_rlhf.py word for word (test_siblings.py) is tested in test_atari_parts.py. "Trap n"
names a bug that other implementations of the method have, or had; each such test fails on that bug.
"""

import copy
import itertools
import math
from types import SimpleNamespace

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ppo_mujoco_rlhf as script
import slider  # noqa: F401, registers Slider-v0

TASKS = list(script.SEGMENT_LENGTH)


def make_args(*flags: str) -> script.Args:
    return script.parse_args(["--oracle", *flags])


def make_envs(env_id: str, num_envs: int):
    return script.Envs(make_args("--env-id", env_id), num_envs)


def bare_agent(num_obs, num_actions, init_logstd=0.0):
    return script.Agent(num_obs, -torch.ones(num_actions), torch.ones(num_actions), init_logstd)


def make_agent(num_obs=5, num_actions=2, seed=0):
    """An agent whose outputs all differ: the last layers, the stds and the statistics are not what they start as."""
    torch.manual_seed(seed)
    agent = bare_agent(num_obs, num_actions)
    torch.nn.init.normal_(agent.actor_mean[-1].weight, std=0.5)
    torch.nn.init.normal_(agent.actor_logstd, std=0.5)
    agent.renew_statistics(2 + 3 * torch.randn(500, num_obs))
    return agent


def make_ensemble(num_inputs=5, members=3, seed=0):
    torch.manual_seed(seed)
    ensemble = script.RewardEnsemble(num_inputs, members, 1e-4)
    for bias in ensemble.biases:  # zero at the start, where no test would see it
        torch.nn.init.normal_(bias)
    return ensemble


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module, before) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """MuJoCo writes a log to where it runs, of models that it finds old-fashioned."""
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------------------ task rewards
@pytest.mark.parametrize(
    "env_id, qpos, qvel, x_before, expected",
    [  # by hand: (x - x_before) / dt and what the table of paper.md 2.1 adds; the same for a robot that has fallen
        ("Hopper-v5", {0: 0.3, 1: 1.25}, {}, 0.26, 0.04 / 0.008 + 1.25),
        ("Hopper-v5", {0: -0.1, 1: 0.1, 2: 1.5}, {}, -0.1, 0.1),
        ("Walker2d-v5", {0: 0.3, 1: 1.25}, {}, 0.26, 0.04 / 0.008 + 0.25),
        ("Walker2d-v5", {0: 0.3, 1: 0.2, 2: -1.5}, {}, 0.34, -0.04 / 0.008 - 0.8),
        ("Swimmer-v5", {0: 0.3, 1: 7.0}, {0: 9.0}, 0.2, 0.1 / 0.04),
        ("HalfCheetah-v5", {0: 0.3, 1: -0.5}, {0: 9.0}, 0.4, -0.1 / 0.05),
        ("Ant-v5", {0: 0.3, 1: 2.0, 2: 0.5}, {}, 0.2, 0.1 / 0.05 + 0.5 - 1.2),
        # arms of 0.1 and 0.11 at 0 and 90 degrees: the fingertip is at (0.1, 0.11)
        ("Reacher-v5", {0: 0.0, 1: math.pi / 2, 2: 0.13, 3: 0.07}, {}, 0.0, -0.05),
        # poles of 0.6, the first one lying, the second upright: the tip is at (0.5 + 0.6, 0.6)
        ("InvertedDoublePendulum-v5", {0: 0.5, 1: math.pi / 2, 2: -math.pi / 2}, {0: 3.0, 1: 2.0, 2: -4.0}, 0.0,
         10 - 0.01 * 1.1**2 - 1.4**2 - 1e-3 * 4 - 5e-3 * 16 + 10 * -0.4),
        ("InvertedDoublePendulum-v5", {}, {}, 0.0, 10 - 0.8**2 + 10 * 0.2),
        ("InvertedPendulum-v5", {0: 0.9, 1: 0.5}, {1: 3.0}, 0.0, 0.75),
        ("InvertedPendulum-v5", {0: 0.9, 1: -1.5}, {}, 0.0, -1.25),
    ],
)  # fmt: skip
def test_the_reward_of_a_state_by_hand(env_id, qpos, qvel, x_before, expected):
    env = gym.make(env_id).unwrapped
    env.reset(seed=0)
    positions, velocities = np.zeros(env.model.nq), np.zeros(env.model.nv)
    for values, given in ((positions, qpos), (velocities, qvel)):
        for index, value in given.items():
            values[index] = value
    env.set_state(positions, velocities)
    assert script.paper_reward(env_id, env, x_before) == pytest.approx(expected, abs=1e-6)
    env.close()


# ------------------------------------------------------------------------------------------------------ environment
PAID = {  # the table of paper.md 2.1, from the state that Gymnasium's own step has led to, and what it tells of it
    "Walker2d-v5": lambda robot, x, info: (robot.data.qpos[0] - x) / robot.dt + robot.data.qpos[1] - 1,
    "Hopper-v5": lambda robot, x, info: (robot.data.qpos[0] - x) / robot.dt + robot.data.qpos[1],
    "Swimmer-v5": lambda robot, x, info: info["reward_forward"],
    "HalfCheetah-v5": lambda robot, x, info: info["reward_forward"],
    "Ant-v5": lambda robot, x, info: (robot.data.qpos[0] - x) / robot.dt + robot.data.qpos[2] - 1.2,
    "Reacher-v5": lambda robot, x, info: info["reward_dist"],
    "InvertedDoublePendulum-v5": lambda robot, x, info: (
        10 + info["distance_penalty"] + info["velocity_penalty"] + 10 * (robot.data.site_xpos[0][2] - 1)
    ),
    "InvertedPendulum-v5": lambda robot, x, info: 1 - robot.data.qpos[1] ** 2,
}


def state(robot):
    return np.concatenate([robot.data.qpos, robot.data.qvel])


def seen(env_id, obs):
    """Gymnasium's observation as the scripts have it: a turn of the torso more or less is the same pose."""
    obs = obs.astype(np.float32)
    if env_id in script.UNLIMITED:
        turns = np.rint(obs[script.UNLIMITED[env_id]] / (2 * np.pi))
        obs[script.UNLIMITED[env_id]] -= np.float32(2 * np.pi * turns)
    return obs


@pytest.mark.parametrize("env_id", ["Walker2d-v5", "Hopper-v5", "HalfCheetah-v5", "Swimmer-v5"])
@pytest.mark.parametrize("turns", [-3, 0, 1])
def test_a_pose_looks_the_same_however_often_the_torso_has_turned(env_id, turns):
    """Gymnasium ends an episode when it has fallen; here it may tumble on."""
    observations, joint = [], 2  # behind the torso's two positions
    for k in (0, turns):
        envs = make_envs(env_id, 1)
        envs.reset(1)
        robot, positions = envs.robots[0], envs.robots[0].data.qpos.copy()
        assert robot.model.jnt_limited[joint] == 0  # nothing keeps it from that
        positions[joint] += 0.5 + 2 * np.pi * k
        robot.set_state(positions, robot.data.qvel.copy())
        observations.append(envs.step(np.zeros((1, len(envs.low)), np.float32))[1]["led_to"][0])
    assert np.allclose(*observations, atol=1e-4)
    assert abs(observations[0][script.UNLIMITED[env_id]] - 0.5) < 0.3


@pytest.mark.parametrize("env_id", TASKS)
def test_a_thousand_steps_are_gymnasiums_own_to_the_bit(env_id):
    """State, observation, reward, ends and what a step at an end led to, beside Gymnasium's own environments with the
    same seeds and actions; a third of the actions are out of bounds. Traps 14, 32 and 36."""
    envs, kwargs = make_envs(env_id, 2), {"include_cfrc_ext_in_observation": False} if env_id == "Ant-v5" else {}
    plain = [gym.make(env_id, max_episode_steps=-1, **kwargs).unwrapped for _ in range(2)]
    rng, obs = np.random.default_rng(0), envs.reset(3)
    assert obs.dtype == np.float32
    for i in range(2):
        assert np.array_equal(obs[i], plain[i].reset(seed=3 + i)[0].astype(np.float32))
    envs.stagger()
    length = {"Reacher-v5": 50, "InvertedPendulum-v5": 250}.get(env_id, 1000)
    for t in range(1, 1001):
        actions = (envs.random_actions(rng) * 1.5).astype(np.float32)
        obs, told = envs.step(actions)
        for i, robot in enumerate(plain):
            x, action = robot.data.qpos[0], np.clip(actions[i], robot.action_space.low, robot.action_space.high)
            led_to, *_, info = robot.step(action)
            assert np.array_equal(told["executed"][i], action)
            assert np.array_equal(told["led_to"][i], seen(env_id, led_to))
            paid = PAID[env_id](robot, x, info)
            assert told["env_rewards"][i] == (pytest.approx(paid, abs=1e-9) if "Double" in env_id else paid)
            ended = (t - (length // 2 if i == 0 else 0)) % length == 0
            assert told["ended"][i] == ended
            expected = robot.reset()[0] if ended else led_to
            assert np.array_equal(obs[i], seen(env_id, expected))
            assert np.array_equal(state(envs.robots[i]), state(robot))
            assert not ended or not np.array_equal(obs[i], told["led_to"][i])


@pytest.mark.parametrize("env_id", ["Humanoid-v5", "Pusher-v5", "Slider-v0"])
def test_any_other_task_steps_itself_and_pays_its_own_reward_and_its_ends_are_hidden(env_id):
    """Trap 32: Gymnasium says that the humanoid has fallen; here the episode goes on to the task's length."""
    envs, plain = make_envs(env_id, 1), gym.make(env_id, max_episode_steps=-1, disable_env_checker=True).unwrapped
    rng, obs = np.random.default_rng(0), envs.reset(3)
    assert np.array_equal(obs[0], plain.reset(seed=3)[0].astype(np.float32))
    length, over = gym.spec(env_id).max_episode_steps, False
    for t in range(1, 301):
        actions = np.ones((1, len(envs.low)), np.float32) if env_id == "Slider-v0" else envs.random_actions(rng)
        obs, told = envs.step(actions)
        led_to, reward, terminated, *_ = plain.step(actions[0].clip(envs.low, envs.high))
        over |= terminated
        assert told["env_rewards"][0] == reward and told["ended"][0] == (t % length == 0)
        assert np.array_equal(told["led_to"][0], led_to.astype(np.float32))
        expected = plain.reset()[0] if t % length == 0 else led_to
        assert np.array_equal(obs[0], expected.astype(np.float32))
    assert over == (env_id != "Pusher-v5")  # where a task has ends of its own, there was one


def test_a_task_of_a_module_is_found_by_gymnasiums_name_for_it():
    """Kind 7: Gymnasium's `module:MyTask-v0`, with the task's own length and a second and a half of clip."""
    assert make_args("--env-id", "slider:Slider-v0").segment_length == 30  # 1.5 s at 20 per second
    envs = make_envs("slider:Slider-v0", 2)
    assert envs.episode == 50 and envs.reset(0).shape == (2, 2)


def test_scores_are_the_sums_of_whole_episodes():
    """Those that `stagger` has cut short are no episodes."""
    envs, rng, rewards, expected = make_envs("Reacher-v5", 4), np.random.default_rng(0), [], []
    envs.reset(0)
    envs.stagger()
    for t in range(1, 131):
        told = envs.step(envs.random_actions(rng))[1]
        rewards.append(told["env_rewards"])
        for i in np.flatnonzero(told["ended"]):
            if t >= 50:
                expected.append((np.stack(rewards)[t - 50 : t, i].sum(), 50))
    assert len(expected) == 7 and np.allclose(envs.finished, expected)


def test_random_actions_fill_the_tasks_bounds():
    envs, rng = make_envs("InvertedPendulum-v5", 2), np.random.default_rng(0)
    assert envs.random_actions(rng).shape == (2, 1) and envs.random_actions(rng).dtype == np.float32
    actions = np.stack([envs.random_actions(rng) for _ in range(1000)])
    assert -3 <= actions.min() < -2.9 and 2.9 < actions.max() <= 3 and abs(actions.mean()) < 0.15


@pytest.mark.parametrize(
    "env_id, low, high",
    [  # paper.md 2.1 and the curves' starts: 211 +- 171, -798, -39, -1, -871, -9.0, -7,567, -1,435
        ("Hopper-v5", 20, 450),
        ("Walker2d-v5", -950, -600),
        ("HalfCheetah-v5", -120, 40),
        ("Swimmer-v5", -40, 40),
        ("Ant-v5", -1050, -650),
        ("Reacher-v5", -11.5, -6.5),
        ("InvertedDoublePendulum-v5", -8600, -6800),
        ("InvertedPendulum-v5", -375, -300),  # -1,435 in 1,000 steps, of which the first twenty are upright
    ],
)
def test_a_random_policy_gets_what_the_papers_does(env_id, low, high):
    envs, rng = make_envs(env_id, 32 if env_id == "Reacher-v5" else 4), np.random.default_rng(0)
    envs.reset(1)
    for _ in range(envs.episode):
        envs.step(rng.standard_normal((len(envs.robots), len(envs.low))).astype(np.float32))
    scores = [score for score, _ in envs.finished]
    assert len(scores) == len(envs.robots) and low < np.mean(scores) < high


def test_the_ant_sees_27_numbers_and_other_tasks_theirs():
    sizes = {"Ant-v5": 27, "Hopper-v5": 11, "Walker2d-v5": 17, "Reacher-v5": 10, "Humanoid-v5": 348}
    for env_id, size in sizes.items():
        envs = make_envs(env_id, 1)
        assert envs.num_obs == size and envs.reset(0).shape == (1, size)


def test_segments_of_the_paper_are_15_to_60_steps_and_others_a_second_and_a_half():
    lengths = {"Walker2d-v5": 45, "Hopper-v5": 60, "Swimmer-v5": 60, "HalfCheetah-v5": 30, "Ant-v5": 30}
    lengths |= {"Reacher-v5": 15, "InvertedDoublePendulum-v5": 15, "InvertedPendulum-v5": 15}
    assert {task: make_args("--env-id", task).segment_length for task in TASKS} == lengths
    assert make_args("--env-id", "Pusher-v5").segment_length == 30  # 1.5 seconds at 20 per second
    assert make_args("--env-id", "Humanoid-v5").segment_length == 60  # 100 at 66.7 per second, clamped
    assert make_args("--segment-length", "7").segment_length == 7
    assert make_args("--ablation", "no-segments").clip_length == 1


def test_defaults_that_depend_on_the_rest():
    assert make_args().labels == 700 and make_args().initial_labels == 175
    assert make_args("--labels", "1400").initial_labels == 350  # a quarter, also above Atari's 500
    assert make_args("--labels", "4000").initial_labels == 1000
    assert make_args("--labels", "3").initial_labels == 1
    assert make_args("--labels", "700", "--ablation", "no-online-queries").initial_labels == 700
    assert script.parse_args(["--true-reward"]).labels == 0
    assert make_args().eval_episodes == 10 and make_args("--env-id", "Reacher-v5").eval_episodes == 100
    assert make_args("--env-id", "Reacher-v5", "--eval-episodes", "3").eval_episodes == 3
    assert make_args("--num-envs", "16", "--query-pool-steps", "20000").pool_rows == 1250


# ------------------------------------------------------------------------------------------------------ fixed length
UNHEALTHY = {  # a position to change, so that Gymnasium ends the episode
    "Hopper-v5": {1: 0.2, 2: 1.4},
    "Walker2d-v5": {1: 0.2, 2: 1.4},
    "Ant-v5": {2: 1.5},
    "InvertedPendulum-v5": {1: 1.2},
    "InvertedDoublePendulum-v5": {1: 1.6},
}


@pytest.mark.parametrize("env_id", UNHEALTHY)
def test_a_fall_ends_nothing_and_every_episode_has_the_tasks_length(env_id):
    """Trap 32. The first episodes after a common reset end at their share, so that rollouts mix all ages."""
    envs, plain, n = make_envs(env_id, 3), gym.make(env_id), 3
    zeros = np.zeros((3, len(envs.low)), np.float32)
    envs.reset(7)
    for _ in range(50):
        envs.step(zeros)
    envs.reset(0)  # in the middle of episodes
    envs.stagger()
    plain.reset(seed=0)
    for robot in (*envs.robots, plain.unwrapped):
        qpos = robot.data.qpos.copy()
        for index, value in UNHEALTHY[env_id].items():
            qpos[index] = value
        robot.set_state(qpos, robot.data.qvel)
    assert plain.step(zeros[0])[2]  # there it is over
    ends, length = [[] for _ in range(n)], 250 if env_id == "InvertedPendulum-v5" else 1000
    for t in range(1, math.ceil(length / 3) + length + 5):
        for i in np.flatnonzero(envs.step(zeros)[1]["ended"]):
            ends[i].append(t)
    first, second = math.ceil(length / 3), math.ceil(2 * length / 3)
    assert ends == [[first, first + length], [second], [length]]


def test_short_tasks_and_unstaggered_environments_end_at_their_length():
    for stagger, expected in ((True, [[13, 63, 113], [25, 75], [38, 88], [50, 100]]), (False, [[50, 100]] * 4)):
        envs = make_envs("Reacher-v5", 4)
        envs.reset(0)
        if stagger:
            envs.stagger()
        ends = [[] for _ in range(4)]
        for t in range(1, 115):
            for i in np.flatnonzero(envs.step(np.zeros((4, 2), np.float32))[1]["ended"]):
                ends[i].append(t)
        assert ends == expected


# ------------------------------------------------------------------------------------------------- pictures for people
def test_people_see_the_states_that_the_robots_were_in():
    """Of the right environment and row, 384 pixels square; the last rows only; and drawing moves no robot."""
    args, rng = make_args("--env-id", "Reacher-v5"), np.random.default_rng(0)
    envs, camera = script.Envs(args, 3), script.Camera(args, 2, rows=20)
    camera.robot.reset()
    envs.reset(0)
    states = []
    for _ in range(30):
        states.append([state(robot) for robot in envs.robots])
        camera.record(envs, None)
        envs.step(envs.random_actions(rng))
    assert len(camera.kept) == 20
    before = [state(robot) for robot in envs.robots]
    for env, row in ((0, 10), (1, 25)):
        frames = camera.frames(env, row - 30, 5)
        assert frames.shape == (5, 384, 384, 3) and frames.dtype == np.uint8
        assert np.array_equal(state(camera.robot), states[row + 4][env])
        for t in (0, 4):
            camera.robot.set_state(*np.split(states[row + t][env], [envs.robots[0].model.nq]))
            assert np.array_equal(camera.robot.render(), frames[t])
        assert (frames[0] != frames[4]).any()
    assert all(np.array_equal(x, state(robot)) for x, robot in zip(before, envs.robots, strict=True))


def test_a_clip_is_one_sheet_of_five_frames_in_a_row():
    args = make_args("--env-id", "Slider-v0")
    envs, camera = script.Envs(args, 1), script.Camera(args, 1, rows=20)
    envs.reset(0)
    for _ in range(7):
        camera.record(envs, None)
        envs.step(np.ones((1, 1), np.float32))
    frames = camera.frames(0, 0, 7)
    sheet = cv2.imdecode(np.frombuffer(script.sprite_sheet(frames), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert sheet.shape == (2 * 384, 5 * 384, 3) and sheet[400:, 2 * 384 + 16 :].max() < 8
    for i in range(7):
        cell = sheet[384 * (i // 5) :, 384 * (i % 5) :][:384, :384].astype(int)
        differences = [np.abs(cell - other).mean() for other in frames.astype(int)]
        assert np.argmin(differences) == i and differences[i] < 3  # in order, and its colours are the frame's


@pytest.mark.parametrize(("length", "shown"), [(1, 1), (15, 15), (30, 30), (31, 16), (45, 23), (60, 30), (61, 21)])
def test_people_see_thirty_steps_at_most_evenly_spread(tmp_path, length, shown):
    """In a second and a half; what args.json promises the page is what the camera draws."""
    args = make_args("--env-id", "Reacher-v5", "--segment-length", str(length), "--runs-dir", str(tmp_path))
    clip, every = script.make_run_dir(args)[1]["clip"], math.ceil(length / 30)
    assert clip["frames"] == len(range(0, length, every)) == shown <= 30 and clip["fps"] == shown / 1.5
    camera, drawn = object.__new__(script.Camera), []
    camera.follows = False
    camera.kept = [[np.full(8, t)] for t in range(length)]
    camera.robot = SimpleNamespace(
        model=SimpleNamespace(nq=4), set_state=lambda qpos, _: drawn.append(qpos[0]), render=lambda: np.zeros((2, 2, 3))
    )
    assert len(camera.frames(0, -length, length)) == shown and drawn == list(range(0, length, every))


def test_where_the_camera_follows_people_see_an_orange_torso_and_marks_on_the_floor():
    """A line per metre, which stays where it is as the robot moves on, and an arrow that goes along with it; in other
    tasks nothing is added. The robot that is played with is another one."""
    for env_id in ("Hopper-v5", "Reacher-v5"):
        args = make_args("--env-id", env_id)
        camera, follows = script.Camera(args, 1, rows=2), env_id == "Hopper-v5"
        assert (camera.robot.camera_name == "track") == camera.follows == follows
        drawn, viewer = [], camera.robot.mujoco_renderer.viewer
        camera.robot.mujoco_renderer.viewer = SimpleNamespace(add_marker=lambda into=drawn, **mark: into.append(mark))
        camera.robot.render = lambda: np.zeros((2, 2, 3))
        start = np.concatenate([camera.robot.init_qpos, camera.robot.init_qvel])
        camera.kept = [[start], [start + 1.3 * (np.arange(len(start)) == 0)]]  # Hopper's first is x
        camera.frames(0, -2, 2)
        assert len(drawn) == 16 * follows
        camera.robot.mujoco_renderer.viewer = viewer
        torso = camera.robot.model.geom_rgba[camera.robot.model.geom_bodyid == 1]
        assert (np.allclose(torso, (1, 0.35, 0, 1))) == follows
        envs = script.Envs(args, 1)
        assert not np.allclose(envs.robots[0].model.geom_rgba[1], (1, 0.35, 0, 1))
        if follows:
            lines = [[mark["pos"][0] for mark in drawn[i : i + 7]] for i in (0, 8)]
            assert lines == [[-3, -2, -1, 0, 1, 2, 3], [-2, -1, 0, 1, 2, 3, 4]]
            assert np.isclose(drawn[15]["pos"][0] - drawn[7]["pos"][0], 1.3)
            assert np.allclose(np.reshape(drawn[7]["mat"], (3, 3)) @ (0, 0, 1), (1, 0, 0))  # it points to the right


@pytest.mark.parametrize("env_id", ["Hopper-v5", "HalfCheetah-v5", "Ant-v5"])
def test_the_floor_is_drawn_as_far_as_a_robot_runs(env_id):
    """A model's own ends after 20 or 40 metres: beyond its edge the robot ran over the sky."""
    camera = script.Camera(make_args("--env-id", env_id), 1, rows=2)
    start = np.concatenate([camera.robot.init_qpos, camera.robot.init_qvel])
    camera.kept = [[start], [start + 300 * (np.arange(len(start)) == 0)]]
    near, far = camera.frames(0, -2, 2).astype(int)
    assert np.abs(near - far).mean() < 1 and len(np.unique(near)) > 50


@pytest.mark.parametrize("env_id", ["Hopper-v5", "HalfCheetah-v5", "Swimmer-v5", "Ant-v5"])
def test_a_pair_of_clips_loads_quickly(env_id):
    """At most 150 kB, also while the robot is thrown about."""
    args, rng = make_args("--env-id", env_id), np.random.default_rng(0)
    envs, camera = script.Envs(args, 1), script.Camera(args, 1, rows=30)
    envs.reset(0)
    for _ in range(60):
        actions = envs.random_actions(rng)
        camera.record(envs, actions)
        envs.step(actions)
    frames = camera.frames(0, -30, 30)
    assert len(np.unique(frames)) > 50 and 10_000 < len(script.sprite_sheet(frames)) < 75_000


# ------------------------------------------------------------------------------------------------------ policy maths
def test_gae_at_a_time_limit_takes_the_final_states_value_and_cuts_the_trace():
    """Trap 35. Unlike a true end, which is worth nothing, a time limit bootstraps from V(final_obs)."""
    rng = np.random.default_rng(0)
    T, N, gamma, lam = 12, 3, 0.9, 0.8
    rewards, values, final_values = (torch.tensor(rng.normal(size=(T, N))) for _ in range(3))
    dones = torch.tensor(rng.random((T, N)) < 0.25)
    next_values = torch.cat([values[1:], torch.tensor(rng.normal(size=(1, N)))])
    next_values[dones] = final_values[dones]
    assert dones[:-1].any() and not dones.all()
    advantages, returns = script.compute_gae(rewards, values, next_values, dones.double(), gamma, lam)
    for t, n in itertools.product(range(T), range(N)):
        expected, weight = 0.0, 1.0
        for k in range(t, T):
            after = final_values[k, n] if dones[k, n] else next_values[k, n]
            expected += weight * (rewards[k, n] + gamma * after - values[k, n])
            if dones[k, n]:
                break
            weight *= gamma * lam
        assert advantages[t, n].item() == pytest.approx(float(expected), abs=1e-12)
    assert torch.allclose(returns, advantages + values)


def test_logprob_and_entropy_are_those_of_a_normal_distribution():
    agent, obs = make_agent(), 2 + 3 * torch.randn(50, 5)
    with torch.no_grad():
        action, logprob, entropy, value, excess = agent.get_action_and_value(obs)
        x = ((obs - agent.obs_mean.float()) / (agent.obs_var.float() + 1e-8).sqrt()).clamp(-10, 10)
        normal = torch.distributions.Normal(agent.actor_mean(x), agent.actor_logstd.exp().expand(50, 2))
        assert torch.allclose(logprob, normal.log_prob(action).sum(-1), atol=1e-5)
        assert torch.allclose(entropy, normal.entropy().sum(-1), atol=1e-5)
        assert torch.allclose(value, agent.critic(x)[:, 0]) and torch.equal(value, agent.get_value(obs))
        beyond = np.clip(np.abs(agent.actor_mean(x).numpy()) - 1, 0, None)
        assert beyond.any(1).any() and not beyond.any(1).all()
        assert np.allclose(excess, (beyond**2).sum(1), atol=1e-5)
        again = agent.get_action_and_value(obs, action + 0.3)
        assert torch.equal(again[0], action + 0.3)
        assert torch.allclose(again[1], normal.log_prob(action + 0.3).sum(-1), atol=1e-5)


def test_actions_keep_a_std_of_e_to_minus_two_and_get_a_wider_one_back():
    """Where near actions pay for long, and far ones later. A clamp in forward would let no gradient through."""
    args = make_args("--num-envs", "4", "--num-steps", "64", "--num-minibatches", "4", "--ent-coef", "0")
    torch.manual_seed(0)
    agent, rng, obs = bare_agent(3, 1, -1.9), np.random.default_rng(0), torch.randn(256, 3)
    optimizer, stds = torch.optim.Adam(agent.parameters(), lr=1e-2), []
    for sign in [-1] * 8 + [1] * 8:
        with torch.no_grad():
            actions, logprobs, _, values, _ = agent.get_action_and_value(obs)
            rewards = sign * (actions - agent.actor_mean(agent.normalise(obs)))[:, 0].square()
        script.update_policy(agent, optimizer, (obs, actions, logprobs, rewards, rewards, values), rng, args)
        stds.append(agent.actor_logstd.exp().item())
    assert stds[7] == pytest.approx(math.exp(-2), rel=1e-6) and min(stds) >= stds[7]
    assert stds[-1] > 1.2 * math.exp(-2)


def test_actions_follow_the_policys_mean_and_std_and_the_seed():
    agent, obs = make_agent(), torch.randn(1, 5).expand(20_000, 5)
    with torch.no_grad():
        torch.manual_seed(1)
        actions = agent.get_action_and_value(obs)[0]
        torch.manual_seed(1)
        again = agent.get_action_and_value(obs)[0]
        mean = agent.actor_mean(agent.normalise(obs[:1]))[0]
    assert torch.equal(actions, again)
    assert torch.allclose(actions.mean(0), mean, atol=0.05)
    assert torch.allclose(actions.std(0), agent.actor_logstd.exp().detach(), rtol=0.03)


def test_observation_statistics_are_numpys_over_all_batches():
    """Also where the mean is large beside the std, and where batches differ in size and place."""
    rng, agent = np.random.default_rng(0), bare_agent(3, 1)
    batches = [
        rng.normal([1e3 + i, 0.0, -5.0 * i], [1e-1, 2.0, 0.5 + i], size=(n, 3)) for i, n in enumerate([64, 7, 300, 1])
    ]
    for batch in batches:
        agent.renew_statistics(torch.tensor(batch))
    rows = np.concatenate(batches)
    assert agent.obs_count.item() == len(rows)
    assert np.allclose(agent.obs_mean, rows.mean(0), rtol=1e-12) and np.allclose(agent.obs_var, rows.var(0), rtol=1e-9)


def test_only_renewing_moves_the_observation_statistics(monkeypatch):
    """Not acting, not valuing, not an update, not an evaluation."""
    args = make_args("--env-id", "Reacher-v5", "--eval-episodes", "2", "--num-envs", "2", "--num-steps", "16")
    agent = make_agent(10, 2)
    before, names = state_of(agent), {"obs_mean", "obs_var", "obs_count"}
    obs = torch.randn(32, 10) * 100
    with torch.no_grad():
        agent.get_value(obs)
        actions, logprobs, _, values, _ = agent.get_action_and_value(obs)
    script.evaluate(agent, args, 5)
    assert not changed(agent, before)
    optimizer, rng = torch.optim.Adam(agent.parameters(), lr=1e-3), np.random.default_rng(0)
    rollout = (obs, actions, logprobs, torch.randn(32), torch.randn(32), values)
    script.update_policy(agent, optimizer, rollout, rng, args)
    assert changed(agent, before) and not changed(agent, before) & names
    agent.renew_statistics(obs)
    assert names <= changed(agent, before)


def test_update_policy_learns_the_rewarded_action():
    """A bandit: actions near 0.7 pay. A learning test of the policy alone, in a second."""
    args = make_args("--num-envs", "4", "--num-steps", "64", "--num-minibatches", "4")
    torch.manual_seed(0)
    agent, rng = bare_agent(3, 1), np.random.default_rng(0)
    optimizer, obs = torch.optim.Adam(agent.parameters(), lr=3e-3), torch.randn(256, 3)
    for _ in range(15):
        with torch.no_grad():
            actions, logprobs, _, values, _ = agent.get_action_and_value(obs)
        rewards = -(actions[:, 0] - 0.7).square()
        rollout = (obs, actions, logprobs, rewards - values, rewards, values)
        script.update_policy(agent, optimizer, rollout, rng, args)
    with torch.no_grad():
        assert (agent.actor_mean(agent.normalise(obs)) - 0.7).abs().mean() < 0.15
        assert agent.actor_logstd.exp().item() < 0.9


def test_a_mean_out_of_bounds_comes_back_and_one_within_is_left_alone():
    """All actions out there are executed alike: with no advantage to tell them apart, PPO's loss leaves it there."""
    obs, zeros, means = torch.randn(256, 3), torch.zeros(256), {}
    for coef in ("0.1", "0"):
        args = make_args("--num-envs", "4", "--num-steps", "64", "--num-minibatches", "4", "--bound-coef", coef)
        torch.manual_seed(0)
        agent, rng = (
            script.Agent(3, torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0]), 0.0),
            np.random.default_rng(0),
        )
        agent.actor_mean[-1].bias.data[:] = torch.tensor([3.0, 1.5])
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)  # Adam's momentum overshoots
        for _ in range(10):
            with torch.no_grad():
                actions, logprobs, _, values, _ = agent.get_action_and_value(obs)
            rollout = (obs, actions, logprobs, zeros, values, values)
            logged = script.update_policy(agent, optimizer, rollout, rng, args)
        means[coef] = agent.actor_mean(agent.normalise(obs)).mean(0).tolist()
    assert means["0"] == pytest.approx([3.0, 1.5], abs=0.1)
    assert means["0.1"] == pytest.approx([1.0, 1.5], abs=0.1)
    assert logged["out_of_bounds"] == pytest.approx(4, abs=0.5)


def test_the_entropy_bonus_is_the_papers_but_in_swimmer():
    """A.1: 0.01, only when the predictor pays; in Swimmer 0.03, not the paper's 0.001."""
    for task, coef in (("Hopper-v5", 0.01), ("Swimmer-v5", 0.03), ("Pusher-v5", 0.01)):
        assert make_args("--env-id", task).ent_coef == coef
        assert script.parse_args(["--true-reward", "--env-id", task]).ent_coef == 0
    assert make_args("--ent-coef", "0").ent_coef == 0


# ------------------------------------------------------------------------------------------------------- reward model
def member_scores(ensemble, x):
    """Each member as the paper describes it, one after the other, row by row."""
    columns = []
    for m in range(ensemble.members):
        h = ((x - ensemble.input_mean) / ensemble.input_std).clamp(-10, 10)
        for layer, bias in zip(list(ensemble.layers)[:2], ensemble.biases, strict=True):
            h = torch.stack([F.leaky_relu(row @ layer[m] + bias[m, 0], 0.01) for row in h])
        columns.append(torch.stack([(row * ensemble.layers[2][m, :, 0]).sum() for row in h]))
    return torch.stack(columns, 1)


def test_the_batched_members_equal_one_network_after_the_other():
    """Traps 19 and 20: nor does a row's reward depend on the rows beside it, or on the mode."""
    ensemble, x = make_ensemble(), 3 * torch.randn(40, 5) + 1
    ensemble.renew_inputs(x)
    raw = ensemble.score(x)
    assert raw.shape == (40, 3) and raw.std(1).min() > 0
    assert torch.allclose(raw, member_scores(ensemble, x), atol=1e-5)
    assert torch.equal(raw, ensemble.score(x)) and torch.allclose(raw[7:9], ensemble.score(x[7:9]), atol=1e-6)
    assert torch.allclose(raw, ensemble.score(x, batch=7), atol=1e-6)
    assert torch.allclose(ensemble.train()(x), raw, atol=1e-6)
    assert [tuple(weight.shape) for weight in ensemble.weights()] == [(3, 5 * 64), (3, 64 * 64), (3, 64)]


def test_members_share_no_parameters():
    ensemble = make_ensemble()
    ensemble(torch.randn(4, 5))[:, 1].sum().backward()
    for weight in ensemble.parameters():
        grad = weight.grad.reshape(3, -1)
        assert grad[1].any() and not grad[0].any() and not grad[2].any()


def test_only_renew_inputs_moves_the_input_statistics():
    """Traps 29, 30 and 33: scoring moves nothing, and the policy's statistics are others."""
    ensemble, x = make_ensemble(), 3 * torch.randn(200, 5) + 1
    before = state_of(ensemble)
    ensemble.normalise(ensemble.score(x), 0.1)
    ensemble.train()(x)
    assert not changed(ensemble, before)
    ensemble.renew_statistics(x)
    assert changed(ensemble, before) == {"mean", "std", "average_std"}
    before = state_of(ensemble)
    ensemble.renew_inputs(x)
    assert changed(ensemble, before) == {"input_mean", "input_std"}
    assert torch.allclose(ensemble.input_mean, x.mean(0)) and torch.allclose(ensemble.input_std, x.std(0))
    ensemble.renew_inputs(torch.ones(50, 5))  # what never changes is not blown up
    assert ensemble.input_std.min().item() > 1e-4 and ensemble.score(x).isfinite().all()


def test_rewards_have_zero_mean_and_the_wanted_std():
    """Trap 29: right after each renewal, over the rows that it looked at."""
    ensemble, x = make_ensemble(), torch.randn(500, 5)
    for weight in ensemble.parameters():  # members that agree in part: two of three are the same
        weight.data.view(3, -1)[1] = weight.data.view(3, -1)[0]
    ensemble.renew_statistics(x)
    rewards = ensemble.normalise(ensemble.score(x), 0.1)
    assert rewards.mean().abs() < 1e-4 and rewards.std().item() == pytest.approx(0.1, rel=1e-3)
    raw = ensemble.score(x)
    by_hand = ((raw - raw.mean(0)) / raw.std(0)).mean(1)
    assert torch.allclose(rewards, 0.1 * by_hand / by_hand.std(), atol=1e-5)


def test_an_uninformed_model_is_not_blown_up():
    ensemble, x = make_ensemble(), torch.randn(500, 5)
    ensemble.layers[-1].data *= 0.01 * script.STD_FLOOR / ensemble.score(x).std()
    ensemble.renew_statistics(x)
    assert ensemble.normalise(ensemble.score(x), 0.1).std() < 0.1 * 0.03


def fill(tmp_path, n=64, L=5, seed=0):
    """Labels on noise with a planted reward of the state and of the action, which the oracle compares."""
    rng = np.random.default_rng(seed)
    obs, actions = rng.normal([3.0, 0.0, -40.0], [1.0, 1.0, 10.0], (n, 2, L, 3)), rng.uniform(-1, 1, (n, 2, L, 1))
    sums, labels = planted(obs, actions).sum(-1).astype(np.float32), script.Preferences(tmp_path, 0, None, make_args())
    for i in range(n):
        pair = {"obs": obs[i].astype(np.float32), "executed": actions[i].astype(np.float32), "sums": sums[i]}
        labels.answer(labels.ask(pair, []), float(sums[i, 0] > sums[i, 1]))
    labels.read()
    return labels


def planted(obs, actions):
    return obs[..., 0] - 3 + 2 * actions[..., 0] - 0.05 * (obs[..., 2] + 40)


def test_a_planted_reward_is_recovered_from_preferences(tmp_path):
    """Trap 18: every member learns, from states and actions, and ranks clips that it has never seen."""
    args = make_args("--segment-length", "5")
    labels, ensemble = fill(tmp_path, 400), make_ensemble(4)
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=args.reward_learning_rate)
    before = [weight.clone() for weight in ensemble.weights()]
    script.update_reward_model(ensemble, optimizer, labels, 150, np.random.default_rng(0), args)
    for old, new in zip(before, ensemble.weights(), strict=True):
        assert ((old - new).abs().amax(1) > 1e-3).all()
    loss, accuracy = script.held_out(ensemble, labels, args)
    assert accuracy > 0.85 and loss < 0.45
    rng = np.random.default_rng(1)
    obs, actions = rng.normal([3.0, 0.0, -40.0], [1.0, 1.0, 10.0], (500, 3)), rng.uniform(-1, 1, (500, 1))
    raw = ensemble.score(torch.tensor(np.concatenate([obs, actions], -1), dtype=torch.float32))
    for member in range(3):  # per step, though only sums over clips were compared
        assert np.corrcoef(raw[:, member], planted(obs, actions))[0, 1] > 0.85


def test_target_ablation_regresses_both_sums(tmp_path):
    args = make_args("--segment-length", "5", "--ablation", "target")
    labels, ensemble = fill(tmp_path, 400), make_ensemble(4)
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=args.reward_learning_rate)
    script.update_reward_model(ensemble, optimizer, labels, 150, np.random.default_rng(0), args)
    inputs, _, returns, _ = labels.batch(range(400))
    predicted = ensemble.score(inputs).view(800, 5, 3).sum(1).mean(1)
    assert torch.corrcoef(torch.stack([predicted, returns.flatten()]))[0, 1] > 0.9


def test_fitting_renews_the_input_statistics_from_all_labels(tmp_path):
    args = make_args("--segment-length", "5", "--reward-minibatch-size", "4")
    labels, ensemble = fill(tmp_path, 30), make_ensemble(4)
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=1e-3)
    script.update_reward_model(ensemble, optimizer, labels, 1, np.random.default_rng(0), args)
    rows = torch.cat([torch.cat([label["obs"], label["executed"]], -1).flatten(0, 1) for label in labels.labels])
    assert len(rows) == 30 * 2 * 5
    assert torch.allclose(ensemble.input_mean, rows.mean(0), atol=1e-5)
    assert torch.allclose(ensemble.input_std, rows.std(0), atol=1e-4)


def test_held_out_labels_weigh_nothing_and_others_by_their_weight(tmp_path):
    """The gradient of a minibatch is that of the weighted mean per member, summed over members (trap 24)."""
    args = make_args("--segment-length", "5", "--reward-minibatch-size", "16")
    labels, ensemble = fill(tmp_path, 16), make_ensemble(4)
    reference = copy.deepcopy(ensemble)
    optimizer, at = torch.optim.SGD(ensemble.parameters(), lr=1.0), np.random.default_rng(0).integers(16, size=16)
    reference.renew_inputs(labels.batch(range(16))[0])
    inputs, mu, _, weights = labels.batch(at)
    sums = reference(inputs).view(16, 2, 5, 3).sum(2)
    total = 0.0
    for m in range(3):
        losses = script.preference_loss(sums[:, 0] - sums[:, 1], mu)[:, m]
        chosen = [i for i in range(16) for _ in range(int(weights[i, m]))]  # a bootstrap sample, literally
        total = total + losses[chosen].mean()
    total.backward()
    ensemble.l2_coef.zero_()
    script.update_reward_model(ensemble, optimizer, labels, 1, np.random.default_rng(0), args)
    for new, old in zip(ensemble.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(new, old - old.grad, atol=1e-5)


# ---------------------------------------------------------------------------------------------- segments and queries
def recorded(T, N, seed=0):
    """A stream of rows as a run makes them: (T, N, ...)."""
    rng = np.random.default_rng(seed)
    rows = {
        "obs": rng.normal(size=(T, N, 3)),
        "executed": rng.uniform(-1, 1, size=(T, N, 2)),
        "env_rewards": rng.normal(size=(T, N)),
        "pred_rewards": rng.normal(size=(T, N)),
    }
    return {name: torch.tensor(array, dtype=torch.float32) for name, array in rows.items()}


def add(pool, stream, part=slice(None)):
    rows = {name: array[part] for name, array in stream.items()}
    pool.add(rows, rows["env_rewards"], rows["pred_rewards"])


@pytest.mark.parametrize("chunk", [7, 64, 200])
def test_segments_are_the_recorded_rows_also_where_the_pool_has_wrapped(chunk):
    """Rollouts that do not divide the pool, fit into it, and are longer than it is."""
    rows, T, N, L = 64, 403, 3, 10
    stream, pool = recorded(T, N), script.SegmentPool(rows, N, 3, 2, "cpu")
    for t in range(0, T, chunk):
        add(pool, stream, slice(t, t + chunk))
    assert pool.count == T and pool.first_row() == T - rows
    starts = np.array([(n, t) for n in range(N) for t in range(T - rows, T - L + 1)])
    clips = pool.clips(starts, L)
    assert set(clips) == {"obs", "executed"}
    inputs = script.model_inputs(clips).view(len(starts), L, 5)
    sums = [pool.gather(name, starts, 0, L).sum(1) for name in ("oracle_rewards", "pred_rewards")]
    for i, (n, t) in enumerate(starts):
        assert torch.equal(clips["obs"][i], stream["obs"][t : t + L, n])
        assert torch.equal(clips["executed"][i], stream["executed"][t : t + L, n])
        assert torch.equal(inputs[i], torch.cat([stream[name][t : t + L, n] for name in ("obs", "executed")], -1))
        for sums_of, name in zip(sums, ("env_rewards", "pred_rewards"), strict=True):
            assert sums_of[i].item() == pytest.approx(stream[name][t : t + L, n].sum().item(), abs=1e-5)


def test_a_label_keeps_its_clips_when_the_pool_moves_on(tmp_path):
    """Trap 1: copies, not row numbers; on the disk too. `ask` stores what the pool holds, and the oracle's answer."""
    pool, first, args = (
        script.SegmentPool(80, 2, 3, 2, "cpu"),
        recorded(80, 2),
        make_args("--segment-length", "6", "--num-envs", "2"),
    )
    add(pool, first)
    labels = script.Preferences(tmp_path, 0, None, args)
    script.ask(None, pool, labels, None, 4, 0, np.random.default_rng(0), args)
    chosen = script.select_pairs(None, pool, 4, 0, np.random.default_rng(0), args)
    add(pool, recorded(80, 2, seed=1))
    again = script.Preferences(tmp_path, 4, None, args)
    assert labels.used == again.used == 4
    for taken_up in (labels, again):
        inputs, mu, returns, weights = taken_up.batch(range(4))
        sums = []
        for clip, (n, t) in zip(inputs.view(8, 6, 5), chosen.reshape(-1, 2), strict=True):
            assert torch.equal(clip, torch.cat([first[name][t : t + 6, n] for name in ("obs", "executed")], -1))
            sums.append(first["env_rewards"][t : t + 6, n].sum())
        sums = torch.stack(sums).view(4, 2)
        assert torch.equal(mu, (sums[:, 0] > sums[:, 1]).float()) and 0 < mu.mean() < 1
        assert torch.allclose(returns, (sums - sums.mean()) / sums.std(), atol=1e-5)
        assert torch.equal(weights, torch.stack([script.bootstrap_weights(pair, 3) for pair in range(4)]))
    assert all(torch.equal(torch.as_tensor(again.pair(2)[name]), again.labels[2][name]) for name in ("obs", "executed"))


def test_the_most_disputed_candidates_are_taken(monkeypatch):
    args = make_args("--num-envs", "2", "--segment-length", "5")
    pool, ensemble, drawn, sample = script.SegmentPool(400, 2, 3, 2, "cpu"), make_ensemble(), [], script.sample_segments
    add(pool, recorded(400, 2))
    monkeypatch.setattr(script, "sample_segments", lambda *given: drawn.append(sample(*given)) or drawn[-1])

    def dispute(pairs):
        raw = ensemble.score(script.model_inputs(pool.clips(pairs.reshape(-1, 2), 5)))
        return script.disagreement(raw.view(len(pairs), 2, 5, 3).sum(2), "none").numpy()

    chosen = script.select_pairs(ensemble, pool, 4, 0, np.random.default_rng(3), args)
    uniform = script.select_pairs(None, pool, 4, 0, np.random.default_rng(3), args)
    candidates = drawn[0].reshape(-1, 2, 2)
    assert len(candidates) == 40 and len(chosen) == 4 and np.array_equal(uniform, candidates[:4])
    best = np.sort(dispute(candidates))[::-1]
    assert dispute(chosen) == pytest.approx(best[:4], abs=1e-6) and best[0] > 2 * best[-1]


def test_rewards_are_normalised_by_actions_too():
    """A run's renewal draws all rows of the pool and of nothing else, observation and action of each."""
    args, pool, ensemble = make_args("--num-envs", "2"), script.SegmentPool(400, 2, 3, 2, "cpu"), make_ensemble()
    stream = recorded(700, 2)
    stream["executed"] = stream["obs"][..., :2] * 3  # an action belongs to its observation, and to no other
    add(pool, stream)
    ensemble.forward = lambda x: (x[:, :1] * x[:, 3:4]).repeat(1, ensemble.members)
    script.renew_statistics(ensemble, pool, np.random.default_rng(0), args)
    rows = torch.cat([stream["obs"], stream["executed"]], -1)[-400:].flatten(0, 1)
    raw = ensemble.score(rows)
    assert (raw >= 0).all() and raw.mean() > 0.5 * raw.std()
    assert torch.allclose(ensemble.mean, raw.mean(0), atol=0.15 * raw.std(0).min().item())
    assert torch.allclose(ensemble.std, raw.std(0), rtol=0.15)


def test_correlation_is_that_of_paid_rows_and_logging_draws_nothing():
    args, pool, stream = (
        make_args("--num-envs", "2", "--segment-length", "5"),
        script.SegmentPool(400, 2, 3, 2, "cpu"),
        {},
    )
    stream = recorded(400, 2)
    stream["pred_rewards"] = 3 * stream["env_rewards"] + 7
    stream["pred_rewards"][:100] = math.nan  # the untrained policy's
    add(pool, stream)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    assert script.reward_correlation(pool, args) == pytest.approx(1, abs=1e-4)
    assert torch.equal(before[0], torch.random.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])
    pool.streams["pred_rewards"] *= -1
    assert script.reward_correlation(pool, args) == pytest.approx(-1, abs=1e-4)
    assert math.isnan(script.reward_correlation(script.SegmentPool(400, 2, 3, 2, "cpu"), args))
