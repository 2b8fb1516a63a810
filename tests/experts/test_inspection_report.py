"""What is counted inside mixtures, and how it is shown."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from tests.decoding.tiny_decoder import save_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from bakeoff.errors import DataError
from bakeoff.experts.bam import upcycle
from bakeoff.experts.conversion import to_moe
from bakeoff.experts.inspection import (
    ExpertReport,
    LayerReport,
    expert_similarity,
    inspect_experts,
    mixture_layers,
    text_batches,
)
from bakeoff.experts.inspection_report import (
    InspectionPage,
    layer_rows,
    remarks,
    render_inspection,
    write_inspection,
)
from bakeoff.experts.read_me import build_expert_masks, collect_channel_stats, moefy
from bakeoff.experts.recurrent_router import convert_router

TEXTS = {
    "words": ["one two three the cat sat on a mat", "four two yes"] * 6,
    "numbers": ["0123456789 2024 " * 8, "2024", "no maybe 99"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_decoder(tmp_path_factory.mktemp("decoder") / "dense")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def dense(folder, noise=0.0, seed=1):
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model


def bam(folder, method="bam", **settings):
    models = [dense(folder), dense(folder, 0.1), dense(folder, 0.1, seed=2)]
    return upcycle(models, method, router_init_std=1.0, **settings)


def read_me(folder, **settings):
    data = {"a": torch.randint(5, 150, (2, 30)), "b": torch.randint(150, 300, (2, 30))}
    return moefy(dense(folder), build_expert_masks(collect_channel_stats(dense(folder), data)))


def by_hand(chosen_of, texts, tokenizer, n_experts):
    """Count one text at a time: ``chosen_of(ids)`` gives each layer's expert numbers."""
    counts = None
    for domain, given in enumerate(texts.values()):
        for text in given:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                chosen = chosen_of(ids)
            if counts is None:
                counts = [np.zeros((n_experts, len(texts)), dtype=int) for _ in chosen]
            for own, experts in zip(counts, chosen, strict=True):
                own[:, domain] += np.bincount(experts.reshape(-1), minlength=n_experts)
    return counts


# Counts -------------------------------------------------------------------------------------------


def test_counts_of_a_read_me_model_are_those_of_its_plans(folder, tokenizer):
    model = read_me(folder)
    report = inspect_experts(model, text_batches(tokenizer, TEXTS), list(TEXTS))
    expected = by_hand(lambda ids: [model.route(ids).expert_ids.numpy()], TEXTS, tokenizer, 2)
    (layer,) = report.layers
    np.testing.assert_array_equal(layer.counts, expected[0])
    assert report.tokens.tolist() == expected[0].sum(axis=0).tolist()
    masks = [layer.float() for layer in model.masks.layers]
    shared = np.mean([float((m[0] * m[1]).sum() / m[0].sum()) for m in masks])
    assert layer.similarity == pytest.approx(shared)
    assert not layer.soft
    packed = model.pack()
    again = inspect_experts(packed, text_batches(tokenizer, TEXTS), list(TEXTS)).layers[0]
    np.testing.assert_array_equal(again.counts, layer.counts)
    assert math.isnan(again.similarity)


@pytest.mark.parametrize("settings", [{}, {"method": "btx"}, {"ffn_top_k": 2, "share_kv": True}])
def test_counts_of_an_upcycled_model_are_those_of_its_logits(folder, tokenizer, settings):
    model = bam(folder, **settings)
    k = settings.get("ffn_top_k", 1)

    def chosen(ids):
        output = model(ids, output_router_logits=True)
        network = [logits.topk(k).indices.numpy() for logits in output.router_logits]
        attention = [logits.argmax(1).numpy() for logits in output.attention_router_logits]
        if not attention:
            return network
        return [each for pair in zip(attention, network, strict=True) for each in pair]

    expected = by_hand(chosen, TEXTS, tokenizer, 3)
    report = inspect_experts(model, text_batches(tokenizer, TEXTS), list(TEXTS))
    assert len(report.layers) == len(expected)
    for layer, counts in zip(report.layers, expected, strict=True):
        np.testing.assert_array_equal(layer.counts, counts)
        # Every token visits all attention experts: counted is the one that weighs most.
        assert layer.soft == ("self_attn" in layer.name)
        assert 0.5 < layer.similarity < 1


def test_similarity_of_separate_modules_is_the_mean_cosine_of_their_matrices(folder):
    model = bam(folder)
    name = "decoder.model.layers.1.mlp.router"
    mixture = model.get_submodule("decoder.model.layers.1.mlp")
    flat = [
        torch.cat([p.detach().flatten() for p in expert.parameters()]) for expert in mixture.experts
    ]
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosines = [float(torch.cosine_similarity(flat[a], flat[b], dim=0)) for a, b in pairs]
    found = expert_similarity(model.get_submodule(name), model, name)
    assert found == pytest.approx(np.mean(cosines), rel=1e-5)


