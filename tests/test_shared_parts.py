"""What is the same text in several scripts, as tests/test_siblings.py sees to, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

import a2c_atari_rlhf as a2c
import ppo_atari_rlhf as atari
import ppo_mujoco_rlhf as mujoco


@pytest.mark.parametrize("script", [atari, mujoco])
@pytest.mark.parametrize(("target", "epochs"), [("0.02", 2), ("0.04", 3), ("1", 4), ("None", 4)])
def test_no_further_epoch_after_one_that_went_too_far(script, target, epochs):
    """The mean over the minibatches of one epoch counts: not its last one, not those of earlier epochs."""
    flags = ["--num-envs", "2", "--num-steps", "2", "--num-minibatches", "2", "--update-epochs", "4"]
    args = script.parse_args(["--oracle", *flags, "--target-kl", target])
    kls = iter([0.03, 0.0, 0.0, 0.05, 0.09, 0.01, 0.0, 0.9])  # means 0.015, 0.025, 0.05, 0.45
    layer, rows = torch.nn.Linear(1, 1), torch.tensor([[0.0], [1.0], [2.0], [3.0]])

    def loss_function(agent, args, x, returns, values):
        return agent(x).sum(), {"approx_kl": torch.tensor(next(kls))}

    rollout = (rows, rows[:, 0], rows[:, 0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    logged = script.update_policy(layer, optimizer, loss_function, rollout, np.random.default_rng(0), args)
    assert logged["epochs"] == epochs and len(list(kls)) == 8 - 2 * epochs


@pytest.mark.parametrize("script", [atari, mujoco, a2c])
def test_the_correlation_is_of_rewards_that_were_paid(script):
    """Rows from before the predictor paid hold zeros: with a tenth of them a correlation of 0.8 would read 0.25."""
    args, rng = script.parse_args(["--oracle", "--segment-length", "5", "--num-envs", "2"]), np.random.default_rng(0)
    sizes = (3, 2) if script is mujoco else ()  # of observations and actions
    pool, progress = script.SegmentPool(10, 2, *sizes, "cpu"), script.Progress(iteration=1)
    truth, zeros = torch.tensor(rng.normal(size=(2000, 2)), dtype=torch.float32), torch.zeros(2000, 2)
    noise = torch.tensor(rng.normal(size=(2000, 2)), dtype=torch.float32)
    pool.streams, pool.rows = {"oracle_rewards": torch.cat([zeros, truth]), "pred_rewards": zeros.repeat(2, 1)}, 4000
    pool.streams["oracle_rewards"][:2000] = noise
    pool.streams["pred_rewards"][2000:] = truth + 0.75 * noise  # correlation 1 / 1.25
    pool.count = 4000
    assert script.reward_correlation(pool, progress, args) < 0.7  # what all rows would say
    progress.paid_from = 2000 * 2
    assert script.reward_correlation(pool, progress, args) == pytest.approx(0.8, abs=0.05)
    progress.paid_from = 3996 * 2  # no segment lies behind that
    assert math.isnan(script.reward_correlation(pool, progress, args))
