"""The yardstick of atari_speed.py: PPO on Atari as CleanRL's ppo_atari.py does it, on today's Gymnasium.

Written for this comparison, in CleanRL's manner and at its settings: Gymnasium's Atari wrappers, 8 environments in a
SyncVectorEnv, float32 frames, eager float32 PyTorch, 4 epochs of 4 minibatches, a wait for every metric. True reward,
no reward model. Prints steps per second over all updates but the first.
"""

import sys
import time

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from torch.distributions.categorical import Categorical

gym.register_envs(ale_py)


def make_env():
    env = gym.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0)
    env = gym.wrappers.RecordEpisodeStatistics(env)
    env = gym.wrappers.AtariPreprocessing(env, noop_max=30, frame_skip=4, screen_size=84, terminal_on_life_loss=True)
    env = gym.wrappers.TransformReward(env, np.sign)
    return gym.wrappers.FrameStackObservation(env, 4)


def layer_init(layer, std=2**0.5):
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, 0.0)
    return layer


class Agent(nn.Module):
    def __init__(self, num_actions):
        super().__init__()
        self.network = nn.Sequential(
            layer_init(nn.Conv2d(4, 32, 8, stride=4)), nn.ReLU(), layer_init(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
            layer_init(nn.Conv2d(64, 64, 3, stride=1)), nn.ReLU(), nn.Flatten(), layer_init(nn.Linear(3136, 512)),
            nn.ReLU(),
        )  # fmt: skip
        self.actor, self.critic = layer_init(nn.Linear(512, num_actions), 0.01), layer_init(nn.Linear(512, 1), 1)

    def get_value(self, x):
        return self.critic(self.network(x / 255.0))

    def get_action_and_value(self, x, action=None):
        hidden = self.network(x / 255.0)
        probs = Categorical(logits=self.actor(hidden))
        action = probs.sample() if action is None else action
        return action, probs.log_prob(action), probs.entropy(), self.critic(hidden)


def main(updates: int, threads: int, num_envs: int = 8, num_steps: int = 128):
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    envs = gym.vector.SyncVectorEnv([make_env] * num_envs)
    agent = Agent(envs.single_action_space.n)
    optimizer = torch.optim.Adam(agent.parameters(), lr=2.5e-4, eps=1e-5)
    obs = torch.zeros((num_steps, num_envs, 4, 84, 84))
    actions, logprobs, rewards, dones, values = (torch.zeros((num_steps, num_envs)) for _ in range(5))
    next_obs, next_done = torch.Tensor(envs.reset(seed=1)[0]), torch.zeros(num_envs)
    for update in range(updates + 1):
        if update == 1:
            started = time.time()
        for step in range(num_steps):
            obs[step], dones[step] = next_obs, next_done
            with torch.no_grad():
                action, logprob, _, value = agent.get_action_and_value(next_obs)
                values[step] = value.flatten()
            actions[step], logprobs[step] = action, logprob
            next_frames, reward, terminations, truncations, _ = envs.step(action.cpu().numpy())
            rewards[step] = torch.tensor(reward).view(-1)
            next_obs, next_done = torch.Tensor(next_frames), torch.Tensor(np.logical_or(terminations, truncations))
        with torch.no_grad():
            next_value = agent.get_value(next_obs).reshape(1, -1)
            advantages, lastgaelam = torch.zeros_like(rewards), 0
            for t in reversed(range(num_steps)):
                last = t == num_steps - 1
                nextnonterminal = 1.0 - (next_done if last else dones[t + 1])
                nextvalues = next_value if last else values[t + 1]
                delta = rewards[t] + 0.99 * nextvalues * nextnonterminal - values[t]
                advantages[t] = lastgaelam = delta + 0.99 * 0.95 * nextnonterminal * lastgaelam
            returns = advantages + values
        b_obs, b_inds, clipfracs = obs.reshape(-1, 4, 84, 84), np.arange(num_envs * num_steps), []
        flat = [x.reshape(-1) for x in (logprobs, actions, advantages, returns, values)]
        for _ in range(4):
            np.random.shuffle(b_inds)
            for start in range(0, len(b_inds), len(b_inds) // 4):
                mb = b_inds[start : start + len(b_inds) // 4]
                mb_logprobs, mb_actions, mb_advantages, mb_returns, mb_values = (x[mb] for x in flat)
                _, newlogprob, entropy, newvalue = agent.get_action_and_value(b_obs[mb], mb_actions.long())
                ratio = (newlogprob - mb_logprobs).exp()
                with torch.no_grad():
                    clipfracs += [((ratio - 1.0).abs() > 0.1).float().mean().item()]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                pg_loss = torch.max(-mb_advantages * ratio, -mb_advantages * ratio.clamp(0.9, 1.1)).mean()
                newvalue = newvalue.view(-1)
                v_clipped = mb_values + torch.clamp(newvalue - mb_values, -0.1, 0.1)
                v_loss = 0.5 * torch.max((newvalue - mb_returns) ** 2, (v_clipped - mb_returns) ** 2).mean()
                loss = pg_loss - 0.01 * entropy.mean() + 0.5 * v_loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
    print(f"sps {updates * num_envs * num_steps / (time.time() - started):.1f}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
