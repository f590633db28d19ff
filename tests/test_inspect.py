"""``cpmpi inspect`` says what is in a run, whole or not."""

import json

from click.testing import CliRunner

from cpmpi.jobs.cli import cli
from cpmpi.jobs.inspect import command
from cpmpi.run.folder import start_index
from cpmpi.run.paths import RunPaths
from tests.runs import held, kv_of, make_run, make_spec, open_writers, outputs_of


def inspect(*arguments) -> str:
    done = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_a_whole_run(tmp_path):
    make_run(tmp_path)
    text = inspect(tmp_path)
    lines = text.splitlines()
    assert lines[1] == "model     LlamaForCausalLM, computed in float32 (config and weights: sha256 aaaaaaaaaaaa)"
    assert lines[2].startswith("made by   3 ranks, cpmpi ")
    assert lines[3] == "kv        bfloat16, 3 layers x T tokens x 2 heads x 4 + 3: 4.96 kB"
    assert lines[4].startswith("shards    3 files of ")
    assert lines[5] == "state     complete: 3 of 3 documents"
    assert lines[7].split() == ["id", "tokens", "nll", "perplexity", "complete"]
    assert lines[8].split()[:3] == ["0", "d0", "50"]
    assert lines[8].endswith("yes")
    assert len(lines) == 11


def test_how_far_an_unfinished_run_is(tmp_path):
    spec = make_run(tmp_path, stop_after=1)
    index = start_index(tmp_path, spec)
    writers = open_writers(tmp_path, index)
    for rank, writer in enumerate(writers):
        for layer in range(2 if rank else 3):
            writer.put(1, layer, *(x[held(spec.documents[1], rank)] for x in kv_of(1, layer, 2)))
        writer.close()
    text = inspect(tmp_path)
    assert "state     not complete: 1 of 3 documents\n" in text
    assert "          next 'd1': 2 of 3 layers written\n" in text
    assert text.splitlines()[-1].split() == ["2", "d2", "7", "-", "-", "no"]
    RunPaths(tmp_path).shard(0).unlink()
    text = inspect(tmp_path)
    assert f"problem   {tmp_path}/shards/rank-00000.h5: no such file\n" in text


def test_json(tmp_path):
    make_run(tmp_path, stop_after=1)
    facts = json.loads(inspect(tmp_path, "--json"))
    assert facts["complete"] is False
    assert facts["documents_complete"] == 1
    assert facts["documents"][1] == {
        "index": 1, "id": "d1", "source": "corpus.jsonl:1", "n_tokens": 2, "nll": None, "perplexity": None,
        "bits_per_byte": None, "bits_per_character": None,
        "complete": False, "failed": None, "world_size": 3, "appended": [],
    }  # fmt: skip
    assert facts["kv"]["bytes"] == 59 * facts["kv"]["bytes_per_token"] == 59 * 3 * 2 * 7 * 2
    assert [shard["bytes"] for shard in facts["shards"]] == [
        RunPaths(tmp_path).shard(r).stat().st_size for r in range(3)
    ]
    assert facts["unfinished"] == {"id": "d1", "layers_done": 0}


def test_without_kv_and_with_many_documents(tmp_path):
    spec = make_spec((2,) * 25, world=1, kv=None)
    index = start_index(tmp_path, spec)
    index.write_outputs(0, **outputs_of(0, 2))
    text = inspect(tmp_path)
    assert "kv        none\n" in text
    assert "shards" not in text
    assert text.endswith("... and 5 more (--documents 25, or summary.csv)\n")
    assert len(inspect(tmp_path, "--documents", 25).splitlines()) == len(text.splitlines()) + 4


def test_both_commands_are_on_the_command_line():
    text = CliRunner().invoke(cli, ["--help"]).output
    assert "inspect" in text
    assert "verify" in text
    for name in ("inspect", "verify"):
        assert "RUN" in CliRunner().invoke(cli, [name, "--help"]).output
