"""The parts of ppo_mujoco_rlhf.py against answers worked out by hand or by a slow reference.

What it shares with ppo_atari_rlhf.py word for word (test_siblings.py) is tested in test_atari_parts.py. "Trap n"
names a bug that other implementations of the method have, or had; each such test fails on that bug.
"""

import copy
import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ppo_mujoco_rlhf as script

TASKS = list(script.SEGMENT_LENGTH)


def make_args(*flags: str) -> script.Args:
    args = script.parse_args(["--oracle", *flags])
    script.resolve_hardware(args)
    return args


def make_envs(env_id: str, num_envs: int, **kwargs):
    return script.make_envs(make_args("--env-id", env_id), num_envs, **kwargs)


def bare_agent(num_obs, num_actions):
    return script.Agent(num_obs, -torch.ones(num_actions), torch.ones(num_actions))


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


# What the formula says of the numbers that Gymnasium's own step reports of the same step
FROM_INFOS = {
    "Walker2d-v5": lambda env, info: info["x_velocity"] + env.data.qpos[1] - 1,
    "Hopper-v5": lambda env, info: info["x_velocity"] + env.data.qpos[1],
    "Swimmer-v5": lambda env, info: info["reward_forward"],
    "HalfCheetah-v5": lambda env, info: info["reward_forward"],
    "Ant-v5": lambda env, info: info["x_velocity"] + env.data.qpos[2] - 1.2,
    "Reacher-v5": lambda env, info: info["reward_dist"],
    "InvertedDoublePendulum-v5": lambda env, info: (
        10 + info["distance_penalty"] + info["velocity_penalty"] + 10 * (env.data.site_xpos[0][2] - 1)
    ),
    "InvertedPendulum-v5": lambda env, info: 1 - env.data.qpos[1] ** 2,
}


@pytest.mark.parametrize("env_id", TASKS)
def test_a_step_is_paid_for_itself_and_not_for_its_torques(env_id):
    """Trap 14, and the time of the state: a step beside Gymnasium's, whose report it is recomputed from."""
    envs, plain = make_envs(env_id, 1, stagger=False), gym.make(env_id, max_episode_steps=-1).unwrapped
    rng, space = np.random.default_rng(0), envs.single_action_space
    envs.reset(seed=3)
    plain.reset(seed=3)
    for _ in range(49):
        action = rng.uniform(space.low, space.high).astype(np.float32)
        _, rewards, *_ = envs.step(action[None])
        *_, info = plain.step(action)
        assert np.array_equal(plain.data.qpos, envs.envs[0].simulator.data.qpos)
        # Ant reports the velocity between the starts of two last substeps, a hundredth of a second earlier
        tolerance = 1.0 if env_id == "Ant-v5" else 1e-9
        assert rewards[0] == pytest.approx(FROM_INFOS[env_id](plain, info), abs=tolerance)
    envs.close()
    plain.close()


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
    envs, rng = make_envs(env_id, 32 if env_id == "Reacher-v5" else 4, stagger=False), np.random.default_rng(0)
    space, length = envs.single_action_space, envs.envs[0].length
    envs.reset(seed=1)
    returns = np.zeros(envs.num_envs)
    for _ in range(length):
        actions = rng.standard_normal(envs.action_space.shape).clip(space.low, space.high).astype(np.float32)
        _, rewards, _, truncated, _ = envs.step(actions)
        returns += rewards
    envs.close()
    assert truncated.all() and low < returns.mean() < high


