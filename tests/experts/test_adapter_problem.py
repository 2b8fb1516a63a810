"""Adapters at one budget: counted, trained, judged and handed over as PEFT alone would do it."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tests.decoding.tiny_decoder import save_decoder
from tests.experts.test_mixture_of_shards import ARMS, same_as_lora
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from bakeoff._files import folder_name
from bakeoff.data.domain_texts import DomainTexts
from bakeoff.errors import BakeoffError, DataError
from bakeoff.experts.causal_training import domain_batches, train_causal
from bakeoff.experts.problem import adapters
from bakeoff.experts.problem.adapters import (
    ADAPTER_METRICS,
    AdapterProblem,
    adapter_designs,
)
from bakeoff.models.small_gpt import SmallGPT
from bakeoff.study import Design, Study, Work

CONTEXT, BATCH, STEPS = 16, 2, 4
BUDGET = {"context": CONTEXT, "batch_size": BATCH, "n_tokens": CONTEXT * BATCH * STEPS}
DESIGNS = {design.name: design for design in adapter_designs()}
SMALL = SmallGPT(vocabulary=300, n_layers=4, width=16, n_heads=2, context=CONTEXT)
# One block of the tiny Llama: inputs and outputs of q, k, v, o, gate, up and down.
BLOCK = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
ONE_LORA = 4 * 2 * sum(n_in + n_out for n_in, n_out in BLOCK)
OUTPUTS = 4 * sum(n_out for _, n_out in BLOCK)


def texts(n_domains=2, held_out=3):
    words = {
        "numbers": ["one two three four", "four three two one two", "three one four one"],
        "pets": ["the cat sat on a mat", "a cat sat", "the mat sat on the cat"],
        "talk": ["yes no maybe", "maybe yes yes", "no no 2024 maybe"],
    }
    chosen = list(words)[:n_domains]
    return DomainTexts(
        "tiny",
        {name: tuple(f"{text} {text}" for text in words[name] * 12) for name in chosen},
        {name: tuple(f"{text} {words[name][0]}" for text in words[name][:held_out]) * 1
         for name in chosen},
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A tiny Llama and a tiny GPT-2, and a cache of this module's own."""
    made = tmp_path_factory.mktemp("adapters")
    save_decoder(made / "llama")
    tokenizer = AutoTokenizer.from_pretrained(made / "llama")
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
    end = tokenizer.eos_token_id
    config = GPT2Config(vocab_size=len(tokenizer), eos_token_id=end, bos_token_id=end, **shape)
    GPT2LMHeadModel(config).save_pretrained(made / "gpt2")
    tokenizer.save_pretrained(made / "gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAKEOFF_CACHE", str(made / "cache"))
        yield made


def problem(folder, base="llama", n_domains=2, **options):
    given = {"search_share": 0, "learning_rate": 1e-2, **BUDGET, **options}
    return AdapterProblem(texts(n_domains), base=str(folder / base), **given)


def run(problem, design, tmp_path, seed=0):
    design = DESIGNS[design] if isinstance(design, str) else design
    directory = tmp_path / f"{folder_name(design.name, [design.name])}-{seed}"
    directory.mkdir(parents=True)
    return problem.run(design, seed, Work(directory))


def same(first, second):
    assert first.keys() == second.keys()
    for metric, tasks in first.items():
        for task, values in tasks.items():
            assert values.tolist() == second[metric][task].tolist(), (metric, task)


def plain_losses(model, tokenizer, documents):
    """The loss of each document after an end token, one at a time, by transformers alone."""
    found = []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False).input_ids[: CONTEXT - 1]
        ids = torch.tensor([[tokenizer.eos_token_id, *ids]])
        with torch.no_grad():
            found.append(float(model(input_ids=ids, labels=ids).loss))
    return found


# --- how many parameters -----------------------------------------------------------------------


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("name", DESIGNS)
def test_counted_parameters_are_those_that_peft_trains(folder, base, name):
    asked, design = problem(folder, base), DESIGNS[name]
    model = AutoModelForCausalLM.from_pretrained(folder / base)
    if design.method == "none":
        assert asked.trained_parameters(design) == 0
        return
    if design.method != "full":
        model = get_peft_model(model, asked.config(design))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert asked.trained_parameters(design) == trained
    over = design.params.get("over_budget", False)
    assert (trained > asked.budget) == over
    asked.check(design)


