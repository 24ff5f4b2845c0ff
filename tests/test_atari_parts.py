"""The parts of ppo_atari_rlhf.py against answers worked out by hand or by a slow reference.

"Trap n" names a bug that other implementations of the method have, or had; each such test fails on that bug.
"""

import dataclasses
import itertools
import json
import math

import cv2
import numpy as np
import pytest
import torch

import ppo_atari_rlhf as script


def make_args(*flags: str) -> script.Args:
    return script.parse_args(["--oracle", "--no-bf16", "--threads", "1", *flags])


def make_ensemble(members=3, seed=0):
    torch.manual_seed(seed)
    return script.RewardEnsemble(members, 1e-4, bf16=False)


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
    args = make_args("--clip-coef", "0.1", "--ent-coef", "0.5", "--vf-coef", "2")
    newlogprob, logprobs = torch.tensor([1.5, 0.5]).log(), torch.zeros(2)
    advantages, returns, values = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])
    newvalue, entropy = torch.tensor([0.5, 0.05]), torch.tensor([1.0, 3.0])
    loss, info = script.policy_loss(newlogprob, entropy, newvalue, logprobs, advantages, returns, values, args)
    # The advantages are standardised to plus and minus the root of 1/2. Ratios 1.5 and 0.5: the first is clipped to
    # 1.1, the second's worse side is 0.9
    pg = 0.5**0.5 * (-1.1 + 0.9) / 2
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
        actions, logprobs, entropy, _ = agent.get_action_and_value(obs)
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
        script.update_policy(agent, optimizer, rollout, rng, args)
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
    assert script.label_losses(sums, None, returns, "target").tolist() == [[(4 + 1) / 2, (1 + 16) / 2]]


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
def ask(rewards, *flags, recent=(0.0,), seed=0):
    """A teacher's answers to pairs (n, 2, L), one after the other."""
    rng, args = np.random.default_rng(seed), make_args(*flags)
    return [script.teacher_answer(rng, np.asarray(pair, dtype=float), recent, args) for pair in rewards]


def test_oracle_prefers_the_larger_sum_and_ties_exactly():
    """Trap 12: equal sums are ties, 1/2, not a win of either side."""
    pairs = [[[1, 0], [0, 0]], [[0, -1], [0, 0]], [[1, 0], [0, 1]], [[0, 0], [0, 0]], [[0.9], [1 - 0.1]]]
    assert ask(pairs) == [1.0, 0.0, 0.5, 0.5, 0.5]


def test_teacher_beta_gives_the_sigmoids_frequency():
    """Trap 15: a rational teacher must really sample. Ties stay ties."""
    answers = ask(np.tile([[[1.0], [0.0]]], (4000, 1, 1)), "--teacher-beta", "2")
    assert np.mean(answers) == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)
    assert ask([[[1e6], [0.0]]], "--teacher-beta", "1e9") == [1.0]
    assert ask([[[1.0], [1.0]]], "--teacher-beta", "2") == [0.5]


def test_teacher_mistakes_flip_decided_answers_only():
    answers = ask(np.tile([[[1.0], [0.0]]], (4000, 1, 1)), "--teacher-mistake", "0.1")
    assert np.mean(answers) == pytest.approx(0.9, abs=0.015)
    assert ask([[[1.0], [1.0]]] * 50, "--teacher-mistake", "1") == [0.5] * 50
    assert ask([[[1.0], [0.0]]] * 50, "--teacher-mistake", "1") == [0.0] * 50


def test_teacher_gamma_forgets_early_steps():
    pair = [[[3.0, 0.0, 0.0], [0.0, 0.0, 1.0]]]  # 3 early against 1 late: weights 0.25, 0.5, 1
    assert ask(pair) == [1.0]
    assert ask(pair, "--teacher-gamma", "0.5") == [0.0]


