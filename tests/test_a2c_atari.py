"""a2c_atari_rlhf.py: what it does not share with its PPO sibling, by hand; and whole runs on the toy emulator.

Everything else in it is the sibling's text (test_siblings.py), which test_atari_parts.py and test_atari_runs.py test.
"""

import json
import math
from typing import get_args

import numpy as np
import pytest
import torch

import a2c_atari_rlhf as script
import ppo_atari_rlhf as ppo
from runs import Killed, kill, only
from test_atari_runs import Toy, digest, play_toy
from test_atari_runs import resume as resume_any
from test_atari_runs import run as run_any

SMALL = ["--num-envs", "4", "--segment-length", "4", "--query-pool-steps", "600", "--pretrain-pairs", "64"]
SMALL += ["--pairs-per-step", "0.1", "--reward-minibatch-size", "2", "--threads", "1", "--device", "cpu"]
SMALL += ["--eval-episodes", "1", "--reset-every", "12", "--log-every", "20"]
FEEDBACK = ["--oracle", "--labels", "48", "--total-timesteps", "640"]


@pytest.fixture
def toy(monkeypatch):
    return play_toy(monkeypatch, script)


def run(folder, *flags):
    return run_any(folder, *flags, small=SMALL, script=script)


def resume(run_dir, *flags):
    return resume_any(run_dir, *flags, script=script)


def test_the_defaults_are_the_papers():
    args = script.parse_args(["--oracle"])
    assert (args.total_timesteps, args.num_envs, args.num_steps, args.learning_rate) == (50_000_000, 16, 5, 7e-4)
    assert (args.gamma, args.ent_coef, args.rmsprop_alpha, args.rmsprop_eps) == (0.99, 0.01, 0.99, 1e-5)
    assert (args.labels, args.initial_labels, args.label_window, args.reward_std) == (5500, 500, 3000, 0.05)
    assert (args.pairs_per_step, args.segment_length) == (0.1, 25)


def test_the_gradient_is_ppos_at_ratio_one_on_one_full_batch():
    torch.manual_seed(0)
    agent, n = script.Agent(6, bf16=False), 32
    obs = torch.randint(0, 256, (n, 4, 84, 84), dtype=torch.uint8)
    actions, advantages, returns = torch.randint(0, 6, (n,)), torch.randn(n), torch.randn(n)
    advantages = (advantages - advantages.mean()) / advantages.std()  # as PPO makes them
    with torch.no_grad():
        _, logprobs, _, values = agent.get_action_and_value(obs, actions)
    gradients = []
    for module, data in ((script, (advantages, returns)), (ppo, (logprobs, advantages, returns, values))):
        _, newlogprob, entropy, newvalue = agent.get_action_and_value(obs, actions)
        loss, _ = module.policy_loss(newlogprob, entropy, newvalue, *data, module.parse_args(["--oracle"]))
        agent.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in agent.parameters()]))
    assert gradients[0].norm() > 0.1 and torch.allclose(gradients[0], gradients[1], atol=1e-5)


def test_the_loss_by_hand():
    args = script.parse_args(["--oracle"])
    logprob, entropy = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 1.5])
    value, advantage, returns = torch.tensor([1.0, 3.0]), torch.tensor([2.0, -1.0]), torch.tensor([2.0, 1.0])
    loss, info = script.policy_loss(logprob, entropy, value, advantage, returns, args)
    # policy -(2 x -1 + -1 x -2) / 2 = 0, value (1 + 4) / 2 / 2 = 1.25, entropy 1
    assert info["policy_loss"] == 0 and info["value_loss"] == 1.25 and info["entropy"] == 1
    assert loss.item() == pytest.approx(0.5 * 1.25 - 0.01)


def test_an_update_is_one_clipped_step_on_the_whole_rollout():
    """By SGD at rate 1, the parameters move by the loss's gradient, scaled to --max-grad-norm."""
    torch.manual_seed(0)
    agent, args = script.Agent(3, bf16=False), script.parse_args(["--oracle", "--max-grad-norm", "0.01"])
    obs = torch.randint(0, 256, (8, 4, 84, 84), dtype=torch.uint8)
    rollout = (obs, torch.randint(0, 3, (8,)), torch.randn(8), torch.randn(8))
    before = torch.cat([p.detach().flatten().clone() for p in agent.parameters()])
    _, logprob, entropy, value = agent.get_action_and_value(obs, rollout[1])
    script.policy_loss(logprob, entropy, value, *rollout[2:], args)[0].backward()
    gradient = torch.cat([p.grad.flatten() for p in agent.parameters()])
    info = script.update_policy(agent, torch.optim.SGD(agent.parameters(), lr=1.0), rollout, args)
    moved = before - torch.cat([p.detach().flatten() for p in agent.parameters()])
    assert info["grad_norm"].item() == pytest.approx(gradient.norm().item(), rel=1e-4) and gradient.norm() > 0.05
    assert torch.allclose(moved, gradient * 0.01 / gradient.norm(), atol=1e-6)
    assert info["explained_variance"].item() == pytest.approx(
        1 - (rollout[2].var() / rollout[3].var()).item(), rel=1e-4
    )


