"""Whole runs of ppo_mujoco_rlhf.py on the real simulator: learning, numbers, resume, people, what goes wrong.

InvertedPendulum-v5 is the cheapest task. Its first episodes end after 63, 125, 188 and 250 steps with four
environments, so the small runs below (640 steps each) hold time limits, and with --reset-every resets, too.
"""

import dataclasses
import gc
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ppo_mujoco_rlhf as script
import slider
from runs import REFUSED, Killed, answer_open, answers, ended, kill, only, refused_here

ROOT = Path(script.__file__).parent

SMALL = ["--env-id", "InvertedPendulum-v5", "--num-envs", "4", "--num-steps", "32", "--num-minibatches", "2"]
SMALL += ["--update-epochs", "1", "--segment-length", "5", "--query-pool-steps", "800", "--pretrain-pairs", "256"]
SMALL += ["--reward-minibatch-size", "8", "--device", "cpu", "--eval-episodes", "1", "--reset-every", "6"]
SMALL += ["--log-every", "5"]
FEEDBACK = ["--oracle", "--labels", "48", "--total-timesteps", "2560"]
TEACHER = ["--teacher-mistake", "0.2", "--teacher-equal", "0.3", "--teacher-skip", "0.3", "--teacher-beta", "2"]
REACHER = ["--env-id", "Reacher-v5", "--init-logstd", "0"]  # many time limits, and actions out of bounds


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """MuJoCo writes a log to where it runs."""
    monkeypatch.setattr(script, "QUERY_BATCH", 3)
    monkeypatch.setattr(script, "REWARD_MINIBATCHES", 1)
    monkeypatch.setattr(script, "STATISTICS_ROWS", 100)
    return monkeypatch


def run(folder, *flags, small=SMALL):
    return script.train(script.parse_args([*small, "--runs-dir", str(folder), *flags]))


def resume(run_dir, *flags):
    return script.train(script.parse_args(["--resume", str(run_dir), *flags]))


def state_of(run_dir) -> dict:
    """Everything in a checkpoint but the time that it took, and tensors as their bytes."""

    def plain(part):
        if isinstance(part, dict):
            return {name: plain(value) for name, value in part.items()}
        if isinstance(part, list | tuple):
            return [plain(value) for value in part]
        return hashlib.sha256(part.numpy().tobytes()).hexdigest() if isinstance(part, torch.Tensor) else part

    state = plain(script.read_checkpoint(run_dir))
    state["progress"]["scalars"].pop("charts/SPS", None)
    return state | {"progress": state["progress"] | {"seconds": 0, "wall_seconds": 0}}


def parameters(run_dir) -> dict:
    return {name: state_of(run_dir)[name] for name in ("agent", "ensemble", "optimizer")}


def pairs(run_dir) -> list[dict]:
    return [dict(np.load(path)) for path in sorted((run_dir / "preferences").glob("*.npz"))]


class Witness:
    """Stands beside the simulator: every row that it produced, (T, N, ...), per `Envs` in the order of creation."""

    def __init__(self, monkeypatch):
        self.rows: dict = {}
        self.current: dict = {}
        reset, step = script.Envs.reset, script.Envs.step

        def seen_reset(envs, seed):
            self.rows.setdefault(envs, [])
            self.current[envs] = reset(envs, seed)
            return self.current[envs].copy()

        def seen_step(envs, actions):
            obs, told = step(envs, actions)
            self.rows[envs].append({"obs": self.current[envs], **{name: x.copy() for name, x in told.items()}})
            self.current[envs] = obs.copy()
            return obs, told

        monkeypatch.setattr(script.Envs, "reset", seen_reset)
        monkeypatch.setattr(script.Envs, "step", seen_step)

    def __getitem__(self, i) -> dict:
        rows = list(self.rows.values())[i]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


# ---------------------------------------------------------------------------------------------------------- learning
LEARNING = ["--env-id", "Slider-v0", "--num-envs", "8", "--num-steps", "50", "--num-minibatches", "4"]
LEARNING += ["--gamma", "0.95", "--total-timesteps", "12000", "--oracle", "--labels", "100", "--segment-length", "5"]
LEARNING += ["--query-pool-steps", "4000", "--pairs-per-step", "0.5", "--pretrain-pairs", "4096", "--device", "cpu"]


def test_the_policy_learns_from_comparisons(tmp_path):
    """All of it together: from answers about pairs of clips to a cart that stands where it is paid.

    50 steps at the right end pay 50, at the left end -50; a random policy gets about 0, a trained one 42."""
    summary = run(tmp_path, *LEARNING, small=[])
    assert summary["labels_used"] == 100 and summary["final_episodes"] == 10
    assert summary["final_return_mean"] > 25 and summary["reward_accuracy_heldout"] > 0.6


def test_wrong_answers_teach_the_opposite(tmp_path):
    """The agent has no other source of reward: with every answer flipped it goes to the left, and gets about -39."""
    assert run(tmp_path, *LEARNING, "--teacher-mistake", "1", small=[])["final_return_mean"] < -20


