"""Rotations on disk and on the hub: what is saved comes back, fits its model alone and merges into it."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re

import huggingface_hub
import pytest
import torch
from tiny_models import MODELS, tiny

from rotpruner import InputError, Rotations
from rotpruner.families import available_spaces
from rotpruner.placements import turns
from rotpruner.rotations import random_rotations

FILES = ["rotation_config.json", "rotations.safetensors"]


def rotations_of(model, seed=0) -> Rotations:
    return Rotations.of(random_rotations(model.config, available_spaces(model.config), seed), model)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_comes_back_from_disk_and_merges(name, tmp_path):
    model = tiny(name)
    saved = rotations_of(model)
    saved.save_pretrained(tmp_path / "rotations")
    assert sorted(path.name for path in (tmp_path / "rotations").iterdir()) == FILES
    found = Rotations.from_pretrained(tmp_path / "rotations")
    assert set(found) == set(available_spaces(model.config))
    for space, Q in found.items():
        assert Q.dtype == (torch.float32 if turns(space) else torch.int64)
        assert torch.equal(Q, saved[space])

    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    merged = copy.deepcopy(model)
    found.merge(merged)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=2e-4, rtol=2e-4)
    weights = zip(model.parameters(), merged.parameters(), strict=False)
    assert any(old.shape != new.shape or not torch.equal(old, new) for old, new in weights)
    if "residual" in found:
        with pytest.raises(InputError, match="rotated already"):
            found.merge(merged)


def test_other_models_are_refused_and_stay_as_they_were(tmp_path):
    rotations_of(tiny("llama-2")).save_pretrained(tmp_path / "rotations")
    found = Rotations.from_pretrained(tmp_path / "rotations")
    reseeded = tiny("llama-2")
    with torch.no_grad():
        reseeded.model.embed_tokens.weight.add_(1.0)
    for other, reason in (
        (tiny("qwen3"), "another model, a llama;"),
        (tiny("llama-2", num_hidden_layers=1), "of '.*' have shape"),
        (reseeded, "another model of the same type"),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(InputError, match=f"rotations' .*{reason}"):
            found.merge(other)
        assert all(torch.equal(tensor, before[path]) for path, tensor in other.state_dict().items())


def test_damaged_directories_are_refused(tmp_path):
    directory = tmp_path / "rotations"
    saved = rotations_of(tiny("llama-2"))
    saved.save_pretrained(directory)
    with pytest.raises(InputError, match="exists already"):
        saved.save_pretrained(directory)
    config = json.loads((directory / FILES[0]).read_text())
    for content, reason in (
        ("{", "damaged"),
        ("[]", "format 1"),
        (json.dumps({**config, "format": 2}), "format 1"),
        (json.dumps({"format": 1}), "no 'model_type'"),
    ):
        (directory / FILES[0]).write_text(content)
        with pytest.raises(InputError, match=reason):
            Rotations.from_pretrained(directory)
    for name in reversed(FILES):
        saved.save_pretrained(directory, replace=True)
        (directory / name).unlink()
        with pytest.raises(InputError, match=f"{name} is missing"):
            Rotations.from_pretrained(directory)


def test_the_base_model_is_named_without_its_place(model_directory, tmp_path):
    model = tiny("llama-2")
    assert Rotations.of({}, model).base_model is None
    for name, expected in ((str(model_directory), "tiny"), ("/gone/model", "model"), ("owner/name", "owner/name")):
        model.config._name_or_path = name
        rotations = Rotations.of({}, model)
        rotations.save_pretrained(tmp_path / "rotations", replace=True)
        assert Rotations.from_pretrained(tmp_path / "rotations").base_model == expected
        assert expected in repr(rotations)


# -- the hub -----------------------------------------------------------------------------------------


class Hub:
    """A hub of one repository behind the transport of the real client: what is committed can be downloaded."""

    commit = "1" * 40

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.repositories: list[dict] = []
        self.refuses = False

    def answer(self, request, respond):
        path = request.url.path
        if self.refuses:
            return respond(403, json={"error": "not yours"})
        if path == "/api/repos/create":
            self.repositories.append(json.loads(request.content))
            return respond(200, json={"url": "https://huggingface.co/me/turned"})
        if path == "/api/validate-yaml":  # the card's head
            return respond(200, json={"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            asked = [entry["path"] for entry in json.loads(request.content)["files"]]
            return respond(
                200,
                json={"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in asked]},
            )
        if "/commit/" in path:
            for line in map(json.loads, request.content.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"https://huggingface.co/me/turned/commit/{self.commit}"
            return respond(200, json={"success": True, "commitOid": self.commit, "commitUrl": address})
        return self._read(request, path, respond)

    def _read(self, request, path, respond):
        if path.startswith("/api/models/me/turned"):
            if "/tree/" in path:
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in self.files.items()
                ]
                return respond(200, json=entries)
            siblings = [{"rfilename": name} for name in self.files]
            return respond(200, json={"id": "me/turned", "sha": self.commit, "siblings": siblings, "tags": []})
        if found := re.fullmatch(r"/me/turned/resolve/[^/]+/(.+)", path):
            content = self.files[found[1]]
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.commit}
            if request.method == "HEAD":
                return respond(200, headers={**headers, "Content-Length": str(len(content))})
            return respond(200, headers=headers, content=content)
        return respond(404, headers={"X-Error-Code": "RepoNotFound"}, json={"error": "Repository not found"})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Only the transport is replaced: requests, commits and downloads are the real client's."""
    from huggingface_hub.utils import _http

    # The client's own HTTP library: httpx, or httpx2 in later versions.
    http = __import__(type(huggingface_hub.get_session()).__module__.split(".")[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub = Hub()
    transport = http.MockTransport(lambda request: hub.answer(request, http.Response))
    huggingface_hub.set_client_factory(lambda: http.Client(transport=transport, follow_redirects=True))
    yield hub
    huggingface_hub.set_client_factory(_http.default_client_factory)


def test_what_is_pushed_comes_back_from_the_hub(hub):
    model = tiny("llama-2")
    model.config._name_or_path = "owner/name"
    pushed = rotations_of(model)
    address = pushed.push_to_hub("me/turned", private=True, token="hf_none")
    assert address.endswith(hub.commit)
    assert hub.repositories[0]["visibility"] == "private"
    assert sorted(hub.files) == ["README.md", *FILES]
    card = hub.files["README.md"].decode()
    assert huggingface_hub.ModelCard(card).data.base_model == "owner/name"
    found = Rotations.from_pretrained("me/turned", token="hf_none")
    assert all(torch.equal(Q, pushed[space]) for space, Q in found.items())
    # What the card shows runs.
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    exec(code, {"rotpruner": __import__("rotpruner"), "model": model})
    with pytest.raises(InputError, match="rotated already"):
        found.check_model(model)


def test_the_hubs_refusals_are_one_line(hub):
    with pytest.raises(InputError, match=r"no rotations at 'me/nothing': it is not a directory, and the hub[^\n]*"):
        Rotations.from_pretrained("me/nothing", token=False)
    hub.refuses = True
    with pytest.raises(InputError, match=r"cannot upload to 'me/turned' .*403"):
        rotations_of(tiny("llama-2")).push_to_hub("me/turned", token="hf_none")
