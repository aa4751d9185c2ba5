"""Self-attention from scratch, and recording and injecting its keys and values in any SD-1.x-shaped U-Net.

`record` and `inject` are context managers over diffusers' attention processors. They put back exactly the
processors they found, also after an exception, and on leaving they check that every layer fired as often as
the U-Net was called: a patch that silently does not apply is the field's most common bug.

    with record(pipe.unet, layers="up") as bank:
        diffusion.invert(pipe, z0, "a red chair")          # K and V of every step, filed under its timestep
    with inject(pipe.unet, bank, mask=keep, strength=0.8, window=(0, 0.6)):
        diffusion.sample(pipe, "a red chair", latents=noise)

Sources: Vaswani et al. 2017 (attention); MasaCtrl (masked K/V), StyleAligned (concatenated K/V); COURSE's
FeatGLaC.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


def attention(q, k, v, bias=None, return_weights=False):
    """softmax(Q K^T / sqrt(d)) V: q (..., Nq, d), k (..., Nk, d), v (..., Nk, dv) -> (..., Nq, dv).

    bias: added to the scores before the softmax (-inf forbids a key). Equal to SDPA. Half precision is worked
    out in float32, as SDPA does inside: q . k passes float16's 65504 easily. The answer has q's dtype.
    """
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v, bias = (x if x is None else x.float() for x in (q, k, v, bias))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = (scores if bias is None else scores + bias).softmax(dim=-1)
    out = (weights @ v).to(dtype)
    return (out, weights.to(dtype)) if return_weights else out


def split_heads(x, heads) -> torch.Tensor:
    """(B, N, heads * d) -> (B, heads, N, d): the first d channels belong to the first head, and so on."""
    if x.shape[-1] % heads:
        raise ValueError(f"{x.shape[-1]} channels cannot be shared out evenly among {heads} heads.")
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x) -> torch.Tensor:
    """(B, heads, N, d) -> (B, N, heads * d): undoes `split_heads`."""
    return x.transpose(1, 2).flatten(2)


def cost(tokens, heads, head_width, keys=None) -> dict:
    """What one attention layer has to hold and do for one picture, projections not counted.

    tokens: queries; keys: tokens they look at (as many by default, as in self-attention; 77 words in SD's
    cross-attention). Returns {"scores": numbers in all score matrices, "multiply_adds": of Q K^T and of
    weights V}.
    """
    scores = heads * tokens * (tokens if keys is None else keys)
    return {"scores": scores, "multiply_adds": 2 * scores * head_width}


# ---------------------------------------------------------------- which layers
KINDS = {"self": "attn1", "cross": "attn2"}  # diffusers' names: the picture looks at itself; at the words


@dataclass(frozen=True)
class Layer:
    """One attention layer: its place (down, mid, up) and its side as a fraction of the latent's."""

    name: str
    place: str
    fraction: float


def block_fractions(unet) -> dict:
    """Module name of each U-Net block -> side of the grid its layers work on, relative to the latent's."""
    fractions, f = {}, 1.0
    for i, block in enumerate(unet.down_blocks):
        fractions[f"down_blocks.{i}"] = f
        f = f / 2 if getattr(block, "downsamplers", None) else f
    fractions["mid_block"] = f
    for i, block in enumerate(unet.up_blocks):
        fractions[f"up_blocks.{i}"] = f
        f = f * 2 if getattr(block, "upsamplers", None) else f
    return fractions


def grid(layer, size) -> tuple:
    """Rows and columns of a layer's tokens for a latent of size (h, w): halvings round up, as there."""
    halvings = round(math.log2(1 / layer.fraction))
    return tuple(math.ceil(side / 2**halvings) for side in size)


def layers(unet, kind="self") -> list:
    """All self-attention layers (`attn1`), in the order in which the U-Net runs them: a list of `Layer`.

    kind="cross": the cross-attention layers (`attn2`), in which the picture looks at the words.
    """
    if kind not in KINDS:
        raise ValueError(f'kind is "self" or "cross", not {kind!r}.')
    fractions = block_fractions(unet)
    found = [name for name, _ in unet.named_modules() if name.endswith(f".{KINDS[kind]}")]
    listed = []
    for block, fraction in fractions.items():
        place = block.split("_")[0]
        listed += [Layer(n, place, fraction) for n in found if n.startswith(block + ".")]
    return listed


