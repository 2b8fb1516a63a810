"""Two-stage training of a tiny decoder: LoRA, stages, seeds, prompts. About 8 seconds."""

from itertools import islice

import numpy as np
import peft
import pytest
import torch
from tests.embedding.small_models import TEXTS, WORDS, embedder

from bakeoff.data.tasks import TextPairs
from bakeoff.embedding import (
    ClassTriplets,
    LatentAttentionPooling,
    MeanPooling,
    MultiLayerPooling,
    TwoStageTrainer,
    homogeneous_batches,
    info_nce,
    two_stage,
)
from bakeoff.embedding.two_stage import add_lora, embed_with_gradients, lora_config, merge_lora

RETRIEVAL = TextPairs(
    tuple(f"the {a} {b}" for a in WORDS[2:6] for b in WORDS[6:9]),
    tuple(f"{b} a {a}" for a in WORDS[2:6] for b in WORDS[6:9]),
    group="retrieval",
)
CLASSES = ClassTriplets(["cat"] * 4 + ["dog"] * 4, [f"{x} {y}" for x in ("cat", "dog") for y in
                        ("sat", "ran", "mat", "tree")]).pairs(0, 2, "classes")  # fmt: skip


def trainer(stage1=(RETRIEVAL,), stage2=(CLASSES,), **options):
    options = {
        "steps": {"stage1": 4, "stage2": 3},
        "learning_rate": {"stage1": 5e-3, "stage2": 5e-3},
        "batch_size": 4,
        "warmup_steps": 1,
        **options,
    }
    return TwoStageTrainer(stage1, stage2, **options)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    return embedder(tmp_path / "base", MeanPooling(16))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_lora_trains_projections_and_head_and_leaves_no_trace(tmp_path):
    torch.manual_seed(0)
    model = embedder(tmp_path / "base", LatentAttentionPooling(16, num_latents=4, num_heads=2))
    before, structure = weights(model), str(model)
    history = trainer(lora=True).train(model, seed=0)
    assert [len(history[stage]) for stage in ("stage1", "stage2")] == [4, 3]
    moved = changed(before, weights(model))
    projections = {name for name in before if name.endswith("_proj.weight")}
    head = {name for name in before if name.startswith("1.")}
    assert projections <= moved <= projections | head
    assert len(moved & head) > 10
    assert str(model) == structure
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    # Saves and loads without peft.
    model.save_pretrained(str(tmp_path / "out"), create_model_card=False)
    assert not list((tmp_path / "out").rglob("adapter*"))
    loaded = type(model)(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    assert np.abs(loaded.encode(TEXTS) - model.encode(TEXTS)).max() < 1e-6


def test_merging_gives_the_vectors_of_the_adapted_model(model):
    before = model.encode(TEXTS)
    add_lora(model)
    assert np.abs(model.encode(TEXTS) - before).max() < 1e-6  # adapters start at zero
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted = model.encode(TEXTS)
    assert np.abs(adapted - before).max() > 1e-2
    trained = {name for name, p in model[0].named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model[0].named_parameters() if "lora_" in name}
    merge_lora(model)
    assert np.abs(model.encode(TEXTS) - adapted).max() < 1e-5
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_lora_settings_are_the_papers(model):
    config = lora_config(model[0].auto_model)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (16, 32, 0.1, "none")
    assert set(config.target_modules) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"has no linear layer called.*it has \['odd'\]"):
        lora_config(torch.nn.ModuleDict({"odd": torch.nn.Linear(2, 2)}))


def test_own_lora_configuration(model):
    before = weights(model)
    trainer(lora=peft.LoraConfig(r=2, target_modules=["v_proj"])).train(model)
    assert {name.split(".")[-2] for name in changed(before, weights(model))} == {"v_proj"}


def test_full_training_moves_everything(model):
    before = weights(model)
    trainer().train(model)
    assert changed(before, weights(model)) == set(before)


def test_frozen_parameters_stay(tmp_path):
    torch.manual_seed(0)
    head = MultiLayerPooling(16, 3, num_latents=4, num_heads=2)
    model = embedder(tmp_path / "base", head)
    model[0].requires_grad_(False)
    before = weights(model)
    trainer().train(model)
    assert {name[0] for name in changed(before, weights(model))} == {"1"}