def test_n_step_returns_by_hand():
    """lambda 1: 3 + 8 / 2 = 7, 2 + 7 / 2 = 5.5, 1 + 5.5 / 2 = 3.75; an end before the last row leaves 2 and 2."""
    rewards, values, next_values = torch.tensor([[1.0], [2], [3]]), torch.tensor([[5.0], [1], [4]]), torch.zeros(3, 1)
    next_values[:2], next_values[2] = values[1:], 8
    advantages, returns = script.compute_gae(rewards, values, next_values, torch.zeros(3, 1), 0.5, 1.0)
    assert returns.flatten().tolist() == [3.75, 5.5, 7] and advantages.flatten().tolist() == [-1.25, 4.5, 3]
    dones = torch.tensor([[0.0], [1], [0]])
    _, returns = script.compute_gae(rewards, values, next_values * (1 - dones), dones, 0.5, 1.0)
    assert returns.flatten().tolist() == [2, 2, 7]


def test_rmsprop_is_tensorflows():
    """Average from 1, epsilon inside of the root; PyTorch's first step would be ten times as long."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = script.RMSpropTF([parameter], 0.1, 0.99, 1e-5)
    average, expected = np.ones(2), np.array([1.0, -2.0])
    for gradient in ([3.0, 0.0], [-1.0, 0.5], [0.2, 4.0]):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        average = 0.99 * average + 0.01 * np.square(gradient)
        expected -= 0.1 * np.array(gradient) / np.sqrt(average + 1e-5)
        assert parameter.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    state = optimizer.state_dict()
    again = script.RMSpropTF([torch.nn.Parameter(torch.zeros(2))], 0.1, 0.99, 1e-5)
    again.load_state_dict(state)
    assert again.state_dict()["state"][0]["square_avg"].tolist() == pytest.approx(average.tolist())


def test_a_run_counts_right_and_its_rate_falls_to_zero_at_1_6_times_its_length(tmp_path, toy):
    lambdas, gae = [], script.compute_gae

    def seen(*given, gae_lambda):
        lambdas.append(gae_lambda)
        return gae(*given, gae_lambda=gae_lambda)

    toy.setattr(script, "compute_gae", seen)
    summary = run(tmp_path, *FEEDBACK)
    assert (summary["labels_used"], summary["total_timesteps"], summary["script"]) == (48, 640, "a2c_atari_rlhf")
    assert summary["global_step"] > 640 and lambdas == [1.0] * 32
    assert all(math.isfinite(summary[name]) for name in ("reward_loss", "pg_loss", "v_loss", "entropy"))
    assert json.loads((only(tmp_path) / "summary.json").read_text()) == summary
    (group,) = script.read_checkpoint(only(tmp_path))["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(7e-4 * (1 - 31 / (1.6 * 32)))  # the 32nd of 32 updates


def test_a_killed_run_goes_on_to_the_same_parameters(tmp_path, toy):
    """In the initial phase, and twice after a reset in the middle of clips, which are longer than a rollout."""
    flags = [*FEEDBACK, "--num-steps", "3"]
    run(tmp_path / "whole", *flags)
    step, calls = Toy.step, []

    def mortal(self, action):
        calls.append(1)
        if len(calls) == mortal.until:
            raise Killed
        return step(self, action)

    toy.setattr(Toy, "step", mortal)
    mortal.until = 20
    kill(run, tmp_path / "cut", *flags)
    cut = only(tmp_path / "cut")
    for steps in (150, 20):
        mortal.until = len(calls) + steps
        kill(resume, cut)
    assert 0 < script.read_checkpoint(cut)["progress"]["iteration"] < 54
    mortal.until = 0
    resume(cut)
    assert digest(cut) == digest(only(tmp_path / "whole"))


def test_every_ablation_and_seed_gives_parameters_of_its_own(tmp_path, toy):
    runs = [["--oracle", "--labels", "24", "--ablation", name] for name in get_args(script.Ablation)]
    runs += [[*runs[0], "--seed", "2"], ["--true-reward"], runs[0]]
    for i, flags in enumerate(runs):
        run(tmp_path / str(i), *flags, "--total-timesteps", "240")
    digests = [digest(only(tmp_path / str(i))) for i in range(len(runs))]
    assert digests[-1] == digests[0] and len(set(digests)) == len(runs) - 1


@pytest.mark.parametrize("flags", [["--rmsprop-alpha", "1.5"], ["--num-minibatches", "4"], ["--labels", "0"]])
def test_bad_input_ends_with_code_2(flags):
    with pytest.raises(SystemExit) as error:
        script.parse_args(["--oracle", *flags])
    assert error.value.code == 2
