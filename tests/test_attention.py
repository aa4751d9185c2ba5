"""Own attention = SDPA; taps change nothing unless asked, inject what they say, and always go away again."""

import pytest
import torch
import torch.nn.functional as F

from lib import attention, diffusion


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(pipe, z=None, steps=4, scale=1.0, prompt="a red chair"):
    return diffusion.sample(pipe, prompt, steps, scale, latents=rand(1, 4, 16, 16) if z is None else z)


@pytest.mark.parametrize("shape", [(7, 8), (2, 5, 16), (2, 4, 33, 8)])
def test_attention_equals_sdpa(shape):
    q, k, v = (rand(*shape, seed=s) * 3 for s in range(3))
    ours, weights = attention.attention(q, k, v, return_weights=True)
    assert torch.allclose(ours, F.scaled_dot_product_attention(q, k, v), atol=1e-5)
    assert torch.allclose(weights.sum(-1), torch.ones(shape[:-1]), atol=1e-5)
    bias = torch.zeros(shape[-2]).index_fill(0, torch.tensor([0, 3]), float("-inf"))
    assert torch.allclose(
        attention.attention(q, k, v, bias),
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(*q.shape[:-2], shape[-2], shape[-2])),
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_do_not_overflow(dtype):
    """q . k is 120,000 here, more than float16 holds, before it is divided by sqrt(d)."""
    q, k, v = (rand(1, 6, 64, seed=s).to(dtype) for s in range(3))
    q, k = q + 40, k + 45
    ours, weights = attention.attention(q, k, v, return_weights=True)
    assert ours.dtype == weights.dtype == dtype and torch.isfinite(weights).all()
    assert torch.allclose(ours, F.scaled_dot_product_attention(q, k, v), atol=2e-2)
    assert torch.allclose(weights.float().sum(-1), torch.ones(1, 6), atol=2e-2)


def test_layers_of_the_tiny_unet(tiny_pipe):
    found = attention.layers(tiny_pipe.unet)
    assert [x.fraction for x in found] == [1, 0.5, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 1, 1]
    assert [x.place for x in found] == ["down"] * 3 + ["mid"] + ["up"] * 6
    order = []
    taps = [
        tiny_pipe.unet.get_submodule(x.name).register_forward_pre_hook(lambda m, a, n=x.name: order.append(n))
        for x in found
    ]
    run(tiny_pipe, steps=1)
    [tap.remove() for tap in taps]
    assert order == [x.name for x in found]  # listed in the order of running
    assert {x.fraction for x in attention.select(tiny_pipe.unet, [0.5, "mid"])} == {0.5, 0.25}
    assert attention.select(tiny_pipe.unet, found[2]) == [found[2]]
    for bad in ("decoder", 0.125, ["up", "nowhere"], []):
        with pytest.raises(ValueError, match="fits|empty"):
            attention.select(tiny_pipe.unet, bad)


def test_layers_of_stable_diffusion_15_on_the_meta_device():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    found = attention.layers(unet)
    assert len(found) == 16 == len([n for n in unet.attn_processors if "attn1" in n])
    assert [x.fraction for x in found] == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125] + [0.25] * 3 + [0.5] * 3 + [
        1
    ] * 3
    assert all(
        unet.get_submodule(x.name).to_k.in_features == {1: 320, 0.5: 640, 0.25: 1280, 0.125: 1280}[x.fraction]
        for x in found
    )


def test_recording_changes_no_bit_and_keeps_what_it_says(tiny_pipe):
    plain = run(tiny_pipe)
    before = dict(tiny_pipe.unet.attn_processors)
    with attention.record(tiny_pipe.unet, "up", window=(0.5, 1), what="qkvw", dtype=torch.float16) as bank:
        assert torch.allclose(run(tiny_pipe), plain, atol=1e-6)
    after = tiny_pipe.unet.attn_processors
    assert before.keys() == after.keys() and all(before[n] is after[n] for n in before)
    assert bank.timesteps == [1, 251] and len(bank.names) == 6 and len(bank.store) == 12
    kept = bank.at(251, bank.names[-1])
    assert kept["k"].shape == kept["v"].shape == (1, 256, 32) and kept["k"].dtype == torch.float16
    assert kept["w"].shape == (1, 4, 256, 256) and (kept["w"].float().sum(-1) - 1).abs().max() < 1e-2
    assert bank.bytes == sum(x.numel() * 2 for parts in bank.store.values() for x in parts.values())
    with pytest.raises(ValueError, match="timestep 751"):
        bank.at(751, bank.names[0])


