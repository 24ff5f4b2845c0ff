"""Would the scripts work on a GPU? Their whole train, a resume and `evaluate`, on a CUDA device that isn't there.

FakeTensorMode knows shape, dtype and device of every tensor, and no number: an operation on tensors of two devices
raises, as CUDA would. `Transfers` sees each operation before it does, and counts copies between CPU and GPU. The
simulators are real and play zeros. This is no proof: backward, generators and files are stand-ins, every number is 0,
and neither cuDNN nor a kernel, nor speed, is seen.
"""

import contextlib
import ctypes
import functools
import importlib
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GAMES = ["--num-envs", "4", "--segment-length", "10", "--query-pool-steps", "1600", "--reward-minibatch-size", "4"]
GAMES += ["--pretrain-pairs", "64", "--threads", "1", "--eval-episodes", "1", "--reset-every", "4", "--log-every", "3"]
PPO = [*GAMES, "--num-steps", "32", "--num-minibatches", "2"]
FLAGS = {"ppo_atari_rlhf": PPO, "ppo_mujoco_rlhf": [*PPO, "--env-id", "Reacher-v5"], "a2c_atari_rlhf": GAMES}
STEPS = {"ppo_atari_rlhf": 768, "ppo_mujoco_rlhf": 768, "a2c_atari_rlhf": 320}


def on_gpu(tree) -> bool:
    return any(isinstance(x, torch.Tensor) and x.device.type == "cuda" for x in tree_leaves(tree))


class Transfers(TorchDispatchMode):
    """Counts what makes the CPU wait: "up" to the GPU, "down" from it, "item" for a number read from it."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense":
            self.counts["item"] += on_gpu(args)
            return True if args[0].dtype == torch.bool else 0.0 if args[0].dtype.is_floating_point else 0
        if name == "equal":
            return False
        if name == "index":  # a mask's length is a number; take all rows
            whole = [torch.arange(len(x), device=x.device) if x is not None and x.dtype == torch.bool else x
                     for x in args[1]]  # fmt: skip
            self.counts["up"] += sum(x is not None and x.device.type == "cpu" for x in whole) * on_gpu(args[0])
            args = (args[0], whole)
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            moved = on_gpu(args[-1:]), on_gpu(out)  # what is read, what is written
            self.counts[{(True, False): "down", (False, True): "up"}.get(moved, "none")] += 1
        return out


def backward(loss, *_, **__):
    """In place of autograd's engine, which needs a GPU: gradients of the right shape for the parameters in use."""
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            with torch.no_grad():
                node.variable.grad = torch.empty_like(node.variable)
        todo += [after for after, _ in node.next_functions]


def module_to(self, device, **_):
    """In place of Module.to, which swaps the contents of its parameters: fake ones have none."""
    for module in self.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    moved = x.detach().to(device)
                    tensors[name] = nn.Parameter(moved) if tensors is module._parameters else moved
    return self


def as_tensor(data, dtype=None, device=None, make=torch.as_tensor):
    x = data if isinstance(data, torch.Tensor) else make(data)
    return x.to(device=device or x.device, dtype=dtype or x.dtype)


def to_numpy(self, make=torch.Tensor.numpy, **_):
    if not isinstance(self, FakeTensor):
        return make(self)
    if self.device.type != "cpu" or self.requires_grad:
        raise TypeError(f"can't convert a tensor of {self.device} to numpy")
    return np.zeros(tuple(self.shape), str(self.dtype).removeprefix("torch."))


@contextlib.contextmanager
def fake_cuda():
    """In here, "cuda:0" can be used. Yields the transfers that were seen."""
    lib = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 21).in_dll(lib, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[1] or guards[14]  # PyTorch without CUDA has no guard for it: Meta's does nothing
    transfers, saved = Transfers(), []
    state = torch.zeros(16, dtype=torch.uint8)

    def tolist(self):
        transfers.counts["item"] += on_gpu(self)
        return np.zeros(tuple(self.shape)).tolist()

    def save(content, file):
        saved.append(tree_map_only(torch.Tensor, lambda x: x.cpu(), content))
        file.write(b"-")

    stands_in = {
        "torch.as_tensor": as_tensor, "torch.save": save, "torch.load": lambda *_, **__: saved[-2],
        "torch.tensor": lambda data, dtype=None, device=None, make=torch.tensor: as_tensor(data, dtype, device, make),
        "torch.Tensor.numpy": to_numpy, "torch.Tensor.tolist": tolist, "torch.Tensor.backward": backward,
        "torch.nn.Module.to": module_to, "torch.get_rng_state": lambda: state, "torch.set_rng_state": lambda _: None,
        "torch.cuda.get_rng_state": lambda *_: state, "torch.cuda.set_rng_state": lambda *_: None,
        "torch.cuda.set_device": lambda _: None, "torch.cuda.is_bf16_supported": lambda **_: True,
        "torch.cuda.device_count": lambda: 1, "torch.cuda.get_device_name": lambda _: "none",
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in stands_in.items():
            stack.enter_context(patch(name, value))
        stack.enter_context(FakeTensorMode())
        yield stack.enter_context(transfers)


@pytest.mark.parametrize("name", FLAGS)
def test_a_run_its_resume_and_its_evaluation_mix_no_devices_and_a_step_waits_twice(name, tmp_path, monkeypatch):
    """Resumed from the checkpoint before the last one. A step of a rollout sends observations up and actions down."""
    script, seen = importlib.import_module(name), []
    roll_out, evaluate = script.roll_out, script.evaluate
    monkeypatch.setattr(script, "REWARD_MINIBATCHES", 1)
    steps = 5 if name == "a2c_atari_rlhf" else 32
    if hasattr(script, "make_games"):
        short = functools.partial(script.make_games, max_num_frames_per_episode=160)
        monkeypatch.setattr(script, "make_games", short)

    def counted(*given):
        before = transfers.counts.copy()
        out = roll_out(*given)
        seen.append((transfers.counts - before)["up"] - steps)
        seen.append((transfers.counts - before)["down"] - steps)
        seen.append((transfers.counts - before)["item"])
        assert out[0]["obs"].device.type == out[0]["values"].device.type == "cuda"
        return out

    monkeypatch.setattr(script, "roll_out", counted)
    flags = [*FLAGS[name], "--oracle", "--labels", "20", "--total-timesteps", str(STEPS[name]), "--device", "cuda:0"]
    with fake_cuda() as transfers:
        summary = script.train(script.parse_args([*flags, "--runs-dir", str(tmp_path)]))
        assert summary["finished"] and 5 < summary["labels_used"] <= 20  # all candidates are one pair here
        iterations = len(seen)
        args = script.parse_args(["--resume", str(next(tmp_path.iterdir()))])
        assert script.train(args)["finished"] and 0 < len(seen) - iterations < iterations
        agent, _ = script.make_models(args, script.Envs(args, 1))
        assert len(evaluate(agent, args, 1)) == 1
    assert set(seen) == {0}


def test_mixed_devices_raise():
    with fake_cuda():
        here, there = torch.zeros(4), torch.zeros(4, device="cuda:0")
        for wrong in (lambda: here + there, lambda: torch.stack([here, there]), lambda: nn.Linear(4, 1)(there)):
            with pytest.raises(RuntimeError, match="device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
