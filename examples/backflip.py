"""A Hopper that learns to do backflips: a task of one's own, for which nobody has written a reward (section 3.2).

With people, as the paper's authors did it (900 answers, less than an hour of their time):

    python -m examples.backflip > backflip.txt    # what people are asked, below
    python label_server.py --instructions backflip.txt
    python ppo_mujoco_rlhf.py --human --labels 900 --total-timesteps 1500000 --init-logstd 0 --learning-rate 1e-3 \\
        --env-id examples.backflip:HopperBackflip-v0

A flip has to be found first. Both settings are bolder than the defaults, with which the Hopper goes on rocking.

With --oracle in place of --human the reward below answers in their stead: a robot labeller, for trying the task out
and for scores, with which nobody has to sit there. Who has people needs none: return 0.0, {} then. It's shown in no
clip and paid to nobody. How an episode ends isn't told here either: the script hides all ends but the time limit.
"""

import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

INSTRUCTIONS = """Which hopper is nearer to a good backflip?
It should throw itself over backwards, land on its foot, and do so again. Turning backwards (its orange top to the \
left) is better than standing, standing is better than lying or turning forwards. Lying and wriggling is bad."""


class HopperBackflip(HopperEnv):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (12,), np.float64)

    def _get_obs(self):
        """Height; sine and cosine of the torso's pitch, since an angle grows by 2 pi with each flip; joints; speeds."""
        _, height, pitch, *joints = self.data.qpos
        return np.concatenate([[height, np.sin(pitch), np.cos(pitch)], joints, self.data.qvel.clip(-10, 10)])

    def _get_rew(self, x_velocity, action):
        """The robot labeller's: backward rotation, as long as the torso is up."""
        return -self.data.qvel[2] * np.clip(self.data.qpos[1] - 0.3, 0, 1), {}


gym.register("HopperBackflip-v0", "examples.backflip:HopperBackflip", max_episode_steps=1000)

if __name__ == "__main__":
    print(INSTRUCTIONS)
