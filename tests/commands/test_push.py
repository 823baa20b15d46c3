"""Uploads of exported folders, to a hub of our own on 127.0.0.1."""

import base64
import http.server
import json
import threading

import huggingface_hub.constants
import pytest
import runs

from copsd_jax import export, main
from copsd_jax.training import loaded_run
from copsd_jax.weights import hub

optax_promotes = runs.optax_promotes
TOKEN, REPO = "hf_secretsecret", "someone/new-model"


class _Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub's interface that an upload of small files needs."""

    protocol_version = "HTTP/1.1"

    def _answer(self, status: int, content: dict, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else b""
        self.server.seen.append((self.command, path, body))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": f"bad {self.headers.get('Authorization')}"})
        if path == "/api/whoami-v2":
            return self._answer(200, {"name": "someone", "type": "user"})
        if path == f"/api/models/{REPO}":
            if (private := self.server.private) is None:
                return self._answer(404, {}, X_Error_Code="RepoNotFound")
            return self._answer(200, {"id": REPO, "private": private})
        if path == "/api/repos/create":
            return self._answer(
                self.server.creates, {"url": f"https://huggingface.co/{REPO}", "error": "full"}
            )
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == f"/api/models/{REPO}/preupload/main":
            files = [
                {"path": x["path"], "uploadMode": "regular", "shouldIgnore": False}
                for x in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if path == f"/api/models/{REPO}/commit/main":
            url = f"https://huggingface.co/{REPO}/commit/1"
            return self._answer(200, {"commitUrl": url, "commitOid": "1", "success": True})
        return self._answer(404, {"error": path})

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.seen, server.private, server.creates = [], None, 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("push") / "w"
    assert main.main(runs.argv("opsd", workdir, train__steps=1, eval__path="")) == 0
    return workdir


def flags(trained, out, *more):
    return ["export", f"--workdir={trained}", f"--out={out}", f"--push={REPO}", *more]


@pytest.mark.parametrize("more, private", [([], True), (["--public"], False)])
def test_the_folder_is_uploaded_in_one_commit(trained, tmp_path, server, capsys, more, private):
    out = tmp_path / "o"
    assert export.main(flags(trained, out, *more)) == 0
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    assert REPO in said.out.splitlines()[-1]
    bodies = {path: body for _, path, body in server.seen}
    made = json.loads(bodies["/api/repos/create"])
    word = "private" if private else "public"  # releases of the library send one of the two
    assert made.get("private", private) == private
    assert made.get("visibility", word) == word
    assert {"private", "visibility"} & made.keys()
    lines = [json.loads(x) for x in bodies[f"/api/models/{REPO}/commit/main"].splitlines()]
    sent = {
        x["value"]["path"]: base64.b64decode(x["value"]["content"])
        for x in lines
        if x["key"] == "file"
    }
    assert sent == {path.name: path.read_bytes() for path in out.iterdir()}
    assert lines[0]["value"]["summary"] == "step 1, exported by copsd_jax"
    assert f"path = '{REPO}'\n" in sent["README.md"].decode()


@pytest.mark.parametrize("more, change, said", [
    (["--push=x"], {}, "--push=x: write owner/name, the id of a repository"),
    (["--push=a b/c"], {}, "--push=a b/c: write owner/name"),
    (["--push=a/b/c"], {}, "--push=a/b/c: write owner/name"),
    ([], {"private": False}, "exists and is public: add --public"),
    (["--public"], {"private": True}, "exists and is private: leave --public out"),
    (["--push="], {}, "--push=: write owner/name"),
    (["--push=-a/b"], {}, "--push=-a/b: write owner/name"),
    (["--public"], {}, "--public: nothing reads it without --push=owner/name"),
    (["--format=peft"], {}, "the base of this adapter, tiny, is in no known repository"),
])  # fmt: skip
def test_an_upload_that_cannot_work_reads_no_weights(
    trained, tmp_path, server, capsys, monkeypatch, more, change, said
):
    monkeypatch.setattr(loaded_run, "load_run", None)
    vars(server).update(change)
    argv = flags(trained, tmp_path / "o", *more)
    assert export.main([x for x in argv if "without" not in said or "--push" not in x]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --pu")
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_token_or_hub(trained, tmp_path, server, capsys, monkeypatch):
    monkeypatch.setattr(loaded_run, "load_run", None)

    def refused() -> str:
        assert export.main(flags(trained, tmp_path / "o")) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: --push={REPO}: ")
        assert err.count("\n") == 1
        assert TOKEN not in err
        assert "wrong_secret" not in err
        assert not list(tmp_path.iterdir())
        return err

    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    assert f"{huggingface_hub.constants.ENDPOINT} failed: " in refused()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    seen = len(server.seen)
    assert "there is no token: set the environment variable HF_TOKEN" in refused()
    assert len(server.seen) == seen
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is on" in refused()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 failed: " in refused()


def test_a_failed_upload_keeps_the_export(trained, tmp_path, server, capsys, monkeypatch):
    base = hub.BaseModel("owner/name", "", True)
    monkeypatch.setattr(export, "_name_run_base", lambda plan: base)
    server.creates = 403
    assert export.main(flags(trained, tmp_path / "o", "--format=peft")) == 2
    err = capsys.readouterr().err
    assert f"the export is complete in {tmp_path / 'o'}" in err
    assert (tmp_path / "o" / "adapter_model.safetensors").is_file()
