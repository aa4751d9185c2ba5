"""Exercises of lesson 02: softmax, scaled attention, several heads, the bill, a masked blend of keys."""
import math

import torch
import torch.nn.functional as F

from lib.checks import Check, FittingCheck, Wrong, register


# ---------------------------------------------------------------- 1. softmax along an axis

def softmax(scores, dim):
    """exp(scores) / sum of exp(scores) along `dim`, computed so that large scores do not overflow."""
    e = (scores - scores.amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


_exp = lambda scores, dim: (scores - scores.amax(dim, keepdim=True)).exp()
_shared = lambda e, *dim: e / (e.sum(*dim, keepdim=True) if dim else e.sum())
LAST_AXIS = "you normalise along the last axis whatever `dim` says: use dim in the maximum and in the sum."
OVER_ALL = ("you divide by the sum over the whole tensor, so all rows together share one 1: sum along `dim`, with "
            "keepdim=True.")
OVERFLOW_TOO = " (And subtract the row's maximum first: exp(200) is infinite.)"
NO_KEEPDIM = ("the sum along `dim` has lost that axis, so it no longer lines up with the scores: give keepdim=True to "
              "sum (and to amax).")


def _softmax_cases(g):
    return [(torch.randn(2, 5, 7, generator=g) * 2, -1), (torch.randn(2, 5, 7, generator=g) * 2, 1),
            (torch.randn(4, 6, generator=g) * 30 + 200, -1),            # exp(200) does not fit into a float32
            (torch.randn(4, 6, generator=g) + torch.tensor([[200.0], [-200.0], [0.0], [90.0]]), -1)]    # rows far apart


register(FittingCheck(
    name="softmax", reference=softmax, cases=_softmax_cases, tolerance=1e-5,
    source="lib.checks_02:softmax lib.attention:attention",
    praise="Right: every row is a set of shares that sums to 1, and large scores do no harm.",
    hints=["A softmax is exp(scores), divided by its sum along `dim`. keepdim=True keeps the sum divisible.",
           "exp(200) is infinite in float32. What happens to the shares if you subtract the same number from "
           "a whole row?",
           "Subtract scores.amax(dim, keepdim=True) before exp: the largest exponent is then 0."],
    fitting=lambda g: [(torch.randn(5, 5, 5, generator=g), 1)],
    misfits=[
        Wrong("no keepdim", lambda scores, dim: scores.exp() / scores.exp().sum(dim), NO_KEEPDIM),
        Wrong("no keepdim", lambda scores, dim: _exp(scores, dim) / _exp(scores, dim).sum(dim), NO_KEEPDIM),
        Wrong("no keepdim", lambda scores, dim: _shared((scores - scores.amax(dim)).exp(), dim), NO_KEEPDIM),
    ],
    wrongs=[
        Wrong("overflow", lambda scores, dim: scores.exp() / scores.exp().sum(dim, keepdim=True),
              "right for small scores, but exp(200) is infinite, and infinite / infinite is NaN: subtract "
              "the row's maximum first, which changes no share."),
        Wrong("one maximum for all rows", lambda scores, dim: _shared((scores - scores.max()).exp(), dim),
              "you subtract one maximum from the whole tensor: a row far below it becomes exp(-400) = 0 everywhere, "
              "and 0 / 0 is NaN. Subtract each row's own: scores.amax(dim, keepdim=True)."),
        Wrong("clamped", lambda scores, dim: _shared(scores.clamp(max=80).exp(), dim),
              "you cut large scores off, so that all of them get the same share: subtract the row's maximum instead, "
              "which changes no share."),
        Wrong("not divided", _exp,
              "these are the exponentials, not yet shares: divide by their sum along `dim`, with keepdim=True."),
        Wrong("always the last axis", lambda scores, dim: scores.softmax(-1), LAST_AXIS),
        Wrong("always the last axis, no maximum", lambda scores, dim: _shared(scores.exp(), -1),
              LAST_AXIS + OVERFLOW_TOO),
        Wrong("the other axis", lambda scores, dim: scores.softmax(-2 if dim == -1 else -1),
              "you normalise along the wrong axis: the columns sum to 1, not the rows. Use `dim`, with "
              "keepdim=True."),
        Wrong("over everything", lambda scores, dim: scores.flatten().softmax(0).view_as(scores), OVER_ALL),
        Wrong("over everything, no maximum", lambda scores, dim: _shared(scores.exp()), OVER_ALL + OVERFLOW_TOO),
        Wrong("sum over everything", lambda scores, dim: _shared(_exp(scores, dim)),
              OVER_ALL + " (The maximum you took along `dim` is right.)"),
        Wrong("no exp", lambda scores, dim: scores / scores.sum(dim, keepdim=True),
              "you normalise the scores themselves, which gives negative shares: take exp first."),
        Wrong("logarithm", lambda scores, dim: scores.log_softmax(dim),
              "this is the logarithm of the softmax: the rows should sum to 1."),
    ]))


# ---------------------------------------------------------------- 2. scaled dot-product attention

def scaled_attention(q, k, v):
    """softmax(Q K^T / sqrt(d)) V: q (B, Nq, d), k (B, Nk, d), v (B, Nk, dv) -> (B, Nq, dv)."""
    d = q.shape[-1]
    scores = q @ k.transpose(-1, -2) / math.sqrt(d)
    return scores.softmax(dim=-1) @ v


def _untransposed(q, k, v):
    return (q @ k / math.sqrt(q.shape[-1])).softmax(-1) @ v


def _attention_cases(g):
    return [(torch.randn(2, nq, d, generator=g) * 1.5, torch.randn(2, nk, d, generator=g) * 1.5,
             torch.randn(2, nk, dv, generator=g)) for nq, nk, d, dv in ((5, 7, 16, 6), (9, 4, 8, 3))]


NOT_TRANSPOSED = ("K is not transposed: Q (Nq, d) times K (Nk, d) do not fit. Each query is compared with "
                  "each key, so the scores are Q K^T, of shape (Nq, Nk): use k.transpose(-1, -2).")


def _mistake(scale=lambda q, k, v: math.sqrt(q.shape[-1]), axis=-1):
    """A mistaken attention: another divisor of the scores, or another axis of the softmax."""
    return lambda q, k, v: (q @ k.transpose(-1, -2) / scale(q, k, v)).softmax(axis) @ v


register(FittingCheck(
    name="scaled_attention", reference=scaled_attention, cases=_attention_cases,
    fitting=lambda g: [tuple(torch.randn(4, 4, 4, generator=g) for _ in range(3))],
    misfits=[
        Wrong("K not transposed", _untransposed, NOT_TRANSPOSED),
        Wrong("k.T turns the batch, too",
              lambda q, k, v: (q @ k.permute(2, 1, 0) / math.sqrt(q.shape[-1])).softmax(-1) @ v,
              "k.T reverses all three axes, the batch among them. Only the last two should change places: "
              "k.transpose(-1, -2), or k.mT."),
        Wrong("multiplied place by place",
              lambda q, k, v: (q * k / math.sqrt(q.shape[-1])).softmax(-1) * v,
              "* multiplies number by number; every query with every key is the matrix product: q @ "
              "k.transpose(-1, -2), and then weights @ v."),
        Wrong("weights times V place by place",
              lambda q, k, v: (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) * v,
              "the weights are right, but * multiplies number by number; mixing the values is the matrix product "
              "weights @ v."),
    ],
    source="lib.checks_02:scaled_attention lib.attention:attention",
    praise="Right: equal to PyTorch's scaled_dot_product_attention. You have built the heart of every "
           "transformer.",
    hints=["Three steps: scores of every query with every key, softmax over the keys, weighted sum of the "
           "values.",
           "scores = q @ k.transpose(-1, -2) / sqrt(d), with d the width of one query, q.shape[-1].",
           "scores.softmax(dim=-1) makes each query's row of weights sum to 1; then weights @ v."],
    wrongs=[
        Wrong("no scale", _mistake(lambda q, k, v: 1.0),
              "the division by sqrt(d) is missing: the scores grow with the width d, and the softmax turns "
              "into a hard choice (section 4)."),
        Wrong("softmax over the queries", _mistake(axis=-2),
              "the softmax runs over the wrong axis: over the queries (dim=-2) instead of over the keys "
              "(dim=-1). Each query's weights must sum to 1."),
        Wrong("softmax over the batch", _mistake(axis=0),
              "the softmax runs over the batch, so pictures share one attention among them (F.softmax without dim "
              "does that to three axes). Each query's weights over the keys must sum to 1: dim=-1."),
        Wrong("divided by d", _mistake(lambda q, k, v: q.shape[-1]),
              "you divide by d, not by sqrt(d): the scores get too small and every query looks everywhere "
              "alike."),
        Wrong("multiplied by sqrt(d)", _mistake(lambda q, k, v: q.shape[-1] ** -0.5),
              "you multiply by sqrt(d) where you should divide: the softmax picks one key and ignores the "
              "rest."),
        Wrong("sqrt of the number of keys", _mistake(lambda q, k, v: math.sqrt(k.shape[-2])),
              "you divide by the square root of the number of keys; d is the width of one query, "
              "q.shape[-1]."),
        Wrong("sqrt of the number of queries", _mistake(lambda q, k, v: math.sqrt(q.shape[-2])),
              "you divide by the square root of the number of queries (q.shape[1]); d is the width of one query, "
              "q.shape[-1]."),
        Wrong("sqrt of the batch", _mistake(lambda q, k, v: math.sqrt(len(q))),
              "you divide by the square root of the number of pictures (len(q), q.shape[0]); d is the width of one "
              "query, q.shape[-1]."),
        Wrong("sqrt of the values' width", _mistake(lambda q, k, v: math.sqrt(v.shape[-1])),
              "you take the width of the values; d is the width of queries and keys, q.shape[-1]: their dot "
              "product is what grows with d."),
        Wrong("scaled after the softmax",
              lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) / math.sqrt(q.shape[-1]) @ v,
              "you divide the weights, not the scores: each row then sums to 1 / sqrt(d). Divide before the "
              "softmax."),
        Wrong("weights returned",
              lambda q, k, v: (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1),
              "these are the weights, and they are right; the answer is the values mixed by them: weights @ "
              "v."),
        Wrong("K reshaped", lambda q, k, v: (q @ k.reshape(k.shape[0], k.shape[2], k.shape[1])
                                             / math.sqrt(q.shape[-1])).softmax(-1) @ v,
              "you reshape K to (d, Nk), which mixes up its numbers; transposing is another thing: "
              "k.transpose(-1, -2)."),
        Wrong("scores returned", lambda q, k, v: q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]),
              "these are the scores, and they are right; their softmax along the keys gives the weights, and weights "
              "@ v the answer."),
        Wrong("V unweighted", lambda q, k, v: v.mean(1, keepdim=True).expand(-1, q.shape[1], -1),
              "every query gets the plain mean of all values: the weights are not used. Multiply: weights @ "
              "v."),
        Wrong("no softmax", lambda q, k, v: q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) @ v,
              "the softmax is missing: raw scores are no shares, they are negative at times and do not sum "
              "to 1."),
    ]))


