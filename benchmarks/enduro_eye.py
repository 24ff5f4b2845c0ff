"""An eye for speed in Enduro: it tells from a clip, as served to a person, how fast the car goes.

    python benchmarks/enduro_eye.py    # fits it, and tells how well

A small network, fitted to frames of the emulator at speeds that are read from its memory. It stands in for the people
who teach Enduro by what looks fast: of two clips without a score, an oracle can only say that they are equal.
"""

import cv2
import numpy as np
import torch
from ale_py import ALEInterface, LoggerMode, roms
from torch import nn

SPEED = 22  # byte of the emulator's memory; 6 at a crawl, 76 the most that a driver below reached
ROAD = slice(50, 155)  # rows of the screen: below are score and speedometer, hidden from people
CLIP = 25  # steps
EQUAL = 0.05  # in the logarithm: speeds within 5 %
# Drivers, by probabilities of the nine actions: none, fire (which is gas), right, left, down (brakes), ...
DRIVERS = ([1] * 9, [10, 80, 10, 10, 2, 2, 2, 40, 40], [10, 300, 3, 3, 1, 1, 1, 30, 30], [4, 2, 1, 1, 2, 1, 1, 1, 1])


def look(frames: np.ndarray) -> np.ndarray:
    """What the eye sees of RGB frames (L, 210, 160, 3): the road, (L, 44, 84) grey."""
    return np.stack(
        [cv2.resize(cv2.cvtColor(f[ROAD], cv2.COLOR_RGB2GRAY), (84, 44), interpolation=cv2.INTER_AREA) for f in frames]
    )


def drive(seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """An episode of one of the drivers, cut into clips: what is seen (N, L, 44, 84), and the mean speed (N,)."""
    ale = ALEInterface()
    ale.setInt("random_seed", seed)
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path("enduro"))
    rng, actions = np.random.default_rng(seed), ale.getMinimalActionSet()
    chances = np.array(DRIVERS[seed % len(DRIVERS)]) / np.sum(DRIVERS[seed % len(DRIVERS)])
    seen, speeds = [], []
    for action in rng.choice(len(actions), size=steps // CLIP * CLIP, p=chances):
        for _ in range(4):  # as the agent's steps
            ale.act(actions[action])
        seen.append(look(ale.getScreenRGB()[None])[0])
        speeds.append(float(ale.getRAM()[SPEED]))
    return np.array(seen).reshape(-1, CLIP, 44, 84), np.array(speeds).reshape(-1, CLIP).mean(1)


class Eye(nn.Module):
    """Log of the mean speed (B,) of clips (B, L, 44, 84) uint8: the mean over all runs of four frames."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 16, 5, 2), nn.LeakyReLU(0.01), nn.Conv2d(16, 16, 3, 2), nn.LeakyReLU(0.01), nn.Flatten(),
            nn.Linear(16 * 9 * 19, 64), nn.LeakyReLU(0.01), nn.Linear(64, 1),
        )  # fmt: skip

    def forward(self, clips):
        stacks = clips.unfold(1, 4, 1).movedim(-1, 2).float() / 255  # (B, L-3, 4, 44, 84)
        return 2.5 + self.layers(stacks.flatten(0, 1)).view(len(clips), -1).mean(1)

    @torch.no_grad()
    def faster(self, left: bytes, right: bytes, clip: dict) -> str:
        """Which of two WebP sheets, laid out as `clip` says, shows the faster car, or "equal"."""
        clips = []
        for sheet in (left, right):
            image = cv2.imdecode(np.frombuffer(sheet, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            height, width = clip["height"], clip["width"]
            cells = image.reshape(len(image) // height, height, clip["columns"], width, 3).swapaxes(1, 2)
            clips.append(torch.as_tensor(look(cells.reshape(-1, height, width, 3)[: clip["frames"]])))
        first, second = self(torch.stack(clips)).tolist()
        return "equal" if abs(first - second) < EQUAL else "left" if first > second else "right"


def fit_eye(episodes: int = 16, steps: int = 3300, minibatches: int = 1200, seed: int = 0) -> Eye:
    """An eye fitted to three quarters of the episodes; prints how well it does on the others, by driver."""
    ALEInterface.setLoggerMode(LoggerMode.Error)
    torch.manual_seed(seed)
    rng, driven = np.random.default_rng(seed), [drive(episode, steps) for episode in range(episodes)]
    cut = episodes * 3 // 4
    x, y = (torch.as_tensor(np.concatenate(part)) for part in zip(*driven[:cut], strict=True))
    eye = Eye()
    optimizer = torch.optim.Adam(eye.parameters(), 1e-3)
    for _ in range(minibatches):
        at = torch.as_tensor(rng.integers(len(x), size=16))
        optimizer.zero_grad()
        ((eye(x[at]) - y[at].log()) ** 2).mean().backward()
        optimizer.step()
    for episode in range(cut, episodes):
        clips, speeds = driven[episode]
        with torch.no_grad():
            seen = torch.cat([eye(part) for part in torch.as_tensor(clips).split(64)]).numpy()
        pairs = rng.integers(len(speeds), size=(10_000, 2)).T
        seen, true = seen[pairs[0]] - seen[pairs[1]], np.log(speeds[pairs[0]] / speeds[pairs[1]])
        decided, right = np.abs(seen) > EQUAL, (seen > 0) == (true > 0)
        print(
            f"driver {episode % len(DRIVERS)}, at speeds of {speeds.min():.0f} to {speeds.max():.0f}: the eye decides "
            f"{decided.mean():.0%} of the pairs, {right[decided].mean():.0%} of these as the memory does, "
            f"{right[decided & (np.abs(true) > 0.2)].mean():.0%} where one is 20 % faster",
            flush=True,
        )
    return eye


if __name__ == "__main__":
    fit_eye()
