"""The parts of ppo_atari_rlhf.py against answers worked out by hand or by a slow reference.

"Trap n" names a bug that other implementations of the method have, or had; each such test fails on that bug.
"""

import itertools
import math

import numpy as np
import pytest
import torch

import ppo_atari_rlhf as script

GAMES = {game: f"ALE/{game.title().replace('_', '')}-v5" for game in script.HUD}


def make_args(*flags: str) -> script.Args:
    args = script.parse_args(["--oracle", "--no-bf16", "--torch-threads", "1", *flags])
    script.resolve_hardware(args)
    return args


def make_ensemble(members=3, seed=0, dropout=0.5):
    torch.manual_seed(seed)
    return script.RewardEnsemble(members, dropout, 1e-4, bf16=False)


def random_stacks(n, seed=0):
    return torch.randint(0, 256, (n, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ policy maths
def test_gae_is_the_double_sum_of_discounted_errors_up_to_the_end():
    rng = np.random.default_rng(0)
    T, N, gamma, lam = 12, 3, 0.9, 0.8
    rewards, values, next_values = (torch.tensor(rng.normal(size=(T, N))) for _ in range(3))
    dones = torch.tensor(rng.random((T, N)) < 0.25, dtype=torch.float64)
    advantages, returns = script.compute_gae(rewards, values, next_values, dones, gamma, lam)
    for t, n in itertools.product(range(T), range(N)):
        expected, weight = 0.0, 1.0
        for k in range(t, T):
            expected += weight * (rewards[k, n] + gamma * next_values[k, n] - values[k, n])
            if dones[k, n]:
                break
            weight *= gamma * lam
        assert advantages[t, n].item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.allclose(returns, advantages + values)


def test_gae_by_hand_with_an_end_in_the_middle():
    """Trap 35: the end belongs to the row that it follows, which takes no value from the next episode."""
    rewards, values = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0.5], [1.0], [3.0]])
    dones = torch.tensor([[0.0], [1.0], [0.0]])
    next_values = torch.tensor([[1.0], [3.0], [10.0]]) * (1 - dones)
    advantages, _ = script.compute_gae(rewards, values, next_values, dones, 0.5, 0.5)
    # row 2: 4 + 5 - 3 = 6; row 1: 2 - 1 = 1 (nothing of row 2); row 0: 1 + 0.5 - 0.5 + 0.25 * 1 = 1.25
    assert advantages.flatten().tolist() == [1.25, 1.0, 6.0]


def test_policy_loss_by_hand():
    args = make_args("--no-norm-adv", "--clip-coef", "0.1", "--ent-coef", "0.5", "--vf-coef", "2")
    newlogprob, logprobs = torch.tensor([1.5, 0.5]).log(), torch.zeros(2)
    advantages, returns, values = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    newvalue, entropy = torch.tensor([0.5, 0.05]), torch.tensor([1.0, 3.0])
    loss, info = script.policy_loss(newlogprob, entropy, newvalue, logprobs, advantages, returns, values, args)
    pg = (-1.1 + 2 * 0.9) / 2  # ratios 1.5 and 0.5: the first is clipped to 1.1, the second's worse side is 0.9
    v = 0.5 * ((1 - 0.1) ** 2 + 0.05**2) / 2  # the first value may move by 0.1 only
    assert info["policy_loss"].item() == pytest.approx(pg, abs=1e-6)
    assert info["value_loss"].item() == pytest.approx(v, abs=1e-6)
    assert loss.item() == pytest.approx(pg - 0.5 * 2 + 2 * v, abs=1e-6)
    assert info["clipfrac"].item() == 1.0


def test_first_minibatch_has_ratio_one_and_actions_follow_the_policy():
    torch.manual_seed(0)
    agent = script.Agent(3, bf16=False)
    torch.nn.init.normal_(agent.actor.weight, std=0.05)
    obs = random_stacks(2).repeat(2000, 1, 1, 1)[:2000]
    with torch.no_grad():
        actions, logprobs, entropy, _ = agent.get_action_and_value(obs, generator=torch.Generator().manual_seed(1))
        _, again, _, _ = agent.get_action_and_value(obs, actions)
        probs = torch.stack([agent.get_action_and_value(obs[:1], torch.tensor([a]))[1].exp() for a in range(3)])[:, 0]
    assert torch.allclose(logprobs, again, atol=1e-6)
    share = torch.bincount(actions[::2], minlength=3) / 1000
    assert (share - probs).abs().max() < 0.06 and probs.std() > 0.01
    assert entropy[0].item() == pytest.approx(-(probs * probs.log()).sum().item(), abs=1e-5)