def test_the_ant_sees_27_numbers_and_other_tasks_theirs():
    sizes = {"Ant-v5": 27, "Hopper-v5": 11, "Walker2d-v5": 17, "Reacher-v5": 10, "Humanoid-v5": 348}
    for env_id, size in sizes.items():
        envs = make_envs(env_id, 1)
        assert envs.single_observation_space.shape == (size,)
        envs.close()


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
    assert make_args().eval_episodes == 10 and make_args("--env-id", "Reacher-v5").eval_episodes == 100
    assert make_args("--env-id", "Reacher-v5", "--eval-episodes", "3").eval_episodes == 3
    args = make_args("--num-envs", "16", "--query-pool-steps", "20000", "--segment-length", "50")
    assert args.pool_rows == 1250 and args.query_limit == (1250 - 50) * 16 // 200


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
    zeros = np.zeros(envs.action_space.shape, np.float32)
    envs.reset(seed=7)
    for _ in range(50):
        envs.step(zeros)
    envs.reset(seed=0)  # in the middle of episodes
    plain.reset(seed=0)
    for simulator in (*(env.simulator for env in envs.envs), plain.unwrapped):
        qpos = simulator.data.qpos.copy()
        for index, value in UNHEALTHY[env_id].items():
            qpos[index] = value
        simulator.set_state(qpos, simulator.data.qvel)
    assert plain.step(zeros[0])[2]  # there it is over
    ends, length = [[] for _ in range(n)], 250 if env_id == "InvertedPendulum-v5" else 1000
    for t in range(1, math.ceil(length / 3) + length + 5):
        _, _, terminated, truncated, _ = envs.step(zeros)
        assert not terminated.any()
        for i in np.flatnonzero(truncated):
            ends[i].append(t)
    first, second = math.ceil(length / 3), math.ceil(2 * length / 3)
    assert ends == [[first, first + length], [second], [length]]
    envs.close()
    plain.close()


def test_short_tasks_and_unstaggered_environments_end_at_their_length():
    for stagger, expected in ((True, [[13, 63, 113], [25, 75], [38, 88], [50, 100]]), (False, [[50, 100]] * 4)):
        envs = make_envs("Reacher-v5", 4, stagger=stagger)
        envs.reset(seed=0)
        ends = [[] for _ in range(4)]
        for t in range(1, 115):
            for i in np.flatnonzero(envs.step(np.zeros((4, 2), np.float32))[3]):
                ends[i].append(t)
        assert ends == expected
        envs.close()


def test_every_row_is_a_real_step(monkeypatch):
    """Trap 36: with Gymnasium's default, the step after an end is none, and its reward is 0."""
    envs = make_envs("Reacher-v5", 2, stagger=False)
    steps = []
    inner = script.FixedLength.step
    monkeypatch.setattr(script.FixedLength, "step", lambda self, action: steps.append(1) or inner(self, action))
    envs.reset(seed=0)
    rewards = np.stack([envs.step(np.ones((2, 2), np.float32))[1] for _ in range(120)])
    assert len(steps) == 240 and (rewards < 0).all()
    envs.close()


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


def test_actions_follow_the_policys_mean_and_std_and_its_own_generator():
    agent, obs = make_agent(), torch.randn(1, 5).expand(20_000, 5)
    with torch.no_grad():
        actions = agent.get_action_and_value(obs, generator=torch.Generator().manual_seed(1))[0]
        torch.manual_seed(99)  # must not matter
        again = agent.get_action_and_value(obs, generator=torch.Generator().manual_seed(1))[0]
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
    script.evaluate(agent, None, args, 5)
    assert not changed(agent, before)
    optimizer, rng = torch.optim.Adam(agent.parameters(), lr=1e-3), np.random.default_rng(0)
    rollout = (obs, actions, logprobs, torch.randn(32), torch.randn(32), values)
    script.update_policy(agent, optimizer, script.minibatch_loss, rollout, rng, args)
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
        script.update_policy(agent, optimizer, script.minibatch_loss, rollout, rng, args)
    with torch.no_grad():
        assert (agent.actor_mean(agent.normalise(obs)) - 0.7).abs().mean() < 0.15
        assert agent.actor_logstd.exp().item() < 0.9