# ---------------------------------------------------------------- 3. several heads

def multi_head(q, k, v, heads):
    """Attention in `heads` separate groups of channels: q (B, Nq, C), k, v (B, Nk, C) -> (B, Nq, C).

    Head h has channels h * d to (h + 1) * d - 1, with d = C / heads, and divides its scores by sqrt(d).
    """
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)          # (B, heads, N, d)
    q, k, v = split(q), split(k), split(v)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _heads_cases(g):
    return [(torch.randn(2, nq, c, generator=g) * 1.5, torch.randn(2, nk, c, generator=g) * 1.5,
             torch.randn(2, nk, c, generator=g), heads)
            for nq, nk, c, heads in ((6, 4, 12, 3), (8, 8, 16, 4))]


_split = lambda x, heads: x.unflatten(-1, (heads, -1)).transpose(1, 2)
_mixed = lambda x, heads: x.unflatten(-1, (-1, heads)).permute(0, 3, 1, 2)    # channel c to head c % heads
_cut = lambda x, heads: x.reshape(x.shape[0], heads, x.shape[1], -1)          # cuts tokens, not channels
_merge = lambda x: x.transpose(1, 2).flatten(2)
_plain = lambda q, k, v, d: (q @ k.transpose(-1, -2) / math.sqrt(d)).softmax(-1) @ v