def test_update_policy_learns_the_rewarded_action():
    """A bandit: one screen, six actions, action 2 pays. A learning test of the policy alone, in a second."""
    args = make_args("--num-envs", "4", "--num-steps", "32", "--learning-rate", "1e-3")
    torch.manual_seed(0)
    agent, rng = script.Agent(6, bf16=False), np.random.default_rng(0)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)
    obs = random_stacks(1).repeat(128, 1, 1, 1)
    for _ in range(4):
        with torch.no_grad():
            actions, logprobs, _, values = agent.get_action_and_value(obs)
        rewards = (actions == 2).float()
        rollout = (obs, actions, logprobs, rewards - values, rewards, values)
        script.update_policy(agent, optimizer, script.minibatch_loss, rollout, rng, args)
    with torch.no_grad():
        assert agent.get_action_and_value(obs[:1], torch.tensor([2]))[1].exp() > 0.5


# ------------------------------------------------------------------------------------------------- loss and schedule
def test_preference_loss_by_hand_with_a_tie_and_ten_percent_noise():
    difference = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 2.0], [-1.0, 0.0]])
    loss = script.preference_loss(difference, torch.tensor([1.0, 0.5, 0.0]))
    p = 0.9 * 0.75 + 0.05  # sigma(ln 3) = 3/4
    assert loss[0].tolist() == pytest.approx([-math.log(p), math.log(2)], abs=1e-6)
    q = 0.9 / (1 + math.exp(-2)) + 0.05
    assert loss[1].tolist() == pytest.approx(
        [-(math.log(p) + math.log(1 - p)) / 2, -(math.log(q) + math.log(1 - q)) / 2], abs=1e-6
    )
    assert loss[2, 0].item() == pytest.approx(-math.log(1 - (0.9 / (1 + math.e) + 0.05)), abs=1e-6)


def test_preference_loss_is_stable_and_gives_up_on_contradicted_labels():
    difference = torch.tensor([[-1e4], [1e4], [0.0]], requires_grad=True)
    loss = script.preference_loss(difference, torch.tensor([1.0, 1.0, 1.0]))
    loss.sum().backward()
    assert loss.flatten().tolist() == pytest.approx([-math.log(0.05), -math.log(0.95), math.log(2)], rel=1e-5)
    assert difference.grad.flatten().tolist() == pytest.approx([0.0, 0.0, -0.45], abs=1e-6)


def test_preference_loss_does_not_depend_on_the_order_of_clips():
    difference, mu = torch.randn(50, 3), torch.rand(50)
    assert torch.allclose(script.preference_loss(difference, mu), script.preference_loss(-difference, 1 - mu))


def test_target_loss_by_hand():
    sums, returns = torch.tensor([[[1.0, 2.0], [0.0, 5.0]]]), torch.tensor([[3.0, 1.0]])
    assert script.target_loss(sums, returns).tolist() == [[(4 + 1) / 2, (1 + 16) / 2]]


def test_disagreement_is_the_variance_of_the_predicted_preference():
    sums = torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])
    p = [0.5, 0.9 / (1 + math.exp(-2)) + 0.05]
    assert script.disagreement(sums, "none").item() == pytest.approx(np.var(p), abs=1e-6)
    assert script.disagreement(sums, "target").item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "initial, budget, expected",
    [  # at 0, 5, 10, 25, 50, 75 and 100 % of the run, from the paper's rates
        (500, 5500, [500, 1345, 1945, 3112, 4236, 4962, 5500]),
        (500, 10000, [500, 2106, 3246, 5463, 7599, 8979, 10000]),
        (175, 700, [175, 264, 327, 449, 567, 644, 700]),
    ],
)
def test_label_schedule_is_the_papers(initial, budget, expected):
    due = [script.label_schedule(step, 50_000_000, initial, budget) for step in
           (0, 2_500_000, 5_000_000, 12_500_000, 25_000_000, 37_500_000, 50_000_000)]  # fmt: skip
    assert np.abs(np.array(due) - expected).max() <= 1
    assert due[0] == initial and due[-1] == budget
    assert script.label_schedule(1000, 1000, 7, 7) == 7


