"""README, docs and docstrings: every command is one that its parser takes, every link leads somewhere, README is short,
and the numbers in its table are those of results/."""

import ast
import csv
import importlib
import re
import shlex
from pathlib import Path

import draw
import numpy as np
import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("ppo_atari_rlhf.py", "ppo_mujoco_rlhf.py", "a2c_atari_rlhf.py")
TOOLS = ("label_server.py", "evaluate.py")
# Named in the text, made elsewhere: to be taken off this list once it is there
NOT_YET: set[str] = set()

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
READMES = [ROOT / folder / "README.md" for folder in ("results", "benchmarks", "sweeps")]  # some commands are history
PROGRAMS = [path for name in (*SCRIPTS, *TOOLS, "examples/backflip.py") if (path := ROOT / name).exists()]


def commands_in(text: str) -> list[tuple[str, str]]:
    """(program, flags) of every `python program.py ...`; a backslash at a line's end goes on in the next."""
    text = re.sub(r"\\\n\s*", "", text)
    found = re.findall(r"python3? ([\w/]+\.py)\b([^`|;&#>\n]*)", text)
    return [(program, flags.strip()) for program, flags in found]


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
TEXTS |= {str(path.relative_to(ROOT)): docstring(path) for path in PROGRAMS}
COMMANDS = sorted({command for text in TEXTS.values() for command in commands_in(text)})


@pytest.mark.parametrize(("program", "flags"), COMMANDS)
def test_a_command_is_understood(program, flags):
    assert (ROOT / program).exists() or program in NOT_YET
    if not (ROOT / program).exists() or program not in SCRIPTS + TOOLS:
        return
    module, words = importlib.import_module(program.removesuffix(".py")), shlex.split(flags)
    needs_run = any(re.search(r"\bRUN\b|…", word) for word in words)
    needs_example = "examples.backflip" in flags and not (ROOT / "examples" / "backflip.py").exists()
    if program in SCRIPTS and not needs_run and not needs_example:
        module.parse_args(words)
    else:
        tyro.cli(module.Args, args=words)


def test_each_way_to_use_a_script_is_shown():
    assert {program for program, _ in COMMANDS} >= {*SCRIPTS, *TOOLS}
    shown = " ".join(flags for program, flags in COMMANDS if program in SCRIPTS)
    sources, reuse = ["--oracle", "--human", "--true-reward"], ["--resume", "--preferences", "--reward-model"]
    for flag in [*sources, *reuse, "--ablation", "--teacher-mistake"]:
        assert flag in shown, flag


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(page):
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    links = [(page.parent / link).resolve() for link in links if link and not link.startswith("http")]
    files = re.findall(r"((?:benchmarks|results|sweeps|tests)/\w+\.(?:py|yaml))", page.read_text())
    missing = [str(path.relative_to(ROOT)) for path in [*links, *(ROOT / file for file in files)] if not path.exists()]
    assert not set(missing) - NOT_YET


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_heading_that_is_linked_to_is_there(page):
    for link in re.findall(r"\]\(([^)\s]*#[^)\s]+)\)", page.read_text()):
        path, _, heading = link.partition("#")
        target = (page.parent / path) if path else page
        if not link.startswith("http") and target.exists():
            titles = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_scripts_first_line_names_its_page(script):
    (page,) = re.findall(r"docs/\w+\.md", docstring(ROOT / script).splitlines()[0])
    assert (ROOT / page).exists() and f"`{script}`" in (ROOT / page).read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_function_that_a_page_names_is_in_its_script(script):
    """`name()` in a page is a function or class of the script, or a method."""
    (page,) = re.findall(r"docs/\w+\.md", docstring(ROOT / script).splitlines()[0])
    tree = ast.parse((ROOT / script).read_text())
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    named = re.findall(r"`(?:\w+\.)?(\w+)\(\)`", (ROOT / page).read_text())
    assert len(named) > 5
    assert not set(named) - defined


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_metric_that_a_script_logs_is_explained(script):
    page = (ROOT / "docs" / "metrics.md").read_text()
    for metric in set(re.findall(r"\"((?:charts|losses|reward_model|labels)/\w+)\"", (ROOT / script).read_text())):
        assert f"`{metric}`" in page, metric


def test_no_metric_is_explained_that_no_script_logs():
    page, code = (ROOT / "docs" / "metrics.md").read_text(), "".join((ROOT / script).read_text() for script in SCRIPTS)
    for metric in re.findall(r"`((?:charts|losses|reward_model|labels)/\w+)`", page):
        assert f'"{metric}"' in code or f'"{metric.split("/")[1]}"' in code, metric


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9000


def number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}".replace("-", "−")


def test_the_numbers_in_the_readmes_table_are_those_of_the_rows():
    robots, games = draw.read_csv(ROOT / "results" / "mujoco.csv"), draw.read_csv(ROOT / "results" / "atari.csv")
    side_by_side = draw.of_one_budget(draw.plain(robots))
    budgets = [int(row["total_timesteps"]) for row in side_by_side if row["total_timesteps"]]
    steps = f"{round(min(budgets) / 1e6, 1):g}M to {max(budgets) / 1e6:.0f}M"
    expected = []
    for labels, scores in sorted(draw.normalised_scores(robots).items(), key=lambda item: int(item[0])):
        mean, paper = np.mean([np.mean(seeds) for seeds in scores.values()]), draw.PAPER_NORMALISED[labels]
        assert len(scores) == 8
        numbers = [f"{int(labels):,}", steps, number(mean, 2), "1", number(paper, 2)]
        expected.append(["eight robotics tasks, mean", *numbers])
    for script, budget in (("ppo", 3_000_320), ("a2c", 5_000_000)):
        ended = [row for row in games if row["script"].startswith(script) and row["env_id"] == "ALE/Pong-v5"]
        ended = [row for row in ended if row["final_return_mean"] and int(row["total_timesteps"]) == budget]
        (learned,) = (row for row in ended if row["feedback"] == "oracle")
        (true,) = (row for row in ended if row["feedback"] == "true-reward")
        scores = [number(float(row["final_return_mean"]), 1) for row in (learned, true)]
        paper = number(draw.paper_curve(3, "ALE/Pong-v5", "5.6k syn")[1][-1], 1) if script == "a2c" else "–"
        labels = f"{int(learned['labels_used']):,}"
        expected.append([f"Pong, {script.upper()}", labels, f"{budget / 1e6:.0f}M", *scores, paper])
    section = (ROOT / "README.md").read_text().split("## Does it work?")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter="|")]
    assert [row[1:-1] for row in found[2:]] == expected