@pytest.mark.parametrize("mode", ["replace", "query"])
@pytest.mark.parametrize("layers", ["all", "up", 0.5])
def test_own_keys_and_values_at_strength_1_are_the_identity(tiny_pipe, mode, layers):
    plain = run(tiny_pipe)
    with attention.record(tiny_pipe.unet, layers) as bank:
        run(tiny_pipe)
    with attention.inject(tiny_pipe.unet, bank, mask=1.0, strength=1.0, layers=layers, mode=mode):
        assert torch.allclose(run(tiny_pipe), plain, atol=1e-5)


def test_one_batched_call_equals_the_recorded_bank(tiny_pipe):
    """[source, generation] in one call = record the source's run first, then inject it."""
    text = diffusion.embed(tiny_pipe, ["a box", "a red chair"])
    scheduler = diffusion.ddim(tiny_pipe, 4)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :9] = 1

    with attention.record(tiny_pipe.unet) as bank:
        run(tiny_pipe, rand(1, 4, 16, 16, seed=1), prompt="a box")
    with attention.inject(tiny_pipe.unet, bank, mask, 0.7):
        two_runs = run(tiny_pipe, rand(1, 4, 16, 16, seed=2))
    z = torch.cat([rand(1, 4, 16, 16, seed=1), rand(1, 4, 16, 16, seed=2)])
    with torch.no_grad(), attention.inject(tiny_pipe.unet, 1, mask, 0.7):
        for t in scheduler.timesteps:
            z = diffusion.ddim_step(scheduler, diffusion.predict(tiny_pipe, z, t, text), t, z)
    assert torch.allclose(z[1:], two_runs, atol=1e-4)
    assert torch.allclose(z[:1], run(tiny_pipe, rand(1, 4, 16, 16, seed=1), prompt="a box"), atol=1e-4)


