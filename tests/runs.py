"""What the tests of whole runs share, whichever script made the run."""

import gc
import json
from pathlib import Path

import numpy as np
import pytest

# What every script refuses, and what it says of it
REFUSED = [
    ([], "exactly one of"),
    (["--oracle", "--true-reward"], "exactly one of"),
    (["--oracle", "--ablation", "no-labels"], "invalid choice"),
    (["--oracle", "--labels", "0"], "needs --preferences"),
    (["--oracle", "--teacher-mistake", "1.5"], "1.5 is not in [0, 1]"),
    (["--oracle", "--gamma", "nan"], "nan is not in [0, 1]"),
    (["--oracle", "--num-envs", "0"], "0 is not in [1"),
    (["--oracle", "--learning-rate", "-1"], "-1 is not in"),
    (["--oracle", "--learning-rate", "inf"], "inf is not in"),
    (["--oracle", "--threads", "0"], "0 is not in [1"),
    (["--oracle", "--seed", "99999999999999999999"], "is not in [0"),
    (["--oracle", "--ablation", "target", "--teacher-mistake", "0.1"], "no --teacher-*"),
    (["--human", "--teacher-mistake", "0.1"], "people give answers"),
    (["--true-reward", "--labels", "10"], "learns no reward"),
    (["--true-reward", "--teacher-mistake", "0.1"], "learns no reward"),
    (["--oracle", "--labels", "0", "--preferences", "nowhere"], "not a run directory"),
    (["--oracle", "--labels", "0", "--reward-model", "nowhere"], "not a run directory"),
    (["--oracle", "--labels", "10", "--reward-model", "nowhere"], "takes --labels 0"),
    (["--oracle", "--device", "cuda:99"], "can't be used here"),
    (["--oracle", "--device", "abacus"], "can't be used here"),
    (["--oracle", "--query-pool-steps", "500"], "--query-pool-steps must be"),
    (["--resume", "nowhere"], "not a run directory"),
    (["--oracle", "--runs-dir", "/dev/null/x"], "can't write to"),
]


def only(folder) -> Path:
    (run_dir,) = folder.iterdir()
    return run_dir


def answers(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "preferences" / "answers.jsonl").read_text().splitlines()]


class Killed(Exception):
    pass


def ended(error, run, *given):
    """What a run raised that ended in the middle of a line. Its lock has gone with it, as a process's does."""
    with pytest.raises(error) as end:
        run(*given)
    value = end.value
    value.__traceback__ = value.__context__ = end = None
    gc.collect()
    return value


def kill(run, *given):
    ended(Killed, run, *given)


def answer_open(run_dir: Path, say) -> int:
    """Answer what is open; `say` gets the two true sums. Returns the number of answers."""
    folder = run_dir / "preferences"
    journal = folder / "answers.jsonl"
    done = {answer["pair"] for answer in answers(run_dir)} if journal.exists() else set()
    new = [int(path.stem) for path in sorted(folder.glob("*.npz")) if int(path.stem) not in done]
    with open(journal, "a") as file:
        for number in new:
            with np.load(folder / f"{number:08d}.npz") as pair:
                file.write(json.dumps({"pair": number, "mu": say(number, *pair["sums"]), "who": "Ann"}) + "\n")
    return len(new)


def refused_here(script, flags: list[str], capfd) -> str:
    """What a script says that refuses its flags with exit code 2, before it writes anything where it was started."""
    with pytest.raises(SystemExit) as end:
        script.train(script.parse_args(flags))
    assert end.value.code == 2 and not list(Path.cwd().iterdir())
    return " ".join(capfd.readouterr().err.replace("│", " ").split())
