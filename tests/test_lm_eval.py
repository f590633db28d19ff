"""lm-evaluation-harness gives with our model, on 1 and 2 ranks, the numbers that it gives with its own ``hf`` model.

Sums of n log-probabilities within ``of_a_sum(n)``, n at most the bytes of the text: ``hf`` adds them up in float32.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, clean_environment, mpirun
from tests.tolerances import of_a_sum

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install 'cpmpi[eval]')")

DEMO = ROOT / "examples" / "demo" / "checkpoint"
SOURCE = (ROOT / "cpmpi" / "engine" / "session.py").read_text()
ALONE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
CHOICE = """output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}]
"""
WHOLE = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
ANSWER = """output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n\\n", "def "], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
"""
# With trailing spaces, which belong to the continuation, and an empty context, which is the prefix token.
CHOICES = [(SOURCE[100 : 200 + 40 * i] + "  " * (i % 2), ["\nfrom", "\n", " x" * (1 + i)]) for i in range(5)]
CHOICES += [("", ["def f", "import", "\n"])]
TEXTS = [SOURCE[:n] for n in (1, 30, 500, 9000)] + ["<|endoftext|>" + SOURCE[:50]]
PROMPTS = [SOURCE[:n] for n in (20, 120, 700)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "choice": (CHOICE, [{"q": q, "choices": choices, "gold": 0} for q, choices in CHOICES]),
        "whole": (WHOLE, [{"text": text} for text in TEXTS]),
        "answer": (ANSWER, [{"q": prompt, "a": "x"} for prompt in PROMPTS]),
        "sampled": (ANSWER.replace("do_sample: false", "do_sample: true, temperature: 0.7"), [{"q": "x", "a": "x"}]),
    }
    for name, (text, lines) in rows.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file) + text)
    return folder


def words(tasks, out, which="choice,whole,answer", model_args=(), model=DEMO):
    given = ",".join([f"pretrained={model}", *model_args])
    where = ["--include_path", str(tasks), "--output_path", str(out), "--log_samples"]
    return ["--model_args", given, "--tasks", which, *where]


def run(ranks, *line):
    """What ``cpmpi lm-eval`` prints, and its exit status."""
    if ranks > 1:
        done = mpirun(ranks, "-m", "cpmpi", "lm-eval", *line, environment=ALONE)
    else:
        done = subprocess.run(
            [sys.executable, "-m", "cpmpi", "lm-eval", *line], env=clean_environment(**ALONE), text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
        )  # fmt: skip
    return done.returncode, done.stdout


def hf(*line):
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", *line],
        env=clean_environment(**ALONE), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def samples(out):
    """The model's answers by task and document."""
    found = {}
    for file in sorted(out.rglob("samples_*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            found[file.name.split("_")[1], row["doc_id"]] = row["resps"]
    return found


def compare(found, expected):
    assert found.keys() == expected.keys()
    for (task, number), answers in expected.items():
        for i, ((answer,), (other,)) in enumerate(zip(answers, found[task, number], strict=True)):
            if task == "answer":
                assert other == answer
                continue
            text = CHOICES[number][1][i] if task == "choice" else TEXTS[number]
            values = [(one[0], one[1]) if task == "choice" else (one, True) for one in (answer, other)]
            assert values[0][1] == values[1][1]
            assert abs(float(values[0][0]) - float(values[1][0])) <= of_a_sum(2 + len(text.encode())), (task, number, i)


@pytest.mark.slow
def test_numbers_are_those_of_the_harness_own_model(tasks, tmp_path):
    pytest.importorskip("accelerate", reason="the harness' hf model needs accelerate")
    hf(*words(tasks, tmp_path / "hf"))
    expected = samples(tmp_path / "hf")
    assert len(expected) == len(CHOICES) + len(TEXTS) + len(PROMPTS)
    for ranks in (1, 2):
        status, said = run(ranks, *words(tasks, tmp_path / f"{ranks}"))
        assert status == 0, said
        assert said.count("bits_per_byte") >= 1
        compare(samples(tmp_path / f"{ranks}"), expected)


@pytest.mark.slow
def test_windows_are_those_of_the_harness(tasks, tmp_path):
    pytest.importorskip("accelerate", reason="the harness' hf model needs accelerate")
    hf(*words(tasks, tmp_path / "hf", model_args=("max_length=100",)))
    status, said = run(2, *words(tasks, tmp_path / "ours", model_args=("max_length=100",)))
    assert status == 0, said
    compare(samples(tmp_path / "ours"), samples(tmp_path / "hf"))


@pytest.mark.slow
@pytest.mark.parametrize(("which", "changes", "message"), [
    ("nothing", {}, "Tasks not found: nothing"),
    ("sampled", {}, "sampled asks for sampling"),
    ("whole", {"model": "/no/such/folder"}, "/no/such/folder: no such checkpoint folder"),
    ("whole", {"model_args": ("trust_remote_code=True",)}, "trust_remote_code: a checkpoint's own code is never run"),
    ("whole", {"model_args": ("colour=red",)}, "no option colour: the options are model"),
])  # fmt: skip
def test_bad_input_is_one_line_on_all_ranks(which, changes, message, tasks, tmp_path):
    status, said = run(2, *words(tasks, tmp_path / "out", which, **changes))
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert status == 1, said
    assert len(errors) == 1, said
    assert message in errors[0]
    assert "Traceback" not in said


def test_bad_usage_is_one_line_without_ranks():
    from click.testing import CliRunner

    from cpmpi.jobs.cli import cli

    for line, message in (
        (["--tasks", "x", "--model", "hf"], "--model hf: here the model is cpmpi"),
        (["--tasks", "x", "--trust_remote_code"], "--trust_remote_code: a checkpoint's or data set's own code"),
        (["--tasks", "x", "--colour", "red"], "unrecognized arguments: --colour red"),
    ):
        done = CliRunner().invoke(cli, ["lm-eval", *line])
        assert done.exit_code == 2
        assert message in done.output