def test_teacher_equal_and_skip_follow_the_recent_sums():
    """Traps 15 and 16: thresholds enter once, and work for negative rewards as for positive ones."""
    recent = np.linspace(-10, 0, 101)  # std 2.915, 10 % quantile -9
    pairs = [[[-3.0], [-3.2]], [[-3.0], [-3.4]], [[-9.5], [-9.2]], [[-9.5], [-1.0]]]
    answers = ask(pairs, "--teacher-equal", "0.1", "--teacher-skip", "0.1", recent=recent)
    assert answers == [0.5, 1.0, None, 0.0]  # 0.2 < 0.2915 < 0.4; both below -9; one below -9
    assert ask(pairs, recent=recent) == [1.0, 1.0, 0.0, 0.0]


def test_oracle_reads_the_sign_of_the_raw_reward_and_the_losses():
    """Trap 14: the reward before any wrapper."""
    rollout = {
        "env_rewards": torch.tensor([[7.0, -1.0], [0.0, 0.0]]),
        "lost": torch.tensor([[False] * 2, [True, False]]),
    }
    pong, breakout = make_args(), make_args("--env-id", "ALE/Breakout-v5")
    assert script.oracle_rewards_of(rollout, pong).tolist() == [[1, -1], [0, 0]]
    assert script.oracle_rewards_of(rollout, breakout).tolist() == [[1, -1], [-1, 0]]
    more = make_args("--env-id", "ALE/Breakout-v5", "--oracle-end-penalty", "2.5")
    assert script.oracle_rewards_of(rollout, more).tolist() == [[1, -1], [-2.5, 0]]


# ---------------------------------------------------------------------------------------------- segments and queries
def play(env_id: str, steps: int, num_envs: int = 3, seed: int = 5):
    """Random play on the real emulator, (T, N, ...): what the agent sees, what `Envs` tells, and ALE's own stacks."""
    envs, rng = script.Envs(make_args("--env-id", env_id), num_envs), np.random.default_rng(seed)
    raw, observe = [], envs.observe
    envs.observe = lambda stacks: raw.append(stacks.copy()) or observe(stacks)
    obs, rows = envs.reset(seed), []
    for _ in range(steps):
        next_obs, told = envs.step(envs.random_actions(rng))
        rows.append(told | {"obs": obs})
        obs = next_obs
    envs.games.close()
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {"raw": np.stack(raw[:-1])}


@pytest.fixture(scope="module")
def breakout():
    return play("ALE/Breakout-v5", 800)


def fill_pool(pool, obs, history):
    """Append observations and their history; rewards zero."""
    zeros = torch.zeros(history.shape)
    pool.add({"obs": torch.as_tensor(obs), "history": torch.as_tensor(history)}, zeros, zeros)


def test_stacks_from_stored_frames_are_the_emulators_own(breakout):
    """Right after a reset, across a game over within a clip, and after the pool has wrapped (traps 3 and 4)."""
    obs, history, ended = (breakout[name] for name in ("obs", "history", "ended"))
    pool, L = script.SegmentPool(303, 3, "cpu"), 25
    for part in np.array_split(np.arange(len(obs)), 8):
        fill_pool(pool, obs[part], history[part])
    starts = [(n, t) for n in range(3) for t in range(pool.first_row(), pool.count - L + 1)]
    assert pool.first_row() == 800 - 300 and len(starts) == 3 * (300 - L + 1)
    crossing = 0
    for part in np.array_split(np.array(starts), 20):
        stacks = script.model_inputs(pool.clips(part, L)).view(len(part), L, 4, 84, 84).numpy()
        for stack, (n, t) in zip(stacks, part, strict=True):
            assert np.array_equal(stack, obs[t : t + L, n])
            crossing += ended[t : t + L - 1, n].any()
    assert crossing > 20


def test_stacks_at_the_very_start_hold_the_first_frame(breakout):
    obs, raw = breakout["obs"], breakout["raw"]
    pool = script.SegmentPool(100, 3, "cpu")
    fill_pool(pool, obs[:50], breakout["history"][:50])
    stacks = script.model_inputs(pool.clips(np.array([[1, 0]]), 25)).numpy()
    assert np.array_equal(stacks, obs[:25, 1])
    assert (stacks[0] == stacks[0, 3]).all() and not raw[0, 1, :3].any()  # where ALE leaves three empty ones
    assert np.array_equal(stacks[2, 0], stacks[2, 1]) and np.array_equal(stacks[4], stacks[1:5, 3])