def test_a_mean_out_of_bounds_comes_back_and_one_within_is_left_alone():
    """All actions out there are executed alike: with no advantage to tell them apart, PPO's loss leaves it there."""
    obs, zeros, means = torch.randn(256, 3), torch.zeros(256), {}
    for coef in ("0.1", "0"):
        args = make_args("--num-envs", "4", "--num-steps", "64", "--num-minibatches", "4", "--bound-coef", coef)
        torch.manual_seed(0)
        agent, rng = script.Agent(3, torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0])), np.random.default_rng(0)
        agent.actor_mean[-1].bias.data[:] = torch.tensor([3.0, 1.5])
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.1)  # Adam's momentum overshoots
        for _ in range(10):
            with torch.no_grad():
                actions, logprobs, _, values, _ = agent.get_action_and_value(obs)
            rollout = (obs, actions, logprobs, zeros, values, values)
            logged = script.update_policy(agent, optimizer, script.minibatch_loss, rollout, rng, args)
        means[coef] = agent.actor_mean(agent.normalise(obs)).mean(0).tolist()
    assert means["0"] == pytest.approx([3.0, 1.5], abs=0.1)
    assert means["0.1"] == pytest.approx([1.0, 1.5], abs=0.1)
    assert logged["out_of_bounds"] == pytest.approx(4, abs=0.5)


def test_the_entropy_bonus_is_the_papers():
    """A.1: 0.01, in Swimmer 0.001, and only when the predictor pays."""
    for task, coef in (("Hopper-v5", 0.01), ("Swimmer-v5", 0.001), ("Pusher-v5", 0.01)):
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
    ensemble.normalise(ensemble.score(x), 0.01, 0.1)
    ensemble.train()(x)
    assert not changed(ensemble, before)
    ensemble.renew_statistics(x, 0.01)
    assert changed(ensemble, before) == {"mean", "std", "average_std", "renewals"}
    before = state_of(ensemble)
    ensemble.renew_inputs(x)
    assert changed(ensemble, before) == {"input_mean", "input_std"}
    assert torch.allclose(ensemble.input_mean, x.mean(0)) and torch.allclose(ensemble.input_std, x.std(0))
    ensemble.renew_inputs(torch.ones(50, 5))  # what never changes is not blown up
    assert ensemble.input_std.min().item() > 1e-4 and ensemble.score(x).isfinite().all()


def test_a_stored_clip_scores_the_same_after_the_policys_statistics_have_moved(tmp_path):
    """Trap 33: clips hold raw observations, and what reads them has statistics of its own."""
    args = make_args("--segment-length", "5", "--env-id", "Reacher-v5", "--num-envs", "2", "--num-steps", "16")
    labels, ensemble, agent = fill(tmp_path, 20), make_ensemble(4), bare_agent(3, 1)
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=1e-3)
    script.update_reward_model(ensemble, optimizer, labels, 2, np.random.default_rng(0), args)
    stored = state_of(ensemble), ensemble.score(labels.batch([3])[0])
    agent.renew_statistics(1000 + 50 * torch.randn(100, 3))
    agent.get_action_and_value(torch.randn(8, 3))
    assert torch.equal(ensemble.score(labels.batch([3])[0]), stored[1]) and not changed(ensemble, stored[0])


def test_rewards_have_zero_mean_and_the_wanted_std():
    """Trap 29: right after each renewal, over the rows that it looked at."""
    ensemble, x = make_ensemble(), torch.randn(500, 5)
    for weight in ensemble.parameters():  # members that agree in part: two of three are the same
        weight.data.view(3, -1)[1] = weight.data.view(3, -1)[0]
    ensemble.renew_statistics(x, floor=1e-3)
    rewards = ensemble.normalise(ensemble.score(x), 1e-3, 0.1)
    assert rewards.mean().abs() < 1e-4 and rewards.std().item() == pytest.approx(0.1, rel=1e-3)
    raw = ensemble.score(x)
    by_hand = ((raw - raw.mean(0)) / raw.std(0)).mean(1)
    assert torch.allclose(rewards, 0.1 * by_hand / by_hand.std(), atol=1e-5)