def test_a_router_of_all_experts_counts_the_heaviest(folder, tokenizer):
    model = to_moe(dense(folder), 3, "dense", start="random")
    report = inspect_experts(model, text_batches(tokenizer, TEXTS), list(TEXTS))
    for layer in report.layers:
        assert layer.soft
        assert layer.counts.sum(axis=0).tolist() == report.tokens.tolist()
    sparse = to_moe(dense(folder), 3, {"name": "top-k", "k": 2})
    for layer in inspect_experts(sparse, text_batches(tokenizer, TEXTS), list(TEXTS)).layers:
        assert not layer.soft
        assert layer.counts.sum(axis=0).tolist() == (2 * report.tokens).tolist()


def test_recurrent_routers_are_seen_once_per_layer(folder, tokenizer):
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **shape, **heads))
    names = list(mixture_layers(model))
    convert_router(model, "recurrent", state_size=8)
    assert list(mixture_layers(model)) == names
    report = inspect_experts(model, text_batches(tokenizer, TEXTS), list(TEXTS))
    assert [layer.counts.sum() for layer in report.layers] == [2 * report.tokens.sum()] * 3
    ours = to_moe(dense(folder), 4, "recurrent")
    assert list(mixture_layers(ours)) == [f"model.layers.{i}.mlp" for i in range(4)]


def test_counts_do_not_depend_on_batches(folder, tokenizer):
    model = to_moe(dense(folder), 4, start="random")
    found = [
        inspect_experts(
            model, text_batches(tokenizer, TEXTS, batch_tokens=tokens), list(TEXTS)
        ).to_dict()
        for tokens in (1, 100, 10_000)
    ]
    for other in found[1:]:
        assert other["tokens"] == found[0]["tokens"]
        for one, two in zip(found[0]["layers"], other["layers"], strict=True):
            assert one["counts"] == two["counts"]
            assert one["entropy"] == pytest.approx(two["entropy"], rel=1e-5)


# Batches ------------------------------------------------------------------------------------------


def unpadded(batches):
    rows = {}
    for batch in batches:
        for ids, mask, domain in zip(*(batch[k] for k in batch), strict=True):
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # padded on the right
            rows.setdefault(int(domain), []).append(ids[mask.bool()].tolist())
    return rows


def test_batches_hold_every_token_once(tokenizer):
    rows = unpadded(text_batches(tokenizer, TEXTS, max_tokens=None, max_length=7, batch_tokens=20))
    for domain, texts in enumerate(TEXTS.values()):
        pieces = []
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            pieces += [ids[i : i + 7] for i in range(0, len(ids), 7)]
        assert sorted(rows[domain]) == sorted(pieces)


def test_a_budget_of_tokens_is_kept_exactly(tokenizer):
    batches = text_batches(tokenizer, TEXTS, max_tokens=25, max_length=10, batch_tokens=30)
    rows = unpadded(batches)
    assert [sum(map(len, rows[domain])) for domain in (0, 1)] == [25, 25]
    assert all(batch["input_ids"].numel() <= 30 for batch in batches)
    first = tokenizer(TEXTS["words"][0])["input_ids"]
    assert first[:10] in rows[0]


def test_impossible_batches_are_refused(tokenizer):
    with pytest.raises(DataError, match="max_length must be at least 1"):
        text_batches(tokenizer, TEXTS, max_length=0)
    with pytest.raises(DataError, match="domain 'none' holds no token"):
        text_batches(tokenizer, {**TEXTS, "none": [""]})


# What is shown ------------------------------------------------------------------------------------


def report_of(counts, names=None, *, domains=("code", "prose"), redundancy=None, **settings):
    names = names or [f"model.layers.{i}.mlp.gate" for i in range(len(counts))]
    given = {"entropy": 0.5, "drop_rate": 0.0, "similarity": 0.1, **settings}
    layers = [
        LayerReport(name, np.array(own), **given) for name, own in zip(names, counts, strict=True)
    ]
    tokens = np.array(counts[0]).sum(axis=0)
    if redundancy is None:
        redundancy = np.eye(len(counts))
    return ExpertReport(tuple(layers), tuple(domains), tokens, np.array(redundancy))


TWO = report_of(
    [[[6, 0], [3, 1], [1, 0], [0, 9]], [[5, 5], [5, 5], [0, 0], [0, 0]]],
    redundancy=[[1.0, 0.25], [0.25, 1.0]],
)


def test_rows_say_what_the_report_holds():
    first, second = layer_rows(TWO)
    assert (first.label, first.n_experts, first.idle) == ("layer 0", 4, 0)
    assert first.max_over_mean == pytest.approx(9 / 5)
    assert first.favourites == (((0, 0.6), (1, 0.3), (2, 0.1)), ((3, 0.9), (1, 0.1)))
    assert (first.redundancy_to_next, second.redundancy_to_next) == (0.25, None)
    assert second.idle == 2
    assert second.specialisation == pytest.approx(0)
    assert second.favourites[0] == ((0, 0.5), (1, 0.5))  # ties go to the lower number