def test_life_losses_and_ends_are_told_apart(breakout):
    """Five lives, so five losses per game, of which the last is also the end (and SAME_STEP inserts no row)."""
    history, lost, ended = (breakout[name] for name in ("history", "lost", "ended"))
    assert ended.sum() >= 3 and (lost | ~ended).all()
    for n in range(3):
        last = np.flatnonzero(ended[:, n])[-1]
        assert lost[: last + 1, n].sum() == 5 * ended[:, n].sum()
        for t in np.flatnonzero(ended[:-1, n]):
            assert history[t + 1, n] == 0


def test_a_label_keeps_its_clips_when_the_pool_moves_on(tmp_path, breakout):
    """Trap 1: copies, not row numbers; on the disk too."""
    obs, history = breakout["obs"], breakout["history"]
    pool, preferences = script.SegmentPool(103, 3, "cpu"), make_preferences(tmp_path)
    fill_pool(pool, obs[:100], history[:100])
    clips = {name: x.numpy() for name, x in pool.clips(np.array([[0, 10], [1, 20]]), 25).items()}
    preferences.answer(preferences.ask(clips | {"sums": np.array([1.0, 0.0], np.float32)}, []), 1.0)
    preferences.read()
    for k in range(1, 8):
        fill_pool(pool, obs[100 * k : 100 * k + 100], history[100 * k : 100 * k + 100])
    stacks, mu, returns, _ = preferences.batch([0])
    assert np.array_equal(stacks.numpy(), np.concatenate([obs[10:35, 0], obs[20:45, 1]]))
    assert mu.tolist() == [1.0] and returns.tolist() == [pytest.approx([0.5**0.5, -(0.5**0.5)])]
    stored = preferences.pair(0)
    assert all(np.array_equal(stored[name], clips[name]) for name in script.CLIP_ARRAYS)


def test_bootstrap_holds_out_one_in_e_and_depends_on_the_pair_alone():
    """Trap 21: the split of a label never changes; trap 23: members have different data."""
    weights = torch.stack([script.bootstrap_weights(pair, 3) for pair in range(3000)])
    assert weights.mean().item() == pytest.approx(1.0, abs=0.03)
    assert (weights == 0).float().mean().item() == pytest.approx(math.exp(-1), abs=0.015)
    assert torch.equal(script.bootstrap_weights(2999, 3), weights[2999])
    assert 0.5 < (weights[:, 0] != weights[:, 1]).float().mean() < 0.9


def test_every_valid_start_is_drawn_and_nothing_else():
    """Traps 5, 8 and 10: the last start too, all environments, all equally often."""
    segments = script.sample_segments(np.random.default_rng(0), 40_000, 3, 7, 2)
    counts = np.zeros((2, 10))
    np.add.at(counts, (segments[:, 0], segments[:, 1]), 1)
    assert (counts[:, :3] == 0).all() and (counts[:, 8:] == 0).all()
    assert np.abs(counts[:, 3:8] / 4000 - 1).max() < 0.1


def test_no_segment_is_in_two_pairs_or_twice_in_one(monkeypatch):
    """Trap 6: a clip is not compared with itself."""
    args, pool = make_args("--segment-length", "5"), script.SegmentPool(100, 2, "cpu")
    pool.count = 50
    few = np.array([[0, 1], [0, 1], [0, 2], [1, 3], [0, 2], [1, 9], [1, 8], [1, 9]] + [[0, 1]] * 32)
    monkeypatch.setattr(script, "sample_segments", lambda *_: few)
    pairs = script.select_pairs(None, pool, 2, 0, np.random.default_rng(0), args)
    assert pairs.tolist() == [[[0, 2], [1, 3]], [[1, 8], [1, 9]]]
    assert len(script.select_pairs(None, pool, 1, 0, np.random.default_rng(0), args)) == 1