def select(unet, which="all", kind="self") -> list:
    """Choose layers: "all", "down", "mid", "up", a fraction (0.5), a name, a Layer, or a list of these."""
    known = layers(unet, kind)
    if not known:
        raise ValueError(f"This U-Net has no {kind}-attention layer ({KINDS[kind]}).")
    wanted = which if isinstance(which, (list, tuple, set)) else [which]
    if not wanted:
        raise ValueError('The list of layers is empty; use "all", "up", a fraction such as 0.5, or names.')

    def fits(layer, w):
        if isinstance(w, Layer):
            return layer == w
        return w in ("all", layer.place, layer.name) if isinstance(w, str) else layer.fraction == w

    for w in wanted:
        if not any(fits(layer, w) for layer in known):
            raise ValueError(
                f'No {kind}-attention layer fits {w!r}; known are "all", "down", "mid", "up", the '
                f"fractions {sorted({x.fraction for x in known}, reverse=True)} and the names "
                f"{[x.name for x in known]}."
            )
    return [layer for layer in known if any(fits(layer, w) for w in wanted)]


# ---------------------------------------------------------------- the bank
@dataclass
class Bank:
    """Recorded tensors: `store[(timestep, layer name)]` = {"k": (B, N, C), "v": ...}, heads not split.

    B is the number of pictures in the recorded calls. `bytes` says how much memory it takes. size: the
    latent's (h, w), from which `attention_map` knows each layer's grid.
    """

    names: list
    store: dict = field(default_factory=dict)
    size: tuple = None

    @property
    def timesteps(self) -> list:
        return sorted({t for t, _ in self.store})

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for parts in self.store.values() for x in parts.values())

    def at(self, t: int, name: str) -> dict:
        if (t, name) not in self.store:
            raise ValueError(
                f"Nothing was recorded for timestep {t} in {name}; recorded: layers {self.names}, "
                f"timesteps {self.timesteps}. Record with the same steps, layers and window."
            )
        return self.store[t, name]


def attention_map(bank, layer, t, query=None, key=None) -> torch.Tensor:
    """Recorded weights ("w") of one layer as maps over its grid: (B, heads, h, w).

    query: a token; where does this place look? (self-attention; each map sums to 1).
    key: a token; which places look at it? (a word, in cross-attention; at each place the sum over all words
    is 1). Raises ValueError when the bank holds no weights, or unless exactly one of query and key is given.
    """
    if (query is None) == (key is None):
        raise ValueError("Give either query= (where does this place "
                         "look?) or key= (which places look at it?).")
    parts = bank.at(t, layer.name)
    if "w" not in parts:
        raise ValueError(f'The bank holds only {sorted(parts)}; record with what="w" to see the weights.')
    w, (rows, columns) = parts["w"], grid(layer, bank.size)
    axis, index = (2, query) if key is None else (3, key)
    if not 0 <= index < w.shape[axis]:
        raise ValueError(f"{layer.name} has tokens 0 to {w.shape[axis] - 1} there, not {index}.")
    flat = w.select(axis, index)
    if flat.shape[-1] != rows * columns:
        raise ValueError(f"{layer.name} looks at {flat.shape[-1]} words, not at places: ask with key=.")
    return flat.unflatten(-1, (rows, columns))


def token_at(size, x, y) -> int:
    """The token of a grid of size (h, w) under the point (x, y): 0 to 1 from the left and from the top."""
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"x and y run from 0 (left, top) to 1 (right, bottom); they are {x} and {y}.")
    h, w = size
    return min(int(y * h), h - 1) * w + min(int(x * w), w - 1)