# --------------------------------------------------------------------------------------------------- runs and numbers
def test_a_run_counts_right_and_writes_what_it_promises(tmp_path, quick):
    """Traps 28, 36 and 41: labels and steps are counted once, and there are exactly as many as asked for."""
    witness = Witness(quick)
    summary = run(tmp_path, *FEEDBACK)
    run_dir, rows, evaluation = only(tmp_path), witness[0], witness[1]
    assert summary["finished"] and summary["labels_used"] == summary["labels"] == 48 == len(pairs(run_dir))
    assert summary["asked"] == 48 and summary["skipped"] == 0 and summary["total_timesteps"] == 2560
    assert rows["ended"].size == summary["global_step"] == 2560 + 128 * 3  # three rollouts hold the initial clips
    assert len(witness.rows) == 2 and evaluation["ended"].shape == (250, 1)
    assert summary["final_return_mean"] == pytest.approx(evaluation["env_rewards"].sum())
    assert [answer["pair"] for answer in answers(run_dir)] == list(range(48))
    assert sum(answer["mu"] == 0.5 for answer in answers(run_dir)) == summary["ties"]
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert all(np.isfinite(summary[name]) for name in ("reward_loss", "pg_loss", "v_loss", "entropy"))
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {
        "args", "checkpoint", "summary", "preferences", "events", "run", "ppo_mujoco_rlhf",
    }  # fmt: skip
    assert (run_dir / "ppo_mujoco_rlhf.py").read_text() == Path(script.__file__).read_text()


def test_a_task_without_its_version_is_the_papers():
    """Gymnasium makes Hopper-v5 of it; the paper's reward, clips and angles go by that name."""
    with pytest.warns(UserWarning, match="Hopper-v5"):
        args = script.parse_args(["--oracle", "--env-id", "Hopper"])
    assert (args.env_id, args.segment_length) == ("Hopper-v5", 60)


def test_the_summary_has_the_columns_of_the_results(tmp_path, quick):
    columns = """finished script env_id feedback labels labels_used asked skipped ties labels_loaded ablation
        teacher_beta teacher_gamma teacher_mistake teacher_skip teacher_equal seed total_timesteps global_step
        wall_seconds sps pairs_per_step final_return_mean final_return_std final_episodes reward_accuracy_heldout
        reward_correlation reward_loss pg_loss v_loss entropy commit device"""
    summary = run(tmp_path, "--true-reward", "--total-timesteps", "1000")
    assert set(summary) >= set(columns.split())
    assert summary["script"] == "ppo_mujoco_rlhf" and summary["feedback"] == "true-reward"
    assert summary["total_timesteps"] == summary["global_step"] == 1024  # whole rollouts of 128
    assert summary["labels"] == summary["labels_used"] == summary["asked"] == 0 and summary["sps"] > 0
    for name in ("teacher_beta", "reward_accuracy_heldout", "reward_correlation", "reward_loss"):
        assert summary[name] is None  # infinite, or absent
    assert not pairs(only(tmp_path))


def test_stored_clips_are_the_rows_that_the_simulator_saw(tmp_path, quick):
    """Traps 1, 14, 36 and 37: (o_t, a_t, r_t), raw, actions as executed, across episode ends and resets; and the
    answer is the sign of the difference of what the task paid."""
    witness, chosen, select = Witness(quick), [], script.select_pairs
    quick.setattr(script, "select_pairs", lambda *given: chosen.append(select(*given)) or chosen[-1])
    run(tmp_path, "--oracle", "--labels", "60", "--total-timesteps", "2560", *REACHER)
    rows, starts, ends, clipped = witness[0], np.concatenate(chosen), 0, 0
    stored, answered = pairs(only(tmp_path)), answers(only(tmp_path))
    assert len(stored) == len(answered) == len(starts) == 60
    for pair, answer, start in zip(stored, answered, starts, strict=True):
        assert {name: array.dtype for name, array in pair.items()} == dict.fromkeys(
            ("obs", "executed", "sums"), np.float32
        )
        paid = []
        for side, (env, t) in enumerate(start):
            clip = {name: column[t : t + 5, env] for name, column in rows.items()}
            assert np.array_equal(pair["obs"][side], clip["obs"])
            assert np.array_equal(pair["executed"][side], clip["executed"])
            paid.append(clip["env_rewards"].sum())
            ends += clip["ended"][:-1].any()
            clipped += (np.abs(clip["executed"]) == 1).any()
        assert pair["sums"] == pytest.approx(paid, abs=1e-5) and answer["mu"] == (paid[0] > paid[1])
    assert ends >= 3 and clipped > 50 and np.abs(rows["executed"]).max() <= 1  # else nothing is tested


@pytest.mark.parametrize("flags", [["--true-reward"], ["--oracle", "--labels", "16"]], ids=["true reward", "oracle"])
def test_at_a_time_limit_the_final_observation_is_valued_and_the_trace_cut(tmp_path, quick, flags):
    """Traps 32 and 35, in every mode: neither the reset observation after it nor zero."""
    witness, seen, gae = Witness(quick), [], script.compute_gae
    quick.setattr(script, "compute_gae", lambda *given: seen.append([x.clone() for x in given[:4]]) or gae(*given))
    quick.setattr(script.Agent, "get_value", lambda self, x: x.double().sum(-1).float())  # tells which one it was
    run(tmp_path, *flags, "--total-timesteps", "1920", *REACHER, "--reset-every", "4")
    rows, ends = witness[0], 0
    assert len(seen) == 15
    for iteration, (_, _, next_values, dones) in enumerate(seen):
        at = slice(len(rows["obs"]) - 32 * (15 - iteration), len(rows["obs"]) - 32 * (14 - iteration))
        ended, led_to = rows["ended"][at], rows["led_to"][at]
        assert np.array_equal(dones.bool().numpy(), ended)
        assert np.allclose(next_values.numpy(), led_to.sum(-1), atol=1e-4)
        follows = rows["obs"][at][1:]
        assert np.array_equal(follows[~ended[:-1]], led_to[:-1][~ended[:-1]])
        assert (np.abs(follows - led_to[:-1]).max(-1)[ended[:-1]] > 1e-3).all()  # a reset's is another
        ends += ended.sum()
    assert ends > 10


