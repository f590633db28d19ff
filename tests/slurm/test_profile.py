"""Site profiles: what they may say, what is named with its line, and one written from a site's own words."""

import pytest

from cpmpi.slurm import site
from cpmpi.slurm.profile import default_profile, read_profile
from cpmpi.slurm.request import BatchRequest

from .fake import FakeSlurm

GOOD = """\
# a site
partition = "gpu"
nodes = 2
requeue = false
setup = ["module load openmpi", ". ~/venv/bin/activate"]
"""


def write(folder, text):
    path = folder / "site.toml"
    path.write_text(text)
    return path


def test_a_profile_gives_the_defaults_of_a_request(tmp_path):
    values = read_profile(write(tmp_path, GOOD))
    request = BatchRequest(**values) | {"nodes": 4}
    assert (request.partition, request.nodes, request.requeue) == ("gpu", 4, False)
    assert request.setup == ("module load openmpi", ". ~/venv/bin/activate")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD + 'partitions = "x"\n', r"site\.toml:6: unknown key 'partitions'; the keys are job_name, account, part"),
        ("# x\n[slurm]\nnodes = 1\n", r"site\.toml:2: unknown key 'slurm'"),
        ("nodes = 1\ntasks_per_node = '4'\n", r"site\.toml:2: tasks_per_node must be a whole number, not '4'"),
        ("nodes = true\n", r"site\.toml:1: nodes must be a whole number, not True"),
        ("requeue = 1\n", r"site\.toml:1: requeue must be true or false, not 1"),
        ("partition = 3\n", r"site\.toml:1: partition must be a string"),
        ("setup = 'module load x'\n", r"site\.toml:1: setup must be a list of strings"),
        ("setup = [1]\n", r"site\.toml:1: setup must be a list of strings"),
        ("\ntime = 'long'\n", r"site\.toml:2: time limit 'long': not one"),
        ("nodes = 0\n", r"site\.toml:1: nodes \(0\) must be at least 1"),
        ("nodes = \n", r"site\.toml: not TOML: .*line 1"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, told):
    with pytest.raises(ValueError, match=told):
        read_profile(write(tmp_path, text))


def test_which_profile_holds(tmp_path):
    assert default_profile({"HOME": str(tmp_path)}) is None
    own = tmp_path / ".config" / "cpmpi" / "slurm.toml"
    own.parent.mkdir(parents=True)
    own.write_text(GOOD)
    assert default_profile({"HOME": str(tmp_path)}) == own
    other = write(tmp_path, GOOD)
    assert default_profile({"HOME": str(tmp_path), "CPMPI_SLURM_PROFILE": str(other)}) == other
    with pytest.raises(ValueError, match=r"CPMPI_SLURM_PROFILE=/nowhere: no such file"):
        default_profile({"CPMPI_SLURM_PROFILE": "/nowhere"})
    with pytest.raises(ValueError, match=r"nowhere\.toml: cannot read"):
        read_profile(tmp_path / "nowhere.toml")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    fake = FakeSlurm(tmp_path / "fake")
    monkeypatch.setenv("PATH", fake.path)
    fake.prints(
        "sinfo",
        "gpu*|2-00:00:00|8|64|512000+|gpu:a100:4(S:0-1)\ngpu*|2-00:00:00|4|48|256000|gpu:4\ncpu|infinite|3|128+|1000|(null)\n",
    )
    fake.prints("scontrol", "Configuration data as of today\nClusterName = big\nMaxArraySize            = 1001\n")
    fake.prints("srun", "MPI plugin types are...\n\tnone\n\tpmi2\nspecific pmix plugin versions available: pmix_v4\n")
    fake.prints("sacctmgr", "physics\nphysics\n")
    return fake


def test_partitions_are_what_every_node_of_them_has(slurm):
    gpu, cpu = site.partitions()
    assert gpu == site.Partition(
        name="gpu", default=True, time="2-00:00:00", nodes=12, cores=48, memory_mb=256000, gpus=4
    )
    assert (cpu.name, cpu.default, cpu.nodes, cpu.cores, cpu.gpus) == ("cpu", False, 3, 128, 0)
    assert site.largest_index() == 1001
    assert site.accounts() == ["physics"]


def test_a_written_profile_is_read_again(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(site, "mpi_library", lambda: "Open MPI v5.0.11")
    text = site.write_profile()
    values = read_profile(write(tmp_path, text))
    assert values == {
        "partition": "gpu", "account": "physics", "gpus_per_node": 4, "tasks_per_node": 4, "cpus_per_task": 12,
        "launcher": "srun --mpi=pmix -K1", "requeue": True, "signal_s": 120,
    }  # fmt: skip
    assert "#   cpu: infinite, 3 nodes, 128 cores, 1000 MB" in text


@pytest.mark.parametrize(
    ("library", "plugins", "launcher"),
    [
        ("Open MPI v5.0.11", ["none", "pmi2", "pmix"], "srun --mpi=pmix -K1"),
        ("MPICH Version: 5.0.2", ["none", "pmi2", "pmix"], "srun --mpi=pmi2 -K1"),
        ("Intel(R) MPI Library 2021.9", ["pmi2"], "srun --mpi=pmi2 -K1"),
        ("Open MPI v5.0.11", ["none", "pmi2"], "mpirun"),
        (None, ["pmix"], "mpirun"),
    ],
)
def test_the_launcher_that_the_mpi_library_understands(library, plugins, launcher):
    assert site.launcher_for(library, plugins) == launcher
