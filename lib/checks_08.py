"""Exercises of lesson 08: names, a recorder, a blend of two sources, attention over joined tokens, an inversion step."""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lib.checks import Check, FittingCheck, Wrong, register
from lib.checks_02 import NOT_A_COLUMN


# ---------------------------------------------------------------- 1. which processors

def decoder_self_attention(names):
    """Of the keys of `unet.attn_processors`, those of the decoder's (up blocks') self-attention, in their order."""
    return [name for name in names if name.startswith("up_blocks.") and ".attn1." in name]


def _name_cases(g):
    def block(place, i=0, deep=1):
        return [f"{place}.attentions.{i}.transformer_blocks.{k}.attn{n}.processor" for k in range(deep) for n in (1, 2)]
    three = block("down_blocks.0") + block("mid_block") + block("up_blocks.1") + block("up_blocks.1", 1)
    deep = block("up_blocks.0", 0, 2) + block("down_blocks.2", 1) + block("up_blocks.11", 2) + block("mid_block", 0, 2)
    return [(three,), (deep,)]


def _chosen(test, change=lambda name: name):
    return lambda names: [change(name) for name in names if test(name)]


@dataclass(frozen=True)
class NamesCheck(Check):
    """A Check of a list of names that says how another kind of answer becomes one, and names what is amiss."""

    def run(self, function):
        result = super().run(function)
        if result.status != "fail" or result.mistake not in ("", "count", "value"):
            return result
        names, = self.cases(torch.Generator())[0]
        try:
            answer = function(list(names))
        except Exception:
            return result
        if not isinstance(answer, (list, tuple)):
            kind = type(answer).__name__
            return self._fail(f"your function returns a {kind}; it should return a list: [name for name in names if "
                              "...], or list(filter(...)).", "no list")
        wanted = self.reference(names)
        for what, some in (("these should not be in it", [n for n in answer if n not in wanted]),
                           ("these are missing", [n for n in wanted if n not in answer])):
            if some:
                return self._fail(f"your list has {len(answer)} names, the right one {len(wanted)}; {what}: "
                                  f"{', '.join(map(str, some))}.", "names")
        return result


register(NamesCheck(
    name="decoder_self_attention", reference=decoder_self_attention, cases=_name_cases,
    source="lib.checks_08:decoder_self_attention lib.attention:layers lib.attention:select",
    praise="Right: these and no others. Had none been found, you would want to hear of it at once.",
    hints=["Print list(unet.attn_processors) and look at one name from its left end and from its right end.",
           "The decoder's names begin with up_blocks; attn1 is self-attention, attn2 is cross-attention.",
           'name.startswith("up_blocks.") and ".attn1." in name, in a list comprehension.'],
    wrongs=[
        Wrong("cross-attention", _chosen(lambda n: n.startswith("up_blocks.") and ".attn2." in n),
              "these are the cross-attention layers (attn2), where keys and values come from the words: a "
              "picture's keys and values are in attn1."),
        Wrong("self and cross", _chosen(lambda n: n.startswith("up_blocks.")),
              "you take both kinds of attention: attn2 looks at the words, and must be left alone."),
        Wrong("everywhere", _chosen(lambda n: ".attn1." in n),
              "these are the self-attention layers of the whole U-Net: the encoder's (down) and the "
              "middle's are among them."),
        Wrong("the middle, too", _chosen(lambda n: not n.startswith("down_blocks.") and ".attn1." in n),
              "the middle's layers (mid_block) are among them: it lies between encoder and decoder, and is neither."),
        Wrong("one block only", _chosen(lambda n: n.startswith("up_blocks.1.") and ".attn1." in n),
              "you take one block of the decoder, up_blocks.1: all blocks whose name begins with up_blocks. belong "
              "to it."),
        Wrong("the encoder", _chosen(lambda n: n.startswith("down_blocks.") and ".attn1." in n),
              "these are the encoder's layers (down_blocks); the decoder climbs back up, in up_blocks."),
        Wrong("module names", _chosen(lambda n: n.startswith("up_blocks.") and ".attn1." in n,
                                      lambda n: n.removesuffix(".processor")),
              "the layers are right, but you cut `.processor` off: set_attn_processor wants the keys just "
              "as they are."),
        Wrong("nothing", lambda names: [],
              "your list is empty: no name fits your test. A patch built on it would change nothing, "
              "without any error."),
    ]))


