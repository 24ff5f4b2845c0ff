"""A task of one's own, with Gymnasium's usual means: a cart on a rail of two metres, paid for being on the right.

It learns in seconds, by so wide a margin that no machine's rounding turns it around. Its own end, at the very right,
and its time limit are Gymnasium's; `slider:Slider-v0` is its name for the scripts.
"""

from typing import ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

MODEL = """
<mujoco>
  <option timestep="0.025"/>
  <worldbody>
    <light pos="0 0 3"/>
    <camera name="track" mode="trackcom" pos="0 -3 1" xyaxes="1 0 0 0 0 1"/>
    <geom type="plane" size="3 3 .1" rgba=".5 .6 .5 1"/>
    <body pos="0 0 .2">
      <joint name="slide" type="slide" axis="1 0 0" range="-1 1" limited="true" damping="4"/>
      <geom type="box" size=".1 .1 .1" mass="1" rgba=".8 .3 .2 1"/>
    </body>
  </worldbody>
  <actuator><motor joint="slide" gear="8" ctrllimited="true" ctrlrange="-1 1"/></actuator>
</mujoco>
"""


class Slider(MujocoEnv):
    metadata: ClassVar[dict] = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 20}

    def __init__(self, model=MODEL, **kwargs):
        import tempfile
        from pathlib import Path

        with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
            file.write(model)
            file.flush()
            space = gym.spaces.Box(-np.inf, np.inf, (2,))
            super().__init__(str(Path(file.name)), 2, observation_space=space, **kwargs)

    def _get_obs(self):
        return np.concatenate([self.data.qpos, self.data.qvel])

    def step(self, action):
        self.do_simulation(action, self.frame_skip)
        x = float(self.data.qpos[0])
        return self._get_obs(), x, x > 0.5, False, {}

    def reset_model(self):
        self.set_state(self.np_random.uniform(-0.5, 0.5, 1), np.zeros(1))
        return self._get_obs()


gym.register("Slider-v0", Slider, max_episode_steps=50)
unbounded = MODEL.replace(' ctrllimited="true" ctrlrange="-1 1"', "")
gym.register("Unbounded-v0", Slider, max_episode_steps=50, kwargs={"model": unbounded})