def test_counts_in_closed_form(folder):
    asked = problem(folder)
    found = {name: asked.trained_parameters(design) for name, design in DESIGNS.items()}
    assert asked.budget == ONE_LORA == 3712
    exactly = ["LoRA", "rsLoRA", "pure sharing", "PRoLoRA", "subset selection alone"]
    exactly += [name for name in DESIGNS if name.startswith("MoS")]
    assert {name: found[name] for name in exactly} == dict.fromkeys(exactly, ONE_LORA)
    assert found["LoRA, 8 times the rank"] == 8 * ONE_LORA
    assert found["DoRA"] == ONE_LORA // 2 + OUTPUTS
    # 28 layers, each with a vector of the rank: one rank more would not fit.
    rank = asked.config(DESIGNS["VeRA"]).r
    assert found["VeRA"] == OUTPUTS + 28 * rank <= ONE_LORA < OUTPUTS + 28 * (rank + 1)
    # A pair for each of 7 kinds, and in each of 4 blocks a scale per rank and per output.
    rank = asked.config(DESIGNS["Tied-LoRA"]).r
    per_rank = ONE_LORA // 8 + 28
    assert found["Tied-LoRA"] == OUTPUTS + rank * per_rank <= ONE_LORA
    assert OUTPUTS + (rank + 1) * per_rank > ONE_LORA


def test_fewer_layers_have_fewer_parameters(folder):
    assert problem(folder, n_layers=2).budget == ONE_LORA // 2
    full = DESIGNS["full fine-tuning"]
    gone = problem(folder).trained_parameters(full) - problem(
        folder, n_layers=2
    ).trained_parameters(full)
    assert gone == 2 * (sum(n_in * n_out for n_in, n_out in BLOCK) + 2 * 32)


def test_ablations_are_the_components_own(folder, tmp_path):
    """Names here and the arms that the component's tests compare with PEFT are the same things."""
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    layers = [copy.deepcopy(layer) for layer in model.model.layers for _ in range(2)]
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = 8
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(tmp_path)
    asked = problem(tmp_path, ".")
    pairs = {
        "MoS": "mos",
        "MoS without privatisation": "without privatisation",
        "MoS without dissociation": "without dissociation",
        "MoS without sharding": "without sharding",
        "subset selection alone": "subset selection alone",
        "pure sharing": "pure sharing",
        "PRoLoRA": "prolora",
    }
    fields = ("r", "equivalent_rank", "private_rank", "shards_per_vector", "selection")
    for ours, theirs in pairs.items():
        config = asked.config(DESIGNS[ours])
        for field in (*fields, "pair_dissociation", "lora_alpha", "trained_scaling"):
            assert getattr(config, field) == getattr(ARMS[theirs], field), (ours, field)
    without = asked.config(DESIGNS["MoS without subset selection"])
    assert (without.selection, without.private_rank, without.shards_per_vector) == ("all", 1, 4)
    assert problem(folder).config(DESIGNS["MoS"]).r == 5  # 4 blocks have not 7 public vectors each


# --- what is trained and judged ------------------------------------------------------------------


