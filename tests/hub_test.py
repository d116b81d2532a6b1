"""What is fetched from the hub: the hub's own filter runs over the files of real models."""

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest
from command_line import refused
from helpers import FIXTURES
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from astraea_jax.checks import Refusal
from astraea_jax.cli.options import ModelChoice
from astraea_ports import checkpoints, tiny
from astraea_ports.checkpoints import converted
from astraea_ports.pipeline.parts import main_dtype
from astraea_ports.text import t5
from astraea_ports.wan import parts
from astraea_ports.wan.pipeline import Pipeline
from astraea_ports.wan.transformer_weights import load_transformer
from astraea_ports.wan.vae_weights import load_vae

# A load that is stood in for gives no module.
pytestmark = pytest.mark.usefixtures("as_a_user")

FILES = json.loads((FIXTURES / "wan/hub_files.json").read_text())
"""The files of models on the hub, by its name for them."""

CONTENT = json.loads((FIXTURES / "wan/configs.json").read_text())
CONTENT = CONTENT["runs"] | CONTENT["refused"]
"""What their JSON files hold."""

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIFFUSERS, ORIGINAL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B"
TRANSFORMER = "diffusion_pytorch_model"
INDEXES = ("model.safetensors.index.json", f"{TRANSFORMER}.safetensors.index.json")