# ---------------------------------------------------------------- 2. a recorder

def recorder(attn, hidden_states):
    """One self-attention layer of a guided call: hidden_states (2 B, N, C), [unconditional, conditional].

    -> (the layer's output (2 B, N, C), K (B, N, C), V (B, N, C)), K and V of the conditional half, heads not split.
    """
    q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    heads = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    half = len(k) // 2
    return attn.to_out[0](out), k[half:], v[half:]


def _recorder_cases(g):
    from diffusers.models.attention_processor import Attention
    cases = []
    for heads, width, b, n in ((3, 4, 2, 5), (2, 6, 3, 7)):
        attn = Attention(query_dim=heads * width, heads=heads, dim_head=width).eval().requires_grad_(False)
        for parameter in attn.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) / math.sqrt(heads * width))
        cases.append((attn, torch.randn(2 * b, n, heads * width, generator=g)))
    return cases


def _recorder_with(change):
    """A recorder whose (out, k, v), with k and v of the whole batch, is changed by `change(attn, x, out, k, v)`."""
    return lambda attn, x: change(attn, x, recorder(attn, x)[0], attn.to_k(x), attn.to_v(x))


def _unprojected(attn, x):
    heads = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (attn.to_q(x), attn.to_k(x), attn.to_v(x)))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def _viewed(attn, x):
    heads = (y.reshape(len(y), attn.heads, y.shape[1], -1) for y in (attn.to_q(x), attn.to_k(x), attn.to_v(x)))
    return attn.to_out[0](F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def _not_scaled(attn, x):
    q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (attn.to_q(x), attn.to_k(x), attn.to_v(x)))
    return attn.to_out[0]((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


def _one_head(attn, x):
    return attn.to_out[0](F.scaled_dot_product_attention(attn.to_q(x), attn.to_k(x), attn.to_v(x)))


def _wide_scale(attn, x):
    q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (attn.to_q(x), attn.to_k(x), attn.to_v(x)))
    return attn.to_out[0]((q @ k.mT / math.sqrt(x.shape[-1])).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


_second = lambda x: x[len(x) // 2:]

register(Check(
    name="recorder", reference=recorder, cases=_recorder_cases,
    source="lib.checks_08:recorder lib.attention:TapProcessor.__call__ lib.attention:record",
    praise="Right: the layer gives what it always gave, and its keys and values are kept. A recorder must change nothing.",
    hints=["The layer's own parts are attn.to_q, attn.to_k, attn.to_v, attn.heads and attn.to_out[0].",
           "Output: heads split, attention, heads merged, then attn.to_out[0]. K and V are kept before the "
           "split.",
           "In [unconditional, conditional] the conditional half is the second one: k[len(k) // 2:]."],
    wrongs=[
        Wrong("unconditional half", _recorder_with(lambda a, x, o, k, v: (o, k[:len(k) // 2], v[:len(v) // 2])),
              "you keep the unconditional half, the first one: these keys were made for the empty prompt. "
              "The order is [unconditional, conditional]."),
        Wrong("both halves", _recorder_with(lambda a, x, o, k, v: (o, k, v)),
              "you keep both halves of the guided call, twice as many pictures as there are: keep the "
              "conditional half."),
        Wrong("every second", _recorder_with(lambda a, x, o, k, v: (o, k[1::2], v[1::2])),
              "you keep every second picture; the halves lie one behind the other, not interleaved."),
        Wrong("half the tokens", _recorder_with(lambda a, x, o, k, v: (
            o, k[:, k.shape[1] // 2:], v[:, v.shape[1] // 2:])),
              "you keep half of the tokens of every picture; the conditional half is half of the *pictures*, along "
              "the first axis."),
        Wrong("output of one half", _recorder_with(lambda a, x, o, k, v: (_second(o), _second(k), _second(v))),
              "the output is that of the conditional half alone; the U-Net goes on with the whole batch: only K and V "
              "are halved."),
        Wrong("K and V swapped", _recorder_with(lambda a, x, o, k, v: (o, _second(v), _second(k))),
              "K and V are swapped: return (output, K, V)."),
        Wrong("queries kept", _recorder_with(lambda a, x, o, k, v: (o, _second(a.to_q(x)), _second(v))),
              "you keep the queries where the keys should be: K comes from attn.to_k."),
        Wrong("heads split", _recorder_with(lambda a, x, o, k, v: (
            o, *(_second(y).unflatten(-1, (a.heads, -1)).transpose(1, 2) for y in (k, v)))),
              "you keep K and V with the heads split; here they are kept as (B, N, C), before the split."),
        Wrong("input kept", _recorder_with(lambda a, x, o, k, v: (o, _second(x), _second(x))),
              "you keep the layer's input; keys and values are what to_k and to_v make of it."),
        Wrong("no output projection", _recorder_with(lambda a, x, o, k, v: (_unprojected(a, x), _second(k), _second(v))),
              "the output projection attn.to_out[0] is missing: the recorder would change the picture."),
        Wrong("heads by reshape", _recorder_with(lambda a, x, o, k, v: (_viewed(a, x), _second(k), _second(v))),
              "you reshape (N, C) straight to (heads, N, C / heads), which cuts across tokens: split the "
              "channels first, unflatten(-1, (heads, -1)), then transpose(1, 2)."),
        Wrong("not scaled", _recorder_with(lambda a, x, o, k, v: (_not_scaled(a, x), _second(k), _second(v))),
              "the scores are not divided by sqrt(d), with d the width of ONE head."),
        Wrong("sqrt of the layer's width", _recorder_with(
            lambda a, x, o, k, v: (_wide_scale(a, x), _second(k), _second(v))),
              "you divide the scores by the root of the layer's width C; each head compares vectors of width C / "
              "attn.heads, so that is the d of sqrt(d)."),
        Wrong("one head", _recorder_with(lambda a, x, o, k, v: (_one_head(a, x), _second(k), _second(v))),
              "you compute one wide head: split the channels into attn.heads heads first, or the recorder "
              "changes the picture."),
    ]))


# ---------------------------------------------------------------- 3. two sources, one mask

def blend_two(own, near, far, mask, strength, size):
    """(1 - s) own + s (m near + (1 - m) far), token by token: own, near, far (B, N, C), size (h, w), N = h w.

    mask (B, 1, H, W) in [0, 1]: 1 where `near` is to provide; m is the share of each token's area under it.
    """
    m = F.adaptive_avg_pool2d(mask, size).flatten(2).transpose(1, 2)
    return own + strength * (m * near + (1 - m) * far - own)


def _blend_cases(g):
    cases = []
    for b, h, w, c, strength in ((1, 4, 6, 5, 0.7), (2, 3, 5, 4, 0.4)):
        own, near, far = (torch.randn(b, h * w, c, generator=g) for _ in range(3))
        mask = F.interpolate((torch.rand(b, 1, 3 * h, 3 * w, generator=g) > 0.6).float(), scale_factor=2)
        cases.append((own, near, far, mask, strength, (h, w)))
    soft = mask * torch.rand(mask.shape, generator=g)                   # a soft mask: any share in [0, 1]
    return [*cases, (own, near, far, soft, 1.0, (h, w)), (own, near, far, soft, 0.0, (h, w))]


_tokens = lambda m: m.flatten(2).transpose(1, 2)
_share = lambda mask, size: _tokens(F.adaptive_avg_pool2d(mask, size))


def _blend_with(weights=_share, mix=lambda own, near, far, m, s: own + s * (m * near + (1 - m) * far - own)):
    return lambda own, near, far, mask, strength, size: mix(own, near, far, weights(mask, size), strength)


register(FittingCheck(
    name="blend_two", reference=blend_two, cases=_blend_cases,
    fitting=lambda g: [(*torch.randn(3, 1, 4, 4, generator=g), torch.rand(1, 1, 8, 8, generator=g), 0.6, (2, 2))],
    misfits=[
        Wrong("mask not transposed", _blend_with(lambda mask, size: F.adaptive_avg_pool2d(mask, size).flatten(2)),
              NOT_A_COLUMN),
    ],
    source="lib.checks_08:blend_two lib.attention:pool_mask lib.attention:_blend",
    praise="Right: each token draws on the layer that it should belong to, as strongly as you say. This line is FeatGLaC.",
    hints=["First bring the mask to the layer's grid: adaptive_avg_pool2d(mask, size), then (B, N, 1), row by row.",
           "The guided tokens are m near + (1 - m) far. The strength says how far to go from the own ones "
           "to these.",
           "(1 - strength) * own + strength * guided."],
    wrongs=[
        Wrong("strength reversed", _blend_with(mix=lambda o, n, f, m, s: s * o + (1 - s) * (m * n + (1 - m) * f)),
              "the strength works backwards: at 0 nothing may change, at 1 the sources take over."),
        Wrong("strength twice", _blend_with(mix=lambda o, n, f, m, s: o + s * s * (m * n + (1 - m) * f - o)),
              "the strength is applied twice, so that a half becomes a quarter: multiply by it once."),
        Wrong("mask inverted", _blend_with(lambda mask, size: _share(1 - mask, size)),
              "near and far are swapped: mask = 1 means that `near` provides."),
        Wrong("mask sampled", _blend_with(lambda mask, size: _tokens(F.interpolate(mask, size, mode="nearest"))),
              "you take the mask at one pixel of each token; m is the share of the token's area, so "
              "average over it."),
        Wrong("mask interpolated", _blend_with(lambda mask, size: _tokens(F.interpolate(mask, size, mode="bilinear"))),
              "bilinear interpolation reads the 2 x 2 pixels in the middle of a token; m is the share of "
              "its whole area: adaptive_avg_pool2d."),
        Wrong("hard mask", _blend_with(lambda mask, size: (_share(mask, size) > 0.5).float()),
              "you round the mask to 0 and 1; tokens on an edge belong to both sources in part."),
        Wrong("mask rounded first", _blend_with(lambda mask, size: _share((mask > 0.5).float(), size)),
              "you round the mask to 0 and 1 before you average it: its values may lie anywhere in [0, 1] (a soft "
              "edge), and each counts with its own share."),
        Wrong("mask not resized", lambda own, near, far, mask, strength, size: _blend_with(
            lambda mask, size: _tokens(mask)[:, :own.shape[1]])(own, near, far, mask, strength, size),
              "the mask is not resized to the layer's grid: you take the first tokens' worth of its "
              "pixels, the top rows of the picture."),
        Wrong("columns first", _blend_with(lambda mask, size: _tokens(F.adaptive_avg_pool2d(mask, size).mT)),
              "tokens are counted row by row, yours column by column: flatten the grid as (h, w)."),
        Wrong("no strength", _blend_with(mix=lambda o, n, f, m, s: m * n + (1 - m) * f),
              "the strength is not used: this is outright replacement, at every strength."),
        Wrong("added", _blend_with(mix=lambda o, n, f, m, s: o + s * (m * n + (1 - m) * f)),
              "you add the sources on top of the own tokens; a blend takes as much of these away: (1 - strength) * "
              "own."),
        Wrong("own tokens lost", _blend_with(mix=lambda o, n, f, m, s: s * (m * n + (1 - m) * f)),
              "the sources' part is right, but the own tokens are gone: add (1 - strength) * own."),
        Wrong("strength on the mask", _blend_with(mix=lambda o, n, f, m, s: s * m * n + (1 - s * m) * f),
              "you multiply the mask by the strength, so that weak means *far* and own never counts: the strength "
              "says how far to go from the own tokens to the sources."),
        Wrong("one mask for all pictures", _blend_with(lambda mask, size: _share(mask[:1], size)),
              "you use the first picture's mask for the whole batch: every picture has a mask of its own."),
        Wrong("far forgotten", _blend_with(mix=lambda o, n, f, m, s: o + s * m * (n - o)),
              "only `near` is blended in; where the mask is 0, `far` provides, not the generation itself."),
    ]))


# ---------------------------------------------------------------- 4. attention over joined tokens

def shared_attention(q, k, v, k_ref, v_ref, weight):
    """One softmax over own and reference tokens, each reference token counted `weight` times (weight > 0).

    q, k, v, k_ref, v_ref (B, N, d) -> (B, N, d). Adding log(weight) to a score multiplies its exp by weight.
    """
    scores = q @ torch.cat([k, k_ref], 1).transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = torch.cat([scores[..., :k.shape[1]], scores[..., k.shape[1]:] + math.log(weight)], -1)
    return scores.softmax(-1) @ torch.cat([v, v_ref], 1)


def _shared_cases(g):
    return [(*(torch.randn(2, n, d, generator=g) * 1.5 for _ in range(5)), weight)
            for n, d, weight in ((6, 8, 0.3), (5, 16, 1.7))]


def _plain(q, k, v):
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def _shared_with(change=lambda scores, w: scores + math.log(w), values=lambda v, r, w: torch.cat([v, r], 1)):
    """A mistaken answer: another use of the weight on the reference's scores, or other values."""
    def answer(q, k, v, k_ref, v_ref, weight):
        own, ref = (q @ y.transpose(-1, -2) / math.sqrt(q.shape[-1]) for y in (k, k_ref))
        return torch.cat([own, change(ref, weight)], -1).softmax(-1) @ values(v, v_ref, weight)
    return answer


register(Check(
    name="shared_attention", reference=shared_attention, cases=_shared_cases,
    source="lib.checks_08:shared_attention lib.attention:_concat lib.attention:style_aligned",
    praise="Right: own and foreign tokens compete in one softmax. At weight 0 only the own ones would be left.",
    hints=["Join keys with keys and values with values along the tokens (dim 1). The queries stay as they are.",
           "One softmax over all keys. A token counted w times has w exp(score) in it, which is exp(score + "
           "log w).",
           "Add math.log(weight) to the reference's columns of the scores, before the softmax."],
    wrongs=[
        Wrong("replaced", lambda q, k, v, k_ref, v_ref, weight: _plain(q, k_ref, v_ref),
              "this is replacement: the own tokens are gone. Join them: own first, then the reference's."),
        Wrong("blended after the softmax", lambda q, k, v, k_ref, v_ref, weight: (
            _plain(q, k, v) + weight * _plain(q, k_ref, v_ref)) / (1 + weight),
              "you blend two outputs after two softmaxes, so each side gets its fixed share even where "
              "nothing in it fits. Use one softmax over all tokens, in which they compete."),
        Wrong("no weight", _shared_with(lambda s, w: s),
              "the weight is not used: every reference token counts as much as an own one."),
        Wrong("weight times score", _shared_with(lambda s, w: s * w),
              "you multiply the scores by the weight, which also turns a dislike into a smaller dislike: "
              "add log(weight)."),
        Wrong("weight added", _shared_with(lambda s, w: s + w),
              "you add the weight itself: exp(score + w) counts the token exp(w) times. Add log(weight)."),
        Wrong("weight on the values", _shared_with(lambda s, w: s, lambda v, r, w: torch.cat([v, w * r], 1)),
              "you scale the reference's values: that makes them darker or brighter, not rarer. The weight "
              "belongs into the softmax."),
        Wrong("log divided, too", lambda q, k, v, k_ref, v_ref, weight: shared_attention(
            q, k, v, k_ref, v_ref, weight ** (1 / math.sqrt(q.shape[-1]))),
              "log(weight) is divided by sqrt(d) with the scores, so the weight hardly counts: divide first, then add "
              "log(weight)."),
        Wrong("values in another order", _shared_with(values=lambda v, r, w: torch.cat([r, v], 1)),
              "keys and values are joined in different orders, so keys fetch the wrong values."),
        Wrong("queries joined too", lambda q, k, v, k_ref, v_ref, weight: shared_attention(
            torch.cat([q, k_ref], 1), k, v, k_ref, v_ref, weight),
              "you joined something to the queries, too: then the layer gives twice as many tokens. Only "
              "keys and values are shared."),
        Wrong("not scaled", lambda q, k, v, k_ref, v_ref, weight: shared_attention(
            q * math.sqrt(q.shape[-1]), k, v, k_ref, v_ref, weight),
              "the scores are not divided by sqrt(d), with d the width of a query."),
        Wrong("weight on the own", lambda q, k, v, k_ref, v_ref, weight: shared_attention(
            q, k, v, k_ref, v_ref, 1 / weight),
              "the weight acts on the own tokens: a larger weight should bring in more of the reference."),
    ]))


# ---------------------------------------------------------------- 5. one step of DDIM inversion

def inverse_step(z, eps, abar_below, abar_t):
    """z at the level below t, with noise prediction eps -> z_t: predict z_0 from the level below, renoise it to t."""
    z0 = (z - (1 - abar_below).sqrt() * eps) / abar_below.sqrt()
    return abar_t.sqrt() * z0 + (1 - abar_t).sqrt() * eps


def _inverse_cases(g):
    levels = ((0.9, 0.6), (0.5, 0.2), (1.0, 0.95))
    return [(torch.randn(2, 4, 3, 5, generator=g), torch.randn(2, 4, 3, 5, generator=g), torch.tensor(below), torch.tensor(t))
            for below, t in levels]


register(Check(
    name="inverse_step", reference=inverse_step, cases=_inverse_cases,
    source="lib.checks_08:inverse_step lib.diffusion:ddim_inverse_step lib.diffusion:_move",
    praise="Right: equal to diffusers' DDIMInverseScheduler. The same two lines as the step down, with the levels exchanged.",
    hints=["A DDIM step has two halves: predict z_0 from where you are, then noise it to where you are going.",
           "You are at the level below: z = sqrt(abar_below) z_0 + sqrt(1 - abar_below) eps. Solve it for "
           "z_0.",
           "Then z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps, with the same eps: no fresh noise."],
    wrongs=[
        Wrong("levels swapped", lambda z, eps, below, t: inverse_step(z, eps, t, below),
              "the two levels are swapped: this is the step of generation, from t down. You stand at the "
              "level below and climb."),
        Wrong("goes nowhere", lambda z, eps, below, t: inverse_step(z, eps, t, t),
              "you predict z_0 with abar_t and noise it with abar_t again, so that z comes back unchanged: "
              "z lies at the level below, use abar_below for the first half."),
        Wrong("no roots", lambda z, eps, below, t: t * (z - (1 - below) * eps) / below + (1 - t) * eps,
              "the square roots are missing: abar is a share of variance, and amplitudes go with its root."),
        Wrong("z_0 too small", lambda z, eps, below, t: t.sqrt() * (z - (1 - below).sqrt() * eps) + (1 - t).sqrt() * eps,
              "taking the noise off z leaves sqrt(abar_below) z_0: divide by sqrt(abar_below)."),
        Wrong("z taken for z_0", lambda z, eps, below, t: t.sqrt() * z + (1 - t).sqrt() * eps,
              "you noise z as if it were clean: it has some noise already, so predict z_0 first."),
        Wrong("stays clean", lambda z, eps, below, t: (z - (1 - below).sqrt() * eps) / below.sqrt(),
              "this is the predicted z_0: the second half is missing, noise it to level t."),
        Wrong("noise of the level below", lambda z, eps, below, t: inverse_step(z, eps, below, t)
              - ((1 - t).sqrt() - (1 - below).sqrt()) * eps,
              "z_0 is right, but you add as much noise as the level below has: at t it is sqrt(1 - abar_t) eps."),
        Wrong("z_0 not shrunk", lambda z, eps, below, t: inverse_step(z, eps, below, t) / t.sqrt()
              + (1 - 1 / t.sqrt()) * (1 - t).sqrt() * eps,
              "z_0 goes in at full size: at level t it has the share sqrt(abar_t)."),
        Wrong("noise added on top", lambda z, eps, below, t: (t / below).sqrt() * z + (1 - t / below).sqrt() * eps,
              "this adds noise on top, as the forward process does with *fresh* noise; eps is in z "
              "already, and amplitudes of the same noise add, not variances."),
        Wrong("sign", lambda z, eps, below, t: t.sqrt() * (z + (1 - below).sqrt() * eps) / below.sqrt() + (1 - t).sqrt() * eps,
              "a sign is wrong: z_0 is what is left when the noise is taken *off*."),
    ]))
