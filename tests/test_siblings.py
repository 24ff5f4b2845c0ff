"""The training scripts are meant to be diffed: what is the same function in two of them is the same text.

Every name that a script defines at its top level is listed below, by the scripts that have it and by whose text is
whose. "a = b" is the same text in both, "a | b" is two texts. A name that is not listed, or listed wrongly, fails.

To add a script, put it into SCRIPTS and run this file: what fails says where each name goes.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("ppo_atari", "ppo_mujoco", "a2c_atari")

# In all scripts, with the same text
SHARED = """
    SCRIPT CORES QUERY_BATCH QUERY_CANDIDATES OPEN_PAIRS REWARD_MINIBATCHES STATISTICS_ROWS STD_FLOOR
    SHOWN CHANGEABLE
    fail within Count Number Seed Share Weight Positive Ablation
    sprite_sheet
    layer_init
    sample_segments write_whole write_json read_answers Preferences
    preference_probability preference_loss label_losses disagreement bootstrap_weights teacher_answer label_schedule
    compute_gae
    decisive_sums held_out adapt_l2 pretrain renew_statistics select_pairs ask wait_for_people
    read_run open_run tell stop_at_infinity save_checkpoint read_checkpoint load_checkpoint
    roll_out evaluate reward_correlation
    Progress summarise
"""

# In all scripts, with more than one text
DIFFERENT = {
    "ppo_atari | ppo_mujoco | a2c_atari": """
        Args refuse
        update_policy
        train
    """,
    "ppo_atari = ppo_mujoco | a2c_atari": "policy_loss",
    "ppo_atari = a2c_atari | ppo_mujoco": """
        PACKAGES CLIP
        parse_args
        Envs Camera
        Agent
        RewardEnsemble make_models
        model_inputs CLIP_ARRAYS SegmentPool
        update_reward_model
        make_run_dir start_anew
    """,
}

# Not in all scripts
ONLY = {
    "ppo_atari = a2c_atari": "HUD hide hidden_band make_games oracle_rewards_of keep_large_buffers",
    "ppo_mujoco": "RENDERER SEGMENT_LENGTH UNLIMITED EPISODE_LENGTH LEAST_LOGSTD MOST_FRAMES make_task paper_reward",
    "a2c_atari": "RMSpropTF",
}


def source(script: str) -> str:
    return (ROOT / f"{script}_rlhf.py").read_text()


def definitions(text: str) -> dict[str, str]:
    """Top-level name -> text of what defines it, decorators included."""
    found, lines = {}, text.splitlines()  # ast.get_source_segment splits them anew at each call
    for node in ast.parse(text).body:
        segment = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
            first = min(part.lineno for part in [node, *node.decorator_list])
            segment = "\n".join(lines[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        else:
            continue
        for name in names:
            found[name] = f"{found[name]}\n{segment}" if name in found else segment
    return found


def relation(name: str, texts: dict[str, dict[str, str]]) -> str:
    """ "a = b | c": a and b have the same text of this name, c another; scripts without it are left out."""
    groups: dict[str, list[str]] = {}
    for script in SCRIPTS:
        if name in texts[script]:
            groups.setdefault(texts[script][name], []).append(script)
    return " | ".join(" = ".join(group) for group in groups.values())


def banners(text: str) -> list[str]:
    """Titles of the one-line banners; a banner over three lines is none, and is missed."""
    return re.findall(r"^# ---- (.+?) -+$", text, flags=re.MULTILINE)


def plot(text: str) -> list[str]:
    """The numbered lines at the top of a script, the line between them included."""
    return re.search(r"^    1\. .*?(?=\n\n)", text, flags=re.MULTILINE | re.DOTALL)[0].splitlines()


def test_each_name_is_the_same_text_in_just_the_scripts_that_it_is_listed_for():
    listed = [(name, " = ".join(SCRIPTS)) for name in SHARED.split()]
    listed += [(name, key) for group in (DIFFERENT, ONLY) for key, names in group.items() for name in names.split()]
    assert len(listed) == len(dict(listed)), "a name is listed twice"
    texts = {script: definitions(source(script)) for script in SCRIPTS}
    found = {name: relation(name, texts) for script in SCRIPTS for name in texts[script]}
    wrong = [
        f"{name}: listed as {dict(listed).get(name, 'nothing')!r}, is {found.get(name, 'nowhere')!r}"
        for name in sorted(found.keys() | dict(listed).keys())
        if found.get(name) != dict(listed).get(name)
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_lists_say_what_they_are_lists_of():
    assert all(set(re.split(r" [=|] ", key)) == set(SCRIPTS) and "|" in key for key in DIFFERENT)
    assert all(set(re.split(r" [=|] ", key)) < set(SCRIPTS) for key in ONLY)


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_names_that_scripts_share_come_in_the_same_order(script):
    """A diff shows a function that has moved as two differences."""
    ours, theirs = definitions(source(script)), definitions(source(SCRIPTS[0]))
    assert [name for name in ours if name in theirs] == [name for name in theirs if name in ours]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_sections_are_the_same_in_the_same_order(script):
    titles = [re.sub(r" \(.*\)", "", title) for title in banners(source(script))]
    assert titles == [
        "Arguments", "Environment", "Policy", "Reward model", "Pairs and answers", "Maths of preferences",
        "Maths of the policy", "Updates", "Run state", "Training",
    ]  # fmt: skip
    assert all(len(line) == 120 for line in source(script).splitlines() if line.startswith("# ----"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_plot_is_told_in_the_same_words_and_train_follows_it(script):
    """Seven steps, in order, the same at the top of every script; `train` does them under the same numbers."""
    told = plot(source(script))
    assert told == plot(source(SCRIPTS[0])) and len(told) == 8
    assert re.findall(r"^ +(\d)\. ", "\n".join(told), flags=re.MULTILINE) == list("1234567")
    body = definitions(source(script))["train"]
    assert re.findall(r"^ +# (\d)\. ", body, flags=re.MULTILINE) == list("1234567")
    for number in "1237":  # 4, 5 and 6 are told in the words of the code
        words = [
            re.search(rf"^ +(?:# )?{number}\. (\w+ \w+|\w+)", text, re.M)[1].lower() for text in ("\n".join(told), body)
        ]
        assert words[0].split()[0] == words[1].split()[0], (number, words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_no_sibling(script):
    for node in ast.walk(ast.parse(source(script))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.endswith("_rlhf") or name.startswith("tests") for name in names)


def test_the_comparison_sees_what_it_should():
    """A changed decorator, a name that is assigned again, and both names of a pair count as text of the name."""
    plain, marked = "def f(): pass\n", "@torch.no_grad()\ndef f(): pass\n"
    assert definitions(plain)["f"] != definitions(marked)["f"] == "@torch.no_grad()\ndef f(): pass"
    found = definitions("A, B = 1, 2\nC: int = 3\nA += 1\n")
    assert found == {"A": "A, B = 1, 2\nA += 1", "B": "A, B = 1, 2", "C": "C: int = 3"}
    texts = {script: {"f": "1"} for script in SCRIPTS} | {SCRIPTS[-1]: {"f": "2", "g": "3"}}
    assert relation("f", texts) == f"{' = '.join(SCRIPTS[:-1])} | {SCRIPTS[-1]}" and relation("g", texts) == SCRIPTS[-1]