def test_an_uninformed_model_is_not_blown_up():
    ensemble, x = make_ensemble(), torch.randn(500, 5)
    ensemble.layers[-1].data *= 1e-4 / ensemble.score(x).std()
    ensemble.renew_statistics(x, floor=0.01)
    assert ensemble.normalise(ensemble.score(x), 0.01, 0.1).std() < 0.1 * 0.03


def fill(tmp_path, n=64, L=5, seed=0):
    """Labels on noise with a planted reward of the state and of the action, which the oracle compares."""
    rng = np.random.default_rng(seed)
    obs, actions = rng.normal([3.0, 0.0, -40.0], [1.0, 1.0, 10.0], (n, 2, L, 3)), rng.uniform(-1, 1, (n, 2, L, 1))
    returns = planted(obs, actions).sum(-1)
    mu = (returns[:, 0] > returns[:, 1]) + 0.5 * (returns[:, 0] == returns[:, 1])
    labels = script.Preferences(tmp_path, n, script.clip_shapes(L, 3, 1), 3, "cpu")
    answers = {"obs": obs, "actions": actions, "mu": mu, "returns": returns}
    labels.add(answers | {"segments": np.zeros((n, 2, 2), np.int64)}, save=False)
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
    inputs, _, returns, _ = labels.batch(np.arange(400))
    predicted = ensemble.score(inputs).view(800, 5, 3).sum(1).mean(1)
    assert torch.corrcoef(torch.stack([predicted, returns.flatten()]))[0, 1] > 0.9


def test_fitting_renews_the_input_statistics_from_all_labels(tmp_path):
    args = make_args("--segment-length", "5", "--reward-minibatch-size", "4")
    labels, ensemble = fill(tmp_path, 30), make_ensemble(4)
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=1e-3)
    script.update_reward_model(ensemble, optimizer, labels, 1, np.random.default_rng(0), args)
    rows = torch.cat([labels.arrays["obs"], labels.arrays["actions"]], -1).flatten(0, 2)
    assert len(rows) == 30 * 2 * 5
    assert torch.allclose(ensemble.input_mean, rows.mean(0), atol=1e-5)
    assert torch.allclose(ensemble.input_std, rows.std(0), atol=1e-4)