def test_the_first_minibatchs_ratio_is_one(tmp_path, quick):
    """Statistics of the observations stand still during an iteration; else it shows here. So does a value of the next
    state that is not what the next row says."""
    ratios, counts, updates, seen = [], [], [], []
    loss, update, gae = script.policy_loss, script.update_policy, script.compute_gae

    def seen_loss(newlogprob, entropy, newvalue, logprobs, *rest):
        ratios.append((newlogprob - logprobs).exp().detach())
        return loss(newlogprob, entropy, newvalue, logprobs, *rest)

    def seen_update(agent, *rest):
        updates.append(len(ratios))
        counts.append(agent.obs_count.item())
        return update(agent, *rest)

    quick.setattr(script, "policy_loss", seen_loss)
    quick.setattr(script, "update_policy", seen_update)
    quick.setattr(script, "compute_gae", lambda *given: seen.append([x.clone() for x in given[:4]]) or gae(*given))
    run(tmp_path, *FEEDBACK)
    assert counts == [128 * i for i in range(20)]  # they do move in between
    for i in updates:
        assert torch.allclose(ratios[i], torch.ones(64), rtol=0, atol=2e-5)
    assert max((ratios[i + 1] - 1).abs().max() for i in updates) > 1e-3  # and those of the second one do not
    for _, values, next_values, dones in seen:
        within = ~dones[:-1].bool()
        assert torch.allclose(next_values[:-1][within], values[1:][within], atol=1e-4)


def test_same_seed_same_parameters_other_seed_others_whatever_is_logged(tmp_path, quick):
    run(tmp_path / "a", *FEEDBACK)
    run(tmp_path / "b", *FEEDBACK, "--log-every", "3", "--eval-episodes", "2")
    run(tmp_path / "c", *FEEDBACK, "--seed", "2")
    first, again, other = (state_of(only(tmp_path / name)) for name in "abc")
    assert first == again and first["agent"] != other["agent"] and first["ensemble"] != other["ensemble"]
    assert answers(only(tmp_path / "a")) == answers(only(tmp_path / "b"))


def test_every_ablation_trains_parameters_of_its_own(tmp_path, quick):
    ends, initial, pretrain = [], [], script.pretrain
    quick.setattr(script, "pretrain", lambda e, o, p, *rest: initial.append(p.used) or pretrain(e, o, p, *rest))
    for ablation in script.Ablation.__args__:
        summary = run(tmp_path / ablation, *FEEDBACK, "--total-timesteps", "1280", "--ablation", ablation)
        run_dir = only(tmp_path / ablation)
        assert summary["labels_used"] == 48 and summary["ablation"] == ablation and np.isfinite(summary["reward_loss"])
        ensemble = script.read_checkpoint(run_dir)["ensemble"]
        assert len(ensemble["mean"]) == (1 if ablation == "no-ensemble" else 3)
        assert (ensemble["l2_coef"] == 0).all() == (ablation == "no-regularization")
        assert {pair["obs"].shape for pair in pairs(run_dir)} == {(2, 1 if ablation == "no-segments" else 5, 4)}
        assert initial.pop() == (48 if ablation == "no-online-queries" else 12) and not initial
        ends.append(parameters(run_dir)["agent"])
    assert all(one != other for i, one in enumerate(ends) for other in ends[:i])


def noise_for(quick):
    """The task pays noise from now on."""
    noise = np.random.default_rng(0)
    quick.setattr(script, "paper_reward", lambda *_: noise.normal())


def test_given_the_labels_the_true_reward_changes_nothing(tmp_path, quick):
    """Trap 38: with the reward replaced by noise, labels loaded from before, the run ends in the same parameters."""
    run(tmp_path / "labels", *FEEDBACK)
    loaded = ["--oracle", "--labels", "0", "--preferences", str(only(tmp_path / "labels")), "--total-timesteps", "1280"]
    honest = run(tmp_path / "honest", *loaded)
    noise_for(quick)
    noisy = run(tmp_path / "noise", *loaded)
    assert parameters(only(tmp_path / "honest")) == parameters(only(tmp_path / "noise"))
    assert noisy["final_return_mean"] != honest["final_return_mean"]  # the noise was there
    assert honest["labels_loaded"] == 48 and honest["labels_used"] == honest["asked"] == 0


