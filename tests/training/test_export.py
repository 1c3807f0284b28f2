"""An export is whole, proven and never in the way of what is there; a push says nothing of its token."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from training import artifact, export, gguf
from training.checkpoint import load_adapter, save_adapter
from training.errors import InputError
from training.model import EMBEDDED, load_model
from training.recipe import Recipe

TOKEN = "hf_thisIsNoRealToken0123456789"


@pytest.fixture(scope="module")
def packaged(tmp_path_factory) -> Path:
    """The embedded model as a promotion packages one, with an adapter."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load_model(Recipe(model="embedded")), LoraConfig(r=2, target_modules=["q_proj"]))

    def fill(aside: Path) -> dict:
        for path in EMBEDDED.iterdir():
            if path.is_file() and path.suffix != ".py":
                shutil.copy(path, aside / path.name)
        (aside / "README.md").write_text("# A model\n")
        save_adapter(adapted, aside / "adapter", {"recipe": {"model": "embedded"}, "tokens": 1})
        return {"kind": "model", "name": "quickstart"}

    return artifact.write(tmp_path_factory.mktemp("storage") / "models" / "quickstart" / "0123456789ab", fill).folder


@pytest.fixture
def damaged(packaged, tmp_path) -> Path:
    copy = Path(shutil.copytree(packaged, tmp_path / "damaged"))
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    return copy


def refused(*arguments, **given) -> str:
    with pytest.raises(InputError) as caught:
        export.export(*map(str, arguments), **given)
    return str(caught.value)