def test_unadapted_losses_are_the_bases_own(folder, tmp_path):
    asked = problem(folder)
    trial = run(asked, "not adapted", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    for domain, documents in asked.texts.held_out.items():
        want = plain_losses(model, tokenizer, documents)
        assert trial.scores["loss"][domain].tolist() == pytest.approx(want, abs=1e-5)
        assert trial.scores["forgetting"][domain].tolist() == [0.0] * 3
    assert trial.artifact is None
    assert trial.cost["trained_parameters"] == trial.cost["training_tokens"] == 0


def test_a_mixture_of_private_shards_is_lora_trained_by_peft(folder, tmp_path):
    """With e = r = p nothing is shared: from one start, losses are those of PEFT's LoRA."""
    asked = problem(folder, n_domains=1)
    design = Design("private", "mos", {"r": 2, "private_rank": 2, "shards_per_vector": 1})
    trial = run(asked, design, tmp_path, seed=3)

    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    start = get_peft_model(base, asked.config(design, 3))
    lora = same_as_lora(start, lora_dropout=0.0, r=2)
    rows = asked.rows()["numbers"]
    aside = max(1, len(rows) // 10)
    train_causal(
        lora,
        domain_batches({"numbers": rows[:-aside]}, batch_size=BATCH, seed=3),
        steps=STEPS,
        peak_learning_rate=1e-2,
        weight_decay=0.0,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    documents = asked.texts.held_out["numbers"]
    want = plain_losses(lora, tokenizer, documents)
    assert trial.scores["loss"]["numbers"].tolist() == pytest.approx(want, abs=1e-5)
    before = plain_losses(lora.unload(), tokenizer, documents)
    assert max(abs(a - b) for a, b in zip(want, before, strict=True)) > 1e-3  # it did learn


def test_every_design_learns_and_is_a_matter_of_seed_alone(folder, tmp_path):
    asked = problem(folder, targets=["pets"])
    before = run(asked, "not adapted", tmp_path).scores["loss"]["pets"].mean()
    first = {}
    for name in list(DESIGNS)[1:]:
        trial = run(asked, name, tmp_path / "first")
        assert trial.scores["loss"]["pets"].mean() != before
        assert trial.scores["loss"].keys() == {"pets"}
        assert trial.scores["forgetting"]["pets"].shape == (3,)
        assert trial.cost["trained_parameters"] == asked.trained_parameters(DESIGNS[name])
        assert trial.cost["training_tokens"] == CONTEXT * BATCH * STEPS
        assert trial.cost["adapter_bytes"] > 4 * trial.cost["trained_parameters"]
        assert trial.cost["seconds_per_step"] > 0
        first[name] = trial.scores
    again = pickle.loads(pickle.dumps(asked))
    torch.manual_seed(99)  # the caller's generator is nobody's business
    for name in ("full fine-tuning", "MoS", "Tied-LoRA", "VeRA", "DoRA", "LoRA"):  # other order
        same(first[name], run(again, name, tmp_path / "again").scores)
    for name in ("LoRA", "MoS"):
        other = run(asked, name, tmp_path / "other", seed=1).scores
        assert other["loss"]["pets"].tolist() != first[name]["loss"]["pets"].tolist()


def test_dropout_does_not_depend_on_what_ran_before(folder, tmp_path):
    asked = problem(folder, n_domains=1)
    design = Design("with dropout", "lora", {"dropout": 0.5})
    first = run(asked, design, tmp_path / "a")
    torch.rand(5)
    same(first.scores, run(asked, design, tmp_path / "b").scores)
    without = run(asked, "LoRA", tmp_path / "c")
    assert first.scores["loss"]["numbers"].tolist() != without.scores["loss"]["numbers"].tolist()


def test_what_a_design_says_is_what_is_trained(folder, tmp_path):
    asked = problem(folder, n_domains=1)
    plain = run(asked, "LoRA", tmp_path).scores["loss"]["numbers"]
    for number, params in enumerate(({"alpha": 32}, {"learning_rate": 1e-3}, {"rank": 1})):
        other = run(asked, Design(f"other {number}", "lora", params), tmp_path)
        assert other.scores["loss"]["numbers"].tolist() != plain.tolist()
    stabilised = {"alpha": 16 * 2**-0.5 * 2**0.5}  # rank 2: alpha / sqrt(2) is alpha * sqrt(2) / 2
    as_lora = Design("as rsLoRA", "lora", {"alpha": 16 * 2**0.5})
    design = Design("rs", "rslora", stabilised)
    want = run(asked, design, tmp_path).scores["loss"]["numbers"].tolist()
    assert run(asked, as_lora, tmp_path).scores["loss"]["numbers"].tolist() == pytest.approx(want)


# --- a decoder trained beforehand ----------------------------------------------------------------


def small(**options):
    given = {"shape": SMALL, "search_share": 0, "base_tokens": 8 * CONTEXT * 40, **BUDGET}
    return AdapterProblem(texts(3), **{**given, **options})


@pytest.mark.parametrize("base", ["small-gpt", "small-parallel"])
def test_a_small_decoder_knows_the_others_and_learns_the_target(base, tmp_path):
    asked = small(base=base, known_share=0.0, targets=["pets"], n_tokens=CONTEXT * BATCH * 40)
    asked.prepare(list(DESIGNS.values()), [0], Work(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(asked._pretrained("pets"))
    tokenizer = AutoTokenizer.from_pretrained(asked._pretrained("pets"))
    held_out = asked.texts.held_out
    means = {d: sum(plain_losses(model, tokenizer, held_out[d])) / 3 for d in held_out}
    assert means["pets"] > max(means["numbers"], means["talk"]) + 1
    # The words of the target were never read: low-rank updates of frozen layers help little.
    adapted = run(asked, "LoRA", tmp_path).scores["loss"]["pets"].mean()
    trial = run(asked, "full fine-tuning", tmp_path)
    tuned = trial.scores["loss"]["pets"].mean()
    assert tuned + 0.3 < adapted < means["pets"] - 0.02
    assert trial.scores["forgetting"]["pets"].shape == (6,)
    assert trial.scores["forgetting"]["pets"].mean() > 0


def test_each_target_has_a_decoder_of_its_own_made_once(monkeypatch):
    asked = small()
    folders = {domain: asked._pretrained(domain) for domain in asked.targets}
    assert len(set(folders.values())) == 3
    monkeypatch.setattr("bakeoff.experts.causal_training.train_causal", None)
    assert small(n_tokens=64)._pretrained("pets") == folders["pets"]
    for different in ({"base_tokens": 2000}, {"known_share": 0.5}):
        with pytest.raises(TypeError):  # it is to be trained anew
            small(**different)._pretrained("pets")


def test_a_share_of_the_target_is_known_beforehand():
    known = {}
    for share in (0.0, 0.5):
        asked = small(known_share=share, targets=["pets"])
        known[share] = asked._losses_before("pets")["pets"].mean()
    assert known[0.5] < known[0.0] - 0.5


# --- learning rates ------------------------------------------------------------------------------


def test_runs_that_diverged_are_counted_and_edges_are_told(folder, tmp_path, monkeypatch):
    asked = problem(folder, targets=["pets"], search_share=0.5, learning_rate=2e-2)
    tried = {2e-2: 1.0, 6e-2: float("inf"), 2e-2 / 3: 1.5}
    monkeypatch.setattr(adapters, "search_rate", lambda *_, **__: tried)
    trial = run(asked, "LoRA", tmp_path)
    assert trial.cost["search_tokens"] == 3 * 2 * BATCH * CONTEXT
    assert trial.notes == ("Learning rate for pets: 0.02, the best of 3.",)
    steps = {2e-2 / 3**k: 1.0 - k / 10 for k in range(5)}
    monkeypatch.setattr(adapters, "search_rate", lambda *_, **__: steps)
    trial = run(asked, "rsLoRA", tmp_path)
    assert "the best of 5 and the last that was to be tried" in trial.notes[0]


def test_each_design_gets_its_rate_once_and_seeds_share_it(folder, tmp_path, monkeypatch):
    asked = problem(folder, search_share=0.5, learning_rate=3e-2, n_tokens=CONTEXT * BATCH * 6)
    trial = run(asked, "LoRA", tmp_path)
    rates = asked._rates(DESIGNS["LoRA"], "pets", lambda *_: None, 0.0)
    best = min(rates, key=rates.get)
    assert f"Learning rate for pets: {best:.3g}, the best of {len(rates)}." in trial.notes
    n_tried = sum(len(asked._rates(DESIGNS["LoRA"], d, None, 0.0)) for d in asked.targets)
    assert trial.cost["search_tokens"] == n_tried * 3 * BATCH * CONTEXT
    fixed = Design("fixed", "lora", {"learning_rate": best})
    assert run(asked, fixed, tmp_path).scores["loss"]["pets"].tolist() == (
        trial.scores["loss"]["pets"].tolist()
    )
    monkeypatch.setattr(adapters, "search_rate", None)  # not called any more
    assert run(asked, "LoRA", tmp_path, seed=1).cost["search_tokens"] == trial.cost["search_tokens"]


def test_held_out_documents_take_no_part_in_the_search(folder):
    found = []
    for held_out in (2, 3):
        other = AdapterProblem(
            texts(2, held_out), base=str(folder / "llama"), **BUDGET, learning_rate=1e-2
        )
        found.append(other._rates(DESIGNS["MoS"], "pets", lambda *_: None, 0.0))
    assert found[0] == found[1]


def test_nothing_trains_on_what_rates_are_chosen_by(folder):
    asked = problem(folder)
    rows = asked.rows()["pets"]
    trained, aside = asked._parts("pets")
    assert torch.equal(torch.cat([trained, aside]), rows)
    assert len(aside) == len(rows) // 10 > 0


@pytest.mark.filterwarnings("ignore")
def test_training_that_diverges_says_so(folder, tmp_path):
    asked = problem(folder, search_share=1, learning_rate=1e30)
    with pytest.raises(BakeoffError, match=r"'full fine-tuning': .* diverged"):
        run(asked, "full fine-tuning", tmp_path)
    with pytest.raises(BakeoffError, match=r"'full fine-tuning': .*diverged"):
        run(problem(folder, learning_rate=1e30), "full fine-tuning", tmp_path / "b")


# --- the winner ----------------------------------------------------------------------------------

ALONE = """
import json, sys
class NoBakeoff:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "bakeoff":
            raise ImportError("no bakeoff here")
sys.meta_path.insert(0, NoBakeoff())
"""
JUDGE = """
import torch
end, losses = tokenizer.eos_token_id, []
for document in json.loads(sys.argv[1]):
    ids = tokenizer(document, add_special_tokens=False).input_ids[:15]
    ids = torch.tensor([[end, *ids]])
    with torch.no_grad():
        losses.append(float(model(input_ids=ids, labels=ids).loss))
print("\\n" + json.dumps(losses))
"""


def judged_elsewhere(lines, documents, *, alone=True):
    """Run lines that load a model in a new process; return the documents' losses there."""
    code = (ALONE if alone else "import json, sys\n") + "\n".join(lines) + JUDGE
    command = [sys.executable, "-c", code, json.dumps(list(documents))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["LoRA", "MoS", "full fine-tuning"])
def test_the_winner_loads_without_bakeoff_and_does_the_same(folder, tmp_path, name):
    asked = problem(folder)
    trial = run(asked, name, tmp_path)
    destination = tmp_path / "winner"
    assert asked.export(DESIGNS[name], trial.artifact, destination, reason="It won.")
    want = trial.scores["loss"]["numbers"].tolist()
    documents = asked.texts.held_out["numbers"]
    usage = asked.usage(destination)
    assert judged_elsewhere(usage, documents) == pytest.approx(want, abs=1e-5)
    readme = (destination / "README.md").read_text()
    assert "It won." in readme
    assert "\n".join(usage) in readme
    assert ("shards" in readme) == (name == "MoS")
    assert {"numbers", "pets", "README.md"} == {path.name for path in destination.iterdir()}
    assert not list(destination.rglob("*.bin"))


def test_the_pools_load_as_the_readme_says(folder, tmp_path):
    asked = problem(folder, targets=["pets"])
    trial = run(asked, "MoS", tmp_path)
    asked.export(DESIGNS["MoS"], trial.artifact, tmp_path / "winner")
    blocks = (tmp_path / "winner" / "README.md").read_text().split("```python\n")[1:]
    plain, pools = (block.split("```")[0].splitlines() for block in blocks)
    lines = [line for line in plain if "PeftModel.from" not in line]
    at = next(n for n, line in enumerate(lines) if line.startswith("model = Auto")) + 1
    documents = asked.texts.held_out["pets"]
    found = judged_elsewhere([*lines[:at], *pools], documents, alone=False)
    assert found == pytest.approx(trial.scores["loss"]["pets"].tolist(), abs=1e-5)
    with pytest.raises(AssertionError, match="KeyError: 'MIXTURE_OF_SHARDS'"):
        judged_elsewhere([*lines[:at], pools[1]], documents)


def test_another_winner_takes_the_place_of_the_first(folder, tmp_path):
    asked = problem(folder, n_layers=3)
    destination = tmp_path / "winner"
    for name in ("MoS", "LoRA", "full fine-tuning"):
        trial = run(asked, name, tmp_path)
        asked.export(DESIGNS[name], trial.artifact, destination)
        found = {path.name for path in destination.rglob("*")}
        assert ("shards" in found) == (name == "MoS")
        assert ("adapter_config.json" in found) == ("base" in found) == (name != "full fine-tuning")
    want = trial.scores["loss"]["numbers"].tolist()
    documents = asked.texts.held_out["numbers"]
    assert judged_elsewhere(asked.usage(destination), documents) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("name", ["DoRA", "VeRA", "Tied-LoRA"])
def test_other_winners_are_whole(folder, tmp_path, name):
    from peft import PeftModel

    asked = problem(folder, n_layers=3)
    trial = run(asked, name, tmp_path)
    destination = tmp_path / "winner"
    asked.export(DESIGNS[name], trial.artifact, destination)
    base = AutoModelForCausalLM.from_pretrained(destination / "base")
    tokenizer = AutoTokenizer.from_pretrained(destination / "base")
    assert base.config.num_hidden_layers == 3
    model = PeftModel.from_pretrained(base, destination / "pets").eval()
    found = plain_losses(model, tokenizer, asked.texts.held_out["pets"])
    assert found == pytest.approx(trial.scores["loss"]["pets"].tolist(), abs=1e-5)


def test_a_small_decoder_leaves_with_its_adapter(tmp_path):
    asked = small(targets=["talk"])
    trial = run(asked, "PRoLoRA", tmp_path)
    destination = tmp_path / "winner"
    asked.export(DESIGNS["PRoLoRA"], trial.artifact, destination)
    found = judged_elsewhere(asked.usage(destination), asked.texts.held_out["talk"])
    assert found == pytest.approx(trial.scores["loss"]["talk"].tolist(), abs=1e-5)
    settings = json.loads((destination / "talk" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(destination / "talk" / "base")


@given(st.lists(st.text(max_size=8), min_size=1, max_size=5, unique=True))
def test_folders_of_domains_are_distinct_and_safe(domains):
    names = [folder_name(domain, domains) for domain in domains]
    assert len(set(names)) == len(domains)
    for name in names:
        assert name not in ("", ".", "..", "base", "README.md")
        assert "/" not in name
        assert "\\" not in name
        assert "\0" not in name


# --- a study, and what is refused ----------------------------------------------------------------


def test_a_study_runs_and_describes_itself(folder, tmp_path):
    asked = problem(folder)
    names = ["LoRA", "MoS", "not adapted"]
    designs = [DESIGNS[name] for name in names]
    study = Study(asked, designs, reference="LoRA", seeds=2, directory=tmp_path / "study")
    results = study.run()
    assert not results.data["failures"]
    assert set(results.unit_scores) == set(ADAPTER_METRICS)
    facts = results.data["problem"]["description"]
    assert "3,712 trained parameters" in facts["budget"]
    assert any("LoRA of rank 2 on all 28 linear layers" in note for note in facts["notes"])
    assert json.dumps(facts)


def test_one_domain_has_nothing_to_forget(folder):
    assert list(problem(folder, n_domains=1).metrics) == ["loss"]
    assert list(problem(folder).metrics) == ["loss", "forgetting"]


def test_the_fingerprint_follows_what_scores_depend_on(folder):
    same_ = problem(folder).fingerprint()
    assert problem(folder).fingerprint() == same_
    changes = (
        *({"rank": 1}, {"targets": ["pets"]}, {"search_share": 1.0}, {"n_layers": 2}),
        *({"n_tokens": 64}, {"learning_rate": 1e-3}, {"base": "gpt2"}),
    )
    for change in changes:
        assert problem(folder, **change).fingerprint() != same_, change
    first = small().fingerprint()
    assert small(base_tokens=999).fingerprint() != first != small(known_share=0.1).fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": 1.5}, "rank must be an integer"),
        ({"base_tokens": 0}, "base_tokens must be an integer of at least 1"),
        ({"known_share": 1.0}, "known_share must be from 0 to below 1, got 1.0"),
        ({"search_share": 2}, "search_share must be from 0 to 1, got 2"),
        ({"targets": ["news"]}, "targets names 'news'; there are: numbers, pets"),
        ({"targets": "pets"}, "targets must be names of domains, got 'pets'"),
        ({"targets": []}, "targets must be names of domains"),
        ({"n_domains": 1, "base": "small-gpt"}, "give at least 2 domains, or name a model"),
        ({"learning_rate": 0}, "learning_rate must be positive"),
    ],
)
def test_impossible_problems(folder, options, message):
    if options.get("base") == "small-gpt":
        with pytest.raises(DataError, match=message):
            AdapterProblem(texts(1), shape=SMALL, **BUDGET)
        return
    with pytest.raises(DataError, match=message):
        problem(folder, **options)


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("adalora", {}, "does not say which adapter to train; there are: none, full, lora"),
        ("lora", {"r": 3}, "lora takes .*; got r"),
        ("lora", {"times": 4}, "trains 14,848 parameters, more than the budget of 3,712"),
        ("full", {}, "more than the budget of 3,712"),
        ("vera", {"rank": 500}, "more than the budget"),
        ("lora", {"times": 1.5}, "times must be an integer of at least 1, got 1.5"),
        ("mos", {"private_rank": -1}, "private_rank must be an integer of at least 0"),
        ("lora", {"over_budget": "yes"}, "over_budget must be True or False, got 'yes'"),
        ("lora", {"learning_rate": 0}, "learning_rate must be positive, got 0"),
        ("lora", {"dropout": 1}, "dropout must be at least 0 and below 1, got 1"),
        ("lora", {"alpha": "high"}, "alpha must be a number, positive, got 'high'"),
        ("mos", {"shards_per_vector": 5}, "shards_per_vector=5 does not divide in_features=32"),
        ("mos", {"r": 9}, "r=9 takes 8 public vectors"),
        ("mos", {"selection": "best"}, "selection must be one of"),
        ("mos", {"private_rank": 2}, None),
        ("prolora", {"chunks": 0}, "chunks must be an integer of at least 1, got 0"),
        ("prolora", {"unshared_rank": -1}, "unshared_rank must be an integer of at least 0"),
        ("prolora", {"unshared_rank": 3}, "more than the whole budget"),
    ],
)
def test_designs_that_cannot_run(folder, method, params, message):
    design = Design("odd", method, params)
    if message is None:  # all private: a LoRA, and within the budget
        assert problem(folder).config(design).r == 2
        problem(folder).check(design)
        return
    with pytest.raises(DataError, match=f"^design 'odd': .*{message}"):
        problem(folder).check(design)


def test_a_budget_too_small_for_a_design(folder):
    smallest = problem(folder, rank=1)
    for name in ("LoRA", "VeRA", "MoS", "PRoLoRA", "pure sharing"):
        smallest.check(DESIGNS[name])
    with pytest.raises(DataError, match=r"'DoRA': dora of rank 1 .*: raise the problem's rank"):
        smallest.check(DESIGNS["DoRA"])


def test_too_little_text(folder, tmp_path):
    few = DomainTexts("few", {"pets": ("the cat",) * 6}, {"pets": ("a cat", "a mat")})
    asked = AdapterProblem(few, base=str(folder / "llama"), **BUDGET)
    with pytest.raises(DataError, match=r"domain 'pets' holds"):
        asked.prepare([DESIGNS["LoRA"]], [0], Work(tmp_path))


def test_rows_that_no_lora_reads(folder):
    """A model without linear layers to adapt is refused by name."""
    asked = problem(folder)
    asked._made.skeleton = type(
        "Empty",
        (torch.nn.Module,),
        {"get_output_embeddings": lambda self: None},
    )()
    with pytest.raises(DataError, match="has no linear layer to adapt"):
        asked.check(DESIGNS["LoRA"])


def test_configurations_are_pefts_own(folder):
    asked = problem(folder)
    lora = asked.config(DESIGNS["LoRA, 4 times the rank"])
    assert isinstance(lora, LoraConfig)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 16, 0.0)
    assert asked.config(DESIGNS["rsLoRA"]).use_rslora
    assert asked.config(DESIGNS["DoRA"]).use_dora
    assert problem(folder, "gpt2").config(DESIGNS["LoRA"]).fan_in_fan_out
