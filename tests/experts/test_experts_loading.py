"""Every kind of saved mixture comes back, in a new process too, through one loader."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.decoding.tiny_decoder import save_decoder
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from bakeoff.errors import ModelError
from bakeoff.experts.bam import upcycle
from bakeoff.experts.conversion import save_moe, to_moe
from bakeoff.experts.loading import load_experts, load_mixture, stored_dtype
from bakeoff.experts.mixture_of_experts import moe_layers
from bakeoff.experts.read_me import (
    ReadMeForCausalLM,
    build_expert_masks,
    collect_channel_stats,
    moefy,
)
from bakeoff.experts.recurrent_router import convert_router
from bakeoff.models import load_language_model
from bakeoff.models.attention import sees_ahead

IDS = torch.arange(5, 15)[None]
KINDS = (
    "dense",
    "moe",
    "moe-recurrent",
    "moe-hash",
    "bam",
    "btx",
    "read-me",
    "read-me-packed",
    "recurrent",
    "mixtral",
    "olmoe",
)


def mixtral(vocabulary, kind=MixtralForCausalLM, config=MixtralConfig):
    torch.manual_seed(0)
    number = {"num_local_experts": 4} if config is MixtralConfig else {"num_experts": 4}
    return kind(
        config(
            vocab_size=vocabulary,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts_per_tok=2,
            pad_token_id=0,
            eos_token_id=1,
            initializer_range=0.2,
            **number,
        )
    )


def read_me(dense):
    data = {"a": torch.randint(5, 150, (2, 20)), "b": torch.randint(150, 300, (2, 20))}
    return moefy(dense, build_expert_masks(collect_channel_stats(dense, data)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder of all kinds, and the logits that each model gave before it was saved."""
    root = tmp_path_factory.mktemp("mixtures")
    save_decoder(root / "dense")
    tokenizer = AutoTokenizer.from_pretrained(root / "dense")
    vocabulary = len(tokenizer)

    def dense(noise=0.0):
        model = AutoModelForCausalLM.from_pretrained(root / "dense")
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise * torch.randn_like(parameter)
        return model

    made = {
        "dense": dense(),
        "moe": to_moe(dense(), 4, start="random"),
        "moe-recurrent": to_moe(dense(), 4, "recurrent", start="random"),
        "moe-hash": to_moe(dense(), 4, {"name": "hash", "vocabulary": vocabulary}, start="random"),
        "bam": upcycle([dense(), dense(0.05)]),
        "btx": upcycle([dense(), dense(0.05)], "btx"),
        "read-me": read_me(dense()),
        "read-me-packed": read_me(dense()).pack(),
        "recurrent": convert_router(mixtral(vocabulary), "recurrent", state_size=8),
        "mixtral": mixtral(vocabulary),
        "olmoe": mixtral(vocabulary, OlmoeForCausalLM, OlmoeConfig),
    }
    logits = {}
    for name, model in made.items():
        if name.startswith("moe"):
            save_moe(model, root / name)
        else:
            model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        with torch.no_grad():
            logits[name] = model.eval()(IDS).logits.numpy()
    return root, logits


SCRIPT = """
import sys, numpy, torch
from bakeoff.experts.loading import load_experts
found = {}
for name in sys.argv[2:]:
    model, tokenizer = load_experts(f"{sys.argv[1]}/{name}")
    assert not model.training and tokenizer.pad_token is not None
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        found[name] = model(ids).logits.numpy()
        grown = model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert grown.shape == (1, 12)
numpy.savez(f"{sys.argv[1]}/found.npz", **found)
"""


