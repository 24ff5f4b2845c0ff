"""Every command in the README is one that the scripts' own parsers take, and every file that it names is there."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import tyro

import a2c_atari_rlhf as a2c
import label_server
import ppo_atari_rlhf as atari
import ppo_mujoco_rlhf as mujoco

ROOT = Path(atari.__file__).parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {f"{script.SCRIPT}.py": script for script in (atari, mujoco, a2c)}
CODE = re.findall(r"`(?:``bash\n)?([^`]+)`", README)
LINES = [line.split("#")[0] for block in CODE for line in block.splitlines()]
FOUND = (re.search(r"python3? (\w+\.py)\b([^|;&]*)", line) for line in LINES)
COMMANDS = sorted({(found[1], found[2].strip()) for found in FOUND if found})


def test_the_readme_shows_each_script_in_each_of_its_uses():
    shown = {program for program, _ in COMMANDS}
    assert shown == {*SCRIPTS, "label_server.py"}
    for flag in ("--oracle", "--true-reward", "--human", "--resume", "--evaluate", "--preferences", "--reward-model"):
        assert any(flag in flags for _, flags in COMMANDS), flag


@pytest.mark.parametrize("program, flags", COMMANDS)
def test_a_command_is_understood(program, flags, monkeypatch):
    flags = [re.sub(r".*…", "somewhere", flag) for flag in shlex.split(flags)]
    if program == "label_server.py":
        tyro.cli(label_server.Args, args=flags)
        return
    script = SCRIPTS[program]
    env_id = flags[flags.index("--env-id") + 1] if "--env-id" in flags else script.Args().env_id
    run = {"script": script.SCRIPT, "commit": None, "args": asdict(script.Args(oracle=True, env_id=env_id))}
    monkeypatch.setattr(script, "read_run", lambda _: run)
    script.parse_args(flags)


def test_what_the_readme_links_to_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    links += re.findall(r"python ((?:benchmarks|results|sweeps)/\w+\.py)", README)
    assert len(links) > 5
    assert not [link for link in links if not (ROOT / link).exists()]