@pytest.mark.parametrize("mode", ["replace", "query", "concat"])
def test_masked_injection_by_hand(tiny_pipe, mode):
    """One layer, one call: the tap's output equals the formula computed here from the layer's own weights."""
    unet, layer = tiny_pipe.unet, attention.layers(tiny_pipe.unet)[-1]
    attn = unet.get_submodule(layer.name)
    seen = {}
    hook = attn.register_forward_hook(
        lambda m, a, kw, out: seen.update(x=a[0] if a else kw["hidden_states"], out=out), with_kwargs=True
    )
    with attention.record(unet, layer) as bank:
        run(
            tiny_pipe,
            torch.cat([rand(1, 4, 16, 16, seed=3), rand(1, 4, 16, 16, seed=4)]),
            1,
            prompt=["a", "b"],
        )
    mask = torch.rand(2, 1, 128, 128, generator=torch.Generator().manual_seed(0)) / 2
    with attention.inject(unet, bank, mask, 0.8, layer, mode=mode):
        run(tiny_pipe, steps=1)
    hook.remove()
    m = F.avg_pool2d(mask, 8).flatten(2).transpose(1, 2) * 0.8  # (2, 256, 1)
    q, k, v = (f(seen["x"]) for f in (attn.to_q, attn.to_k, attn.to_v))
    src = bank.at(bank.timesteps[0], layer.name)
    heads = lambda x: attention.split_heads(x, attn.heads)
    if mode == "replace":
        mix = lambda own, name: (1 - m.sum(0)) * own + (m * src[name]).sum(0)
        out = attention.attention(heads(q), heads(mix(k, "k")), heads(mix(v, "v")))
    elif mode == "query":
        out = (1 - m.sum(0)) * attention.attention(heads(q), heads(k), heads(v))
        out = out + sum(
            m[s] * attention.attention(heads(q), heads(src["k"][s : s + 1]), heads(src["v"][s : s + 1]))
            for s in range(2)
        )
    else:
        weight = torch.cat([torch.ones(256), m.flatten()])
        keys = torch.cat([k, src["k"][:1], src["k"][1:]], 1)
        values = torch.cat([v, src["v"][:1], src["v"][1:]], 1)
        e = (heads(q) @ heads(keys).transpose(-1, -2) / (q.shape[-1] // attn.heads) ** 0.5).exp() * weight
        out = (e / e.sum(-1, keepdim=True)) @ heads(values)
    out = attn.to_out[0](out.transpose(1, 2).flatten(2))
    assert torch.allclose(out, seen["out"], atol=1e-5)


def test_parts_strength_window_and_layers_matter(tiny_pipe):
    with attention.record(tiny_pipe.unet) as bank:
        run(tiny_pipe, rand(1, 4, 16, 16, seed=9), prompt="a box")
    plain = run(tiny_pipe)

    half = torch.ones(1, 1, 16, 16)
    half[..., :8] = 0.2  # (under a mask of ones everywhere, "replace" and "query" are the same)

    def with_(mask=half, **options):
        with attention.inject(tiny_pipe.unet, bank, mask, **options):
            return run(tiny_pipe)

    results = [
        plain,
        with_(),
        with_(parts="k"),
        with_(parts="v"),
        with_(strength=0.5),
        with_(window=(0, 0.5)),
        with_(layers=0.5),
        with_(mode="query"),
        with_(mode="concat"),
        with_(strength={1.0: 1.0}),
    ]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert (a - b).abs().max() > 1e-4
    assert torch.allclose(with_(strength=0.0), plain, atol=1e-5)
    with pytest.raises(ValueError, match="works at the fractions"):
        with_(strength={0.3: 1.0})
    assert torch.allclose(with_(mask=torch.zeros(1, 1, 16, 16), mode="concat"), plain, atol=1e-5)


def test_everything_is_restored_after_an_exception(tiny_pipe):
    plain, before = run(tiny_pipe), dict(tiny_pipe.unet.attn_processors)
    with pytest.raises(KeyError, match="stop"):
        with attention.record(tiny_pipe.unet):
            run(tiny_pipe, steps=1)
            raise KeyError("stop")
    with pytest.raises(ValueError, match="Nothing was recorded"):
        with attention.inject(tiny_pipe.unet, attention.Bank([])):
            run(tiny_pipe)
    after = tiny_pipe.unet.attn_processors
    assert all(before[n] is after[n] for n in before) and not tiny_pipe.unet._forward_pre_hooks
    assert torch.equal(run(tiny_pipe), plain)


def test_a_patch_that_does_nothing_is_caught(tiny_pipe):
    from diffusers.models.attention_processor import AttnProcessor2_0

    with pytest.raises(RuntimeError, match="never applied"):
        with attention.record(tiny_pipe.unet):
            pass
    with pytest.raises(RuntimeError, match="never applied: 4"):
        with attention.record(tiny_pipe.unet, window=(0.99, 0.995)):
            run(tiny_pipe)
    before = dict(tiny_pipe.unet.attn_processors)
    with pytest.raises(RuntimeError, match="fired 0 times in 4"):  # the classic: something resets processors
        with attention.record(tiny_pipe.unet):
            tiny_pipe.unet.set_attn_processor(AttnProcessor2_0())
            run(tiny_pipe)
    tiny_pipe.unet.set_attn_processor(dict(before))
    with pytest.raises(RuntimeError, match="already"):
        with attention.record(tiny_pipe.unet), attention.inject(tiny_pipe.unet, 1):
            pass


def test_bad_requests_are_named(tiny_pipe):
    unet = tiny_pipe.unet
    with attention.record(unet) as bank:
        run(tiny_pipe, steps=2)
    for words, options in [
        ("Unknown mode", {"mode": "swap"}),
        ("parts must", {"parts": "q"}),
        ("strength must", {"strength": 1.5}),
        ("window is", {"window": (0.5, 0.2)}),
    ]:
        with pytest.raises(ValueError, match=words), attention.inject(unet, bank, **options):
            pass
    for words, mask in [
        ("need masks of shape", torch.ones(2, 1, 8, 8)),
        ("need masks of shape", torch.ones(8, 8)),
        ("at most 1", torch.full((1, 1, 8, 8), 1.2)),
    ]:
        with pytest.raises(ValueError, match=words), attention.inject(unet, bank, mask):
            run(tiny_pipe, steps=2)
    with pytest.raises(ValueError, match="same picture size"), attention.inject(unet, bank):
        run(tiny_pipe, rand(1, 4, 8, 8), steps=2)
    with pytest.raises(ValueError, match="none is left"), attention.inject(unet, 1):
        run(tiny_pipe, steps=2)


# ---------------------------------------------------------------- cross-attention, maps, cost
def test_merging_undoes_splitting_and_bad_widths_are_named():
    x = rand(2, 5, 12)
    assert torch.equal(attention.merge_heads(attention.split_heads(x, 3)), x)
    assert torch.equal(attention.split_heads(x, 3)[:, 1], x[..., 4:8])
    with pytest.raises(ValueError, match="12 channels"):
        attention.split_heads(x, 5)


def test_own_heads_equal_torch_multihead_attention():
    module = torch.nn.MultiheadAttention(24, 4, batch_first=True)
    x, y = rand(2, 7, 24), rand(2, 5, 24, seed=1)
    q, k, v = (
        F.linear(t, w, b)
        for t, w, b in zip((x, y, y), module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3))
    )
    ours = attention.attention(*(attention.split_heads(t, 4) for t in (q, k, v)))
    ours = module.out_proj(attention.merge_heads(ours))
    assert torch.allclose(ours, module(x, y, y, need_weights=False)[0], atol=1e-5)


def test_cost_counts_what_is_made():
    q, k = rand(4, 64, 8), rand(4, 20, 8)
    assert attention.cost(64, 4, 8, keys=20)["scores"] == (q @ k.mT).numel()
    assert attention.cost(4096, 8, 40)["scores"] == 8 * 4096**2
    assert attention.cost(64, 1, 8)["multiply_adds"] == 2 * 64 * 64 * 8


def test_cross_layers_lie_where_the_self_layers_lie(tiny_pipe):
    own, cross = attention.layers(tiny_pipe.unet), attention.layers(tiny_pipe.unet, "cross")
    assert [x.name.replace("attn2", "attn1") for x in cross] == [x.name for x in own]
    assert [x.fraction for x in cross] == [x.fraction for x in own]
    assert [attention.grid(x, (16, 12)) for x in own[:3]] == [(16, 12), (8, 6), (4, 3)]
    with pytest.raises(ValueError, match='"self" or "cross"'):
        attention.layers(tiny_pipe.unet, "attn2")


def test_cross_recording_changes_nothing_and_keeps_the_words_weights(tiny_pipe):
    plain, before = run(tiny_pipe), dict(tiny_pipe.unet.attn_processors)
    with attention.record(tiny_pipe.unet, what="qkvw", kind="cross") as bank:
        assert torch.allclose(run(tiny_pipe), plain, atol=1e-5)
    after = tiny_pipe.unet.attn_processors
    assert all(before[n] is after[n] for n in before) and not tiny_pipe.unet._forward_pre_hooks
    layer = attention.layers(tiny_pipe.unet, "cross")[0]
    kept = bank.at(251, layer.name)
    assert kept["q"].shape == (1, 256, 32) and kept["k"].shape == kept["v"].shape == (1, 32, 32)
    assert kept["w"].shape == (1, 4, 256, 32) and torch.allclose(kept["w"].sum(-1), torch.ones(1, 4, 256), atol=1e-5)
    heads = [attention.split_heads(kept[p], 4) for p in "qk"]
    assert torch.allclose(kept["w"], (heads[0] @ heads[1].mT / 8**0.5).softmax(-1), atol=1e-5)  # heads of width 8
    words = diffusion.embed(tiny_pipe, "a red chair")
    assert torch.allclose(kept["k"], tiny_pipe.unet.get_submodule(layer.name).to_k(words), atol=1e-5)


def test_self_and_cross_can_be_recorded_together_and_after_an_exception_all_is_restored(tiny_pipe):
    plain, before = run(tiny_pipe), dict(tiny_pipe.unet.attn_processors)
    words_too = attention.record(tiny_pipe.unet, what="w", kind="cross")
    with attention.record(tiny_pipe.unet, what="w") as own, words_too as words:
        run(tiny_pipe, steps=1)
    assert len(own.store) == len(words.store) == 10 and own.size == words.size == (16, 16)
    with pytest.raises(KeyError, match="stop"):
        with attention.record(tiny_pipe.unet, kind="cross"):
            run(tiny_pipe, steps=1)
            raise KeyError("stop")
    with pytest.raises(RuntimeError, match="never applied: 0"):
        with attention.record(tiny_pipe.unet, kind="cross"):
            pass
    after = tiny_pipe.unet.attn_processors
    assert all(before[n] is after[n] for n in before) and not tiny_pipe.unet._forward_pre_hooks
    assert torch.equal(run(tiny_pipe), plain)


def test_maps_are_the_recorded_rows_and_columns(tiny_pipe):
    words_too = attention.record(tiny_pipe.unet, what="w", kind="cross")
    with attention.record(tiny_pipe.unet, what="w") as own, words_too as words:
        run(tiny_pipe, rand(1, 4, 16, 24), steps=1)
    t = own.timesteps[0]
    layer, reader = attention.layers(tiny_pipe.unet)[1], attention.layers(tiny_pipe.unet, "cross")[1]
    place = attention.token_at(attention.grid(layer, own.size), 0.99, 0.3)  # 8 x 12: row 2, the last column
    assert place == 2 * 12 + 11 and attention.token_at((8, 12), 1.0, 1.0) == 95
    seen = attention.attention_map(own, layer, t, query=place)
    assert torch.equal(seen.flatten(2), own.at(t, layer.name)["w"][:, :, place]) and seen.shape == (1, 4, 8, 12)
    read = attention.attention_map(words, reader, t, key=2)
    assert torch.equal(read.flatten(2), words.at(t, reader.name)["w"][..., 2])
    total = sum(attention.attention_map(words, reader, t, key=k) for k in range(32))
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


def test_maps_name_what_is_wrong(tiny_pipe):
    words_too = attention.record(tiny_pipe.unet, what="w", kind="cross")
    with attention.record(tiny_pipe.unet) as bank, words_too as words:
        run(tiny_pipe, steps=1)
    layer, reader = attention.layers(tiny_pipe.unet)[0], attention.layers(tiny_pipe.unet, "cross")[0]
    for words_of_error, arguments in [
        ("either query", (words, reader, 1)),
        ('what="w"', (bank, layer, 1, 0)),
        ("not to places|not at places", (words, reader, 1, 0)),
    ]:
        with pytest.raises(ValueError, match=words_of_error):
            attention.attention_map(*arguments)
    with pytest.raises(ValueError, match="tokens 0 to 31"):
        attention.attention_map(words, reader, 1, key=32)
    with pytest.raises(ValueError, match="run from 0"):
        attention.token_at((4, 4), 1.2, 0.5)
    with pytest.raises(ValueError, match="No cross-attention layer fits"):
        attention.select(tiny_pipe.unet, 0.125, "cross")


# ---------------------------------------------------------------- rules, AdaIN, features (lesson 08)
def sources(pipe, z, what="qkv", names="up_blocks.0.resnets.1", steps=2):
    with attention.record(pipe.unet, what=what) as bank, attention.record_features(pipe.unet, names) as features:
        run(pipe, z, steps, prompt="a box")
    return bank, features


def test_adain_gives_each_channel_the_references_mean_and_spread():
    x, reference = rand(2, 50, 6) * 3 + 1, rand(2, 40, 6, seed=1) * torch.arange(1, 7) - 2
    y = attention.adain(x, reference)
    assert torch.allclose(y.mean(1), reference.mean(1), atol=1e-4)
    assert torch.allclose(y.std(1), reference.std(1), rtol=1e-3)
    assert torch.allclose(attention.adain(x, x), x, atol=1e-4)
    normal = F.instance_norm(x.mT, eps=1e-12).mT  # torch divides by the biased spread
    assert torch.allclose((y - reference.mean(1, keepdim=True)) / reference.std(1, keepdim=True),
                          normal * (49 / 50) ** 0.5, atol=1e-3)


def test_own_recordings_change_nothing_under_every_rule(tiny_pipe):
    z = rand(1, 4, 16, 16)
    plain, (bank, features) = run(tiny_pipe, z, 2, prompt="a box"), sources(tiny_pipe, z)
    for rule in (attention.masactrl, attention.plug_and_play, attention.style_aligned):
        with attention.steer(tiny_pipe.unet, bank, rule), attention.inject_features(tiny_pipe.unet, features):
            assert torch.allclose(run(tiny_pipe, z, 2, prompt="a box"), plain, atol=1e-4)
    assert not tiny_pipe.unet._forward_pre_hooks


def test_masactrls_rule_is_replacement_and_each_rule_changes_something_else(tiny_pipe):
    bank, features = sources(tiny_pipe, rand(1, 4, 16, 16, seed=5))
    unet, plain = tiny_pipe.unet, run(tiny_pipe, steps=2)
    with attention.inject(unet, bank, layers="up", window=(0.4, 1)):
        wanted = run(tiny_pipe, steps=2)
    with attention.steer(unet, bank, attention.masactrl, "up", (0.4, 1)):
        results = [plain, run(tiny_pipe, steps=2)]
    assert torch.allclose(results[1], wanted, atol=1e-4)  # `inject` blends, which rounds
    for rule in (attention.plug_and_play, attention.style_aligned):
        with attention.steer(unet, bank, rule):
            results.append(run(tiny_pipe, steps=2))
    with attention.inject_features(unet, features, window=(0.0, 0.6)):
        results.append(run(tiny_pipe, steps=2))
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(results) for b in results[:i])
    assert torch.equal(run(tiny_pipe, steps=2), plain)