def test_the_true_reward_pays_the_baseline_centred_and_scaled(tmp_path, quick):
    """Over the pool, as a reward model's rewards are: the last --query-pool-steps steps."""
    witness, paid, gae = Witness(quick), [], script.compute_gae
    quick.setattr(script, "compute_gae", lambda *given: paid.append(given[0].clone()) or gae(*given))
    flags = ["--true-reward", "--total-timesteps", "1280", "--reward-std", "0.3", "--query-pool-steps", "512"]
    run(tmp_path / "a", *flags)
    env_rewards = witness[0]["env_rewards"]
    for i in range(10):
        recent = env_rewards[max(0, 32 * (i - 3)) : 32 * (i + 1)]  # 128 rows of four environments
        mean, std = recent.mean(), max(recent.std(ddof=1), 0.01)
        assert np.allclose(paid[i], 0.3 * (env_rewards[32 * i : 32 * (i + 1)] - mean) / std, atol=1e-4)
    noise_for(quick)
    run(tmp_path / "b", *flags)
    assert parameters(only(tmp_path / "a"))["agent"] != parameters(only(tmp_path / "b"))["agent"]


def test_the_entropy_bonus_falls_to_zero_by_half_of_the_run(tmp_path, quick):
    """Also across a resume, which knows the first weight from the run's arguments."""
    seen, update = [], script.update_policy

    def seen_update(*given):
        seen.append(given[-1].ent_coef)
        if len(seen) == 3:
            seen.pop()
            quick.setattr(script, "update_policy", lambda *now: seen.append(now[-1].ent_coef) or update(*now))
            raise Killed
        return update(*given)

    quick.setattr(script, "update_policy", seen_update)
    kill(run, tmp_path, "--true-reward", "--ent-coef", "0.4", "--total-timesteps", "1024", "--reset-every", "2")
    resume(only(tmp_path))
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0])
    assert script.read_run(only(tmp_path))["args"]["ent_coef"] == 0.4


def test_labels_come_when_they_are_due(tmp_path, quick):
    """L(0) = 12 before the first update, then as the schedule says, to within a batch of three; all at the end. The
    untrained policy's steps are not in the schedule."""
    used, update, made, make = [], script.update_policy, [], script.Preferences
    quick.setattr(script, "Preferences", lambda *given: made.append(make(*given)) or made[-1])
    quick.setattr(script, "update_policy", lambda *given: used.append(made[-1].used) or update(*given))
    run(tmp_path, *FEEDBACK)
    due = [script.label_schedule(128 * i, 2560, 12, 48) for i in range(20)]
    assert used[0] == 12 and all(0 <= d - u < 3 for d, u in zip(due, used, strict=True)) and made[-1].used == 48


def test_the_initial_phase_rolls_out_the_untrained_policy_and_asks_about_fresh_rows(tmp_path, quick):
    """The policy is what it was, each batch of questions is about later rows, and what was not paid is not correlated
    with anything. The ensemble is fitted, and its statistics are renewed, before the first rollout is paid."""
    witness, events, chosen = Witness(quick), [], []
    for name in ("roll_out", "select_pairs", "pretrain", "renew_statistics", "save_checkpoint", "update_policy"):
        inner = getattr(script, name)

        def seen(*given, name=name, inner=inner):
            events.append(name)
            if name == "roll_out":
                actors.append(torch.cat([weight.flatten() for weight in given[0].parameters()]).clone())
            out = inner(*given)
            if name == "select_pairs":
                chosen.append((given[3], given[2], out))
            return out

        quick.setattr(script, name, seen)
    actors = []
    run(tmp_path, *FEEDBACK, "--ablation", "no-online-queries")
    first = events.index("update_policy")
    rollouts, before = events.index("pretrain"), events[:first]
    assert set(before[:rollouts]) == {"roll_out", "select_pairs"} and before[-1] == "roll_out"
    assert before[rollouts:] == ["pretrain", "renew_statistics", "save_checkpoint", "roll_out"]
    assert "select_pairs" not in events[first:] and "pretrain" not in events[first:]
    assert all(torch.equal(actors[0], actor) for actor in actors[: before.count("roll_out")])
    assert not torch.equal(actors[0], actors[before.count("roll_out")])
    assert sum(len(out) for _, _, out in chosen) == 48 and len(chosen) >= 3
    for (_, _, out), (later, _, _) in itertools.pairwise(chosen):
        assert out[..., 1].max() + 5 <= later
    assert len(witness[0]["obs"]) * 4 == 2560 + 128 * (before.count("roll_out") - 1)


def test_what_a_teacher_skips_is_asked_anew(tmp_path, quick):
    summary = run(tmp_path, *FEEDBACK, *TEACHER)
    assert summary["skipped"] > 3 and summary["ties"] > 0
    assert summary["asked"] == summary["labels_used"] + summary["skipped"] == len(answers(only(tmp_path)))
    assert summary["labels_used"] >= 48 - 3  # but for the last batch


def test_a_frozen_reward_model_pays_a_new_agent(tmp_path, quick):
    run(tmp_path / "first", *FEEDBACK)
    source = only(tmp_path / "first")
    learned = script.read_checkpoint(source)["ensemble"]
    flags = ["--oracle", "--labels", "0", "--reward-model", str(source), "--total-timesteps", "1280", "--seed", "5"]
    summary = run(tmp_path / "b", *flags)
    assert summary["finished"] and summary["asked"] == 0
    frozen = script.read_checkpoint(only(tmp_path / "b"))["ensemble"]
    rescaled = {name for name in learned if not torch.equal(frozen[name], learned[name])}
    assert rescaled == {"mean", "std", "average_std"}  # on what the new agent does; nothing else moves
    noise_for(quick)
    run(tmp_path / "c", *flags)
    assert parameters(only(tmp_path / "b")) == parameters(only(tmp_path / "c"))


