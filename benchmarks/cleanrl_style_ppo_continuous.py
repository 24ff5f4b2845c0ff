"""The yardstick of mujoco_speed.py: PPO on Hopper as CleanRL's ppo_continuous_action.py does it, on today's Gymnasium.

    python benchmarks/cleanrl_style_ppo_continuous.py 488 1 1        # updates, threads, seed; a million steps

Written for this comparison, in CleanRL's manner and at its settings: Gymnasium's wrappers around one environment, eager
float32 PyTorch, torch.distributions, 10 epochs of 32 minibatches of 64, a wait for the clipped share; without its
TensorBoard log and KL. True reward, no reward model; Hopper-v5 as Gymnasium has it, which ends where the hopper falls.
Prints the returns as it learns, then steps per second over all updates but the first.
"""

import sys
import time

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch.distributions.normal import Normal


def make_env():
    env = gym.wrappers.FlattenObservation(gym.make("Hopper-v5"))
    env = gym.wrappers.ClipAction(gym.wrappers.RecordEpisodeStatistics(env))
    env = gym.wrappers.NormalizeObservation(env)
    env = gym.wrappers.TransformObservation(env, lambda x: np.clip(x, -10, 10), None)
    env = gym.wrappers.NormalizeReward(env, gamma=0.99)
    return gym.wrappers.TransformReward(env, lambda reward: np.clip(reward, -10, 10))


def layer_init(layer, std=2**0.5):
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, 0.0)
    return layer


def network(inputs: int, outputs: int, std: float):
    return nn.Sequential(
        layer_init(nn.Linear(inputs, 64)), nn.Tanh(), layer_init(nn.Linear(64, 64)), nn.Tanh(),
        layer_init(nn.Linear(64, outputs), std),
    )  # fmt: skip


class Agent(nn.Module):
    def __init__(self, num_inputs: int, num_actions: int):
        super().__init__()
        self.critic, self.actor_mean = network(num_inputs, 1, 1.0), network(num_inputs, num_actions, 0.01)
        self.actor_logstd = nn.Parameter(torch.zeros(1, num_actions))

    def get_action_and_value(self, x, action=None):
        mean = self.actor_mean(x)
        probs = Normal(mean, self.actor_logstd.expand_as(mean).exp())
        action = probs.sample() if action is None else action
        return action, probs.log_prob(action).sum(1), probs.entropy().sum(1), self.critic(x)


def main(updates: int, threads: int, seed: int = 1, num_envs: int = 1, num_steps: int = 2048):
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    np.random.seed(seed)
    envs = SyncVectorEnv([make_env] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    num_inputs, num_actions = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    agent = Agent(num_inputs, num_actions)
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-4, eps=1e-5)
    obs, actions = (torch.zeros((num_steps, num_envs, size)) for size in (num_inputs, num_actions))
    logprobs, rewards, dones, values = (torch.zeros((num_steps, num_envs)) for _ in range(4))
    next_obs, next_done, episode_returns = torch.Tensor(envs.reset(seed=seed)[0]), torch.zeros(num_envs), []
    for update in range(updates + 1):
        if update == 1:
            started = time.time()
        optimizer.param_groups[0]["lr"] = 3e-4 * (1 - update / (updates + 1))
        for step in range(num_steps):
            obs[step], dones[step] = next_obs, next_done
            with torch.no_grad():
                action, logprob, _, value = agent.get_action_and_value(next_obs)
                values[step] = value.flatten()
            actions[step], logprobs[step] = action, logprob
            next_state, reward, terminations, truncations, infos = envs.step(action.cpu().numpy())
            rewards[step] = torch.tensor(reward).view(-1)
            next_obs, next_done = torch.Tensor(next_state), torch.Tensor(np.logical_or(terminations, truncations))
            if "final_info" in infos:
                episode = infos["final_info"]["episode"]
                episode_returns += episode["r"][infos["final_info"]["_episode"]].tolist()
        with torch.no_grad():
            next_value = agent.critic(next_obs).reshape(1, -1)
            advantages, lastgaelam = torch.zeros_like(rewards), 0
            for t in reversed(range(num_steps)):
                last = t == num_steps - 1
                nextnonterminal = 1.0 - (next_done if last else dones[t + 1])
                nextvalues = next_value if last else values[t + 1]
                delta = rewards[t] + 0.99 * nextvalues * nextnonterminal - values[t]
                advantages[t] = lastgaelam = delta + 0.99 * 0.95 * nextnonterminal * lastgaelam
            returns = advantages + values
        b_obs, b_actions = obs.reshape(-1, num_inputs), actions.reshape(-1, num_actions)
        flat = [x.reshape(-1) for x in (logprobs, advantages, returns, values)]
        b_inds, clipfracs = np.arange(num_envs * num_steps), []
        for _ in range(10):
            np.random.shuffle(b_inds)
            for start in range(0, len(b_inds), len(b_inds) // 32):
                mb = b_inds[start : start + len(b_inds) // 32]
                mb_logprobs, mb_advantages, mb_returns, mb_values = (x[mb] for x in flat)
                _, newlogprob, entropy, newvalue = agent.get_action_and_value(b_obs[mb], b_actions[mb])
                ratio = (newlogprob - mb_logprobs).exp()
                with torch.no_grad():
                    clipfracs += [((ratio - 1.0).abs() > 0.2).float().mean().item()]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                pg_loss = torch.max(-mb_advantages * ratio, -mb_advantages * ratio.clamp(0.8, 1.2)).mean()
                newvalue = newvalue.view(-1)
                v_clipped = mb_values + torch.clamp(newvalue - mb_values, -0.2, 0.2)
                v_loss = 0.5 * torch.max((newvalue - mb_returns) ** 2, (v_clipped - mb_returns) ** 2).mean()
                loss = pg_loss - 0.0 * entropy.mean() + 0.5 * v_loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        if update % 20 == 0 or update == updates:
            recent, steps = episode_returns[-20:], (update + 1) * num_envs * num_steps
            print(f"{steps} steps, return {np.mean(recent):.1f} over the last {len(recent)} episodes", flush=True)
    print(f"sps {updates * num_envs * num_steps / (time.time() - started):.1f}")


if __name__ == "__main__":
    main(*(int(arg) for arg in sys.argv[1:]))