def test_a_safetensors_export_is_a_plain_folder_that_loads_without_the_adapter(packaged, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = export.export(str(packaged), str(tmp_path / "out"), "safetensors")
    assert not (tmp_path / "out" / "adapter").exists()
    assert artifact.verify(said["path"]).digest == said["digest"]
    assert artifact.verify(said["path"]).manifest["source"] == said["source"] == artifact.verify(packaged).digest
    loaded, before = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (said["path"], EMBEDDED))
    for name, values in before.state_dict().items():
        assert torch.equal(values, loaded.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(said["path"])("hello")["input_ids"]
    assert said["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_an_adapter_export_loads_onto_the_base(packaged, tmp_path):
    said = export.export(str(packaged), str(tmp_path / "out"), "adapter")
    loaded = load_adapter(load_model(Recipe(model="embedded")), said["path"])
    assert loaded.peft_config["default"].r == 2
    assert artifact.verify(said["path"]).manifest["tokens"] == 1


def test_a_model_without_its_adapter_says_so(packaged, tmp_path):
    export.export(str(packaged), str(tmp_path / "plain"), "safetensors")
    assert "packaged without its adapter" in refused(tmp_path / "plain", tmp_path / "out", "adapter")


@pytest.mark.parametrize(("format", "logits", "perplexity"), [("gguf-f16", 0.005, 0.001), ("gguf-q8_0", 0.1, 0.02)])
def test_a_gguf_export_says_how_far_it_is_from_the_model(format, logits, perplexity, packaged, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = export.export(str(packaged), str(tmp_path / "deep" / "model.gguf"), format)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.gguf"]
    assert said["bytes"] == (tmp_path / "deep" / "model.gguf").stat().st_size
    assert (said["architecture"], said["tokenizer"], said["left_at_f16"]) == ("llama", "gpt2/gpt-2", [])
    check = said["check"]
    assert check["bounds"] == [logits, perplexity] and check["rows"] == 32 and check["tokens"] > 1000
    assert 0 < check["logit_difference"] <= logits * check["logit_scale"]
    assert check["perplexity"] == pytest.approx(check["perplexity_before"], rel=perplexity)
    json.dumps(said)
    # The same by hand, on other text, so that the check is not its own only witness.
    before = AutoModelForCausalLM.from_pretrained(packaged, dtype=torch.float32).eval()
    after, _ = gguf.read(Path(said["path"]))
    ids = AutoTokenizer.from_pretrained(packaged)("Good morning. I need a spare hinge for the fridge.", return_tensors="pt")
    with torch.inference_mode():
        pair = [model(input_ids=ids["input_ids"]).logits for model in (before, after)]
    assert (pair[0] - pair[1]).abs().max() <= logits * pair[0].abs().max()


def test_the_comparison_is_made_on_the_text_that_is_given(packaged, tmp_path):
    said = export.export(str(packaged), str(tmp_path / "m.gguf"), "gguf-f16", text=["one row of text", "x" * 1000, "a"])
    assert said["check"]["rows"] == 2 and said["check"]["tokens"] <= 256 + 10
    assert "no row of at least two tokens" in refused(packaged, tmp_path / "n.gguf", "gguf-f16", text=["a"])


def test_a_file_that_says_something_else_is_refused_and_nothing_is_left(packaged, tmp_path, monkeypatch):
    swapped = gguf.LAYER | {"mlp.gate_proj": "ffn_up", "mlp.up_proj": "ffn_gate"}
    monkeypatch.setattr(gguf, "LAYER", swapped)
    assert "read back, the file differs from the model: logits by" in refused(packaged, tmp_path / "m.gguf", "gguf-f16")
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_tokens_differ_is_refused(packaged, tmp_path, monkeypatch):
    from training import gguf_tokens

    merges = gguf_tokens._merges
    monkeypatch.setattr(gguf_tokens, "_merges", lambda rules: merges(rules)[:100])
    assert "row 0 is cut into other tokens" in refused(packaged, tmp_path / "m.gguf", "gguf-f16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["safetensors", "gguf-f16"])
def test_what_is_there_is_refused_or_replaced_as_a_whole(format, packaged, tmp_path):
    place = tmp_path / ("m.gguf" if format == "gguf-f16" else "m")
    first = export.export(str(packaged), str(place), format)
    before = place.stat().st_ino
    assert refused(packaged, place, format) == f"export.output: {place} exists. Name another place, or replace it."
    assert place.stat().st_ino == before
    if place.is_dir():
        (place / "left over").write_text("from before")
    second = export.export(str(packaged), str(place), format, replace=True)
    assert place.stat().st_ino != before
    assert {key: first[key] for key in ("bytes", "source")} == {key: second[key] for key in ("bytes", "source")}
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_what_is_no_export_is_never_replaced(packaged, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    (tmp_path / "link.gguf").symlink_to(mine / "thesis.txt")
    for place, format in ((mine, "safetensors"), (mine, "adapter"), (tmp_path / "link.gguf", "gguf-f16")):
        assert "no earlier export" in refused(packaged, place, format, replace=True)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_place_that_cannot_be_is_refused(packaged, tmp_path):
    for place in (packaged, packaged / "inside", packaged.parent, packaged.parents[1]):
        assert "lie in each other" in refused(packaged, place, "safetensors", replace=True)
    assert "does not end in .gguf" in refused(packaged, tmp_path / "model.bin", "gguf-f16")
    assert "'onnx' is none of safetensors, adapter, gguf-f16, gguf-q8_0" in refused(packaged, tmp_path / "m", "onnx")


@pytest.mark.parametrize("format", export.FORMATS)
def test_a_model_that_does_not_verify_is_not_exported(format, damaged, tmp_path):
    assert "the file is not what was written" in refused(damaged, tmp_path / "out.gguf", format)
    assert "no manifest" in refused(EMBEDDED, tmp_path / "out.gguf", format)
    assert not (tmp_path / "out.gguf").exists()


def test_without_the_package_the_user_is_told_what_to_install(packaged, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'paretune[gguf]'" in refused(packaged, tmp_path / "m.gguf", "gguf-f16")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from training import export, gguf
gguf.read = lambda *path, **given: os.kill(os.getpid(), signal.SIGKILL)  # the file is written, and not yet compared
export.export(*sys.argv[1:])
"""


def test_a_process_killed_half_way_leaves_no_file_and_the_next_one_cleans_up(packaged, tmp_path):
    place = tmp_path / "m.gguf"
    done = subprocess.run([sys.executable, "-c", KILLED, str(packaged), str(place), "gguf-f16"], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert not place.exists()
    assert len(list(tmp_path.iterdir())) == 1  # what it had written aside
    export.export(str(packaged), str(place), "gguf-f16")
    assert list(tmp_path.iterdir()) == [place]


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload needs: one repository, files small enough to travel inside the commit."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.files: dict[str, bytes] = {".gitattributes": b"*", "stale.safetensors": b"of an older version"}
        self.private, self.refuses, self.seen = None, None, []


class Answers(BaseHTTPRequestHandler):
    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        hub = self.server
        hub.seen.append((self.path, self.headers.get("Authorization")))
        if hub.private is None:
            self._answer({"error": "Repository not found"}, 404)
        elif "/tree/" in self.path:
            self._answer([{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in hub.files.items()])
        else:
            listed = [{"rfilename": name} for name in hub.files]
            self._answer({"id": "me/tuned", "private": hub.private, "sha": "a" * 40, "siblings": listed, "tags": []})

    def do_POST(self):
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.seen.append((self.path, self.headers.get("Authorization")))
        if hub.refuses and hub.refuses in self.path:
            self._answer({"error": f"not with {self.headers.get('Authorization')}"}, 403)
        elif self.path == "/api/repos/create":
            if hub.private is None:
                hub.private = json.loads(body).get("private", json.loads(body).get("visibility") == "private")
            self._answer({"url": f"http://127.0.0.1:{self.server.server_port}/me/tuned"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            named = [entry["path"] for entry in json.loads(body)["files"]]
            self._answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del hub.files[value["path"]]
            self._answer({"commitUrl": f"http://127.0.0.1:{hub.server_port}/me/tuned/commit/{'a' * 40}", "commitOid": "a" * 40})
        else:
            self._answer({"error": f"unknown: {self.path}"}, 404)


@pytest.fixture
def hub():
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


PUSH = """
import json, sys, traceback
from training import export
try:
    print("URL", export.push(*sys.argv[1:3], **json.loads(sys.argv[3])))
except Exception:
    traceback.print_exc()
"""


def pushed(hub, model, repo="me/tuned", token=TOKEN, **given) -> str:
    """Pushes from a process of its own, because the hub's client reads its settings once; returns all that it says."""
    said = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": token, "HF_DEBUG": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PUSH, str(model), repo, json.dumps(given)],
        cwd=Path(__file__).parents[2], env=os.environ | said, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_a_push_uploads_every_file_and_nothing_else_stays(hub, packaged):
    said = pushed(hub, packaged)
    assert f"URL http://127.0.0.1:{hub.server_port}/me/tuned" in said
    ours = {path.relative_to(packaged).as_posix(): path.read_bytes() for path in packaged.rglob("*") if path.is_file()}
    assert {name: data for name, data in hub.files.items() if name != ".gitattributes"} == ours
    assert hub.private is True
    assert {authorization for _, authorization in hub.seen} <= {f"Bearer {TOKEN}", None}
    assert TOKEN not in said


@pytest.mark.parametrize("where", ["/api/repos/create", "/commit/"])
def test_what_the_hub_refuses_is_said_without_the_token(where, hub, packaged):
    hub.refuses = where
    said = pushed(hub, packaged)
    assert "InputError: push: me/tuned was not uploaded (" in said and "not with Bearer <token>" in said
    assert TOKEN not in said


def test_a_private_push_into_a_public_repository_is_refused(hub, packaged):
    hub.private = False
    assert "push.repo: me/tuned is public." in pushed(hub, packaged)
    assert not any("/commit/" in path for path, _ in hub.seen)
    assert "URL http" in pushed(hub, packaged, private=False)


def test_an_error_of_the_client_that_names_the_token_is_not_passed_on(packaged, monkeypatch):
    class Careless:
        def create_repo(self, *arguments, **given):
            raise OSError(f"cannot connect with Authorization: Bearer {TOKEN}")

    monkeypatch.setenv("MY_TOKEN", TOKEN)
    with pytest.raises(InputError) as caught:
        export.push(str(packaged), "me/tuned", token_from="MY_TOKEN", api=Careless())
    assert "OSError: cannot connect with Authorization: Bearer <token>" in str(caught.value)
    assert caught.value.__context__ is None and caught.value.__cause__ is None


def test_nothing_is_pushed_without_a_sound_model_an_id_and_a_token(packaged, damaged, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for model, repo, reason in (
        (damaged, "me/tuned", "the file is not what was written"),
        (packaged, "tuned", "'tuned' is no repository's id. Write owner/name."),
        (packaged, "a/b/c", "'a/b/c' is no repository's id"),
    ):
        with pytest.raises(InputError) as caught:
            export.push(str(model), repo, api=object())
        assert reason in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", " ")
    with pytest.raises(InputError, match="the environment has no HF_TOKEN"):
        export.push(str(packaged), "me/tuned", api=object())