def test_labels_can_be_reused_and_added_to(tmp_path, quick):
    """Of another run that had loaded some itself. Each directory needs no other."""
    run(tmp_path / "first", *FEEDBACK)
    more = ["--oracle", "--labels", "40", "--total-timesteps", "1280", "--preferences"]
    for before, name in (("first", "second"), ("second", "third")):
        summary = run(tmp_path / name, *more, str(only(tmp_path / before)))
        assert summary["labels_used"] == summary["asked"] == 40
        shutil.rmtree(tmp_path / before)
    assert summary["labels_loaded"] == 88 and len(answers(only(tmp_path / "third"))) == 128


@pytest.mark.parametrize(
    "flags",
    [
        ["--labels", "1"],
        ["--labels", "3", "--num-envs", "1", "--num-steps", "64"],
        ["--labels", "24", "--query-pool-steps", "208"],
        ["--labels", "12", "--env-id", "Pusher-v5"],  # not one of the paper's
        ["--labels", "12", "--env-id", "slider:Slider-v0"],  # nor Gymnasium's
    ],
    ids=["one label", "one environment", "small pool", "another task", "a task of one's own"],
)
def test_small_runs_use_their_budget(tmp_path, quick, flags):
    summary = run(tmp_path, "--oracle", *flags, "--total-timesteps", "1280")
    assert summary["labels_used"] == summary["labels"] and summary["entropy"] is not None
    assert ":" not in only(tmp_path).name


@pytest.mark.parametrize("env_id", [task for task in script.SEGMENT_LENGTH if task != "InvertedPendulum-v5"])
def test_every_task_of_the_paper_trains(tmp_path, quick, env_id):
    """With its own segment length; what is paid is sane from the start; nothing is written beside the run."""
    quick.chdir(tmp_path)
    at = SMALL.index("--segment-length")
    small = SMALL[:at] + SMALL[at + 2 :]
    quick.setattr(script, "evaluate", lambda *_: np.zeros(1))
    paid, gae = [], script.compute_gae
    quick.setattr(script, "compute_gae", lambda *given: paid.append(given[0].clone()) or gae(*given))
    flags = ["--oracle", "--labels", "8", "--total-timesteps", "1280", "--query-pool-steps", "4000"]
    summary = run(tmp_path / "runs", *flags, "--env-id", env_id, small=small)
    assert summary["labels_used"] == 8 and np.isfinite(summary["v_loss"]) and summary["reward_correlation"] is not None
    assert all(rewards.isfinite().all() and rewards.std() < 1 for rewards in paid) and len(paid) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # MuJoCo likes to leave a log


def test_an_evaluation_plays_whole_episodes_and_moves_nothing(quick):
    """Ten episodes, one per environment, sampled actions, their true return; the same ones for the same seed."""
    witness, args = Witness(quick), script.parse_args(["--true-reward", "--env-id", "Reacher-v5"])
    args.eval_episodes = 3
    agent, _ = script.make_models(args, script.Envs(args, 1))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    scores = script.evaluate(agent, args, 7)
    assert torch.equal(before, torch.random.get_rng_state())
    assert witness[0]["env_rewards"].shape == (50, 3) and witness[0]["ended"][-1].all()
    assert scores == pytest.approx(witness[0]["env_rewards"].sum(0)) and np.std(scores) > 0.1
    assert np.array_equal(scores, script.evaluate(agent, args, 7))
    assert not np.array_equal(scores, script.evaluate(agent, args, 8))


# ------------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize(
    "flags",
    [[*FEEDBACK, *TEACHER], ["--true-reward", "--total-timesteps", "2560"], [*FEEDBACK, *REACHER]],
    ids=["imperfect teacher", "true reward", "many time limits"],
)
def test_killed_and_resumed_equals_undisturbed(tmp_path, quick, flags):
    """Trap 40. Killed in the initial phase, twice after the same checkpoint, and at two random steps, in a renamed
    folder: policy, optimisers, ensemble, pool, counters and answers are the same to the bit."""
    run(tmp_path / "whole", *flags)
    step, calls = script.Envs.step, []

    def mortal(self, actions):
        calls.append(1)
        if len(calls) == mortal.until:
            raise Killed
        return step(self, actions)

    quick.setattr(script.Envs, "step", mortal)
    mortal.until = 40
    kill(run, tmp_path / "cut", *flags)
    run_dir = only(tmp_path / "cut")
    moments = [random.randrange(1, 100) for _ in range(2)]
    print("killed after", moments)
    for steps in (450, 60, *moments):
        mortal.until = len(calls) + steps
        kill(resume, run_dir)
    assert 0 < script.read_checkpoint(run_dir)["progress"]["iteration"] < 20
    run_dir = run_dir.rename(tmp_path / "cut" / "best run #1")
    mortal.until = 0
    resume(run_dir)
    whole, end = state_of(only(tmp_path / "whole")), state_of(run_dir)
    assert whole == end and ("Reacher-v5" not in flags or len(end["progress"]["returns"]) == 20)
    if "--oracle" in flags:
        assert answers(run_dir) == answers(only(tmp_path / "whole"))
        for one, other in zip(pairs(run_dir), pairs(only(tmp_path / "whole")), strict=True):
            assert all(np.array_equal(one[name], other[name]) for name in other)


