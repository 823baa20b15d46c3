"""The launcher for GKE: its manifest against the schemas of Kubernetes and one for JobSet, the
number of Pods against the chips of the topology, and what is done with it."""

import itertools
import json
import pathlib
import re
import shlex
import signal

import jsonschema
import kubernetes_validate
import launchers
import pytest
import yaml


@pytest.fixture
def bare(tmp_path):
    return launchers.bare(tmp_path)


@pytest.fixture
def shell(tmp_path):
    return launchers.recording(tmp_path)


CLUSTER = {"IMAGE": "registry/image:tag", "SHARED": "pvc:claim"}
POD_PROGRAM = [*launchers.PROGRAM, "--workdir=/mnt/shared/W"]
KUBECTL = ["kubectl", "--namespace=default"]
SEE = [
    *KUBECTL, "get", "jobset", "copsd", "--ignore-not-found",
    "--output=jsonpath={.status.terminalState}",
]  # fmt: skip
DROP = [*KUBECTL, "delete", "jobset", "copsd", "--ignore-not-found"]
APPLY = [*KUBECTL, "apply", "--filename=-"]


def manifest(bare, *arguments, **settings):
    """The JobSet that would be applied, checked against the schemas, and its Pod's spec."""
    text = launchers.printed(bare, "gke.sh", *(arguments or POD_PROGRAM), **CLUSTER | settings)
    jobset = yaml.safe_load(text.split("<< 'MANIFEST'\n")[1].split("\nMANIFEST\n")[0])
    schema = json.loads((pathlib.Path(__file__).parent / "jobset_schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(jobset)
    template = jobset["spec"]["replicatedJobs"][0]["template"]
    version = kubernetes_validate.latest_version()
    named = {"metadata": {"name": "one"}}
    job = {"apiVersion": "batch/v1", "kind": "Job", **named, **template}
    kubernetes_validate.validate(job, version, strict=True)
    pod = {"apiVersion": "v1", "kind": "Pod", **named, **template["spec"]["template"]}
    kubernetes_validate.validate(pod, version, strict=True)
    spec = template["spec"]["template"]["spec"]
    rest = json.dumps(jobset).replace(json.dumps(spec["containers"][0]["args"]), "")
    assert "${" not in rest  # all is filled in
    return jobset, spec


@pytest.mark.parametrize(
    "tpu, topology, slices, accelerator, block",
    [
        # A host has the chips of a block of the slice: 2 x 2 (x 1) for 4 of them.
        ("v5e", "4x4", 1, "tpu-v5-lite-podslice", (2, 2)),
        ("v5e", "4x4", 2, "tpu-v5-lite-podslice", (2, 2)),
        ("v5e", "2x4", 1, "tpu-v5-lite-podslice", (2, 4)),
        ("v5e", "1x1", 1, "tpu-v5-lite-podslice", (2, 2)),
        ("v5e", "16x16", 3, "tpu-v5-lite-podslice", (2, 2)),
        ("v6e", "8x16", 2, "tpu-v6e-slice", (2, 2)),
        ("v4", "2x2x4", 1, "tpu-v4-podslice", (2, 2, 1)),
        ("v5p", "2x2x2", 2, "tpu-v5p-slice", (2, 2, 1)),
        ("v5p", "4x8x8", 1, "tpu-v5p-slice", (2, 2, 1)),
        ("tpu7x", "2x2x1", 1, "tpu7x", (2, 2, 1)),
    ],
)
def test_pods_are_the_hosts_of_the_topology(bare, tpu, topology, slices, accelerator, block):
    settings = {"TPU": tpu, "TOPOLOGY": topology, "SLICES": str(slices)}
    if block == (2, 4):
        settings["CHIPS_PER_HOST"] = "8"
    jobset, pod = manifest(bare, **settings)
    chips = list(itertools.product(*(range(int(side)) for side in topology.split("x"))))
    hosts = {tuple(c // b for c, b in zip(chip, block, strict=True)) for chip in chips}
    replicated = jobset["spec"]["replicatedJobs"][0]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == slices
    assert job["parallelism"] == job["completions"] == len(hosts)
    resources = pod["containers"][0]["resources"]
    for kind in ("requests", "limits"):
        assert resources[kind]["google.com/tpu"] * len(hosts) == len(chips)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    assert pod["restartPolicy"] == "Never"


def kubernetes_argument(text):
    """What a container gets: $(NAME) is filled in, $$ stands for $ in front of a bracket."""
    text = re.sub(r"(?<!\$)((?:\$\$)*)\$\(ATTEMPT\)", r"\g<1>7", text)
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", text), text
    return text.replace("$$(", "$(")


COUNT = [
    "-m", "copsd_jax.runtime.tries", "--limit=3", "--workdir=/mnt/shared/W", "--attempt=7", "--"
]  # fmt: skip


def test_the_container_gets_the_arguments(bare):
    _, pod = manifest(bare)
    container = pod["containers"][0]
    assert container["command"] == ["python"]
    assert [kubernetes_argument(x) for x in container["args"]] == [
        *COUNT,
        *launchers.MAIN,
        *POD_PROGRAM,
        launchers.AUTO,
        "--config.train.grace=20",
    ]
    (attempt,) = container["env"]
    assert attempt["name"] == "ATTEMPT"
    path = attempt["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"
    odd = '--config.a.b=x", "--", "y $(ATTEMPT)'
    _, pod = manifest(bare, *POD_PROGRAM, odd)
    assert [kubernetes_argument(x) for x in pod["containers"][0]["args"]][8:-2] == [
        *POD_PROGRAM, odd
    ]  # fmt: skip
    _, pod = manifest(bare, *POD_PROGRAM, "--config.train.grace=7")
    graces = [x for x in pod["containers"][0]["args"] if "grace" in x]
    assert graces == ["--config.train.grace=7"]
    assert container["image"] == "registry/image:tag"


def test_spot_network_and_account(bare):
    _, plain = manifest(bare, HOST_NETWORK="0")
    assert "hostNetwork" not in plain
    assert "serviceAccountName" not in plain
    assert "dnsPolicy" not in plain
    jobset, spot = manifest(bare, SPOT="1", SERVICE_ACCOUNT="writer", NAME="mine")
    assert spot["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    keys = {t["key"]: t["operator"] for t in spot["tolerations"]}
    assert keys == {"google.com/tpu": "Exists", "cloud.google.com/gke-spot": "Exists"}
    assert {t["key"] for t in plain["tolerations"]} == {"google.com/tpu"}
    assert (spot["hostNetwork"], spot["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert spot["serviceAccountName"] == "writer"
    assert (jobset["metadata"]["name"], jobset["metadata"]["namespace"]) == ("mine", "default")
    # Machines that are taken away are not counted: the Pod's condition fails the Job with the
    # reason that the JobSet's rule has.
    policy, job = jobset["spec"]["failurePolicy"], jobset["spec"]["replicatedJobs"][0]["template"]
    assert policy["maxRestarts"] == 0
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    taken, stopped = job["spec"]["podFailurePolicy"]["rules"]
    assert taken["action"] == stopped["action"] == "FailJob"
    assert taken["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    # Neither is a program that a signal has ended. All other ends fail the JobSet.
    container = job["spec"]["template"]["spec"]["containers"][0]["name"]
    ends = (signal.SIGINT, signal.SIGABRT, signal.SIGBUS, signal.SIGKILL, signal.SIGSEGV)
    assert stopped["onExitCodes"] == {
        "containerName": container, "operator": "In",
        "values": sorted(128 + number for number in (*ends, signal.SIGTERM)),
    }  # fmt: skip


@pytest.mark.parametrize(
    "shared, volume",
    [
        ("pvc:claim", {"persistentVolumeClaim": {"claimName": "claim"}}),
        ("10.0.0.2:/share", {"nfs": {"server": "10.0.0.2", "path": "/share"}}),
        (
            "gs://a.bucket",
            {
                "csi": {
                    "driver": "gcsfuse.csi.storage.gke.io",
                    "volumeAttributes": {
                        "bucketName": "a.bucket",
                        "mountOptions": "implicit-dirs,metadata-cache:ttl-secs:0",
                    },
                }
            },
        ),
    ],
)
def test_all_pods_have_the_shared_disk(bare, shared, volume):
    jobset, pod = manifest(bare, SHARED=shared)
    assert pod["volumes"] == [{"name": "shared", **volume}]
    assert pod["containers"][0]["volumeMounts"] == [{"name": "shared", "mountPath": "/mnt/shared"}]
    template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    wanted = {"gke-gcsfuse/volumes": "true"} if "csi" in volume else None
    assert template.get("metadata", {}).get("annotations") == wanted


@pytest.mark.parametrize("ended", ["", "Completed", "Failed"])
def test_gke_applies_what_it_prints(bare, shell, ended):
    text = launchers.printed(bare, "gke.sh", *POD_PROGRAM, **CLUSTER)
    assert launchers.executed(shell, text) == [SEE, DROP, APPLY]
    shell.answer(get=[[ended, 0]])
    done = shell.run(launchers.LAUNCH / "gke.sh", *POD_PROGRAM, **CLUSTER)
    assert done.returncode == 0, done.stderr
    applied = shell.inputs()[-1]
    assert shell.calls() == ([SEE, DROP, APPLY] if ended else [SEE, APPLY])
    assert applied.strip() in text
    assert yaml.safe_load(applied)["kind"] == "JobSet"
    assert done.stdout.splitlines()[-1] == shlex.join(
        [*KUBECTL, "logs", "--follow", "job/copsd-slice-0"]
    )


def test_gke_delete_and_context(bare, shell):
    text = launchers.printed(
        bare, "gke.sh", "delete", CONTEXT="there", NAMESPACE="team", NAME="mine"
    )
    wanted = "kubectl --namespace=team --context=there delete jobset mine --ignore-not-found"
    assert launchers.executed(shell, text) == [wanted.split()]