def test_one_recorded_picture_serves_a_guided_call(tiny_pipe):
    bank, features = sources(tiny_pipe, rand(1, 4, 16, 16, seed=5))
    twice = torch.cat([rand(1, 4, 16, 16)] * 2)
    with attention.steer(tiny_pipe.unet, bank, attention.masactrl), attention.inject_features(tiny_pipe.unet, features):
        a, b = run(tiny_pipe, twice, 2, scale=3.0, prompt=["a red chair"] * 2)
    assert torch.allclose(a, b, atol=1e-4)


def test_an_injected_feature_is_what_the_next_module_gets(tiny_pipe):
    unet, name = tiny_pipe.unet, "up_blocks.0.resnets.1"
    _, features = sources(tiny_pipe, rand(1, 4, 16, 16, seed=5), names=name)
    with torch.no_grad(), attention.inject_features(unet, features), attention.record_features(unet, name) as seen:
        run(tiny_pipe, steps=2)
    assert seen.timesteps == features.timesteps == [1, 501] and seen.size == (16, 16)
    assert all(torch.equal(seen.at(t, name)["out"], features.at(t, name)["out"]) for t in seen.timesteps)


def test_wrong_rules_banks_and_modules_are_named_and_all_is_restored(tiny_pipe):
    unet, before = tiny_pipe.unet, dict(tiny_pipe.unet.attn_processors)
    bank, features = sources(tiny_pipe, rand(1, 4, 16, 16, seed=5), what="kv")
    for words, z, tool in [
        ("asks for 'q'", None, lambda: attention.steer(unet, bank, attention.plug_and_play)),
        ("Nothing was recorded", None, lambda: attention.steer(unet, attention.Bank([]), attention.masactrl)),
        ("record one picture", rand(1, 4, 8, 8), lambda: attention.steer(unet, bank, attention.masactrl)),
        ("record one picture", rand(1, 4, 8, 8), lambda: attention.inject_features(unet, features)),
        ("no module 'up_blocks.9'", None, lambda: attention.record_features(unet, "up_blocks.9")),
    ]:
        with pytest.raises(ValueError, match=words), tool():
            run(tiny_pipe, z, 2)
    for tool in (attention.record_features(unet, "mid_block", window=(0.9991, 0.9999)),
                 attention.steer(unet, bank, attention.masactrl, window=(0.9991, 0.9999))):
        with pytest.raises(RuntimeError, match="never applied: 2"), tool:
            run(tiny_pipe, steps=2)
    with pytest.raises(RuntimeError, match="fired 0 times in 2"), attention.record_features(unet, "time_proj"):
        forward, unet.time_proj = unet.time_proj, torch.nn.Identity()
        unet.time_proj.forward = forward.forward
        try:
            run(tiny_pipe, steps=2)
        finally:
            unet.time_proj = forward
    assert all(before[n] is p for n, p in unet.attn_processors.items()) and not unet._forward_pre_hooks
    assert not any(m._forward_hooks for m in unet.modules())