def test_labels_before_training():
    assert make_args("--labels", "5500").initial_labels == 500
    assert make_args("--labels", "700").initial_labels == 175
    assert make_args("--labels", "5500", "--ablation", "no-online-queries").initial_labels == 5500


# ------------------------------------------------------------------------------------------------------------ teacher
def ask(rewards, *flags, recent=(), seed=0):
    rewards = np.asarray(rewards, dtype=float)
    return script.teacher_answers(np.random.default_rng(seed), rewards, list(recent), make_args(*flags))


def test_oracle_prefers_the_larger_sum_and_ties_exactly():
    """Trap 12: equal sums are ties, (1/2, 1/2), not a win of either side."""
    mu, skipped = ask([[[1, 0], [0, 0]], [[0, -1], [0, 0]], [[1, 0], [0, 1]], [[0, 0], [0, 0]]])
    assert mu.tolist() == [1.0, 0.0, 0.5, 0.5] and not skipped.any()


def test_teacher_beta_gives_the_sigmoids_frequency():
    """Trap 15: a rational teacher must really sample. Ties stay ties."""
    mu, _ = ask(np.tile([[[1.0], [0.0]]], (4000, 1, 1)), "--teacher-beta", "2")
    assert mu.mean() == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)
    assert ask([[[1e6], [0.0]]], "--teacher-beta", "1e9")[0].tolist() == [1.0]
    assert ask([[[1.0], [1.0]]], "--teacher-beta", "2")[0].tolist() == [0.5]


def test_teacher_mistakes_flip_decided_answers_only():
    mu, _ = ask(np.tile([[[1.0], [0.0]]], (4000, 1, 1)), "--teacher-mistake", "0.1")
    assert mu.mean() == pytest.approx(0.9, abs=0.015)
    assert ask([[[1.0], [1.0]]] * 50, "--teacher-mistake", "1")[0].tolist() == [0.5] * 50
    assert ask([[[1.0], [0.0]]] * 50, "--teacher-mistake", "1")[0].tolist() == [0.0] * 50