# ---------------------------------------------------------------- the processor
class TapProcessor:
    """diffusers' AttnProcessor2_0 written out, with a place to read or change q, k and v.

    `edit(name, q, k, v, run)` returns the heads' output (B, heads, N, d); `run(k, v)` is plain attention.
    In a layer named attn2 keys and values are made of the text features: cross-attention.
    """

    def __init__(self, name, edit):
        self.name, self.edit, self.calls = name, edit, 0
        self.cross = name.endswith(KINDS["cross"])

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        if not self.cross and encoder_hidden_states is not None:
            raise RuntimeError(
                f"{self.name} got text features: the tap belongs on self-attention (attn1) only."
            )
        if self.cross and encoder_hidden_states is None:
            raise RuntimeError(f"{self.name} got no text features: "
                               "this tap belongs on cross-attention (attn2).")
        self.calls += 1
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        grid = x.shape
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        context = encoder_hidden_states
        if context is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        keys = x.shape[1] if context is None else context.shape[1]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, keys, x.shape[0])
            attention_mask = attention_mask.view(x.shape[0], attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if context is None else context
        q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)

        def run(k, v, bias=None, q=q):
            query, key, value = (split_heads(y, attn.heads) for y in (q, k, v))
            query = query if attn.norm_q is None else attn.norm_q(query)
            key = key if attn.norm_k is None else attn.norm_k(key)
            bias = (
                attention_mask if bias is None else bias if attention_mask is None else bias + attention_mask
            )
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

        out = self.edit(self.name, q, k, v, run)
        out = merge_heads(out).to(q.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        if len(grid) == 4:
            out = out.transpose(1, 2).reshape(grid)
        out = out + hidden_states if attn.residual_connection else out
        return out / attn.rescale_output_factor


class Clock:
    """Follows the U-Net's calls by a pre-hook: timestep, latent shape, number of calls."""

    def __init__(self):
        self.t, self.shape, self.calls, self.active_calls = None, None, 0, 0
        self.is_active = lambda t: True

    def __call__(self, module, args, kwargs):
        sample = args[0] if args else kwargs["sample"]
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        if torch.is_tensor(t) and t.ndim and not (t == t.flatten()[0]).all():
            raise ValueError("One U-Net call with several timesteps cannot be recorded or injected into.")
        self.t = int(t.flatten()[0]) if torch.is_tensor(t) else int(t)
        self.shape = tuple(sample.shape)
        self.calls += 1
        self.active_calls += self.is_active(self.t)

    @property
    def active(self) -> bool:
        return self.is_active(self.t)


@contextmanager
def tapped(unet, chosen, edit, clock, what):
    """Install taps on the chosen layers; restore whatever happens; check the counts on leaving."""
    modules = {layer.name: unet.get_submodule(layer.name) for layer in chosen}
    busy = [name for name, m in modules.items() if isinstance(m.processor, TapProcessor)]
    if busy:
        raise RuntimeError(
            f"{busy[0]} is already being recorded or injected into: leave that `with` block first."
        )
    before = {name: m.processor for name, m in modules.items()}
    taps = {name: TapProcessor(name, edit) for name in modules}
    handle = unet.register_forward_pre_hook(clock, with_kwargs=True)
    try:
        for name, m in modules.items():
            m.set_processor(taps[name])
        yield
        for name, m in modules.items():
            if m.processor is not taps[name] or taps[name].calls != clock.calls:
                raise RuntimeError(
                    f"{what}: {name} fired {taps[name].calls} times in {clock.calls} U-Net calls; "
                    "something replaced its processor."
                )
        if not clock.active_calls:
            raise RuntimeError(
                f"{what} never applied: {clock.calls} U-Net calls, none of them inside the window."
            )
    finally:
        handle.remove()
        for name, m in modules.items():
            m.set_processor(before[name])


def in_window(window, train_steps=1000):
    """window=(a, b), parts of the way 1 - t/1000 from noise (0) to picture (1) -> test of a timestep."""
    a, b = window
    if not 0 <= a < b <= 1:
        raise ValueError(
            f"A window is (start, stop) with 0 <= start < stop <= 1, from noise to picture, not {window}."
        )
    return lambda t: a <= 1 - t / train_steps < b or (b == 1 and t == 0)


@contextmanager
def record(unet, layers="all", window=(0.0, 1.0), what="kv", device=None, dtype=None, rows=None, kind="self"):
    """Record inside the `with` block; gives a `Bank`. A timestep that comes twice keeps the later call.

    what: which of "q", "k", "v" and "w" (the attention weights (B, heads, N, N): large), e.g. "kv".
    kind: "self" or "cross": with "cross", keys and values are the words', and "w" is (B, heads, N, words).
    device, dtype: where to keep it ("cpu" and torch.float16 spare the card's memory); by default as it is.
    rows: keep only these pictures of the batch (a slice), e.g. the conditional half of a guided call.
    """
    if not what or set(what) - set("qkvw"):
        raise ValueError(f"what may hold the letters q, k, v, w, not {what!r}.")
    chosen, clock = select(unet, layers, kind), Clock()
    clock.is_active = in_window(window)
    bank = Bank([layer.name for layer in chosen])

    def keep(x):
        x = x if rows is None else x[rows]
        return x.detach().to(device or x.device, dtype or x.dtype, copy=rows is not None)

    def edit(name, q, k, v, run):
        if clock.active:
            parts = {letter: keep(x) for letter, x in zip("qkv", (q, k, v)) if letter in what}
            if "w" in what:
                heads = unet.get_submodule(name).heads
                parts["w"] = keep(
                    attention(*(split_heads(y, heads) for y in (q, k, v)), return_weights=True)[1]
                )
            bank.store[clock.t, name] = parts
            bank.size = clock.shape[-2:]
        return run(k, v)

    with tapped(unet, chosen, edit, clock, "record"):
        yield bank


# ---------------------------------------------------------------- injection
def pool_mask(mask, size) -> torch.Tensor:
    """Mask (S, 1, H, W) -> weight per token (S, h*w, 1): the share of each token's area under the mask."""
    h, w = size
    return F.adaptive_avg_pool2d(mask.float(), (h, w)).flatten(2).transpose(1, 2)


def check_masks(masks, sources) -> torch.Tensor:
    """(S, 1, H, W) in [0, 1], sum over the S sources <= 1; a float stands for a constant."""
    if isinstance(masks, (int, float)):
        masks = torch.full((sources, 1, 1, 1), float(masks))
    if not torch.is_tensor(masks) or masks.ndim != 4 or masks.shape[1] != 1 or masks.shape[0] != sources:
        raise ValueError(
            f"{sources} source(s) need masks of shape ({sources}, 1, H, W), not "
            f"{tuple(getattr(masks, 'shape', ()))}."
        )
    if masks.min() < -1e-5 or masks.sum(0).max() > 1 + 1e-4:
        raise ValueError("The masks of all sources must lie in [0, 1] and sum to at most 1 at every pixel.")
    return masks


class _Shares:
    """How much of each source a layer's tokens take: the masks on its grid, times its strength; made once."""

    def __init__(self, unet, chosen, mask, strength, clock):
        known = {layer.fraction for layer in layers(unet)}
        each = strength if isinstance(strength, dict) else dict.fromkeys(known, strength)
        if set(each) - known:
            raise ValueError(f"strength names {sorted(each)}; this "
                             f"U-Net works at the fractions {sorted(known)}.")
        if any(not 0 <= s <= 1 for s in each.values()):
            raise ValueError(f"strength must lie in [0, 1], not {strength}.")
        self.layers, self.strength = {layer.name: layer for layer in chosen}, each
        self.mask, self.clock, self.checked, self.made = mask, clock, None, {}

    def __call__(self, name, sources, k) -> torch.Tensor:
        """(S, N, 1) for the S sources and the N tokens of keys k (B, N, C), in their dtype."""
        if self.checked is None:
            self.checked = check_masks(self.mask, sources)
        size = self.clock.shape[-2:]
        if (name, size) not in self.made:
            layer = self.layers[name]
            h, w = grid(layer, size)
            if h * w != k.shape[1]:
                raise ValueError(f"{name} has {k.shape[1]} tokens, but its grid should be {h}x{w}.")
            self.made[name, size] = pool_mask(self.checked, (h, w)) * self.strength.get(layer.fraction, 0.0)
        return self.made[name, size].to(k)


def _sources(source, t, name, k, v) -> tuple:
    """Keys and values (S, N, C) of the pictures that lead: the call's first, or the bank's at this time."""
    if isinstance(source, int):
        if len(k) <= source:
            raise ValueError(f"The U-Net call holds {len(k)} "
                             f"pictures, {source} of them sources: none is left.")
        return k[:source], v[:source]
    kept = source.at(t, name)
    if "k" not in kept or "v" not in kept:
        raise ValueError(f'The bank holds only {sorted(kept)}; record with what="kv" to inject it.')
    if kept["k"].shape[1:] != k.shape[1:]:
        raise ValueError(
            f"{name}: recorded {tuple(kept['k'].shape[1:])}, but the generation has {tuple(k.shape[1:])}: "
            "record and generate at the same picture size."
        )
    return kept["k"].to(k), kept["v"].to(v)


@contextmanager
def inject(unet, source, mask=1.0, strength=1.0, layers="all", window=(0.0, 1.0), parts="kv", mode="replace"):
    """Give self-attention the keys and values of other pictures, where the masks say so.

    source: a `Bank` of S pictures (from `record`), matched by timestep, so every step uses its own noise
        level; or an int S: the first S pictures of each U-Net call guide the rest (one batched call
        [fg, bg, generation, ...]).
    mask: (S, 1, H, W), one per source picture, of any resolution (average-pooled to each layer's grid); where
        their sum is below 1 the generation keeps its own share.
    strength: in [0, 1], multiplies all masks; a dict {fraction: strength} sets it per resolution (0 where it
        says nothing).
    window: (start, stop) along the way from noise (0) to picture (1). parts: "k", "v" or "kv".
    mode: "replace": K <- (1 - m) K + m K_source, token by token (COURSE 4);
        "query": each *query* under a mask attends to that source's K/V, the outputs blended (MasaCtrl with
        masks); "concat": the sources' tokens join the own ones with weight m (StyleAligned).
    Own K/V at strength 1 change nothing (a test says so). With guidance both halves of a call are led alike.
    """
    if mode not in MODES:
        raise ValueError(f"Unknown mode {mode!r}; known: {', '.join(MODES)}.")
    if not parts or set(parts) - set("kv"):
        raise ValueError(f'parts must be "k", "v" or "kv", not {parts!r}.')
    if isinstance(source, int) and source < 1:
        raise ValueError("A batched call needs at least one source picture in front.")
    chosen, clock = select(unet, layers), Clock()
    clock.is_active = in_window(window)
    shares = _Shares(unet, chosen, mask, strength, clock)
    lead = source if isinstance(source, int) else 0  # pictures of each call that are sources, and stay

    def edit(name, q, k, v, run):
        if not clock.active:
            return run(k, v)
        k_src, v_src = _sources(source, clock.t, name, k, v)
        m = shares(name, len(k_src), k)
        k_src, v_src = (x if letter in parts else None for letter, x in (("k", k_src), ("v", v_src)))
        led = MODES[mode](q[lead:], k[lead:], v[lead:], k_src, v_src, m, run)
        return torch.cat([run(k[:lead], v[:lead], q=q[:lead]), led]) if lead else led

    with tapped(unet, chosen, edit, clock, "inject"):
        yield clock


def _blend(own, sources, m):
    """own (B, N, C), sources (S, N, C) or None (= keep own), m (S, N, 1): the masked blend."""
    if sources is None:
        return own
    return own + (m * sources).sum(0) - m.sum(0) * own


def _replace(q, k, v, k_src, v_src, m, run):
    return run(_blend(k, k_src, m), _blend(v, v_src, m), q=q)


def _query(q, k, v, k_src, v_src, m, run):
    # each query's output is a mixture: own attention with weight 1 - sum(m), source s's with weight m_s
    weights = m.unsqueeze(1)  # (S, 1, N, 1)
    out = run(k, v, q=q)
    mixed = out * (1 - weights.sum(0))
    for s in range(len(m)):
        k_s = k if k_src is None else k_src[s].expand_as(k)
        v_s = v if v_src is None else v_src[s].expand_as(v)
        mixed = mixed + weights[s] * run(k_s, v_s, q=q)
    return mixed


def _concat(q, k, v, k_src, v_src, m, run):
    # log(m) added to a source token's score multiplies its weight in the softmax by m; m = 0 removes it
    count, tokens = m.shape[:2]
    flat = lambda own, src: torch.cat(
        [own] + [own if src is None else src[s].expand_as(own) for s in range(count)], 1
    )
    bias = torch.cat([torch.zeros(tokens, device=m.device, dtype=m.dtype), m.flatten().log()])
    return run(flat(k, k_src), flat(v, v_src), bias.view(1, 1, 1, -1).to(q), q=q)


MODES = {"replace": _replace, "query": _query, "concat": _concat}


# ---------------------------------------------------------------- rules of one's own, and of the relatives
@contextmanager
def steer(unet, source, rule, layers="all", window=(0.0, 1.0)):
    """Let `rule(q, k, v, src, run)` answer for self-attention: `inject` for any rule.

    source: a `Bank` of one picture, or of as many as each U-Net call holds; src: what it holds for this layer
        at this timestep, {"q": (B, N, C), "k": ..., ...}, in the call's dtype. Record what the rule asks for.
    rule: gets the call's own q, k, v (B, N, C) and returns the heads' output (B, heads, N, d), as `run` gives
        it: run(k, v, bias=None, q=q) is plain attention. `masactrl`, `plug_and_play`, `style_aligned` are
        rules.
    window: (start, stop) from noise (0) to picture (1); outside it attention is plain.
    Raises ValueError where the bank lacks a part, timestep or layer, or fits no picture of the call.
    """
    chosen, clock = select(unet, layers), Clock()
    clock.is_active = in_window(window)

    def fit(name, x, k):
        if len(x) not in (1, len(k)) or x.shape[1:] != k.shape[1:]:
            raise ValueError(
                f"{name}: recorded {tuple(x.shape)}, but the generation has {tuple(k.shape)}: record one "
                "picture, or as many as are generated, at the same size."
            )
        return x.to(k).expand_as(k)

    def edit(name, q, k, v, run):
        if not clock.active:
            return run(k, v)
        kept = source.at(clock.t, name)
        src = {part: fit(name, x, k) for part, x in kept.items() if part in "qkv"}
        try:
            return rule(q, k, v, src, run)
        except KeyError as missing:
            raise ValueError(
                f"The rule asks for {missing}, but the bank holds only {sorted(kept)}: record it with what=."
            ) from None

    with tapped(unet, chosen, edit, clock, "steer"):
        yield clock


def adain(x, reference, eps=1e-5) -> torch.Tensor:
    """Adaptive instance normalisation: x (B, N, C) with the mean and spread of each channel of `reference`.

    Both are taken over the tokens N, for each picture and channel. Huang and Belongie 2017, eq. 8.
    """
    (mean, std), (to_mean, to_std) = (
        (y.mean(1, keepdim=True), (y.var(1, keepdim=True) + eps).sqrt()) for y in (x, reference)
    )
    return (x - mean) / std * to_std + to_mean


def masactrl(q, k, v, src, run):
    """Mutual self-attention (MasaCtrl, Cao et al. 2023): own queries look at the source's keys and values."""
    return run(src["k"], src["v"])


def plug_and_play(q, k, v, src, run):
    """Plug-and-Play (Tumanyan et al. 2023): the source's queries and keys (its weights), own values."""
    return run(src["k"], v, q=src["q"])


def style_aligned(q, k, v, src, run):
    """StyleAligned (Hertz et al. 2024): AdaIN on queries and keys; the source's tokens join the own ones."""
    q, k = adain(q, src["q"]), adain(k, src["k"])
    return run(torch.cat([src["k"], k], 1), torch.cat([src["v"], v], 1), q=q)


# ---------------------------------------------------------------- outputs of whole modules
@contextmanager
def hooked(unet, names, hook, clock, what):
    """Forward hooks `hook(name, output)` on modules of the U-Net; always removed, counted like `tapped`."""
    names = [names] if isinstance(names, str) else list(names)
    known = dict(unet.named_modules())
    for name in names:
        if name not in known:
            raise ValueError(f'This U-Net has no module {name!r}; names look like "up_blocks.1.resnets.1".')
    fired = dict.fromkeys(names, 0)

    def watch(name):
        def after(module, args, output):
            fired[name] += 1
            return hook(name, output)

        return after

    handles = [unet.register_forward_pre_hook(clock, with_kwargs=True)]
    handles += [known[name].register_forward_hook(watch(name)) for name in names]
    try:
        yield
        for name, count in fired.items():
            if count != clock.calls:
                raise RuntimeError(f"{what}: {name} fired {count} times in {clock.calls} U-Net calls.")
        if not clock.active_calls:
            raise RuntimeError(f"{what} never applied: {clock.calls} "
                               "U-Net calls, none of them inside the window.")
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_features(unet, names, window=(0.0, 1.0), device=None, dtype=None):
    """Record outputs of modules, e.g. "up_blocks.1.resnets.1": a `Bank` with {"out": (B, C, h, w)} per step.

    device, dtype: where and how to keep them, as in `record`.
    """
    clock, bank = Clock(), Bank([names] if isinstance(names, str) else list(names))
    clock.is_active = in_window(window)

    def keep(name, output):
        if clock.active:
            kept = output.detach().to(device or output.device, dtype or output.dtype)
            bank.store[clock.t, name] = {"out": kept}
            bank.size = clock.shape[-2:]

    with hooked(unet, bank.names, keep, clock, "record_features"):
        yield bank


@contextmanager
def inject_features(unet, bank, window=(0.0, 1.0)):
    """Put recorded module outputs in the place of the generation's own, by timestep (Plug-and-Play)."""
    clock = Clock()
    clock.is_active = in_window(window)

    def put(name, output):
        if not clock.active:
            return None
        kept = bank.at(clock.t, name)["out"]
        if len(kept) not in (1, len(output)) or kept.shape[1:] != output.shape[1:]:
            raise ValueError(
                f"{name}: recorded {tuple(kept.shape)}, but the generation has {tuple(output.shape)}: record "
                "one picture, or as many as are generated, at the same size."
            )
        return kept.to(output).expand_as(output)

    with hooked(unet, bank.names, put, clock, "inject_features"):
        yield clock