def test_held_out_labels_weigh_nothing_and_others_by_their_weight(tmp_path):
    """The gradient of a minibatch is that of the weighted mean per member, summed over members (trap 24)."""
    args = make_args("--segment-length", "5", "--reward-minibatch-size", "16")
    labels, ensemble = fill(tmp_path, 16), make_ensemble(4)
    reference = copy.deepcopy(ensemble)
    optimizer, at = torch.optim.SGD(ensemble.parameters(), lr=1.0), np.random.default_rng(0).integers(16, size=16)
    reference.renew_inputs(labels.batch(np.arange(16))[0])
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
    return {
        "obs": rng.normal(size=(T, N, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(T, N, 2)).astype(np.float32),
        "oracle_rewards": rng.normal(size=(T, N)).astype(np.float32),
        "pred_rewards": rng.normal(size=(T, N)).astype(np.float32),
    }


@pytest.mark.parametrize("chunk", [7, 64, 200])
def test_segments_are_the_recorded_rows_also_where_the_pool_has_wrapped(chunk):
    """Rollouts that do not divide the pool, fit into it, and are longer than it is."""
    rows, T, N, L = 64, 403, 3, 10
    stream, pool = recorded(T, N), script.SegmentPool(rows, N, 3, 2, "cpu")
    for t in range(0, T, chunk):
        pool.add(**{name: array[t : t + chunk] for name, array in stream.items()})
    assert pool.count == T and pool.first_start() == T - rows
    starts = np.array([(n, t) for n in range(N) for t in range(T - rows, T - L + 1)])
    clips = pool.clips(starts, L)
    assert {name: tuple(x.shape[1:]) for name, x in clips.items()} == {
        name: shape for name, (shape, _) in script.clip_shapes(L, 3, 2).items()
    }
    inputs = script.model_inputs(clips).view(len(starts), L, 5).numpy()
    sums = pool.gather("oracle_rewards", starts, 0, L).sum(1).numpy()
    for i, (n, t) in enumerate(starts):
        assert np.array_equal(clips["obs"][i], stream["obs"][t : t + L, n])
        assert np.array_equal(clips["actions"][i], stream["actions"][t : t + L, n])
        assert np.array_equal(inputs[i], np.concatenate([stream[k][t : t + L, n] for k in ("obs", "actions")], -1))
        assert sums[i] == pytest.approx(stream["oracle_rewards"][t : t + L, n].sum(), abs=1e-5)


def test_a_label_keeps_its_clips_when_the_pool_moves_on(tmp_path):
    """Trap 1: copies, not row numbers; on the disk too."""
    pool, first = script.SegmentPool(40, 2, 3, 2, "cpu"), recorded(40, 2)
    pool.add(**first)
    pairs = np.array([[[0, 10], [1, 20]]])
    clips = {name: x.numpy()[None] for name, x in pool.clips(pairs[0], 6).items()}
    labels = script.Preferences(tmp_path, 4, script.clip_shapes(6, 3, 2), 3, "cpu")
    labels.add(clips | {"mu": np.array([1.0]), "returns": np.array([[1.0, 0.0]]), "segments": pairs})
    pool.add(**recorded(40, 2, seed=1))
    inputs, mu, returns, _ = labels.batch([0])
    expected = [np.concatenate([first[k][t : t + 6, n] for k in ("obs", "actions")], -1) for n, t in ((0, 10), (1, 20))]
    assert np.array_equal(inputs.numpy(), np.concatenate(expected))
    assert mu.tolist() == [1.0] and returns.tolist() == [pytest.approx([0.5**0.5, -(0.5**0.5)])]
    (stored,) = script.read_shards(tmp_path, script.clip_shapes(6, 3, 2))
    assert np.array_equal(stored["obs"][0, 1], first["obs"][20:26, 1]) and np.array_equal(stored["segments"], pairs)
    again = script.Preferences(tmp_path, 4, script.clip_shapes(6, 3, 2), 3, "cpu")
    again.restore(1)
    assert torch.equal(again.batch([0])[0], inputs)


def test_the_most_disputed_candidates_are_taken(tmp_path, monkeypatch):
    args = make_args("--num-envs", "2", "--segment-length", "5")
    pool, ensemble = script.SegmentPool(400, 2, 3, 2, "cpu"), make_ensemble()
    pool.add(**recorded(400, 2))
    labels, offered, take = script.Preferences(tmp_path, 4, script.clip_shapes(5, 3, 2), 3, "cpu"), [], []
    inner = script.take_disjoint
    monkeypatch.setattr(script, "take_disjoint", lambda pairs, *rest: offered.append(pairs) or inner(pairs, *rest))
    take = script.select_pairs(ensemble, pool, labels, 4, 0, np.random.default_rng(3), args)
    (ranked,) = offered
    raw = ensemble.score(script.model_inputs(pool.clips(ranked.reshape(-1, 2), 5)))
    scores = script.disagreement(raw.view(len(ranked), 2, 5, 3).sum(2), "none")
    assert len(ranked) == 40 and len(take) == 4 and np.array_equal(take, inner(ranked, 4, 5))
    assert (scores[1:] <= scores[:-1] + 1e-6).all() and scores[0] > 2 * scores[-1]


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "exactly one of"),
        (["--oracle", "--true-reward"], "exactly one of"),
        (["--oracle", "--env-id", "Hoper-v5"], "did you mean Hopper-v5"),
        (["--oracle", "--env-id", "Walker-v5"], "Walker2d-v5"),
        (["--oracle", "--env-id", "CartPole-v1"], "not a v5 MuJoCo task"),
        (["--oracle", "--env-id", "Pendulum-v1"], "not a v5 MuJoCo task"),
        (["--oracle", "--env-id", "ALE/Pong-v5"], "not a v5 MuJoCo task"),
        (["--oracle", "--env-id", ""], "not a v5 MuJoCo task"),
        (["--oracle", "--env-id", "Hopper-v2"], "Hopper-v5"),
        (["--oracle", "--env-id", "Pusher-v4"], "not a v5"),  # fallen robots are paid for standing there
        (["--true-reward", "--env-id", "Hopper-v4"], "not a v5"),
        (["--oracle", "--env-id", "HalfCheetah-v5", "--labels", "-3"], "negative"),  # no log of MuJoCo's own
        (["--oracle", "--ablation", "no-labels"], "invalid choice"),
        (["--oracle", "--labels", "-3"], "negative"),
        (["--oracle", "--labels", "0"], "nothing to learn from"),
        (["--oracle", "--labels", "1400", "--total-timesteps", "20000"], "more than"),
        (["--oracle", "--labels", "100", "--total-timesteps", "4096", "--num-steps", "256"], "more than"),
        (["--oracle", "--query-pool-steps", "500"], "more than"),
        (["--oracle", "--segment-length", "2000"], "more than"),
        (["--oracle", "--segment-length", "0"], "at least 1"),
        (["--oracle", "--num-minibatches", "7"], "does not divide"),
        (["--oracle", "--num-envs", "4", "--num-steps", "16", "--num-minibatches", "64"], "one step per minibatch"),
        (["--oracle", "--teacher-mistake", "1.5"], "outside [0, 1]"),
        (["--oracle", "--gamma", "nan"], "outside [0, 1]"),
        (["--oracle", "--l2-coef", "0"], "outside [1e-6, 1e-3]"),
        (["--oracle", "--num-envs", "0"], "at least 1"),
        (["--oracle", "--reset-every", "0"], "at least 1"),
        (["--oracle", "--learning-rate", "-1"], "at least 0"),
        (["--oracle", "--learning-rate", "inf"], "at least 0"),
        (["--oracle", "--ent-coef", "nan"], "at least 0"),
        (["--oracle", "--ablation", "target", "--teacher-mistake", "0.1"], "--teacher"),
        (["--true-reward", "--labels", "10"], "learns no reward"),
        (["--true-reward", "--teacher-mistake", "0.1"], "learns no reward"),
        (["--oracle", "--labels", "0", "--preferences", "nowhere"], "not a run directory"),
        (["--oracle", "--labels", "0", "--reward-model", "nowhere"], "not a run directory"),
        (["--oracle", "--device", "cuda:99"], "not available"),
        (["--oracle", "--device", "meta"], "none of"),
        (["--oracle", "--torch-threads", "0"], "at least 1"),
        (["--oracle", "--seed", "99999999999999999999"], "below 2^32"),
        (["--oracle", "--random"], "goes with"),
        (["--resume", "nowhere"], "not a run directory"),
        (["--evaluate", "nowhere"], "not a run directory"),
        (["--resume", "a", "--evaluate", "b"], "give one of"),
        (["--human"], "label server"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_code_2(tmp_path, capfd, flags, said):
    with pytest.raises(SystemExit) as end:
        script.train(script.parse_args(flags))
    assert end.value.code == 2 and not list(tmp_path.iterdir())
    shown = capfd.readouterr().err
    assert said in " ".join(shown.replace("│", " ").split())
    if "invalid choice" not in said:  # that one is drawn by the command line's library
        assert len(shown.strip().splitlines()) == 1