def test_the_most_disputed_candidates_are_taken(monkeypatch):
    args = make_args("--num-envs", "2", "--segment-length", "5")
    pool = script.SegmentPool(403, 2, "cpu")
    fill_pool(pool, random_stacks(100)[:, None].repeat(4, 2, 1, 1, 1), np.full((400, 2), 3, np.uint8))
    ensemble = make_ensemble()
    torch.nn.init.normal_(ensemble.out_weight, std=1.0)
    drawn, sample = [], script.sample_segments
    monkeypatch.setattr(script, "sample_segments", lambda *given: drawn.append(sample(*given)) or drawn[-1])

    def dispute(pairs):
        stacks = script.model_inputs(pool.clips(pairs.reshape(-1, 2), 5))
        return script.disagreement(ensemble.score(stacks).view(len(pairs), 2, 5, 3).sum(2), "none").numpy()

    chosen = script.select_pairs(ensemble, pool, 4, 0, np.random.default_rng(3), args)
    uniform = script.select_pairs(None, pool, 4, 0, np.random.default_rng(3), args)
    candidates = drawn[0].reshape(-1, 2, 2)
    assert len(candidates) == 40 and len(chosen) == 4 and np.array_equal(uniform, candidates[:4])
    best = np.sort(dispute(candidates))[::-1]
    assert dispute(chosen) == pytest.approx(best[:4], abs=1e-6) and best[0] > 2 * best[-1]


# ------------------------------------------------------------------------------------------------- pairs and answers
def make_preferences(folder, asked=0, window=None, *flags):
    return script.Preferences(folder, asked, window, make_args(*flags))


def make_pair(value: int, length: int = 2) -> dict:
    """A pair of clips that can be told by its frames."""
    frames = np.full((2, length + 3, 84, 84), value, np.uint8)
    sums = np.array([value, -value], np.float32)
    return {"frames": frames, "history": np.full((2, length), 3, np.uint8), "sums": sums}