def test_same_seed_same_model_and_the_callers_random_state_is_kept(tmp_path):
    results = []
    for attempt, seed in enumerate((1, 1, 2)):
        model = embedder(tmp_path / str(attempt), MeanPooling(16))
        torch.manual_seed(attempt)
        state = torch.random.get_rng_state()
        history = trainer(lora=True).train(model, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        results.append((history, weights(model)))
    assert results[0][0] == results[1][0]
    assert not changed(results[0][1], results[1][1])
    assert results[0][0] != results[2][0]


def test_first_losses_are_those_of_the_two_rules(model):
    """Stage 1 counts the batch as negatives, stage 2 each query's own hard negatives only."""
    model[0].requires_grad_(False)
    gain = torch.nn.Parameter(torch.ones(()))  # gives the trainer something that changes nothing

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.gain = model, gain

        def forward(self, texts):
            return embed_with_gradients(self.inner, texts) * self.gain

    history = trainer().train(Scaled(), seed=5)
    for stage, group, in_batch, seed in (
        ("stage1", RETRIEVAL, True, 10),
        ("stage2", CLASSES, False, 11),
    ):
        batches = homogeneous_batches([group], 4, seed, distinct=lambda position: in_batch)  # noqa: B023
        for indices, loss in zip(islice(batches, 3), history[stage], strict=False):
            embed = lambda texts: torch.from_numpy(model.encode(texts))  # noqa: E731
            negatives = None
            if group.negatives is not None:
                negatives = torch.stack([embed(list(group.negatives[i])) for i in indices])
            expected = info_nce(
                embed([group.queries[i] for i in indices]),
                embed([group.positives[i] for i in indices]),
                negatives,
                in_batch=in_batch,
            )
            assert loss == pytest.approx(float(expected), abs=1e-5)


def test_rules_can_differ_by_group(model):
    calls = []
    original = two_stage.train_contrastive

    def spy(*arguments, in_batch, **options):
        calls.append([in_batch(np.array([0])), in_batch(np.array([len(RETRIEVAL)]))])
        return original(*arguments, in_batch=in_batch, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_stage, "train_contrastive", spy)
        trainer(
            stage1=(RETRIEVAL, CLASSES),
            stage2=(),
            in_batch={"stage1": {"retrieval": True, "classes": False}},
        ).train(model)
    assert calls == [[True, False]]


def test_training_helps(model):
    def separation():
        queries, positives = (
            torch.from_numpy(model.encode(list(side)))
            for side in (RETRIEVAL.queries, RETRIEVAL.positives)
        )
        return float(info_nce(queries, positives))

    before = separation()
    trainer(stage2=(), steps={"stage1": 40}, batch_size=12).train(model)
    assert separation() < 0.5 * before


def test_failure_leaves_the_weights_as_they_were(model):
    before, structure = weights(model), str(model)

    def fail(fraction, message):
        if fraction > 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(lora=True).train(model, progress=fail)
    assert not changed(before, weights(model))
    assert str(model) == structure


def test_progress_runs_through_both_stages(model):
    reports = []
    trainer().train(model, progress=lambda fraction, message: reports.append((fraction, message)))
    assert [fraction for fraction, _ in reports] == pytest.approx(
        [step / 7 for step in range(1, 8)]
    )
    assert [message[:6] for _, message in reports] == ["stage1"] * 4 + ["stage2"] * 3


def test_prompts_reach_queries_and_only_where_asked_documents():
    seen = []

    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4))

        def forward(self, texts):
            seen.append(texts)
            spread = torch.tensor([[len(t), ord(t[-1]), ord(t[0]), 1.0] for t in texts])
            return spread * self.weight

    trainer(
        stage2=(),
        steps={"stage1": 1},
        query_prompts={"retrieval": "find: "},
        document_prompts={"other": "doc: "},
    ).train(Recorder())
    queries, positives = seen
    assert all(text.startswith("find: the ") for text in queries)
    assert all(text in RETRIEVAL.positives for text in positives)


def test_prompt_is_left_out_of_the_mean_by_the_head(tmp_path):
    model = embedder(tmp_path / "base", MeanPooling(16, include_prompt=False, normalize=False))
    vectors = embed_with_gradients(model, ["a dog ran", "red tree"], "find : ")
    tokens = model.tokenizer(["find : a dog ran"], return_tensors="pt")
    hidden = model[0].auto_model(**tokens).last_hidden_state
    assert torch.allclose(vectors[0], hidden[0, 3:].mean(dim=0), atol=1e-5)  # after <s> find :
    assert vectors.requires_grad


def test_bad_settings():
    with pytest.raises(ValueError, match="both empty"):
        trainer((), ())
    with pytest.raises(ValueError, match="'retrieval' without in-batch negatives, but it has no"):
        trainer(stage2=(RETRIEVAL,))
    with pytest.raises(ValueError, match=r"steps must have the keys.*got \['stage3'\]"):
        trainer(steps={"stage3": 1})
    with pytest.raises(ValueError, match=r"says nothing about group 'classes'"):
        trainer(in_batch={"stage2": {"retrieval": True}})
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        trainer().train(frozen)
