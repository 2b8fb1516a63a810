"""`bakeoff experts` as a user meets it, with tiny random models."""

from __future__ import annotations

import json
import math
import random
import re

import pytest
import torch
import typer
from tests.decoding.tiny_decoder import save_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

from bakeoff.cli.experts import experts_app
from bakeoff.cli.main import _Commands
from bakeoff.data.domain_texts import read_domains, split_domains
from bakeoff.experts.loading import load_experts

app = typer.Typer(cls=_Commands, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(experts_app, name="experts")

WORDS = {
    "words": ["one", "two", "three", "four", "the", "cat", "sat", "on"],
    "numbers": ["9", "24", "301", "7"],
}


def invoke(*arguments):
    return CliRunner().invoke(app, ["experts", *map(str, arguments)])


def done(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 3, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("dense", "other")):
        save_decoder(root / name, seed=number)
    tokenizer = AutoTokenizer.from_pretrained(root / "dense")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **shape, **heads)).save_pretrained(
        root / "mixtral"
    )
    tokenizer.save_pretrained(root / "mixtral")
    draw = random.Random(0)
    for name, words in WORDS.items():
        paragraphs = [" ".join(draw.choice(words) for _ in range(70)) for _ in range(30)]
        (root / f"{name}.txt").write_text("\n\n".join(paragraphs))
    return root


@pytest.fixture
def data(folder):
    return [part for name in WORDS for part in ("--data", f"{name}={folder / name}.txt")]


def beside(path):
    return sorted(found.name for found in path.parent.iterdir())


# inspect ------------------------------------------------------------------------------------------


def test_a_mixture_of_transformers_is_read_and_shown(folder, data, tmp_path):
    out = tmp_path / "deep" / "look"
    result = done("inspect", folder / "mixtral", *data, "--max-tokens", 150, "--out", out)
    for head in ("layer 0", "layer 1", "heaviest", "words", "numbers", str(out / "experts.html")):
        assert head in result.stdout
    found = json.loads((out / "experts.json").read_text())
    assert found["domains"] == list(WORDS)
    assert found["tokens"] == [150, 150]
    assert [sum(map(sum, layer["counts"])) for layer in found["layers"]] == [600, 600]
    html = (out / "experts.html").read_text()
    assert "MixtralForCausalLM" in html
    assert "<script" not in html
    assert beside(out / "x") == ["experts.html", "experts.json"]


def test_json_is_all_there_is_on_standard_output(folder, data):
    result = done("inspect", folder / "mixtral", *data, "--max-tokens", 50, "--json")
    found = json.loads(result.stdout)
    assert found["active_parameters"] < found["parameters"]
    assert len(found["redundancy"]) == 2
    assert "loading" in result.stderr