def test_labels_tell_layers_apart():
    def labels(*names):
        return [row.label for row in layer_rows(report_of([[[1, 1], [1, 1]]] * len(names), names))]

    assert labels("router") == ["all layers"]
    assert labels("model.layers.3.mlp", "model.layers.10.mlp") == ["layer 3", "layer 10"]
    both = ("decoder.h.0.self_attn.router", "decoder.h.0.mlp.router", "decoder.h.1.mlp.router")
    assert labels(*both) == ["layer 0, attention", "layer 0, feed-forward", "layer 1"]
    assert labels("a.0.x", "a.0.y") == ["a.0.x", "a.0.y"]


def test_remarks_speak_of_what_is_there():
    assert remarks(TWO) == [
        "2 of 8 experts were chosen by no token, most of them in layer 1: 2 of 4."
    ]
    fine = [[[5, 1], [1, 5]]]
    assert remarks(report_of(fine)) == []
    said = remarks(report_of(fine, drop_rate=0.1, similarity=1.0, soft=True))
    assert len(said) == 3
    assert "dropped assignments in 1 layer, up to 10" in said[0]
    assert "equal" in said[1]
    assert "heaviest" in said[2]
    one = report_of([[[5], [1]]], domains=("all",))
    assert remarks(one) == ["There is one domain, so specialisation is not known."]


def page(report, **settings):
    return render_inspection(InspectionPage(report, "a model", "some data", **settings))


def cells(html, section):
    body = html.split(f'<section id="{section}">')[1].split("</section>")[0]
    return re.findall(r"<td[^>]*>([^<]*)</td>", body)


def test_the_page_holds_every_number_as_text():
    html = page(TWO, facts={"cut at": "512"}, command="bakeoff experts inspect", version="1")
    shares = ["60", "30", "10", "0", "0", "10", "0", "90", "30", "20", "5", "45"]
    shares += ["50", "50", "0", "0"] * 3
    assert cells(html, "load") == shares
    assert cells(html, "redundancy") == ["1.00", ".25", ".25", "1.00"]
    first = cells(html, "layers")[:8]
    assert [text.replace("\xa0", " ") for text in first[:4]] == ["4", "1.80", "0", "0.50"]
    assert "code: <b>10</b> tokens" in html
    assert "bakeoff experts inspect" in html
    assert "expert 3, prose: 90\xa0%, 3.60 even shares" in html


def test_shade_grows_with_the_share_and_stays_readable():
    body = page(TWO).split('<section id="load">')[1]
    shades = {
        (expert, domain): float(shade)
        for shade, expert, domain in re.findall(
            r'<td style="--o:([\d.]+)" title="expert (\d), (\w+)', body.split("layer 1")[0]
        )
    }
    assert shades["3", "code"] == 0
    assert shades["2", "code"] < shades["1", "code"] < shades["0", "code"] < shades["3", "prose"]
    assert shades["3", "prose"] <= 0.5  # black or white text lies on it


def test_many_experts_get_cells_without_numbers_on_them_but_with_them_in_the_page():
    generator = np.random.default_rng(0)
    many = report_of([generator.integers(0, 50, (100, 2)) for _ in range(20)])
    html = page(many)
    assert len(cells(html, "load")) == 20 * 3 * 100
    assert 'class="map narrow' in html
    assert 'class="map numbered' not in html
    heads = re.findall(r'<th scope="colgroup" colspan="(\d+)">(\d+)</th>', html)
    assert sum(int(width) for width, _ in heads) == 100 + 20
    assert len(html) < 2_000_000


def test_layers_of_different_sizes_have_maps_of_their_own():
    mixed = report_of([[[1, 1]] * 4, [[1, 1]] * 4, [[1, 1]] * 6])
    html = page(mixed)
    assert html.count('<table class="map') == 2 + 1
    assert "4 to 6 experts" in html


def test_one_layer_and_one_domain_make_a_page():
    html = page(report_of([[[5], [1]]], ["router"], domains=("all",), similarity=math.nan))
    assert 'id="redundancy"' not in html
    assert "nan" not in html.lower().replace("name", "")
    assert "1 router" in html


def test_the_page_is_one_safe_file(tmp_path):
    evil = '</style><script>alert(1)</script>{{ 7 * 7 }}"&\ud800'
    report = report_of([[[1, 2], [3, 4]]], domains=(evil, "b"))
    write_inspection(
        InspectionPage(report, evil, evil, facts={evil: evil}, notes=[evil], command=evil),
        tmp_path / "page.html",
    )
    html = (tmp_path / "page.html").read_text("utf-8")
    assert "<script" not in html
    assert "49" not in html.split("<body>")[1]
    assert not re.search(r'(?:src|href)="(?!#|data:)', html)
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
