"""How well does an Atari reward model, fitted to the first labels of one run, judge those of another?

    python benchmarks/offline_fit.py TRAIN_RUN TEST_RUN --labels 880    # seven minutes on one core

The runs have different seeds, so no frame is in both. Other flags go to the script beside this folder, for instance
--reward-learning-rate 1e-3; to compare two forms of the model, copy this file into two checkouts. It writes nothing
into either run.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_atari_rlhf as script


def first_labels(run: Path, number: int, args: script.Args) -> script.Preferences:
    """The first labels of a run."""
    lines = (run / "preferences" / "answers.jsonl").read_text().splitlines()[:number]
    with tempfile.TemporaryDirectory() as folder:
        for line in lines:
            shutil.copy(run / "preferences" / f"{json.loads(line)['pair']:08d}.npz", folder)
        (Path(folder) / "answers.jsonl").write_text("".join(line + "\n" for line in lines))
        return script.Preferences(Path(folder), 0, None, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--labels", type=int, default=880)
    parser.add_argument("--minibatches", type=int, default=400)
    parser.add_argument("--seed", type=int, default=3)
    given, flags = parser.parse_known_args()
    args = script.parse_args(["--human", "--device", "cpu", "--threads", "1", *flags])
    torch.set_num_threads(1)
    script.keep_large_buffers()
    fitted, held_back = (first_labels(run, given.labels, args) for run in (given.train, given.test))
    for label in held_back.labels:
        label["weights"].zero_()  # held out for every member
    torch.manual_seed(given.seed)
    rng = np.random.default_rng(given.seed)
    _, ensemble = script.make_models(args, SimpleNamespace(num_actions=6))
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=args.reward_learning_rate, fused=True)
    for minibatch in range(50, given.minibatches + 1, 50):
        info = script.update_reward_model(ensemble, optimizer, fitted, 50, rng, args)
        loss, accuracy = script.held_out(ensemble, held_back, args)
        told = f"{minibatch} minibatches: loss {info['loss']:.3f}; of the other run {loss:.3f}, accuracy {accuracy:.3f}"
        print(told, flush=True)
