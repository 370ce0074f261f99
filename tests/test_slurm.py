"""configs/accelerate/slurm.sh under commands that stand for SLURM's: what it launches, and when it queues again."""

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "configs" / "accelerate" / "slurm.sh"
RECIPE = ["configs/coco/r101_r50_12.yaml", "--output_dir", "my runs"]
STUBS = {
    # two nodes, one after the other
    "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@"; code=$?; done; exit $code',
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$@" >> "$RECORD/requeued"; fi',
    "scancel": 'echo "$@" > "$RECORD/signalled"',
    "accelerate": 'printf "%s\\n" "$@" > "$RECORD/launch$SLURM_NODEID"; eval "$RUN"',
}
# the first launcher: tells the batch script that its time is over, and ends as one that was told to stop
STOPPED = 'kill -USR1 "$BATCH"; until [ -e "$RECORD/signalled" ]; do sleep 0.1; done; exit 1'


@pytest.fixture
def job(tmp_path):
    """Runs the script; the argument is what `accelerate` does."""
    for name, content in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{content}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(tmp_path)}
    environment |= {"SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    environment |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": "32"}

    def run(what: str) -> int:
        called = ["bash", "-c", 'export BATCH=$$; exec bash "$@"', "sbatch", str(SCRIPT), *RECIPE]
        return subprocess.run(called, env=environment | {"RUN": what}, cwd=REPOSITORY, timeout=60).returncode

    return run


def test_launchers_are_called_as_accelerate_understands(job, tmp_path):
    """Each node with its own rank, all with the same address; the processes of all nodes are counted."""
    assert job("true") == 0
    parser = launch_command_parser()
    for node in (0, 1):
        name, *words = (tmp_path / f"launch{node}").read_text().splitlines()
        called = parser.parse_args(words)
        assert name == "launch" and called.machine_rank == node
        assert (called.num_machines, called.num_processes) == (2, 8)
        assert (called.main_process_ip, called.main_process_port) == ("node7", 23456)
        assert Path(called.config_file).exists() and Path(called.training_script).exists()
        assert called.training_script_args == RECIPE
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("what", "code", "requeued"),
    [(STOPPED, 1, "requeue 123456\n"), (STOPPED.replace("exit 1", "exit 0"), 0, None), ("exit 1", 1, None)],
    ids=["out of time", "out of time, but finished", "failed"],
)
def test_job_queues_again_when_its_time_was_over(job, tmp_path, what, code, requeued):
    assert job(what) == code
    record = tmp_path / "requeued"
    assert (record.read_text() if record.exists() else None) == requeued
    if what != "exit 1":
        assert (tmp_path / "signalled").read_text() == "--signal=TERM 123456\n"