def _headed(scale=lambda d, heads: d, axis=-1, split=_split, merge=_merge):
    """Mistaken heads: another divisor of the scores (its square), axis of the softmax, split or merge."""
    def answer(q, k, v, heads):
        d = q.shape[-1] // heads
        q, k, v = (split(x, heads) for x in (q, k, v))
        return merge((q @ k.transpose(-1, -2) / math.sqrt(scale(d, heads))).softmax(axis) @ v)
    return answer


register(FittingCheck(
    name="multi_head", reference=multi_head, cases=_heads_cases,
    fitting=lambda g: [(*(torch.randn(2, 6, 12, generator=g) for _ in range(3)), 3)],
    misfits=[
        Wrong("heads not moved", _headed(split=lambda x, heads: x.unflatten(-1, (heads, -1)),
                                         merge=lambda x: x.flatten(2)),
              "after the split the axes are (B, N, heads, d), so the heads of one token look at each other. Tokens "
              "should look at tokens: move the heads beside the batch with transpose(1, 2), and back at the end."),
    ],
    source="lib.checks_02:multi_head lib.attention:split_heads lib.attention:merge_heads",
    praise="Right: each head looks for something of its own, and the heads stand side by side again at the "
           "end.",
    hints=["Split the channels into (heads, d), and move the heads' axis beside the batch: (B, heads, N, d).",
           "x.unflatten(-1, (heads, -1)).transpose(1, 2). Then attention as before, with d = C / heads.",
           "Undo the split at the end: out.transpose(1, 2).flatten(2)."],
    wrongs=[
        Wrong("sqrt of the model width", lambda q, k, v, heads: _merge(
            _plain(_split(q, heads), _split(k, heads), _split(v, heads), q.shape[-1])),
              "you divide by the square root of the model's width C; each head compares vectors of width d = "
              "C / heads, so it divides by sqrt(d)."),
        Wrong("sqrt of the number of heads", _headed(scale=lambda d, heads: heads),
              "you divide by the square root of the number of heads; a score is a sum over the d = C / heads channels "
              "of one head, so it is sqrt(d)."),
        Wrong("softmax over the queries", _headed(axis=-2),
              "the softmax runs over the queries (dim=-2) instead of over the keys (dim=-1): each query's weights "
              "must sum to 1."),
        Wrong("softmax over the heads", _headed(axis=1),
              "the softmax runs over the heads (dim=1), so that they share one attention; each head's weights must "
              "sum to 1 over the keys: dim=-1."),
        Wrong("not merged", _headed(merge=lambda x: x),
              "the heads are right, but still apart, (B, heads, N, d): put them side by side with transpose(1, "
              "2).flatten(2)."),
        Wrong("heads added", _headed(merge=lambda x: x.sum(1)),
              "you add the heads; they stand side by side: head h fills channels h * d to (h + 1) * d - 1."),
        Wrong("one head", lambda q, k, v, heads: _plain(q, k, v, q.shape[-1]),
              "this is attention with a single head: split the channels first, so that each head has weights "
              "of its own."),
        Wrong("heads interleaved", lambda q, k, v, heads: _mixed_answer(q, k, v, heads),
              "the heads are interleaved wrongly: you give every heads-th channel to a head. Head 0 has the "
              "first d channels: unflatten(-1, (heads, -1)), not (-1, heads)."),
        Wrong("tokens cut, not channels", lambda q, k, v, heads: _merge(
            _plain(_cut(q, heads), _cut(k, heads), _cut(v, heads), q.shape[-1] // heads)),
              "you reshape (B, N, C) straight to (B, heads, N, d), which cuts the list of tokens and not the "
              "channels: unflatten the last axis, then transpose."),
        Wrong("merged without transposing", lambda q, k, v, heads: _plain(
            _split(q, heads), _split(k, heads), _split(v, heads), q.shape[-1] // heads).reshape(q.shape),
              "the heads are right, but put together wrongly: transpose (B, heads, N, d) to (B, N, heads, d) "
              "before you flatten the last two axes."),
        Wrong("heads averaged", lambda q, k, v, heads: _plain(
            _split(q, heads), _split(k, heads), _split(v, heads), q.shape[-1] // heads
        ).mean(1).repeat(1, 1, heads),
              "you average the heads; they stand side by side: head h fills channels h * d to (h + 1) * d - "
              "1."),
        Wrong("no scale", lambda q, k, v, heads: _merge(
            _plain(_split(q, heads), _split(k, heads), _split(v, heads), 1)),
              "the division by sqrt(d) is missing, with d = C / heads."),
    ]))


def _mixed_answer(q, k, v, heads):
    out = _plain(_mixed(q, heads), _mixed(k, heads), _mixed(v, heads), q.shape[-1] // heads)
    return out.permute(0, 2, 3, 1).flatten(2)


# ---------------------------------------------------------------- 4. the bill

def attention_cost(tokens, heads, head_width):
    """Self-attention of one picture: (numbers in all score matrices, multiply-adds of both products)."""
    scores = heads * tokens**2
    return scores, 2 * scores * head_width


register(Check(
    name="attention_cost", reference=attention_cost, tolerance=1e-9,
    cases=lambda g: [(4096, 8, 40), (256, 4, 16), (64, 3, 24)],
    source="lib.checks_02:attention_cost lib.attention:cost",
    praise="Right: twice as many tokens, four times the bill. That is why the layers sit at low resolutions.",
    hints=["How many rows has one score matrix, and how many columns? And there is one for each head.",
           "One score is a dot product of two vectors of width d: d multiply-adds. weights @ V costs as much "
           "again.",
           "scores = heads * tokens ** 2, and 2 * scores * head_width multiply-adds."],
    wrongs=[
        Wrong("one head", lambda tokens, heads, head_width: (tokens**2, 2 * tokens**2 * head_width),
              "you count one head: every head has a score matrix of its own."),
        Wrong("heads forgotten in the products", lambda tokens, heads, head_width: (
            heads * tokens**2, 2 * tokens**2 * head_width),
              "the scores are right, but you count the products of one head only: every head has its own two."),
        Wrong("heads forgotten in the scores", lambda tokens, heads, head_width: (
            tokens**2, 2 * heads * tokens**2 * head_width),
              "the products are right, but you count the scores of one head only: every head has a matrix of its "
              "own."),
        Wrong("other order", lambda tokens, heads, head_width: (
            2 * heads * tokens**2 * head_width, heads * tokens**2),
              "both numbers are right, in the other order: the scores first, then the multiply-adds."),
        Wrong("width forgotten", lambda tokens, heads, head_width: (heads * tokens**2, 2 * heads * tokens**2),
              "one score is not one multiply-add: it is a dot product over the head's width, so it takes head_width "
              "of them."),
        Wrong("linear", lambda tokens, heads, head_width: (heads * tokens, 2 * heads * tokens * head_width),
              "you count one score for each token; every token looks at every token, so there are tokens ** "
              "2 for each head."),
        Wrong("only Q "
              "K^T", lambda tokens, heads, head_width: (heads * tokens**2, heads * tokens**2 * head_width),
              "you count the multiply-adds of Q K^T only; weights V costs the same once more."),
        Wrong("multiplications and additions", lambda tokens, heads, head_width: (
            heads * tokens**2, 4 * heads * tokens**2 * head_width),
              "you count a multiplication and an addition as two; a multiply-add is one (two of them would "
              "be FLOPs)."),
        Wrong("size of Q", lambda tokens, heads, head_width: (
            heads * tokens * head_width, 2 * heads * tokens**2 * head_width),
              "the first number is the size of Q; a score matrix is tokens x tokens, whatever the head's "
              "width."),
        Wrong("each pair once", lambda tokens, heads, head_width: (
            heads * tokens * (tokens - 1) // 2, heads * tokens * (tokens - 1) * head_width),
              "you count each pair once; but a's query with b's key is another score than b's query with a's "
              "key, and every token looks at itself, too."),
    ]))


# ---------------------------------------------------------------- 5. a masked blend of keys (or values)

def blend_tokens(own, source, mask, size):
    """(1 - m) own + m source, token by token. own, source (B, h w, C), mask (B, 1, H, W), size (h, w).

    m is the share of each token's area that lies under the mask (COURSE 4, FeatGLaC).
    """
    m = F.adaptive_avg_pool2d(mask, size).flatten(2).transpose(1, 2)        # (B, N, 1)
    return (1 - m) * own + m * source


def _blend_cases(g):
    """Masks of squares that do not fit the tokens' grid: only the mean over a token gives its share."""
    def mask(b, h, w):
        squares = (torch.rand(b, 1, 2 * h, 2 * w, generator=g) > 0.8).float()
        return F.interpolate(squares, scale_factor=4).roll((1, 2), (-2, -1))

    cases = [(*(torch.randn(b, h * w, c, generator=g) for _ in range(2)), mask(b, h, w), (h, w))
             for b, h, w, c in ((1, 4, 6, 5), (2, 3, 5, 4), (1, 4, 4, 6))]
    own, source, hard, size = cases[-1]
    cases[-1] = own, source, hard * torch.rand(hard.shape, generator=g), size       # a soft mask: any share in [0, 1]
    return cases


def _with(weights, mix=lambda own, source, m: (1 - m) * own + m * source):
    return lambda own, source, mask, size: mix(own, source, weights(mask, size))


_tokens = lambda m: m.flatten(2).transpose(1, 2)
_share = lambda mask, size: _tokens(F.adaptive_avg_pool2d(mask, size))

NOT_A_COLUMN = ("the pooled mask has its tokens along the last axis, where own has its channels: it should be "
                 "(B, N, 1), one number for each token's row. flatten(2) gives (B, 1, N); then transpose(1, 2).")

register(FittingCheck(
    name="blend_tokens", reference=blend_tokens, cases=_blend_cases,
    fitting=lambda g: [(*torch.randn(2, 1, 4, 4, generator=g), torch.rand(1, 1, 8, 8, generator=g), (2, 2))],
    misfits=[
        Wrong("mask not transposed", _with(lambda mask, size: F.adaptive_avg_pool2d(mask, size).flatten(2)),
              NOT_A_COLUMN),
    ],
    source="lib.checks_02:blend_tokens lib.attention:pool_mask",
    praise="Right: this line, for keys and for values at every layer and step, is what FeatGLaC does (lesson "
           "08).",
    hints=["The mask has one number for each pixel, own has one row for each token: pool the mask to (h, w) "
           "first.",
           "F.adaptive_avg_pool2d(mask, size) is (B, 1, h, w). Tokens are counted row by row: flatten(2) "
           "keeps that order.",
           "m = F.adaptive_avg_pool2d(mask, size).flatten(2).transpose(1, 2), then (1 - m) * own + m * "
           "source."],
    wrongs=[
        Wrong("mask inverted", _with(_share, lambda own, source, m: m * own + (1 - m) * source),
              "the mask is inverted: where it is 1, the source's tokens should come in."),
        Wrong("added", _with(_share, lambda own, source, m: own + m * source),
              "you add the source on top of the own tokens; a blend takes the own ones away by as much: (1 - "
              "m) * own."),
        Wrong("nearest pixel",
              _with(lambda mask, size: _tokens(F.interpolate(mask, size=size, mode="nearest"))),
              "you take one pixel of the mask for each token; a token covers a whole square of pixels, and m "
              "is the share of it under the mask: average-pool."),
        Wrong("bilinear", _with(lambda mask, size: _tokens(F.interpolate(mask, size=size, mode="bilinear"))),
              "bilinear interpolation looks at the four pixels around each token's middle only; m is the "
              "share of the whole token: average-pool."),
        Wrong("hard edge", _with(lambda mask, size: (_share(mask, size) > 0.5).float()),
              "you make the pooled mask 0 or 1: keep the soft shares at the edge, or the seam will show."),
        Wrong("hard mask", _with(lambda mask, size: _share((mask > 0.5).float(), size)),
              "you make the mask 0 or 1 before you pool it: its values may lie anywhere in [0, 1] (a soft edge), and "
              "each counts with its own share."),
        Wrong("own tokens lost", _with(_share, lambda own, source, m: m * source),
              "the source's part is right, but the own tokens are gone: add (1 - m) * own."),
        Wrong("one mask for all pictures", _with(lambda mask, size: _share(mask[:1], size)),
              "you use the first picture's mask for the whole batch: every picture has a mask of its own."),
        Wrong("height and width swapped", _with(lambda mask, size: _share(mask, size[::-1])),
              "you pool the mask to (w, h); size is (h, w) already, as adaptive_avg_pool2d wants it."),
        Wrong("any pixel", _with(lambda mask, size: _tokens(F.adaptive_max_pool2d(mask, size))),
              "you use the largest mask value under a token (max-pooling), which swells the mask: take the "
              "mean."),
        Wrong("column by column",
              _with(lambda mask, size: _tokens(F.adaptive_avg_pool2d(mask, size).transpose(-1, -2))),
              "you list the tokens column by column; the U-Net flattens its grid row by row: flatten(2) "
              "without swapping height and width."),
        Wrong("replaced everywhere", lambda own, source, mask, size: source,
              "you replace all tokens: outside the mask the own ones must stay."),
    ]))
