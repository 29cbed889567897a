"""The files of launchers/: the shell script against stand-ins for Slurm's commands, the manifests against schemas."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from lejepa_scale.cli.main import main
from lejepa_scale.config.paths import recipes

LAUNCHERS = ROOT / "launchers"
BIN = Path(sys.executable).parent


def test_the_shell_script_has_no_known_mistake() -> None:
    result = subprocess.run([BIN / "shellcheck", LAUNCHERS / "slurm.sh"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


class Cluster:
    """srun and scontrol that write down what they are asked; `leaves` is what the run leaves behind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, folder / "asked"
        (folder / "bin").mkdir()
        for name, body in {
            "srun": 'cd "$RUN" || exit; rm -f exit_status; [ "$LEAVES" ] && echo "$LEAVES" > exit_status; exit "$WITH"',
            "scontrol": '[ "$1" = show ] && printf "n1\\nn2\\n"; exit 0',
        }.items():
            path = folder / "bin" / name
            path.write_text(f'#!/bin/bash\necho "{name} $*" >> {self.asked}\n{body}\n')
            path.chmod(0o755)

    def __call__(self, leaves: str, status: int, run: str = "runs/lejepa-7", **slurm: str) -> tuple[int, list[str]]:
        """The script's status, and what it has asked of Slurm."""
        self.asked.unlink(missing_ok=True)
        (self.folder / run).mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_NAME": "lejepa", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "8", "LEAVES": leaves, "WITH": str(status), "RUN": str(self.folder / run), **slurm,
        }  # fmt: skip
        command = ["bash", str(LAUNCHERS / "slurm.sh"), "optim.lr=1e-3"]
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False)
        assert not done.stderr
        return done.returncode, self.asked.read_text().splitlines()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize(
    ("leaves", "status", "restarts", "again"),
    [("75", 1, "0", True), ("75", 1, "50", False), ("0", 0, "0", False), ("", 1, "0", False)],
    ids=["stopped", "stopped too often", "finished", "a fault"],
)
def test_a_run_that_stopped_is_queued_again(
    cluster: Cluster, leaves: str, status: int, restarts: str, again: bool
) -> None:
    """And no other: a fault of the configuration would come back for ever."""
    left, asked = cluster(leaves, status, SLURM_RESTART_COUNT=restarts)
    assert left == status
    assert ("scontrol requeue 7" in asked) == again
    (started,) = [line for line in asked if line.startswith("srun")]
    assert started.startswith("srun --kill-on-bad-exit=1 torchrun "), "the others would wait for a node that is lost"
    assert "--nnodes 2 --nproc-per-node 8" in started
    assert f"--rdzv-id 7-{restarts} --rdzv-backend c10d --rdzv-endpoint n1:29500" in started
    assert "USR2" in started.split("--signals-to-handle ")[1].split()[0]
    assert started.endswith("-m lejepa_scale train --config vitl_in1k run.dir=runs/lejepa-7 optim.lr=1e-3")


def test_a_task_of_an_array_has_a_directory_of_its_own_through_its_restarts(cluster: Cluster) -> None:
    """Slurm gives each task of an array a job id of its own, and another one to none that it requeues."""
    for task, job in (("0", "7"), ("1", "8")):
        _, asked = cluster(
            "75", 1, f"runs/lejepa-7_{task}", SLURM_JOB_ID=job, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=task
        )
        assert any(f"run.dir=runs/lejepa-7_{task} " in line for line in asked)
        assert f"scontrol requeue {job}" in asked


def test_the_warning_comes_before_what_torchrun_waits() -> None:
    """Slurm's USR2 comes so many seconds before the end of the job; in these torchrun lets its ranks save."""
    text = (LAUNCHERS / "slurm.sh").read_text()
    assert int(text.split("USR2@")[1].split()[0]) > int(text.split("--shutdown-timeout ")[1].split()[0])


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCHERS / name).read_text()))


def test_the_job_is_what_kubernetes_takes() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    service, job = documents("kubernetes_job.yaml")
    for document in (service, job):
        validate.validate(document, validate.latest_version(), strict=True)
    spec = job["spec"]
    container = spec["template"]["spec"]["containers"][0]
    assert f"--nnodes={spec['completions']}" in container["args"]
    assert spec["parallelism"] == spec["completions"]
    name, subdomain = job["metadata"]["name"], spec["template"]["spec"]["subdomain"]
    assert f"--rdzv-endpoint={name}-0.{subdomain}:29500" in container["args"]  # of the pod of index 0
    assert service["metadata"]["name"] == subdomain
    grace = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > next(int(word.split("=")[1]) for word in container["args"] if word.startswith("--shutdown-timeout"))


def test_the_trainjob_has_the_fields_of_trainer_2() -> None:
    """Of trainer.kubeflow.org/v1alpha1 in Kubeflow Trainer 2.2: its definition is not in a package."""
    (job,) = documents("kubernetes_trainjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"].keys() == {"runtimeRef", "trainer"}
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": "torch-distributed"
    }  # fmt: skip
    assert job["spec"]["trainer"].keys() <= {"numNodes", "image", "command", "args", "env", "resourcesPerNode"}


@pytest.mark.parametrize("name", ["kubernetes_job.yaml", "kubernetes_trainjob.yaml"])
def test_what_the_pods_run_is_a_command_of_ours(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The configuration is resolved for real; torchrun's options are those that it has."""
    spec = documents(name)[-1]["spec"]
    container = spec["trainer"] if "trainer" in spec else spec["template"]["spec"]["containers"][0]
    assert container["command"] == ["torchrun"]
    at = container["args"].index("-m")
    assert container["args"][at : at + 3] == ["-m", "lejepa_scale", "train"]
    assert main([*container["args"][at + 2 :], "--print-config"]) == 0
    assert "dir: /runs/vitl" in capsys.readouterr().out
    from torch.distributed.run import get_args_parser

    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert {word.split("=")[0] for word in container["args"][:at]} <= known


def test_the_host_file_is_read_by_deepspeed() -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert runner.fetch_hostfile(str(LAUNCHERS / "hostfile")) == {"node1": 8, "node2": 8}
    assert "vitg_lvd" in recipes()