def test_the_window_holds_the_newest_labels_and_the_disk_all(tmp_path):
    labels = make_preferences(tmp_path, 0, 5)
    for i in range(10):
        labels.answer(labels.ask(make_pair(i), []), [0.0, 0.5, 1.0, None][i % 4])
        labels.read()
    assert (labels.asked, labels.used, labels.ties, labels.skipped, labels.open) == (10, 8, 3, 2, 0)
    assert [int(label["frames"][0, 0, 0, 0]) for label in labels.labels] == [4, 5, 6, 8, 9]
    again = make_preferences(tmp_path, 10, 5)
    assert (again.used, again.ties, again.skipped, again.open) == (8, 3, 2, 0)
    for old, new in zip(labels.labels, again.labels, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert list(again.recent_sums) == list(labels.recent_sums) and len(again.recent_sums) == 20


def test_what_is_no_whole_answer_is_passed_over_and_the_first_line_of_a_pair_counts(tmp_path):
    labels = make_preferences(tmp_path)
    for i in range(4):
        labels.ask(make_pair(i), [])
    lines = [
        '{"pair": 1, "mu": 1.0, "who": "a"}',
        '{"pair": 0, "mu"',
        "[]",
        '{"pair": "x", "mu": 1}',
        '{"pair": 2, "mu": 7}',
    ]
    lines += ['{"pair": 1, "mu": 0.0}', '{"pair": 99, "mu": 1.0}', '{"pair": 2, "mu": null}']
    labels.journal.write_text("\n".join(lines) + '\n{"pair": 3, "mu": 0.5}')  # the last without its newline
    labels.read()
    assert [label["mu"].item() for label in labels.labels] == [1.0] and labels.skipped == 1 and labels.open == 2
    with open(labels.journal, "a") as file:
        file.write("\n")
    labels.read()
    assert [label["mu"].item() for label in labels.labels] == [1.0, 0.5] and labels.ties == 1 and labels.open == 1


def test_what_the_oracle_was_asked_after_the_checkpoint_is_forgotten_and_asked_again(tmp_path):
    first = make_preferences(tmp_path)
    for i in range(3):
        first.answer(first.ask(make_pair(i), []), 1.0)
    with open(first.journal, "a") as file:
        file.write('{"pair": 3, "mu"')  # killed in the middle of a line
    again = make_preferences(tmp_path, 1)
    assert again.asked == again.used == 1 and list(again.recent_sums) == [0, 0]
    assert [path.stem for path in tmp_path.glob("*.npz")] == ["00000000"]
    for i in range(1, 3):
        again.answer(again.ask(make_pair(100 + i), []), 0.0)
    again.read()
    assert again.used == 3 and [label["mu"].item() for label in again.labels] == [1.0, 0.0, 0.0]
    assert [int(label["frames"][0, 0, 0, 0]) for label in again.labels] == [0, 101, 102]
    assert len(again.journal.read_text().splitlines()) == 3


def test_people_were_asked_what_lies_on_the_disk_and_may_answer_in_any_order(tmp_path):
    first = script.Preferences(tmp_path, 0, None, script.parse_args(["--human"]))
    for i in range(3):
        first.ask(make_pair(i), [b"left", b"right"])
    assert (tmp_path / "00000002.1.webp").read_bytes() == b"right"
    (tmp_path / "00000003.tmp").write_bytes(b"half")  # killed while it was written
    (tmp_path / "notes.npz").write_bytes(b"somebody else's")
    first.journal.write_text('{"pair": 2, "mu": 1.0}\n{"pair": 0, "mu": 0.0}\n')
    again = script.Preferences(tmp_path, 0, None, script.parse_args(["--human"]))  # the checkpoint is older than these
    assert (again.asked, again.used, again.open) == (3, 2, 1)
    assert [label["mu"].item() for label in again.labels] == [1.0, 0.0]


def test_loaded_labels_train_and_are_no_labels_of_this_run(tmp_path):
    """They keep their numbers, and so who they are held out for; numbers that were never answered are left out."""
    source = make_preferences(tmp_path)
    for i in (0, 1, 2, 3):
        source.ask(make_pair(i), [])
    (tmp_path / "00000001.npz").unlink()
    lines = [{"pair": i, "mu": 1.0, "loaded": True} for i in (0, 3)]
    source.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    labels = make_preferences(tmp_path)
    assert (labels.first, labels.asked, labels.loaded, labels.used, labels.open) == (4, 4, 2, 0, 0)
    labels.answer(labels.ask(make_pair(9), []), 0.5)
    labels.read()
    assert (labels.asked, labels.loaded, labels.used, labels.ties) == (5, 2, 1, 1) and len(labels.labels) == 3
    assert torch.equal(labels.labels[1]["weights"], script.bootstrap_weights(3, 3))


def test_a_damaged_pair_is_named(tmp_path, capsys):
    labels = make_preferences(tmp_path)
    labels.answer(labels.ask(make_pair(1), []), 1.0)
    labels.path(0).write_bytes(labels.path(0).read_bytes()[:100])
    with pytest.raises(SystemExit):
        labels.read()
    assert "00000000.npz can't be read" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- reward model
def test_scoring_moves_nothing_and_is_repeatable():
    """Traps 19, 20 and 30: no batch statistics, no memory of other clips, at inference."""
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


def fill(tmp_path, n=64, L=3, seed=0):
    """Labels on noise frames with a planted reward: the brightness of a patch, which the oracle compares."""
    rng, labels = np.random.default_rng(seed), make_preferences(tmp_path)
    frames = rng.integers(0, 100, (n, 2, L + 3, 84, 84), dtype=np.uint8)
    bright = rng.integers(0, 256, (n, 2, L + 3))
    frames[..., 30:50, 30:50] = bright[..., None, None]
    sums = (bright[..., 3:].sum(-1) / 255).astype(np.float32)
    for clips, pair in zip(frames, sums, strict=True):
        number = labels.ask({"frames": clips, "history": np.full((2, L), 3, np.uint8), "sums": pair}, [])
        labels.answer(number, float((pair[0] > pair[1]) + 0.5 * (pair[0] == pair[1])))
    labels.read()
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
    stacks, _, returns, _ = labels.batch(range(50))
    predicted = ensemble.score(stacks).view(100, 3, 3).sum(1)
    for member in range(3):
        assert torch.corrcoef(torch.stack([predicted[:, member], returns.flatten()]))[0, 1] > 0.8


def test_what_is_paid_keeps_up_with_what_is_fitted(tmp_path):
    """Rewards are paid by running statistics, and fitted by those of each batch: soon the two must be the same."""
    args = make_args("--segment-length", "3")
    labels, ensemble = fill(tmp_path, 64), make_ensemble()
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=args.reward_learning_rate)
    script.update_reward_model(ensemble, optimizer, labels, 16, np.random.default_rng(0), args)
    stacks = labels.batch(range(48))[0]
    paid = ensemble.score(stacks)
    with torch.no_grad():
        fitted = ensemble.train()(stacks)
    apart = (paid - paid.mean(0)) - (fitted - fitted.mean(0))
    assert (apart.std(0) < 0.2 * fitted.std(0)).all()  # 0.05; with PyTorch's momentum of 0.1 it is 0.56


