"""Bad input: one ``error:`` line on rank 0, exit status 1 or 2, on 1 and on 3 ranks, nothing written, no hang."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from .conftest import clean_environment, mpirun
from .test_exact import save_llama, shared_folder

POSITIONS = 8192


def prepare(folder: Path) -> None:
    """Good and bad inputs and checkpoints."""
    save_llama(folder / "model", 2)
    save_llama(folder / "other", 1)
    np.save(folder / "good.npy", np.arange(20) % 300)
    np.save(folder / "more.npy", np.arange(21) % 300)
    np.save(folder / "long.npy", np.zeros(POSITIONS + 1, np.int64))
    np.save(folder / "vocabulary.npy", np.array([1, 2, 300, 4]))
    np.save(folder / "none.npy", np.array([], np.int64))
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(b"abc\0def")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "text.txt").write_text("some text")
    lines = [{"id": "a", "token_ids": [1, 2]}, {"id": "b", "token_ids": [3]}]
    (folder / "broken.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"id": "c", "token_ids"\n')
    (folder / "bare").mkdir()
    for name, missing in (("no-config", "config.json"), ("no-weights", "model.safetensors")):
        shutil.copytree(folder / "model", folder / name)
        (folder / name / missing).unlink()
    shutil.copytree(folder / "no-weights", folder / "pickled")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    for name, change in (
        ("encoder-decoder", {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}),
        ("unknown", {"model_type": "nonesuch"}),
        ("remote", {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}),
        ("quantized", {"quantization_config": {"quant_method": "fp8"}}),
        ("hybrid", {"model_type": "qwen3_next", "num_hidden_layers": 1, "layer_types": ["linear_attention"]}),
    ):
        shutil.copytree(folder / "model", folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        config = {"model_type": change["model_type"]} | change if "model_type" in change else config | change
        (folder / name / "config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "model", folder / "holes")
    tensors = load_file(folder / "model" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "holes" / "model.safetensors", {"format": "pt"})
    shutil.copytree(folder / "model", folder / "truncated")
    weights = (folder / "truncated" / "model.safetensors").read_bytes()
    (folder / "truncated" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folder / "not-a-run").mkdir()
    (folder / "not-a-run" / "summary.csv").write_text("years of work")


# (what is wrong, arguments, what the line says, exit status); {f} is the folder, --model and --output have defaults
CASES = [
    ("missing input", ["--input", "{f}/nowhere.txt"], r"nowhere\.txt: no such file or folder", 1),
    ("empty input", ["--input", "{f}/empty.txt"], r"empty\.txt: the file is empty", 1),
    ("binary input", ["--input", "{f}/binary.txt"], r"binary\.txt: not text: a zero byte at byte 3", 1),
    ("not UTF-8", ["--input", "{f}/latin.txt"], r"latin\.txt: not UTF-8 text: 0xe9 at byte 3", 1),
    ("broken line", ["--input", "{f}/broken.jsonl"], r"broken\.jsonl:3: not JSON", 1),
    ("vocabulary", ["--input", "{f}/vocabulary.npy"], r"token id 300 at index 2: the vocabulary has 300 tokens", 1),
    ("no tokens", ["--input", "{f}/none.npy"], r"none\.npy.* has no tokens", 1),
    ("no tokenizer", ["--input", "{f}/text.txt"], r"model: no tokenizer there", 1),
    ("too long", ["--input", "{f}/long.npy"], r"8193 tokens.*8192 positions.*--allow-longer", 1),
    ("no folder", ["--model", "{f}/nowhere"], r"nowhere: no such checkpoint folder", 1),
    ("empty folder", ["--model", "{f}/bare"], r"bare: no config\.json", 1),
    ("no config", ["--model", "{f}/no-config"], r"no-config: no config\.json", 1),
    ("no weights", ["--model", "{f}/no-weights"], r"no-weights: no weights", 1),
    ("pickle", ["--model", "{f}/pickled"], r"pickled: weights only as pickle \(pytorch_model\.bin\).*safetensors", 1),
    ("encoder-decoder", ["--model", "{f}/encoder-decoder"], r"t5 is an encoder-decoder", 1),
    ("unknown model", ["--model", "{f}/unknown"], r"unknown.*nonesuch", 1),
    ("remote code", ["--model", "{f}/remote"], r"remote: the model needs code from the checkpoint", 1),
    ("hybrid model", ["--model", "{f}/hybrid"], r"qwen3_next has layers of type linear_attention", 1),
    (
        "cut weights",
        ["--model", "{f}/truncated"],
        r"truncated/model\.safetensors: damaged, or cut short to [\d,]+ bytes: ",
        1,
    ),
    ("quantized weights", ["--model", "{f}/quantized"], r"quantized: llama has quantized weights \(fp8\)", 1),
    ("missing tensor", ["--model", "{f}/holes"], r"1 tensors missing in the weights: model\.layers\.1\.mlp\.up_pr", 1),
    (
        "missing tensor, overwriting",
        ["--model", "{f}/holes", "--output", "{f}/run", "--overwrite"],
        r"1 tensors missing in the weights: model\.layers\.1\.mlp\.up_pr",
        1,
    ),
    ("trace in the run", ["--trace", "{f}/new/trace.json"], r"--trace .*new/trace\.json: is in the run folder", 1),
    ("no folder for a trace", ["--trace", "{f}/none/trace.json"], r"--trace .*trace\.json: no folder .*/none", 1),
    ("no GPUs for NCCL", ["--transport", "nccl", "--device", "cpu"], r"--transport nccl: NCCL carries", 1),
    ("no drawing", ["--plot", "{f}/run.gif"], r"--plot: .*run\.gif: a drawing's name ends in one of", 1),
    ("unknown score", ["--keep", "ranks"], r"--keep ranks: choose among rank, entropy, greedy, moments, topk=K and", 1),
    ("score with a value", ["--keep", "rank=3"], r"--keep rank=3: takes no value", 1),
    ("score twice", ["--keep", "rank", "--keep", "rank"], r"--keep rank: rank is given twice", 1),
    ("no best token", ["--keep", "topk=0"], r"--keep topk=0: must be a number of tokens from 1 on", 1),
    ("too many best tokens", ["--keep", "topk=301"], r"--keep topk=301: the vocabulary has 300 tokens", 1),
    ("no file of ids", ["--keep", "ids={f}/none.txt"], r"--keep ids=.*none\.txt: No such file", 1),
    ("no ids", ["--keep", "ids={f}/empty.txt"], r"--keep ids=.*empty\.txt: no token ids there", 1),
    (
        "an id outside",
        ["--keep", "ids={f}/vocabulary.npy"],
        r"vocabulary\.npy: token id 300 at place 2: the .* 0 to 299",
        1,
    ),
    ("ids that are words", ["--keep", "ids={f}/text.txt"], r"text\.txt: 'some' is not a token id", 1),
    ("beyond the end", ["--from", "20"], r"--from 20: .*good\.npy: document 'good\.npy' has 20 tokens, 0 to 19", 1),
    ("prefix outside", ["--prefix-token", "300"], r"--prefix-token 300: the vocabulary has 300 tokens, 0 to 299", 1),
    ("prefix with KV", ["--prefix-token", "bos"], r"--prefix-token bos: only with `cpmpi score`", 1),
    ("no such prefix", ["--prefix-token", "eos"], r"--prefix-token eos: choose bos, none, or a token id", 1),
    ("spans of ids", ["--spans", "lines"], r"--spans lines: .*good\.npy.* is given as token ids", 1),
    (
        "unknown spans",
        ["--spans", "words"],
        r"--spans words: choose lines, sentences, paragraphs, or a \.jsonl file",
        1,
    ),
    (
        "other scores",
        ["--output", "{f}/run", "--keep", "rank"],
        r"a run with keep nothing, this one has rank; choose",
        1,
    ),
    ("other start", ["--output", "{f}/run", "--from", "3"], r"a run with scored_from 0, this one has 3; choose", 1),
    ("not a run", ["--output", "{f}/not-a-run"], r"not-a-run: holds summary\.csv, which a run would replace", 1),
    ("other model", ["--output", "{f}/run", "--model", "{f}/other"], r"holds a run with model_sha256 .*--overwrite", 1),
    (
        "other KV",
        ["--output", "{f}/run", "--kv-dtype", "float32"],
        r"a run with kv_dtype .*--overwrite, which deletes",
        1,
    ),
    ("empty model", ["--model", ""], r"'--model': is empty; is a variable not set", 2),
    ("empty output", ["--output", ""], r"'--output': is empty; is a variable not set", 2),
    ("empty input", ["--input", ""], r"'--input': is empty; is a variable not set", 2),
    ("below a file", ["--output", "{f}/text.txt/a/b"], r"a/b: cannot be made, .*text\.txt is a file; choose", 1),
    ("segments 0", ["--segments", "0"], r"'--segments': 0 is not in the range x>=1", 2),
    ("unknown schedule", ["--attention", "star"], r"'star' is not one of 'auto', 'ring', 'tree', 'hybrid'", 2),
    ("no input", None, r"Missing option '--input'", 2),
    ("unknown option", ["--inputs", "x"], r"No such option.*--inputs", 2),
]


def call(arguments: list[str], capsys) -> tuple[int, str]:
    """The command line in this process: exit status and what it printed on standard error."""
    from cpmpi.jobs.cli import main

    capsys.readouterr()
    before, sys.argv = sys.argv, ["cpmpi", *arguments]
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.argv = before
    return status, capsys.readouterr().err


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.mpi(n)) for n in (1, 3)])
def test_bad_input_is_one_line_on_rank_0(ranks, tmp_path, capsys, monkeypatch):
    from mpi4py import MPI

    from cpmpi.comm import ranks as ours

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    if comm.size > 1:  # all of these are agreed upon by all ranks: nobody has to end the others
        monkeypatch.setattr(ours, "abort", lambda text, **_: pytest.fail(f"rank {comm.rank} aborts: {text}"))
    if comm.rank == 0:
        prepare(folder)
    comm.Barrier()
    good = ["--model", f"{folder}/model", "--input", f"{folder}/good.npy"]
    status, printed = call(["prefill", "--quiet", *good, "--output", f"{folder}/run"], capsys)
    assert (status, printed) == (0, "")
    comm.Barrier()
    before = sorted(folder.rglob("*"))

    def check(name, arguments, pattern, expected):
        status, printed = call(arguments, capsys)
        assert status == expected, (name, status, printed)
        lines = printed.splitlines()
        if comm.rank:
            assert not lines, (name, lines)
        else:
            assert len(lines) == 1, (name, lines)
            assert re.match(f"error: .*{pattern}", lines[0]), (name, lines[0])
        comm.Barrier()
        assert sorted(folder.rglob("*")) == before, name
        comm.Barrier()

    for name, more, pattern, expected in CASES:
        if more is None:
            check(name, ["prefill", "--model", "x", "--output", "y"], pattern, expected)
            continue
        given = [item.format(f=folder) for item in more]
        defaults = [] if "--model" in given else good[:2]
        defaults += [] if "--output" in given else ["--output", f"{folder}/new"]
        check(name, ["prefill", "--quiet", *good[2:], *defaults, *given], pattern, expected)

    usage = shutil._ntuple_diskusage(10**9, 10**9 - 5, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    line = r"new: the run needs .* \(\d+ bytes\), .* of it for checkpoints, but its file system has .* \(5 bytes\) free"
    check("no room", ["prefill", "--quiet", *good, "--output", f"{folder}/new"], line, 1)


def test_a_real_launch_ends_with_one_line(tmp_path):
    """The same through mpirun: the status reaches the shell, the line comes once, and no rank hangs."""
    done = mpirun(3, "-m", "cpmpi", "score", "--model", "/nowhere", "--input", "x", "--output", str(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stdout.count("error: ") == 1
    assert "error: /nowhere: no such checkpoint folder" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(("ranks", "weights"), [(1, "resident"), (2, "stream")])
def test_a_layer_that_overflows_is_named(ranks, weights, tmp_path):
    """Its weights are finite, its output is not: with --check-finite the job stops there."""
    from safetensors.torch import load_file, save_file

    save_llama(tmp_path / "model", 2, layers=3)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e30
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e30
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    np.save(tmp_path / "document.npy", np.arange(100))
    line = ["--model", f"{tmp_path}/model", "--input", f"{tmp_path}/document.npy", "--output", f"{tmp_path}/run"]
    done = mpirun(ranks, "-m", "cpmpi", "score", "--quiet", "--check-finite", "--weights", weights, *line, timeout_s=60)
    assert done.returncode != 0
    named = r"error: .*output of layers\.1: \d+ of \d+ numbers are NaN or infinite"
    assert re.search(named, done.stdout), done.stdout
    assert "Traceback" not in done.stdout
    assert len(set(re.findall(r"output of \S+", done.stdout))) == 1, done.stdout


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("RuntimeError('disk on fire')", r"RuntimeError: disk on fire \(--debug shows"),
        ("KeyboardInterrupt", "interrupted"),
    ],
)
def test_an_error_on_one_rank_ends_all(raised, told):
    code = (
        "import sys; from cpmpi.comm import ranks; from cpmpi.jobs import cli; import click\n"
        "@click.command()\n"
        "def fail():\n"
        "    r = ranks.start()\n"
        f"    if r.rank == 1: raise {raised}\n"
        "    r.comm.recv()\n"
        "cli.cli.resolve_command = lambda *_: ('fail', fail, [])\n"
        "sys.argv = ['cpmpi', 'fail']; cli.main()\n"
    )
    done = mpirun(3, "-c", code, timeout_s=60)
    assert done.returncode != 0
    assert re.search(rf"error: rank 1/3 on \S+: {told}", done.stdout)
    assert "Traceback" not in done.stdout


def test_silent_singletons_are_refused(tmp_path):
    """A launcher that this MPI does not understand starts three worlds of one rank: only the first one speaks."""
    printed = []
    for rank in range(3):
        environment = clean_environment(PMI_SIZE="3", PMI_RANK=str(rank))
        command = [
            sys.executable,
            "-m",
            "cpmpi",
            "score",
            "--model",
            "m",
            "--input",
            "x",
            "--output",
            str(tmp_path / "r"),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 1
        printed.append(done.stderr)
    assert re.fullmatch(r"error: .* started 3 ranks \(PMI_SIZE=3\), but MPI sees a world of 1: .*\n", printed[0])
    assert printed[1:] == ["", ""]


def test_a_world_that_is_what_was_launched_is_no_problem():
    from cpmpi.comm.ranks import singleton_problem

    library = "Open MPI v5.0.11, package: x"
    assert singleton_problem(4, {"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, library) is None
    assert singleton_problem(1, {}, library) is None
    assert singleton_problem(1, {"SLURM_NTASKS": "4"}, library) is None, "a plain command in a batch script"
    problem = singleton_problem(1, {"SLURM_STEP_NUM_TASKS": "4"}, library)
    assert problem is not None
    assert problem.startswith("srun started 4 ranks (SLURM_STEP_NUM_TASKS=4), but MPI sees a world of 1")