class Hub:
    """As much of the hub as is asked for files: its filter, and what it would have sent."""

    def __init__(self, folder):
        self.folder, self.files, self.calls = folder / "snapshots" / COMMIT, dict(FILES), []

    def snapshot_download(self, name, *, revision=None, allow_patterns):
        self.calls.append((name, revision))
        for file in filter_repo_objects(self.files[name], allow_patterns=allow_patterns):
            path = self.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._content(name, file))
        return str(self.folder)

    def _content(self, name, file):
        content = CONTENT.get(name.split("/")[1], {}).get(file)
        if file.endswith(".safetensors.index.json"):
            stem = file.removesuffix(".safetensors.index.json")
            shards = [Path(each).name for each in self.files[name] if each.startswith(f"{stem}-")]
            content = {"weight_map": {str(i): shard for i, shard in enumerate(shards)}}
        if file.endswith("/tokenizer.json"):
            return (tiny.FOLDER / "tokenizer/tokenizer.json").read_bytes()
        return b"" if content is None else json.dumps(content).encode()

    def fetched(self):
        """The files that are here now."""
        return {
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file()
        }

    def weights(self):
        """Those of them that are not JSON."""
        return {name for name in self.fetched() if not name.endswith(".json")}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub; weights are taken for what they should be."""
    made = Hub(tmp_path / "models--owner--name")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(
        checkpoints,
        "open_checkpoint",
        lambda source, template, *_, deltas=None: converted.Converted(template, Path(source)),
    )
    return made


def shards(stem, count):
    return {f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}


TEXT = {f"text_encoder/{name}" for name in shards("model", 5)}
PICKLES = {"Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
WHOLE = {
    DIFFUSERS: (
        TEXT | shards(f"transformer/{TRANSFORMER}", 2) | {f"vae/{TRANSFORMER}.safetensors"}
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (
        TEXT | shards(f"transformer/{TRANSFORMER}", 12) | {f"vae/{TRANSFORMER}.safetensors"}
    ),
    ORIGINAL: PICKLES | {f"{TRANSFORMER}.safetensors"},
    "Wan-AI/Wan2.1-T2V-14B": PICKLES | shards(TRANSFORMER, 6),
}


@pytest.mark.parametrize("name", WHOLE)
def test_of_a_whole_model_its_parts_are_fetched_and_nothing_else(hub, name):
    opened = parts.open_parts(name)
    assert hub.weights() == WHOLE[name]
    folder = "tokenizer" if name.endswith("Diffusers") else "google/umt5-xxl"
    assert {Path(each).name for each in hub.fetched() if each.startswith(folder)} == TOKENIZER
    assert opened.large and main_dtype(opened.transformer.template) == "bfloat16"
    # All of one commit, whatever happens to the branch meanwhile.
    assert {revision for _, revision in hub.calls[1:]} == {COMMIT}


ALONE = {
    (DIFFUSERS, load_vae): {f"vae/{TRANSFORMER}.safetensors"},
    (DIFFUSERS, load_transformer): shards(f"transformer/{TRANSFORMER}", 2),
    (DIFFUSERS, t5.load_text_encoder): TEXT,
    (ORIGINAL, load_vae): {"Wan2.1_VAE.pth"},
    (ORIGINAL, load_transformer): {f"{TRANSFORMER}.safetensors"},
    (ORIGINAL, t5.load_text_encoder): {"models_t5_umt5-xxl-enc-bf16.pth"},
}


@pytest.mark.parametrize(("name", "load"), ALONE)
def test_of_a_part_its_own_files_are_fetched(hub, monkeypatch, name, load):
    monkeypatch.setattr(converted.Converted, "load", lambda self: self)
    load(name)
    assert hub.weights() == ALONE[name, load]
    assert not any(each.endswith("/tokenizer.json") for each in hub.fetched())


def test_of_copies_of_the_weights_one_is_fetched(hub, monkeypatch):
    monkeypatch.setattr(converted.Converted, "load", lambda self: self)
    hub.files[DIFFUSERS] = [
        *hub.files[DIFFUSERS],
        *(f"vae/{TRANSFORMER}.{kind}" for kind in ("bin", "fp16.bin", "fp16.safetensors", "gguf")),
        *(f"transformer/{name}" for name in shards(f"{TRANSFORMER}.fp16", 2)),
        f"transformer/{TRANSFORMER}.fp16.safetensors.index.json",
        f"transformer/{TRANSFORMER}.safetensors",
        *("model.safetensors", "pytorch_model.bin", "sample.mp4", "image.png", "data/all.json"),
    ]
    load_vae(DIFFUSERS)
    assert hub.weights() == {f"vae/{TRANSFORMER}.safetensors"}
    load_transformer(DIFFUSERS)
    found = {name for name in hub.weights() if name.startswith("transformer")}
    assert found == shards(f"transformer/{TRANSFORMER}", 2)
    assert "data/all.json" not in hub.fetched()


def test_a_safetensors_file_beside_an_originals_pickle_is_preferred(hub, monkeypatch):
    monkeypatch.setattr(converted.Converted, "load", lambda self: self)
    hub.files[ORIGINAL] = [*hub.files[ORIGINAL], "Wan2.1_VAE.safetensors"]
    load_vae(ORIGINAL)
    assert hub.weights() == {"Wan2.1_VAE.safetensors"}


OTHERS = {
    "Wan-AI/Wan2.1-I2V-14B-480P": "image-to-video",
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "image-to-video",
    "Wan-AI/Wan2.1-VACE-1.3B": "VACE",
    "Wan-AI/Wan2.1-VACE-1.3B-Diffusers": "VACE",
    "Wan-AI/Wan2.2-T2V-A14B": "two experts",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "two experts",
}


@pytest.mark.parametrize("name", OTHERS)
def test_of_a_model_that_does_not_run_here_no_weight_is_fetched(hub, name):
    with pytest.raises(Refusal, match=OTHERS[name]):
        parts.open_parts(name)
    assert hub.weights() == set()


def test_what_is_no_model_is_refused_by_its_files(hub):
    hub.files["owner/gguf"] = ["README.md", "wan-Q4.gguf", "vae.safetensors"]
    hub.folder.mkdir(parents=True)
    with pytest.raises(Refusal, match=r"model_index\.json"):
        parts.open_parts("owner/gguf")
    with pytest.raises(Refusal, match=r"config\.json"):
        load_vae("owner/gguf")
    assert hub.fetched() == set()


def test_an_index_can_not_ask_for_other_files(hub, monkeypatch):
    hub.files["owner/odd"] = [*FILES[ORIGINAL], INDEXES[1]]
    asking = json.dumps({"weight_map": {"a": "*", "b": "[A-Z]*.pth"}}).encode()
    monkeypatch.setattr(hub, "_content", lambda name, file: asking)
    checkpoints.find_model("owner/odd").fetch_weights("")
    assert hub.weights() == set()


def test_the_folder_of_a_whole_model(hub):
    assert checkpoints.model_folder(DIFFUSERS) == hub.folder
    assert hub.weights() == WHOLE[DIFFUSERS]


@pytest.mark.usefixtures("in_an_empty_folder")
def test_a_revision(hub, tmp_path, capsys):
    Pipeline.from_pretrained(DIFFUSERS, revision="refs/pr/1", staged=True)
    assert hub.calls[0] == (DIFFUSERS, "refs/pr/1")
    hub.calls.clear()
    ModelChoice(model=DIFFUSERS, revision="dev", staged=True).open()
    assert hub.calls[0] == (DIFFUSERS, "dev")
    with pytest.raises(Refusal, match=r"revision is of a model on the hub.*is a folder"):
        load_vae(tmp_path, revision="dev")
    options = ["--model", str(tmp_path), "--revision", "dev", "--no-compilation-cache"]
    line = refused(capsys, "generate", "a circle", *options)
    assert "is a folder: leave it out" in line


def failing(error, monkeypatch):
    def fetch(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(Refusal) as caught:
        Pipeline.from_pretrained("owner/model", revision="dev")
    return str(caught.value)


def hub_error(kind, text):
    error = kind.__new__(kind)  # a response is not at hand
    error.args = (text,)
    return error


HTTP = "404 Client Error. (Request ID: Root=1-abc)\n\nRepository Not Found for url: https://x."


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            hub_error(errors.GatedRepoError, HTTP),
            ["is gated", "accept its licence at https://hugg"],
        ),
        (hub_error(errors.GatedRepoError, HTTP), ["owner/model", "`hf auth login`"]),
        (hub_error(errors.RepositoryNotFoundError, HTTP), ["or it is private", "`hf auth login`"]),
        (hub_error(errors.RevisionNotFoundError, HTTP), ["no revision 'dev'", "tag or commit"]),
        (
            errors.LocalEntryNotFoundError("outgoing traffic has been\ndisabled. HF_HUB_OFFLINE=0"),
            ["can't be reached", "go online", "outgoing traffic has been disabled. HF_HUB_OFFLINE"],
        ),
        (hub_error(errors.HfHubHTTPError, "503 Server Error\nbusy"), ["503 Server Error busy"]),
        (ConnectionError("no route\nto host"), ["no route to host; check"]),
        (OSError(28, "No space left on device"), ["No space left on device"]),
        (RuntimeError(), ["RuntimeError; check the network"]),
    ],
)
def test_why_it_can_not_be_fetched_reaches_the_user(monkeypatch, error, words):
    said = failing(error, monkeypatch)
    assert all(word in said for word in ["can't fetch owner/model from the hub", *words]), said
    assert "\n" not in said


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