def test_a_checkpoint_is_saved_where_all_starts_anew(tmp_path, quick):
    saved, save, anew = [], script.save_checkpoint, script.start_anew
    quick.setattr(script, "save_checkpoint", lambda *given: saved.append(given[-1].iteration) or save(*given))
    quick.setattr(script, "start_anew", lambda key, *given: saved.append(key) or anew(key, *given))
    run(tmp_path, *FEEDBACK)
    assert saved == [[1, 0, 0], 0, [1, 1, 0], 6, [1, 1, 6], 12, [1, 1, 12], 18, [1, 1, 18], 20]


def test_a_finished_run_can_be_trained_on(tmp_path, quick, capsys):
    run(tmp_path, *FEEDBACK)
    run_dir = only(tmp_path)
    summary = resume(run_dir, "--total-timesteps", "3840", "--labels", "60")
    shown = capsys.readouterr().out
    assert "--total-timesteps is 3840 from now on, not 2560" in shown and "--labels is 60" in shown
    assert summary["finished"] and summary["labels_used"] == 60 and summary["total_timesteps"] == 3840
    assert script.read_checkpoint(run_dir)["progress"]["iteration"] == 30


def test_a_crash_is_an_exception_and_the_last_checkpoint_goes_on(tmp_path, quick):
    """Trap 43; and labels on the disk that are newer than the checkpoint do not come twice."""
    run(tmp_path / "whole", *FEEDBACK)
    update, calls = script.update_reward_model, []

    def failing(*given):
        calls.append(given[2].used)
        if calls[-1] > 36 and calls[-1] > calls[-2]:  # right after labels have come
            raise ZeroDivisionError
        return update(*given)

    with quick.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(script, "update_reward_model", failing)
        run(tmp_path / "cut", *FEEDBACK)
    gc.collect()
    cut = only(tmp_path / "cut")
    assert not (cut / "summary.json").exists()
    assert len(answers(cut)) > script.read_checkpoint(cut)["progress"]["asked"] > 12
    resume(cut)
    assert state_of(cut) == state_of(only(tmp_path / "whole")) and len(answers(cut)) == len(pairs(cut)) == 48


# ------------------------------------------------------------------------------------------------ numbers that are none
def ends_not_finite(act, *given) -> str:
    """It ends with a sentence, which is exit code 1."""
    with pytest.raises(SystemExit) as end:
        act(*given)
    said = end.value.code
    del end  # and with it the lock of the run
    gc.collect()
    assert "are not finite after step" in said and "learning rates" in said
    return said


def good(run_dir) -> bool:
    state = script.read_checkpoint(run_dir)
    return all(x.isfinite().all() for part in ("agent", "ensemble") for x in state[part].values())


def test_a_learning_rate_that_breaks_the_policy_ends_the_run(tmp_path, quick):
    """Kind 2: it trained on to the end, and was told as finished. (A std that shrinks stays finite; the bonus makes it
    grow.)"""
    for name, flags in {"a": FEEDBACK, "b": ["--true-reward", "--total-timesteps", "2560"]}.items():
        ends_not_finite(run, tmp_path / name, *flags, "--learning-rate", "100", "--ent-coef", "10")
        cut = only(tmp_path / name)
        assert not (cut / "summary.json").exists() and good(cut)


@pytest.mark.parametrize("at, kept", [(400, 6), (96 + 19 * 32 + 10, 18)], ids=["middle", "last rollout"])
def test_one_observation_that_is_no_number_ends_the_run_and_spares_the_checkpoint(tmp_path, quick, at, kept):
    """Kind 2: once, late. The run that goes on from the last good checkpoint, where the task is sound again, ends as
    if nothing had happened."""
    run(tmp_path / "whole", *FEEDBACK)
    step, calls = script.Envs.step, []

    def broken(self, actions):
        obs, told = step(self, actions)
        calls.append(1)
        if len(calls) == at:
            obs[1, 2] = told["led_to"][1, 2] = math.nan
        return obs, told

    quick.setattr(script.Envs, "step", broken)
    said = ends_not_finite(run, tmp_path / "cut", *FEEDBACK)
    cut = only(tmp_path / "cut")
    assert str(cut / "checkpoint.pt") in said and not (cut / "summary.json").exists() and good(cut)
    assert script.read_checkpoint(cut)["progress"]["iteration"] == kept
    resume(cut)
    assert state_of(cut) == state_of(only(tmp_path / "whole"))


# ------------------------------------------------------------------------------------------------------------- people
PEOPLE = ["--human", "--labels", "24", "--total-timesteps", "2560", *REACHER]