def test_every_kind_comes_back_in_a_new_process(folders):
    root, logits = folders
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root), *KINDS],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = np.load(root / "found.npz")
    assert set(found) == set(KINDS) == set(logits)
    for name in KINDS:
        np.testing.assert_allclose(found[name], logits[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["read-me", "read-me-packed", "bam"])
def test_registered_kinds_load_as_any_language_model(folders, kind):
    # A mixture around a decoder steers what is inside: probing that by itself failed, or saw a
    # dense model.
    loaded = load_language_model(folders[0] / kind)
    assert loaded.max_length == 1024
    assert not sees_ahead(loaded.model)


def test_a_router_that_looks_ahead_is_found_out(folders):
    model = ReadMeForCausalLM.from_pretrained(folders[0] / "read-me")
    assert not sees_ahead(model)
    look = model.router.forward

    def ahead(input_ids, attention_mask=None, cache=None):
        return look(input_ids.flip(1).cumsum(1).flip(1) % 300, attention_mask, cache)

    model.router.forward = ahead
    assert sees_ahead(model)


def test_rounded_weights_leave_routers_as_they_were(folders):
    for kind in ("moe", "bam", "read-me"):
        exact, _ = load_experts(folders[0] / kind)
        rounded, _ = load_experts(folders[0] / kind, dtype="bfloat16")
        assert rounded.dtype == torch.bfloat16
        exact, rounded = dict(exact.named_parameters()), dict(rounded.named_parameters())
        assert exact.keys() == rounded.keys()
        for name, parameter in rounded.items():
            if ".router." in name or name.startswith("router."):
                assert torch.equal(parameter, exact[name]), name
            else:
                assert parameter.dtype == torch.bfloat16, name


def test_stored_precision(folders, tmp_path):
    folder = shutil.copytree(folders[0] / "dense", tmp_path / "half")
    assert stored_dtype(folder) == "float32"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    assert stored_dtype(folder) == "bfloat16"
    assert load_experts(folder, dtype="stored")[0].dtype == torch.bfloat16
    to_moe(model, 4)
    save_moe(model, tmp_path / "moe")
    load_experts(folder)[1].save_pretrained(tmp_path / "moe")
    again, _ = load_experts(tmp_path / "moe", dtype="stored")
    assert next(iter(moe_layers(again).values())).experts.w_in.dtype == torch.bfloat16
    assert load_experts(tmp_path / "moe")[0].dtype == torch.float32


def test_the_fingerprint_knows_the_experts_settings(folders, tmp_path):
    folder = shutil.copytree(folders[0] / "moe", tmp_path / "moe")
    before = load_mixture(folder).fingerprint
    assert before == load_mixture(folders[0] / "moe").fingerprint
    settings = json.loads((folder / "moe.json").read_text())
    for layer in settings["layers"]:
        layer["settings"]["router"]["k"] = 1
    (folder / "moe.json").write_text(json.dumps(settings))
    assert load_mixture(folder).fingerprint != before


def without_router(folder):
    path = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if "recurrent_router." not in k}
    save_file(kept, path, metadata={"format": "pt"})


def without_experts(folder):
    path = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if not k.endswith("experts.w_in")}
    save_file(kept, path, metadata={"format": "pt"})


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


DAMAGES = {
    "no tokenizer": ("moe", without_tokenizer, "tokenizer in .* cannot be loaded"),
    "settings cut": ("moe", lambda f: (f / "moe.json").write_text("{"), "model in .* cannot"),
    "settings of tomorrow": (
        "moe",
        lambda f: (f / "moe.json").write_text('{"format": 9}'),
        "format 9",
    ),
    "experts gone": ("moe", without_experts, "model in .* cannot be loaded.*w_in"),
    "no weights": ("moe", lambda f: (f / "model.safetensors").unlink(), "no .safetensors"),
    "router gone": ("recurrent", without_router, "lacks the weights of its recurrent router"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_errors_of_one_line(folders, tmp_path, damage):
    kind, harm, message = DAMAGES[damage]
    folder = shutil.copytree(folders[0] / kind, tmp_path / "harmed")
    harm(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_experts(folder)
    assert "\n" not in str(caught.value)


def test_what_is_not_there():
    with pytest.raises(ModelError, match="unknown model 'nothing'"):
        load_experts("nothing")
    with pytest.raises(ModelError, match="no file or folder"):
        load_experts("./nothing", dtype="stored")


def test_unknown_devices_and_precisions_are_refused(folders):
    with pytest.raises(ModelError, match="device 'nowhere'"):
        load_experts(folders[0] / "moe", device="nowhere")
    with pytest.raises(ModelError, match="dtype must be one of"):
        load_experts(folders[0] / "moe", dtype="int8")


def test_loading_says_nothing(folders, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for kind in ("moe", "bam", "read-me", "recurrent"):
            load_experts(folders[0] / kind)
    assert capfd.readouterr() == ("", "")