def test_target_ablation_regresses_both_sums(tmp_path):
    args = make_args("--segment-length", "3", "--ablation", "target")
    labels, ensemble = fill(tmp_path, 160), make_ensemble()
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=1e-3)
    script.update_reward_model(ensemble, optimizer, labels, 60, np.random.default_rng(0), args)
    stacks, _, returns, _ = labels.batch(range(160))
    predicted = ensemble.score(stacks).view(320, 3, 3).sum(1).mean(1)
    assert torch.corrcoef(torch.stack([predicted, returns.flatten()]))[0, 1] > 0.9
    assert (predicted - returns.flatten()).square().mean() < returns.var()  # the level too, not the order alone


def test_held_out_labels_weigh_nothing_and_others_by_their_weight(tmp_path):
    """The gradient of a minibatch is that of the weighted mean per member, summed over members (trap 24)."""
    args = make_args("--segment-length", "3")
    labels, ensemble = fill(tmp_path, 16), make_ensemble()
    optimizer, rng = torch.optim.SGD(ensemble.parameters(), lr=1.0), np.random.default_rng(0)
    at = np.random.default_rng(0).integers(16, size=16)
    reference = make_ensemble()
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
    decided = script.decisive_sums(ensemble, labels, range(16), args)
    for label in labels.labels[16:]:
        label["mu"] = torch.tensor(0.5)
    assert torch.allclose(script.decisive_sums(ensemble, labels, range(32), args), decided, atol=1e-4)
    assert decided[:, 2].sum(0).tolist() == [16.0] * 3
    weights = torch.stack([label["weights"] for label in labels.labels[:16]])
    assert torch.equal(decided[0, 2], (weights == 0).sum(0).float())


def test_rewards_have_zero_mean_and_the_wanted_std():
    """Trap 29: right after each renewal, over the rows that it looked at."""
    ensemble, stacks = make_ensemble(), random_stacks(200)
    torch.nn.init.normal_(ensemble.out_weight, std=20.0)
    for weight in ensemble.parameters():  # members that agree in part: two of three are the same
        weight.data.view(3, -1)[1] = weight.data.view(3, -1)[0]
    ensemble.renew_statistics(stacks)
    rewards = ensemble.normalise(ensemble.score(stacks), 0.05)
    assert rewards.mean().abs() < 1e-4 and rewards.std().item() == pytest.approx(0.05, rel=1e-3)


def test_an_uninformed_model_is_not_blown_up():
    ensemble, stacks = make_ensemble(), random_stacks(100)
    ensemble.out_weight.data *= 0.01 * script.STD_FLOOR / ensemble.score(stacks).std()
    ensemble.renew_statistics(stacks)
    assert ensemble.normalise(ensemble.score(stacks), 0.05).std() < 0.05 * 0.02