def test_teacher_gamma_forgets_early_steps():
    pair = [[[3.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]  # 3 early against 1 late: weights 0.25, 0.5, 1
    assert ask(pair)[0].tolist() == [1.0]
    assert ask(pair, "--teacher-gamma", "0.5")[0].tolist() == [0.0]


def test_teacher_equal_and_skip_follow_the_recent_sums():
    """Traps 15 and 16: thresholds enter once, and work for negative rewards as for positive ones."""
    recent = np.linspace(-10, 0, 101)  # std 2.915, 10 % quantile -9
    pairs = [[[-3.0], [-3.2]], [[-3.0], [-3.4]], [[-9.5], [-9.2]], [[-9.5], [-1.0]]]
    mu, skipped = ask(pairs, "--teacher-equal", "0.1", "--teacher-skip", "0.1", recent=recent)
    assert mu.tolist()[:2] == [0.5, 1.0]  # 0.2 < 0.2915 < 0.4
    assert skipped.tolist() == [False, False, True, False]
    assert not ask(pairs, recent=recent)[1].any()


def test_oracle_reads_the_raw_reward_its_sign_and_the_losses():
    """Trap 14: the reward before any wrapper, which `--no-oracle-clip` shows."""
    env_rewards, lost = np.array([[7.0, -1.0], [0.0, 0.0]]), np.array([[False, False], [True, False]])
    pong, breakout = make_args(), make_args("--env-id", "ALE/Breakout-v5")
    assert script.oracle_rewards_of(env_rewards, lost, pong).tolist() == [[1, -1], [0, 0]]
    assert script.oracle_rewards_of(env_rewards, lost, breakout).tolist() == [[1, -1], [-1, 0]]
    raw = make_args("--env-id", "ALE/Breakout-v5", "--no-oracle-clip", "--oracle-end-penalty", "2.5")
    assert script.oracle_rewards_of(env_rewards, lost, raw).tolist() == [[7, -1], [-2.5, 0]]


# ---------------------------------------------------------------------------------------------- segments and queries
def play(game: str, steps: int, num_envs: int = 3, seed: int = 5):
    """Random play on the real emulator: masked observations (T, N, 4, 84, 84), history, rewards, lost, ended."""
    args = make_args("--env-id", GAMES[game])
    envs, boxes, rng = script.make_envs(args, num_envs), script.hud_boxes(args.env_id), np.random.default_rng(seed)
    frames, infos = envs.reset(seed=seed)
    history, lives = np.zeros(num_envs, dtype=np.uint8), infos["lives"]
    rows = []
    for _ in range(steps):
        raw = frames.copy()
        action = rng.integers(0, envs.single_action_space.n, num_envs)
        obs, before = script.observe(frames, history, boxes).copy(), history
        frames, rewards, terminated, truncated, infos = envs.step(action)
        history = np.where(terminated | truncated, 0, np.minimum(history + 1, 3)).astype(np.uint8)
        rows.append((obs, before, rewards, terminated | (infos["lives"] < lives), terminated | truncated, raw))
        lives = infos["lives"]
    envs.close()
    return [np.stack(column) for column in zip(*rows, strict=True)]


@pytest.fixture(scope="module")
def breakout():
    return play("breakout", 800)


def fill_pool(pool, frames, history):
    """Append the newest frames of stacks and their history; rewards zero."""
    zeros = np.zeros(history.shape)
    pool.add(frames=frames[:, :, -1], history=history, oracle_rewards=zeros, pred_rewards=zeros)


def test_stacks_from_stored_frames_are_the_emulators_own(breakout):
    """Right after a reset, across a game over within a clip, and after the pool has wrapped (traps 3 and 4)."""
    obs, history, _, _, ended, _ = breakout
    pool, L = script.SegmentPool(303, 3, "cpu"), 25
    for part in np.array_split(np.arange(len(obs)), 8):
        fill_pool(pool, obs[part], history[part])
    starts = [(n, t) for n in range(3) for t in range(pool.first_start(), pool.count - L + 1)]
    assert pool.first_start() == 800 - 300 and len(starts) == 3 * (300 - L + 1)
    crossing = 0
    for part in np.array_split(np.array(starts), 20):
        stacks = script.model_inputs(pool.clips(part, L)).view(len(part), L, 4, 84, 84).numpy()
        for stack, (n, t) in zip(stacks, part, strict=True):
            assert np.array_equal(stack, obs[t : t + L, n])
            crossing += ended[t : t + L - 1, n].any()
    assert crossing > 20


def test_stacks_at_the_very_start_hold_the_first_frame(breakout):
    obs, history, *_, raw = breakout
    pool = script.SegmentPool(100, 3, "cpu")
    fill_pool(pool, obs[:50], history[:50])
    stacks = script.model_inputs(pool.clips(np.array([[1, 0]]), 25)).numpy()
    assert np.array_equal(stacks, obs[:25, 1])
    assert (stacks[0] == stacks[0, 3]).all() and not raw[0, 1, :3].any()  # where ALE leaves three empty ones
    assert np.array_equal(stacks[2, 0], stacks[2, 1]) and np.array_equal(stacks[4], stacks[1:5, 3])


def test_life_losses_and_ends_are_told_apart(breakout):
    """Five lives, so five losses per game, of which the last is also the end (and SAME_STEP inserts no row)."""
    _, history, _, lost, ended, _ = breakout
    assert ended.sum() >= 3 and (lost | ~ended).all()
    for n in range(3):
        last = np.flatnonzero(ended[:, n])[-1]
        assert lost[: last + 1, n].sum() == 5 * ended[:, n].sum()
        for t in np.flatnonzero(ended[:-1, n]):
            assert history[t + 1, n] == 0


def test_a_label_keeps_its_clips_when_the_pool_moves_on(tmp_path, breakout):
    """Trap 1: copies, not row numbers; on the disk too."""
    obs, history, *_ = breakout
    pool = script.SegmentPool(103, 3, "cpu")
    fill_pool(pool, obs[:100], history[:100])
    pairs = np.array([[[0, 10], [1, 20]]])
    clips = {name: x.numpy()[None] for name, x in pool.clips(pairs[0], 25).items()}
    labels = script.Preferences(tmp_path, 4, script.clip_shapes(25), 3, "cpu")
    labels.add(clips | {"mu": np.array([1.0]), "returns": np.array([[1.0, 0.0]]), "segments": pairs})
    for k in range(1, 8):
        fill_pool(pool, obs[100 * k : 100 * k + 100], history[100 * k : 100 * k + 100])
    stacks, mu, returns, _ = labels.batch([0])
    assert np.array_equal(stacks.numpy(), np.concatenate([obs[10:35, 0], obs[20:45, 1]]))
    assert mu.tolist() == [1.0] and returns.tolist() == [pytest.approx([0.5**0.5, -(0.5**0.5)])]
    (stored,) = script.read_shards(tmp_path, script.clip_shapes(25))
    assert np.array_equal(stored["frames"], clips["frames"]) and np.array_equal(stored["segments"], pairs)


def test_the_window_holds_the_newest_labels_and_the_disk_all(tmp_path):
    labels = script.Preferences(tmp_path, 5, script.clip_shapes(2), 3, "cpu")
    for i in range(4):
        n = 2 + i % 2
        blank = {
            name: np.full((n, *shape), i, dtype)
            for name, (shape, dtype) in script.label_shapes(script.clip_shapes(2)).items()
        }
        labels.add(blank | {"mu": (labels.count + np.arange(n)) / 100})
    assert labels.count == 10 and len(labels) == 5
    assert sorted(labels.arrays["mu"].tolist()) == pytest.approx([0.05, 0.06, 0.07, 0.08, 0.09])
    assert torch.equal(labels.weights[8 % 5], torch.as_tensor(script.bootstrap_weights([8], 3)[0]))
    assert sum(len(arrays["mu"]) for arrays in script.read_shards(tmp_path, script.clip_shapes(2))) == 10
    again = script.Preferences(tmp_path, 5, script.clip_shapes(2), 3, "cpu")
    again.restore(10)
    assert torch.equal(again.weights, labels.weights)
    for name, array in labels.arrays.items():
        assert torch.equal(again.arrays[name], array)


def test_bootstrap_holds_out_one_in_e_and_depends_on_the_label_alone():
    """Trap 21: the split of a label never changes; trap 23: members have different data."""
    weights = script.bootstrap_weights(range(3000), 3)
    assert weights.mean() == pytest.approx(1.0, abs=0.03)
    assert (weights == 0).mean() == pytest.approx(math.exp(-1), abs=0.015)
    assert np.array_equal(script.bootstrap_weights([7, 2999], 3), weights[[7, 2999]])
    assert 0.5 < (weights[:, 0] != weights[:, 1]).mean() < 0.9


def test_every_valid_start_is_drawn_and_nothing_else():
    """Traps 5, 8 and 10: the last start too, all environments, all equally often."""
    pairs = script.sample_pairs(np.random.default_rng(0), 20_000, 3, 7, 2)
    counts = np.zeros((2, 10))
    np.add.at(counts, (pairs[..., 0].ravel(), pairs[..., 1].ravel()), 1)
    assert (counts[:, :3] == 0).all() and (counts[:, 8:] == 0).all()
    assert np.abs(counts[:, 3:8] / 4000 - 1).max() < 0.1


def test_no_row_is_used_twice_in_a_batch_of_queries():
    """Trap 6: nor is a segment compared with itself, or with one that overlaps it."""
    pairs = script.sample_pairs(np.random.default_rng(1), 500, 0, 75, 2)
    chosen = script.take_disjoint(pairs, 50, 25)
    rows = [(env, start + t) for env, start in chosen.reshape(-1, 2).tolist() for t in range(25)]
    assert len(rows) == len(set(rows)) and 2 <= len(chosen) <= 4
    same = np.array([[[0, 5], [0, 5]], [[0, 5], [0, 29]], [[0, 5], [0, 30]], [[1, 0], [0, 40]], [[1, 0], [1, 60]]])
    assert script.take_disjoint(same, 5, 25).tolist() == [[[0, 5], [0, 30]], [[1, 0], [1, 60]]]
    assert len(script.take_disjoint(same, 1, 25)) == 1


def test_a_pair_is_never_asked_twice(tmp_path):
    labels = script.Preferences(tmp_path, 4, script.clip_shapes(2), 1, "cpu")
    pair = np.array([[[0, 5], [1, 9]]])
    blank = {
        name: np.zeros((1, *shape), dtype)
        for name, (shape, dtype) in script.label_shapes(script.clip_shapes(2)).items()
    }
    labels.add(blank | {"segments": pair})
    assert labels.asked(np.array([[[0, 5], [1, 9]], [[1, 9], [0, 5]], [[0, 5], [1, 8]]])).tolist() == [
        True,
        True,
        False,
    ]


def test_the_most_disputed_candidates_are_taken(tmp_path, monkeypatch):
    args = make_args("--num-envs", "2", "--segment-length", "5")
    pool = script.SegmentPool(403, 2, "cpu")
    fill_pool(pool, random_stacks(100)[:, None].repeat(4, 2, 1, 1, 1), np.full((400, 2), 3))
    ensemble, labels = make_ensemble(), script.Preferences(tmp_path, 4, script.clip_shapes(5), 3, "cpu")
    torch.nn.init.normal_(ensemble.out_weight, std=1.0)

    def score_of(pairs):
        stacks = script.model_inputs(pool.clips(pairs.reshape(-1, 2), 5))
        return script.disagreement(ensemble.score(stacks).view(len(pairs), 2, 5, 3).sum(2), "none")

    offered = []
    take = script.take_disjoint
    monkeypatch.setattr(script, "take_disjoint", lambda pairs, *rest: offered.append(pairs) or take(pairs, *rest))
    chosen = script.select_pairs(ensemble, pool, labels, 4, 0, np.random.default_rng(3), args)
    script.select_pairs(None, pool, labels, 4, 0, np.random.default_rng(3), args)
    ranked, uniform = offered
    assert len(ranked) == len(uniform) == 40 and len(chosen) == 4
    assert len({tuple(segment) for segment in ranked.reshape(-1, 2).tolist()}) <= 20  # each stands in four pairs
    scores = score_of(ranked)
    assert (scores[1:] <= scores[:-1] + 1e-6).all() and scores[0] > 2 * scores[-1]
    assert not (score_of(uniform)[1:] <= score_of(uniform)[:-1] + 1e-6).all()
    assert np.array_equal(chosen, take(ranked, 4, 5))


# ------------------------------------------------------------------------------------------------------- reward model
def test_scoring_moves_nothing_and_is_repeatable():
    """Traps 19, 20 and 30: no dropout, no batch statistics, no memory of other clips, at inference."""
    ensemble, stacks = make_ensemble(), random_stacks(20)
    ensemble.train()
    ensemble(stacks)  # batch norm has seen something
    before = {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}
    first = ensemble.score(stacks)
    assert torch.equal(first, ensemble.score(stacks))
    assert torch.allclose(first[7:9], ensemble.score(stacks[7:9]), atol=1e-6)
    for name, tensor in ensemble.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_members_share_no_parameters():
    """One batched pass equals three networks: a member's output has no gradient in another's parameters."""
    ensemble = make_ensemble()
    ensemble.eval()
    ensemble(random_stacks(4))[:, 1].sum().backward()
    for weight in ensemble.parameters():
        grad = weight.grad.reshape(3, -1)
        assert grad[1].any() and not grad[0].any() and not grad[2].any()
    assert ensemble.score(random_stacks(4)).std(1).min() > 0


def fill(tmp_path, n=64, L=3, members=3, value=None, seed=0):
    """Labels on noise frames with a planted reward: the brightness of a patch, which the oracle compares."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 100, (n, 2, L + 3, 84, 84), dtype=np.uint8)
    bright = rng.integers(0, 256, (n, 2, L + 3))
    frames[..., 30:50, 30:50] = bright[..., None, None]
    returns = bright[..., 3:].sum(-1) / 255
    mu = (returns[:, 0] > returns[:, 1]) + 0.5 * (returns[:, 0] == returns[:, 1])
    labels = script.Preferences(tmp_path, n, script.clip_shapes(L), members, "cpu")
    answers = {"frames": frames, "history": np.full((n, 2, L), 3), "mu": mu, "returns": returns}
    labels.add(answers | {"segments": np.zeros((n, 2, 2), np.int64)}, save=False)
    return labels


def test_a_planted_reward_is_recovered(tmp_path):
    """Trap 18: the optimiser steps, every member learns, and held-out labels are predicted."""
    args = make_args("--segment-length", "3", "--reward-learning-rate", "1e-3")
    labels, ensemble = fill(tmp_path, 160), make_ensemble()
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=1e-3)
    before = [weight.clone() for weight in ensemble.weights()]
    script.update_reward_model(ensemble, optimizer, labels, 60, np.random.default_rng(0), args)
    for old, new in zip(before, ensemble.weights(), strict=True):
        assert ((old - new).abs().amax(1) > 1e-3).all()
    loss, accuracy = script.held_out(ensemble, labels, args)
    assert accuracy > 0.8 and loss < 0.55
    stacks, _, returns, _ = labels.batch(np.arange(50))
    predicted = ensemble.score(stacks).view(100, 3, 3).sum(1)
    for member in range(3):
        assert torch.corrcoef(torch.stack([predicted[:, member], returns.flatten()]))[0, 1] > 0.8


def test_target_ablation_regresses_both_sums(tmp_path):
    args = make_args("--segment-length", "3", "--ablation", "target")
    labels, ensemble = fill(tmp_path, 160), make_ensemble()
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=1e-3)
    script.update_reward_model(ensemble, optimizer, labels, 60, np.random.default_rng(0), args)
    stacks, _, returns, _ = labels.batch(np.arange(160))
    predicted = ensemble.score(stacks).view(320, 3, 3).sum(1).mean(1)
    assert torch.corrcoef(torch.stack([predicted, returns.flatten()]))[0, 1] > 0.9
    assert (predicted - returns.flatten()).square().mean() < returns.var()  # the level too, not the order alone


def test_held_out_labels_weigh_nothing_and_others_by_their_weight(tmp_path):
    """The gradient of a minibatch is that of the weighted mean per member, summed over members (trap 24)."""
    args = make_args("--segment-length", "3", "--dropout", "0")
    labels, ensemble = fill(tmp_path, 16), make_ensemble(dropout=0.0)
    optimizer, rng = torch.optim.SGD(ensemble.parameters(), lr=1.0), np.random.default_rng(0)
    at = np.random.default_rng(0).integers(16, size=16)
    reference = make_ensemble(dropout=0.0)
    stacks, mu, _, weights = labels.batch(at)
    sums = reference(stacks).view(16, 2, 3, 3).sum(2)
    total = 0.0
    for m in range(3):
        losses = script.preference_loss(sums[:, 0] - sums[:, 1], mu)[:, m]
        chosen = [i for i in range(16) for _ in range(int(weights[i, m]))]  # a bootstrap sample, literally
        total = total + losses[chosen].mean()
    total.backward()
    ensemble.l2_coef.zero_()
    script.update_reward_model(ensemble, optimizer, labels, 1, rng, args)
    for new, old in zip(ensemble.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(new, old - old.grad, atol=1e-5)


def test_weight_decay_follows_the_ratio_of_held_out_to_training_loss():
    """Trap 22: means over the same unit, so the sizes of the two sets do not matter."""
    ensemble = make_ensemble()
    for held_out_loss, factor in ((2.0, 1.05), (0.5, 1 / 1.05), (1.3, 1.0)):
        ensemble.l2_coef.fill_(1e-4)
        ensemble.decisive[0] = torch.tensor([[held_out_loss * 7], [0.0], [7.0]])
        ensemble.decisive[1] = torch.tensor([[1.0 * 900], [0.0], [900.0]])
        script.adapt_l2(ensemble)
        assert ensemble.l2_coef.tolist() == pytest.approx([1e-4 * factor] * 3, rel=1e-4)
    ensemble.decisive.zero_()
    script.adapt_l2(ensemble)  # no labels yet: no move, no NaN
    assert ensemble.l2_coef.tolist() == pytest.approx([1e-4] * 3)
    for held_out_loss, bound in ((2.0, 1e-3), (0.5, 1e-6)):
        ensemble.decisive[0] = torch.tensor([[held_out_loss * 7], [0.0], [7.0]])
        ensemble.decisive[1] = torch.tensor([[1.0], [0.0], [1.0]])
        for _ in range(300):
            script.adapt_l2(ensemble)
        assert ensemble.l2_coef.tolist() == pytest.approx([bound] * 3)
    assert sum(weight.shape[1] for weight in ensemble.weights()) == 16 * (196 + 400 + 144 + 144) + 784 * 64 + 64


def test_ties_are_left_out_of_held_out_loss_and_accuracy(tmp_path):
    """Trap 13, and: ties put ln 2 into both losses and hide overfitting."""
    args = make_args("--segment-length", "3")
    labels, ensemble = fill(tmp_path, 32), make_ensemble()
    decided = script.decisive_sums(ensemble, labels, np.arange(16), args)
    labels.arrays["mu"][16:] = 0.5
    assert torch.allclose(script.decisive_sums(ensemble, labels, np.arange(32), args), decided, atol=1e-4)
    assert decided[:, 2].sum(0).tolist() == [16.0] * 3
    held_out_count = (labels.weights[:16] == 0).sum(0)
    assert torch.equal(decided[0, 2], held_out_count.float())


def test_rewards_have_zero_mean_and_the_wanted_std():
    """Trap 29: right after each renewal, over the rows that it looked at."""
    ensemble, stacks = make_ensemble(), random_stacks(200)
    torch.nn.init.normal_(ensemble.out_weight, std=20.0)
    for weight in ensemble.parameters():  # members that agree in part: two of three are the same
        weight.data.view(3, -1)[1] = weight.data.view(3, -1)[0]
    ensemble.renew_statistics(stacks, floor=1e-3)
    rewards = ensemble.normalise(ensemble.score(stacks), 1e-3, 0.05)
    assert rewards.mean().abs() < 1e-4 and rewards.std().item() == pytest.approx(0.05, rel=1e-3)
    ensemble.renew_statistics(stacks, floor=1e-3)  # a fixed point of the smoothing
    assert ensemble.normalise(ensemble.score(stacks), 1e-3, 0.05).std().item() == pytest.approx(0.05, rel=1e-3)


def test_an_uninformed_model_is_not_blown_up():
    ensemble, stacks = make_ensemble(), random_stacks(100)
    raw = ensemble.score(stacks)
    ensemble.out_weight.data *= 0.01 / raw.std()
    ensemble.renew_statistics(stacks, floor=1.0)
    assert ensemble.normalise(ensemble.score(stacks), 1.0, 0.05).std() < 0.05 * 0.02


# ---------------------------------------------------------------------------------------------------------------- HUD
@pytest.mark.parametrize("game", script.HUD)
def test_hud_is_hidden_on_real_frames_and_nothing_else(game):
    obs, *_, raw = play(game, 60, num_envs=1)
    assert raw.shape == obs.shape
    hidden = np.zeros((84, 84), dtype=bool)
    for top, bottom, left, right in script.HUD[game]:
        hidden[int(top * 0.4) : math.ceil((bottom + 1) * 0.4), int(left * 0.525) : math.ceil((right + 1) * 0.525)] = (
            True
        )
    newest = raw[-1, 0, -1]
    assert (obs[..., hidden] == 0).all() and np.array_equal(obs[3:][..., ~hidden], raw[3:][..., ~hidden])
    for rows, columns in script.hud_boxes(GAMES[game]):
        assert np.ptp(newest[rows, columns]) > 20, "no HUD here: the box is in the wrong place"
    if game == "seaquest":
        assert obs[-1, 0, -1, 68:70].max() > 60  # the oxygen bar stays


@pytest.mark.parametrize("game", ["pong", "breakout", "seaquest", "space_invaders"])
def test_no_score_digit_sticks_out_of_its_box(game):
    """The hidden band changes when there is a reward, and the rows right below it do not."""
    _, _, rewards, _, _, raw = play(game, 400, num_envs=1)
    rows, columns = script.hud_boxes(GAMES[game])[0]
    scored = np.flatnonzero(rewards[5:-6, 0]) + 5
    assert len(scored) >= 3

    def changed(region):
        return np.mean([(raw[t + 6, 0, -1][region] != raw[t, 0, -1][region]).any() for t in scored])

    assert changed((rows, columns)) > 0.8
    assert changed((slice(rows.stop, rows.stop + 1), columns)) == 0
