"""Write the ready batch scripts in jobs/sbatch/ with the function that ``cpmpi submit`` uses."""

from __future__ import annotations

from pathlib import Path

from cpmpi.slurm.request import BatchRequest
from cpmpi.slurm.script import render

FOLDER = Path(__file__).resolve().parent.parent / "jobs" / "sbatch"
HEAD = "Options go before the file: sbatch -p PARTITION -A ACCOUNT --time=12:00:00 jobs/sbatch/{name}.sbatch"
DOCUMENTS = ["--model", "CHECKPOINT", "--input", "documents"]
# name -> (what it is for, what to ask Slurm for, the command)
RECIPES: dict[str, tuple[str, BatchRequest, list[str]]] = {
    "one-node": (
        "One node, a rank for each 8 cores: log-probabilities and KV of all documents in the folder documents.",
        BatchRequest(tasks_per_node=2, cpus_per_task=4, time="1h"),
        ["prefill", *DOCUMENTS, "--output", "RUN"],
    ),
    "nodes": (
        "Several nodes of cores: every document on all ranks.",
        BatchRequest(nodes=2, tasks_per_node=2, cpus_per_task=4, time="1h"),
        ["prefill", *DOCUMENTS, "--output", "RUN-nodes"],
    ),
    "gpus": (
        "Several nodes with GPUs, a rank for each.",
        BatchRequest(nodes=2, tasks_per_node=2, gpus_per_node=2, cpus_per_task=2, time="1h"),
        ["prefill", *DOCUMENTS, "--output", "RUN-gpus"],
    ),
    "array": (
        "An array over a corpus in parts: task 0 scores part-0.jsonl into scores/part-0, and so on, 2 at a time.",
        BatchRequest(array="0-3%2", cpus_per_task=4, time="1h"),
        ["score", "--model", "CHECKPOINT", "--input", "part-%a.jsonl", "--output", "scores/part-%a"],
    ),
    "after": (
        "After another job: sbatch --dependency=afterok:$(sbatch --parsable jobs/sbatch/one-node.sbatch) "
        "jobs/sbatch/after.sbatch",
        BatchRequest(job_name="cpmpi-verify", time="30m"),
        ["verify", "RUN"],
    ),
}


def text_of(name: str) -> str:
    """The batch script of a recipe."""
    what, request, words = RECIPES[name]
    log = "slurm-%A_%a.out" if request.array is not None else "slurm-%j.out"
    return render(request, words, folder=None, log=log, head=[what, HEAD.format(name=name)])


if __name__ == "__main__":
    for name in RECIPES:
        (FOLDER / f"{name}.sbatch").write_text(text_of(name), encoding="utf-8")
