"""The recipes of docs/cluster.md: as they stand there, as far as they run here."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from helpers import LLAMA, nf4_ok, same_files, write_checkpoint_dir
from ray_hosts import BIN, Hosts, why_not

PAGE = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
SCHEMA = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text())

SRUN = """#!/bin/sh
# Runs a command on every host, and ends with the largest of their exit codes.
pids=
for host in {names}; do
    ip netns exec "$host" unshare -pf --mount-proc sh -c '"$@"; exit $?' sh "$@" &
    pids="$pids $!"
done
code=0
for pid in $pids; do wait "$pid" || code=$?; done
exit $code
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def job(tmp_path) -> Path:
    (script,) = blocks("bash")
    path = tmp_path / "nf4.sh"
    path.write_text(script)
    path.chmod(0o755)
    return path


def test_the_shell_is_good(job):
    subprocess.run([BIN / "shellcheck", "--severity=style", job], check=True)


def test_the_ray_job_is_one():
    (text,) = blocks("yaml")
    document = yaml.safe_load(text)
    jsonschema.validate(document, SCHEMA)
    # The schema does find what is wrong: a field that is none, and one of another kind.
    for path, value in (("entrypiont", "nf4"), ("backoffLimit", "two")):
        wrong = {**document, "spec": {**document["spec"], path: value}}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
def test_the_slurm_job_runs(job, tmp_path):
    """With stand-ins for srun and scontrol, and real Ray on two hosts."""
    weights = {f"a.{i}.proj.weight": torch.randn(256, 720).bfloat16() for i in range(6)}
    source = write_checkpoint_dir(tmp_path / "model", weights, LLAMA, 3)
    nf4_ok("quantize", source, tmp_path / "one")
    with Hosts(tmp_path / "home") as hosts:
        addresses = [hosts.add() for _ in range(2)]
        stand_ins = tmp_path / "bin"
        stand_ins.mkdir()
        (stand_ins / "srun").write_text(SRUN.format(names=" ".join(hosts.names)))
        (stand_ins / "scontrol").write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(addresses))
        for path in stand_ins.iterdir():
            path.chmod(0o755)
        environment = {
            **hosts.environment, "PATH": f"{stand_ins}:{BIN}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1", "SOURCE": str(source), "OUTPUT": str(tmp_path / "out"),
            "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # 60: so long the other nodes wait
        }  # fmt: skip
        done = subprocess.run(
            [job], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
            timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ray: " in done.stderr
    assert same_files(tmp_path / "one", tmp_path / "out")