def test_people_are_waited_for_and_see_the_clips_that_they_are_asked_about(tmp_path, quick):
    """Initial labels are waited for, and all before the last tenth; "can't tell" is asked anew. A pair's pictures are
    drawn from the states of its own rows: Reacher's arm and target are in its observations."""
    waits, drawn, inner = [], [], script.Camera.frames

    def frames(self, env, row, length):
        states = [self.kept[row + t][env] for t in range(length)]
        arms = np.stack([np.concatenate([np.cos(s[:2]), np.sin(s[:2]), s[2:4], s[4:6]]) for s in states])
        drawn.append(arms)
        return inner(self, env, row, 1)[:, ::48, ::48]

    def answer_while_waiting(seconds):
        status = json.loads((only(tmp_path) / "status.json").read_text())
        assert status["wanted"] > status["labels_used"] and status["labels"] == 24
        waits.append((status["phase"], status["step"]))
        answer_open(only(tmp_path), lambda n, a, b: None if n % 5 == 3 else float(np.sign(a - b) + 1) / 2)

    quick.setattr(script.Camera, "frames", frames)
    quick.setattr(script.time, "sleep", answer_while_waiting)
    summary = run(tmp_path, *PEOPLE)
    run_dir = only(tmp_path)
    assert summary["labels_used"] == 24 and summary["skipped"] >= 3
    assert waits[0] == ("initial", 0) and any(phase == "training" for phase, _ in waits)
    assert json.loads((run_dir / "status.json").read_text())["phase"] == "finished"
    stored = pairs(run_dir)
    assert len(drawn) == 2 * len(stored) == 2 * summary["asked"]
    for i, arms in enumerate(drawn):
        assert np.allclose(stored[i // 2]["obs"][i % 2][:, :8], arms, atol=1e-5)
        assert (run_dir / "preferences" / f"{i // 2:08d}.{i % 2}.webp").stat().st_size > 20
    clip = script.read_run(run_dir)["clip"]
    assert (clip["width"], clip["height"], clip["columns"], clip["frames"]) == (384, 384, 5, 5)


def test_a_resumed_run_of_people_keeps_every_answer_and_its_open_pairs(tmp_path, quick):
    """Killed while it waits: what was answered meanwhile counts, what is open stays open, nothing is asked twice."""
    calls = []

    def mortal(seconds):
        calls.append(1)
        if len(calls) in (1, 3):
            raise Killed
        answer_open(only(tmp_path), lambda n, a, b: float(n % 2))

    quick.setattr(script.Camera, "frames", lambda *_: np.zeros((1, 8, 8, 3), np.uint8))
    quick.setattr(script.time, "sleep", mortal)
    kill(run, tmp_path, *PEOPLE)
    run_dir = only(tmp_path)
    asked = len(pairs(run_dir))
    assert asked == 6 + 3 and answer_open(run_dir, lambda n, a, b: float(n % 2)) == asked  # three for the next to do
    kill(resume, run_dir)
    answer_open(run_dir, lambda n, a, b: float(n % 2))
    summary = resume(run_dir)
    assert summary["labels_used"] == 24 == summary["asked"] == len(answers(run_dir))


def test_a_run_of_people_that_is_resumed_in_its_initial_phase_asks_about_other_clips(tmp_path, quick):
    quick.setattr(script.Camera, "frames", lambda *_: np.zeros((1, 8, 8, 3), np.uint8))
    quick.setattr(script.time, "sleep", lambda _: 1 / 0)
    ended(ZeroDivisionError, run, tmp_path, *PEOPLE)
    run_dir = only(tmp_path)
    assert answer_open(run_dir, lambda *_: None) == 9
    ended(ZeroDivisionError, resume, run_dir)
    clips = [clip.tobytes() for pair in pairs(run_dir) for clip in pair["obs"]]
    assert len(clips) == len(set(clips)) == 36


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "flags, said",
    [
        *REFUSED,
        (
            ["--oracle", "--num-envs", "1", "--num-minibatches", "8", "--num-steps", "15"],
            "fewer than two steps for each",
        ),
        (["--oracle", "--env-id", "Hoper-v5"], "Hopper"),
        (["--oracle", "--env-id", "Hoper-v5", "--segment-length", "60"], "Hopper"),
        (["--oracle", "--env-id", "CartPole-v1"], "not a MuJoCo task"),
        (["--oracle", "--env-id", "Pendulum-v1"], "not a MuJoCo task"),
        (["--oracle", "--env-id", "ALE/Pong-v5"], "ALE/Pong-v5"),
        (["--oracle", "--env-id", ""], "can't be made"),
        (["--oracle", "--env-id", "nomodule:Mine-v0"], "nomodule"),
        (["--oracle", "--env-id", "slider:Mine-v0"], "slider:Mine-v0 can't be made"),
        (["--oracle", "--env-id", "slider:Unbounded-v0"], "an actuator without a ctrlrange"),
        (["--oracle", "--env-id", "HalfCheetah-v5", "--labels", "-3"], "-3 is not in [0"),  # no log of MuJoCo's own
        (["--oracle", "--labels", "1400", "--total-timesteps", "20000"], "more steps than the run"),
        (["--oracle", "--segment-length", "0"], "0 is not in [1"),
        (["--oracle", "--l2-coef", "0"], "not in [1e-06, 0.001]"),
        (["--oracle", "--reset-every", "0"], "0 is not in [1"),
        (["--oracle", "--ent-coef", "nan"], "nan is not in"),
        (["--oracle", "--init-logstd", "3"], "3 is not in [-2"),
    ],
)
def test_bad_input_ends_with_a_sentence_and_code_2_before_anything_is_written(
    tmp_path, monkeypatch, capfd, flags, said
):
    monkeypatch.chdir(tmp_path)
    assert said in refused_here(script, flags, capfd)


def test_what_does_not_fit_a_run_is_refused(tmp_path, quick, capsys):
    run(tmp_path / "good", *FEEDBACK)
    source, new = only(tmp_path / "good"), tmp_path / "new"
    labels = ["--oracle", "--labels", "0", "--total-timesteps", "640", "--preferences", str(source)]
    model = ["--oracle", "--labels", "0", "--reward-model", str(source)]
    run(tmp_path / "true", "--true-reward", "--total-timesteps", "640")
    unpaid = str(only(tmp_path / "true"))
    new.mkdir()

    def refused(said, act, *given):
        with pytest.raises(SystemExit) as end:
            act(*given)
        gc.collect()
        assert end.value.code == 2 and said in capsys.readouterr().err and not list(new.iterdir())

    refused("clips of another length", run, new, *labels, "--segment-length", "6")
    refused("a run of InvertedPendulum-v5, not of Hopper-v5", run, new, *labels, "--env-id", "Hopper-v5")
    refused("a run of InvertedPendulum-v5, not of Hopper-v5", run, new, *model, "--env-id", "Hopper-v5")
    refused("has learned no reward model", run, new, "--oracle", "--labels", "0", "--reward-model", unpaid)
    refused("has no answers", run, new, *labels, "--preferences", unpaid)
    pair = source / "preferences" / "00000007.npz"
    whole = pair.read_bytes()
    pair.write_bytes(whole[: len(whole) // 2])
    refused("00000007.npz can't be read", resume, source, "--total-timesteps", "3840")
    pair.write_bytes(whole)
    (source / "ppo_mujoco_rlhf.py").rename(source / "ppo_atari_rlhf.py")
    refused("another script or version", resume, source)


# ------------------------------------------------------------------------------------------------------- from outside
def command(*flags):
    return [sys.executable, str(ROOT / "ppo_mujoco_rlhf.py"), *flags]


def outside(*flags, **environment):
    """The script in a process of its own."""
    return subprocess.run(command(*flags), capture_output=True, text=True, env=os.environ | environment)


def test_help_tells_what_the_defaults_do_on_any_terminal():
    shown = outside("--help", PYTHONIOENCODING="ascii", COLUMNS="200")
    assert shown.returncode == 0 and "5M steps" in shown.stdout and "minutes" in shown.stdout, shown.stderr
    assert all(f"--{field.name.replace('_', '-')}" in shown.stdout for field in dataclasses.fields(script.Args))


def test_signals_end_a_run_as_a_shell_expects_and_what_resumes_it_is_the_same_run(tmp_path, quick):
    """SIGKILL, SIGTERM and Ctrl-C, wherever they hit; the printed line goes on with it. Nothing is on stderr, or
    written elsewhere."""
    work, folder = tmp_path / "work", tmp_path / "cut run"
    work.mkdir()
    quick.undo()  # as the script comes, since that is what the other processes run
    quick.chdir(work)
    flags = [*SMALL, "--oracle=True", "--labels", "64", "--total-timesteps", "6400", "--log-every", "1"]
    run(tmp_path / "whole", *flags)
    flags, shown = [*flags, "--runs-dir", str(folder)], ""
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(command(*flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if " left  " in line:  # the policy is being trained
                time.sleep(0.2 * random.random() * (number != signal.SIGINT))
                process.send_signal(number)
                break
        shown, errors = process.communicate()
        assert process.returncode == -number, errors
        flags = ["--resume", str(only(folder))]
    cut = only(folder)
    assert "Traceback" not in errors and f"--resume '{cut}'" in shown and not (cut / "summary.json").exists()
    line = shown.split(" steps back: ", 1)[1].replace("python", sys.executable, 1)
    end = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert end.returncode == 0 and not end.stderr, end.stderr
    assert state_of(cut) == state_of(only(tmp_path / "whole"))
    assert not list(work.iterdir())


def test_a_broken_run_tells_the_shell(tmp_path):
    done = outside(*SMALL, *FEEDBACK, "--learning-rate", "100", "--runs-dir", str(tmp_path))
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("ppo_mujoco_rlhf: ") and "are not finite after step" in done.stderr


@pytest.mark.parametrize("renderer", ["foo", "osmesa"])
def test_people_get_a_sentence_where_nothing_can_be_drawn(tmp_path, renderer):
    """Kind 6: 30 lines of traceback at `import mujoco`."""
    probe = [sys.executable, "-c", "import mujoco"]
    if not subprocess.run(probe, env=os.environ | {"MUJOCO_GL": renderer}, capture_output=True).returncode:
        pytest.skip("OSMesa is here")
    done = outside(*SMALL, "--human", "--labels", "4", "--runs-dir", str(tmp_path), MUJOCO_GL=renderer)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert len(done.stderr.strip().splitlines()) == 1 and "no pictures can be drawn here" in done.stderr


def test_a_copy_of_the_script_is_a_script_of_its_own_and_training_needs_nothing_that_draws(tmp_path):
    """It finds a task of one's own in the folder where it was started, as the copy in a run directory must, too."""
    (tmp_path / "copies").mkdir()
    shutil.copy(script.__file__, tmp_path / "copies" / "my_ppo.py")
    shutil.copy(slider.__file__, tmp_path / "lab.py")
    flags = [*SMALL, "--oracle", "--labels", "4", "--total-timesteps", "640", "--runs-dir", str(tmp_path / "runs")]
    command = [sys.executable, str(tmp_path / "copies" / "my_ppo.py"), *flags, "--env-id", "lab:Slider-v0"]
    environment = os.environ | {"MUJOCO_GL": "foo"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    run_dir = only(tmp_path / "runs")
    assert "__my_ppo__" in run_dir.name and (run_dir / "my_ppo.py").exists()
    assert json.loads((run_dir / "summary.json").read_text())["script"] == "my_ppo"