def test_no_cell_is_cut_on_a_narrow_terminal(folder, data, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    shown = done("inspect", folder / "mixtral", *data, "--max-tokens", 50).stdout
    assert "…" not in shown
    assert re.search(r"layer 0 +4 +\d\.\d\d +\d +\d\.\d\d +\d\.\d\d", shown)


def test_a_dense_model_is_told_how_to_become_a_mixture(folder, data):
    said = refused("inspect", folder / "dense", *data)
    assert f"bakeoff experts convert {folder / 'dense'} --experts 8 --out dense-moe" in said


def test_what_cannot_be_inspected(folder, data, tmp_path):
    (tmp_path / "file").touch()
    assert "is no folder" in refused("inspect", folder / "mixtral", "--out", tmp_path / "file")
    assert "cannot be read" in refused("inspect", folder / "mixtral", "--data", "a=nothing.txt")
    assert "unknown model" in refused("inspect", "nothing", *data)
    assert "NAME=PATH" in refused("inspect", folder / "mixtral", "--data", "=x")
    assert invoke("inspect", folder / "mixtral", *data, "--max-tokens", 0).exit_code == 2


# convert ------------------------------------------------------------------------------------------


def test_a_converted_model_computes_what_the_dense_one_did(folder, data, tmp_path):
    out = tmp_path / "moe"
    result = done("convert", folder / "dense", "--experts", 4, "--param", "k=3", "--out", out)
    assert "active per token" in result.stdout
    assert beside(out) == ["moe"]
    model, tokenizer = load_experts(out)
    ids = tokenizer("one two three", return_tensors="pt").input_ids
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    assert model.model.layers[0].mlp.router.k == 3
    shown = done("inspect", out, *data, "--max-tokens", 100)
    assert "equal" in shown.stdout  # the experts are copies


@pytest.mark.parametrize(
    ("arguments", "layers", "n_experts"),
    [
        (["--start", "split", "--experts", 4, "--every", 2], 2, 4),
        (["--granularity", 2, "--experts", 4, "--dense-first", 1, "--shared", 1], 3, 4),
        (["--start", "lora", "--rank", 2, "--experts", 3, "--aux", "none"], 4, 3),
        (["--router", "hash", "--experts", 3], 4, 3),
        (["--router", "recurrent", "--param", "state_size=8", "--experts", 3], 4, 3),
        (
            ["--capacity", 1.5, "--drop", "position", "--experts", 2, "--aux", "importance"],
            4,
            2,
        ),
    ],
)
def test_options_of_a_conversion(folder, data, tmp_path, arguments, layers, n_experts):
    out = tmp_path / "moe"
    result = done("convert", folder / "dense", *arguments, "--out", out, "--json")
    found = json.loads(result.stdout)
    seen = json.loads(done("inspect", out, *data, "--max-tokens", 60, "--json").stdout)
    assert len(seen["layers"]) == layers
    assert all(len(layer["counts"]) == n_experts for layer in seen["layers"])
    assert found["parameters"] == seen["parameters"]
    if "--shared" in arguments:
        assert json.loads((out / "moe.json").read_text())["layers"][0]["settings"]["shared"]
    if "importance" in arguments:
        settings = json.loads((out / "moe.json").read_text())["layers"][0]["settings"]
        assert [loss["name"] for loss in settings["aux"]] == ["importance"]
        assert (settings["capacity"], settings["drop"]) == ([1.5, 1.5], "position")


def test_impossible_conversions_leave_nothing(folder, tmp_path):
    out = tmp_path / "moe"
    for arguments, message in (
        (["--router", "nothing"], "unknown router 'nothing'; there are: .*top-k"),
        (["--param", "nothing=1"], "it accepts: k, "),
        (["--router", "expert-choice"], "looks at later tokens"),
        (["--aux", "nothing"], "unknown loss 'nothing'; there are:"),
        (["--experts", 0], "at least 1"),
        (["--every", 9], "no layer of 4"),
        (["--start", "split", "--experts", 7], "7 parts do not divide"),
        (["--start", "lora", "--shared", 1], "--shared does not go with"),
    ):
        assert re.search(message, refused("convert", folder / "dense", *arguments, "--out", out))
    assert "is a mixture of experts already" in refused("convert", folder / "mixtral", "--out", out)
    assert list(tmp_path.iterdir()) == []
    wrong = invoke("convert", folder / "dense", "--param", "k", "--out", out)
    assert wrong.exit_code == 2
    assert "NAME=VALUE" in wrong.output


def test_a_folder_that_holds_something_is_not_written(folder, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    done("convert", folder / "dense", "--experts", 2, "--out", out)  # an empty one may be there
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "not empty" in refused("convert", folder / "dense", "--out", out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (tmp_path / "file").touch()
    assert "is no folder" in refused("convert", folder / "dense", "--out", tmp_path / "file")
    assert "cannot be written" in refused(
        "convert", folder / "dense", "--out", tmp_path / "file" / "moe"
    )


# upcycle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--share-kv"], ["--method", "btx", "--ffn-top-k", 2]])
def test_copies_become_one_mixture(folder, data, tmp_path, arguments):
    out = tmp_path / "mixture"
    given = [folder / "dense", folder / "other"]
    found = json.loads(done("upcycle", *given, *arguments, "--out", out, "--json").stdout)
    model, tokenizer = load_experts(out)
    assert type(model).__name__ == "UpcycledForCausalLM"
    assert len(tokenizer) == 300
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert model.config.share_kv == ("--share-kv" in arguments)
    assert model.config.ffn_top_k == (2 if "btx" in arguments else 1)
    seen = json.loads(done("inspect", out, *data, "--max-tokens", 60, "--json").stdout)
    assert len(seen["layers"]) == (4 if "btx" in arguments else 8)
    assert seen["active_parameters"] == found["active_parameters"]


def test_what_cannot_be_upcycled(folder, tmp_path):
    out = tmp_path / "mixture"
    one = refused("upcycle", folder / "dense", "--out", out)
    assert "at least 2 models" in one
    assert "bakeoff experts convert" in one
    mixed = refused("upcycle", folder / "dense", folder / "mixtral", "--out", out)
    assert "mixture of experts already" in mixed
    done("convert", folder / "dense", "--out", tmp_path / "moe")
    assert "already" in refused("upcycle", folder / "dense", tmp_path / "moe", "--out", out)
    narrow = AutoModelForCausalLM.from_pretrained(folder / "dense")
    narrow.config.rms_norm_eps = 0.5
    narrow.save_pretrained(tmp_path / "narrow")
    AutoTokenizer.from_pretrained(folder / "dense").save_pretrained(tmp_path / "narrow")
    differ = refused("upcycle", folder / "dense", tmp_path / "narrow", "--out", out)
    assert f"the configuration of {tmp_path / 'narrow'} has rms_norm_eps = 0.5" in differ
    assert not out.exists()
    too_many = refused(
        "upcycle", folder / "dense", folder / "other", "--ffn-top-k", 3, "--out", out
    )
    assert "ffn_top_k must be between 1" in too_many


def test_equal_models_are_remarked_upon(folder, tmp_path):
    result = done("upcycle", folder / "dense", folder / "dense", "--out", tmp_path / "mixture")
    assert "all 2 models are equal" in result.stderr


def test_what_is_printed_trains_the_mixture(folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = {"mixture": done("upcycle", folder / "dense", folder / "other", "--out", "mixture")}
    made["moe"] = done("convert", folder / "dense", "--router", "loss-free", "--out", "moe")
    sources = [f"{name}={folder / name}.txt" for name in WORDS]
    for name, result in made.items():
        readme = (tmp_path / name / "README.md").read_text()
        code = readme.split("```python\n")[1].split("```")[0]
        assert all(line in result.stdout for line in code.splitlines())
        code = code.replace('["code=src", "docs=docs"]', repr(sources))
        code = code.replace("steps=1000", "steps=2").replace("found, 256", "found, 32")
        exec(compile(code, readme, "exec"), {})
        before, after = load_experts(name)[0], load_experts(f"{name}-trained")[0]
        weights = dict(after.named_parameters())
        assert any(not torch.equal(p, weights[key]) for key, p in before.named_parameters())


# refactor -----------------------------------------------------------------------------------------

QUICK = ["--router-steps", 15, "--expert-steps", 15, "--sequence-length", 32, "--batch-size", 4]


def judged(model, tokenizer, documents):
    """Return the perplexity, one document at a time with transformers' own loss."""
    total, n_tokens = 0.0, 0
    for text in documents:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :32]
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        n_tokens += ids.shape[1] - 1
    return math.exp(total / n_tokens)


def test_a_dense_model_is_refactored(folder, data, tmp_path):
    out = tmp_path / "read-me"
    arguments = ["refactor", folder / "dense", *data, *QUICK, "--rounds", 2, "--out", out]
    result = done(*arguments)
    assert "perplexity before" in result.stdout
    assert re.search(r"words +\d+\.\d\d +\d+\.\d\d +words: ", result.stdout)
    assert "| words |" in (out / "README.md").read_text()
    model, tokenizer = load_experts(out)
    assert model.domains == ("words", "numbers")

    again = json.loads(done(*arguments[:-1], tmp_path / "again", "--json").stdout)
    weights = dict(load_experts(tmp_path / "again")[0].named_parameters())
    assert all(torch.equal(p, weights[key]) for key, p in model.named_parameters())

    dense, _ = load_experts(folder / "dense")
    texts, _ = read_domains([f"{name}={folder / name}.txt" for name in WORDS])
    held_out = split_domains(texts).held_out
    for name, facts in again["domains"].items():
        for key, one in (("perplexity_before", dense), ("perplexity_after", model)):
            assert facts[key] == pytest.approx(judged(one, tokenizer, held_out[name]), rel=1e-4)
        chosen = [
            model.route(tokenizer(text, return_tensors="pt").input_ids[:, :32]).counts()
            for text in held_out[name]
        ]
        shares = sum(chosen) / sum(chosen).sum()
        assert list(facts["experts"].values()) == pytest.approx(shares.tolist())
    seen = json.loads(done("inspect", out, *data, "--max-tokens", 60, "--json").stdout)
    assert seen["domains"] == list(WORDS)


def test_training_the_experts_pays(folder, data, tmp_path):
    after = []
    for steps in (0, 60):
        arguments = ["--expert-steps", steps, "--router-steps", 3, "--sequence-length", 32]
        arguments += ["--out", tmp_path / str(steps), "--json"]
        found = json.loads(done("refactor", folder / "dense", *data, *arguments).stdout)
        after.append([facts["perplexity_after"] for facts in found["domains"].values()])
    assert all(trained < cut for cut, trained in zip(*after, strict=True))


def test_what_cannot_be_refactored(folder, data, tmp_path):
    out = tmp_path / "read-me"
    dense = folder / "dense"
    assert "give --data NAME=FILE" in refused("refactor", dense, "--out", out)
    assert "at least 2" in refused("refactor", dense, *data[:2], "--out", out)
    absent = refused("refactor", dense, *data[:2], "--data", "b=nothing", "--out", out)
    assert "nothing" in absent
    assert "--keep must be" in refused("refactor", dense, *data, "--keep", 0, "--out", out)
    assert "mixture of experts already" in refused(
        "refactor", folder / "mixtral", *data, "--out", out
    )
    (tmp_path / "short.txt").write_text("one two\n\nthree four")
    short = ["--data", f"short={tmp_path / 'short.txt'}"]
    assert "domain 'short'" in refused("refactor", dense, *data[:2], *short, "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize("value", [float("nan"), 1e4])
def test_a_model_whose_losses_are_no_numbers_is_not_written(folder, data, tmp_path, value):
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    with torch.no_grad():
        model.lm_head.weight.mul_(value)
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(folder / "dense").save_pretrained(tmp_path / "broken")
    out = tmp_path / "read-me"
    said = refused("refactor", tmp_path / "broken", *data, *QUICK, "--out", out)
    assert "judging the dense model: its loss on words is" in said
    assert not out.exists()


@pytest.mark.parametrize("moment", ["tuning", "writing"])
def test_an_interruption_leaves_nothing_behind(folder, data, tmp_path, monkeypatch, moment):
    from bakeoff.experts import read_me

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if moment == "tuning":
        monkeypatch.setattr(read_me, "tune_experts", interrupted)
    else:
        monkeypatch.setattr(read_me.ReadMeForCausalLM, "save_pretrained", interrupted)
    out = tmp_path / "read-me"
    result = invoke("refactor", folder / "dense", *data, *QUICK, "--out", out)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(folder, tmp_path, monkeypatch):
    from bakeoff.experts import conversion

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "save_moe", full)
    out = tmp_path / "moe"
    assert "No space left" in refused("convert", folder / "dense", "--out", out)
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_commands_at_once():
    import subprocess
    import sys

    code = (
        "import sys, bakeoff.cli.experts\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich.table'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    shown = done("--help").stdout
    for command in ("inspect", "convert", "upcycle", "refactor"):
        assert command in shown
        assert "Example: bakeoff experts" in done(command, "--help").stdout