# ---------------------------------------------------------------------------------------------------------------- HUD
def test_only_what_is_hidden_over_the_whole_width_is_cut_off():
    bands = {env_id[4:-3]: script.hidden_band(env_id) for env_id in script.HUD}
    assert bands == {
        "BeamRider": 29,
        "Breakout": 15,
        "Enduro": 0,
        "Pong": 21,
        "Qbert": 0,
        "Seaquest": 0,
        "SpaceInvaders": 20,
    }
    assert script.hidden_band("ALE/Alien-v5") == script.hidden_band(None) == 0


def boxes(env_id: str) -> list[tuple[slice, slice]]:
    """The HUD on 84 x 84 pixels, rounded outward."""
    return [
        (slice(int(top * 0.4), math.ceil((bottom + 1) * 0.4)), slice(int(left * 0.525), math.ceil((right + 1) * 0.525)))
        for top, bottom, left, right in script.HUD[env_id]
    ]


@pytest.mark.parametrize("env_id", script.HUD)
def test_hud_is_hidden_on_real_frames_and_nothing_else(env_id):
    played = play(env_id, 60, num_envs=1)
    obs, raw = played["obs"], played["raw"]
    hidden = np.zeros((84, 84), dtype=bool)
    for box in boxes(env_id):
        hidden[box] = True
        assert np.ptp(raw[-1, 0, -1][box]) > 20, "no HUD here: the box is in the wrong place"
    assert (obs[..., hidden] == 0).all() and np.array_equal(obs[3:][..., ~hidden], raw[3:][..., ~hidden])
    if "Seaquest" in env_id:
        assert obs[-1, 0, -1, 68:70].max() > 60  # the oxygen bar stays


@pytest.mark.parametrize("game", ["Pong", "Breakout", "Seaquest", "SpaceInvaders"])
def test_no_score_digit_sticks_out_of_its_box(game):
    """The hidden band changes when there is a reward, and the rows right below it do not."""
    played = play(f"ALE/{game}-v5", 400, num_envs=1)
    rewards, raw = played["env_rewards"], played["raw"]
    rows, columns = boxes(f"ALE/{game}-v5")[0]
    scored = np.flatnonzero(rewards[5:-6, 0]) + 5
    assert len(scored) >= 3

    def changed(region):
        return np.mean([(raw[t + 6, 0, -1][region] != raw[t, 0, -1][region]).any() for t in scored])

    assert changed((rows, columns)) > 0.8
    assert changed((slice(rows.stop, rows.stop + 1), columns)) == 0


def test_people_see_the_games_that_the_agent_plays_in_colour_without_the_score(tmp_path):
    """The camera's games follow the agent's, step by step; a clip's frames lie row by row on its sheet."""
    args = make_args("--env-id", "ALE/Breakout-v5")
    envs, camera, rng = script.Envs(args, 2), script.Camera(args, 2, rows=40), np.random.default_rng(0)
    obs, seen = envs.reset(7), []
    camera.reset(7)
    for _ in range(60):
        actions = envs.random_actions(rng)
        camera.record(envs, actions)
        seen.append(obs[:, -1])
        obs, _ = envs.step(actions)
    assert len(camera.kept) == 40
    frames = camera.frames(1, 10, 5)
    assert frames.shape == (5, 195, 160, 3)  # without the fifteen rows of the score
    frames = np.pad(frames, ((0, 0), (15, 0), (0, 0), (0, 0)))
    for t in range(5):
        small = cv2.resize(cv2.cvtColor(frames[t], cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)
        assert np.abs(small.astype(int) - seen[30 + t][1]).mean() < 3
    sheet = cv2.imdecode(np.frombuffer(script.sprite_sheet(camera.frames(1, 10 - 40, 7)), np.uint8), cv2.IMREAD_COLOR)[
        ..., ::-1
    ]
    assert sheet.shape == (2 * 195, 5 * 160, 3)
    assert np.array_equal(sheet[:195, 640:], camera.frames(1, 14, 1)[0])
    assert np.array_equal(sheet[195:, :160], camera.frames(1, 15, 1)[0]) and not sheet[195:, 320:].any()
    assert script.make_run_dir(dataclasses.replace(args, runs_dir=str(tmp_path)))[1]["clip"]["height"] == 195
