"""The exercises of lesson 07: layers at a depth, laying them over one another, Otsu's threshold, soft edges, three layers."""
import torch
import torch.nn.functional as F

from lib.checks import Check, Wrong, register

# ---------------------------------------------------------------- 1. two layers from a threshold


def two_layers(image, depth, d):
    """image (B, 3, H, W), depth (B, 1, H, W), 0 = near -> two RGBA layers: what is nearer than d, and the rest.

    Alpha 1 where the layer is, and colour and alpha 0 elsewhere. A surface exactly at d is background."""
    mask = (depth < d).float()
    foreground = torch.cat([image * mask, mask], 1)
    background = torch.cat([image * (1 - mask), 1 - mask], 1)
    return foreground, background


def _layer_cases(g):
    cases = []
    for b, side in ((1, 16), (2, 24)):
        depth = (torch.rand(b, 1, side, side, generator=g) * 10).floor() / 10     # many pixels stand exactly at d
        cases.append((torch.rand(b, 3, side, side, generator=g), depth, 0.5))
    return cases


def _cut(image, near, far):
    return torch.cat([image * near, near], 1), torch.cat([image * far, far], 1)


def _coarse(image, depth, d):
    """The mask of the latent's resolution: a cell of 8 x 8 pixels is foreground as soon as one of them is."""
    cells = F.max_pool2d((depth < d).float(), 8)
    mask = F.interpolate(cells, depth.shape[-2:], mode="nearest")
    return _cut(image, mask, 1 - mask)


register(Check(
    name="two_layers", reference=two_layers, cases=_layer_cases,
    source="lib.checks_07:two_layers lib.deglad:split",
    praise="Right: no pixel is in both layers, none is lost, and their sum is the picture.",
    hints=["Depth is 0 = near, 1 = far. Which comparison picks what is NEARER than d, and what about depth == d?",
           "mask = (depth < d).float(); the background's alpha is 1 - mask, so the two can never overlap.",
           "A layer is torch.cat([image * alpha, alpha], 1): three colours and alpha. Return both."],
    wrongs=[
        Wrong("depth sign", lambda i, z, d: _cut(i, (z > d).float(), 1 - (z > d).float()),
              "the sign of depth is wrong: you took what is FARTHER than d as the foreground. Here 0 = "
              "near; raw inverse depth (MiDaS, DPT) is the other way round and is converted on the way in."),
        Wrong("swapped", lambda i, z, d: _cut(i, (z >= d).float(), (z < d).float()),
              "the two layers are swapped: return the foreground (depth < d) first, then the background."),
        Wrong("<= at the threshold", lambda i, z, d: _cut(i, (z <= d).float(), (z > d).float()),
              "you use <= : a surface exactly at d belongs to the BACKGROUND. Whole walls stand at one "
              "depth, and depth_at() gives exactly the depth of what was clicked, so the difference shows."),
        Wrong("overlap", lambda i, z, d: _cut(i, (z <= d).float(), (z >= d).float()),
              "the layers overlap: pixels exactly at d are in both (<= and >=), so their sum is too bright "
              "there. Make the second mask as 1 - the first."),
        Wrong("gap", lambda i, z, d: _cut(i, (z < d).float(), (z > d).float()),
              "pixels exactly at d are in neither layer (< and >), so they are lost: make the second mask "
              "as 1 - the first."),
        Wrong("colours kept", lambda i, z, d: (torch.cat([i, (z < d).float()], 1), torch.cat([i, (z >= d).float()], 1)),
              "alpha is right, but the whole picture still stands in both layers' colours: multiply the "
              "image by the mask."),
        Wrong("one mask for both", lambda i, z, d: (_cut(i, (z < d).float(), (z < d).float())[0],) * 2,
              "both layers use the foreground's mask: the background's alpha is 1 - mask."),
        Wrong("mask at the wrong resolution", _coarse,
              "your mask is as coarse as the latent (cells of 8 x 8 pixels): cut at the resolution of the "
              "picture, and make the small mask from it only where a network needs one."),
        Wrong("no alpha", lambda i, z, d: (i * (z < d), i * (z >= d)),
              "the alpha channel is missing: black in a layer could be a black thing or nothing at all. "
              "Put the mask behind the colours with torch.cat([..., mask], 1)."),
    ]))


# ---------------------------------------------------------------- 2. laying a straight-alpha layer over a picture

def lay_over(layer, below):
    """RGBA (B, 4, H, W) with straight alpha over RGB (B, 3, H, W): alpha * colour + (1 - alpha) * below."""
    colour, alpha = layer[:, :3], layer[:, 3:]
    return alpha * colour + (1 - alpha) * below


def _over_cases(g):
    return [(torch.rand(b, 4, 9, 12, generator=g), torch.rand(b, 3, 9, 12, generator=g)) for b in (1, 2)]


register(Check(
    name="lay_over", reference=lay_over, cases=_over_cases,
    source="lib.checks_07:lay_over lib.deglad:over",
    praise="Right: straight alpha is multiplied in once, here, and the layer's colours stay what the surface is.",
    hints=["Where alpha is 1 the result is the layer, where it is 0 what lies below. And between?",
           "layer[:, :3] is the colour (B, 3, H, W), layer[:, 3:] is alpha (B, 1, H, W).",
           "alpha * colour + (1 - alpha) * below"],
    wrongs=[
        Wrong("taken for premultiplied", lambda l, b: l[:, :3] + (1 - l[:, 3:]) * b,
              "you add the colour without alpha: that is the formula for PREMULTIPLIED layers. Ours are "
              "straight, so half-covered pixels come out too bright."),
        Wrong("premultiplied twice", lambda l, b: l[:, :3] * l[:, 3:] ** 2 + (1 - l[:, 3:]) * b,
              "alpha is multiplied into the colour twice: edges get a dark rim. Once is enough."),
        Wrong("alpha inverted", lambda l, b: (1 - l[:, 3:]) * l[:, :3] + l[:, 3:] * b,
              "alpha is inverted: alpha = 1 means that the LAYER is seen."),
        Wrong("below not covered", lambda l, b: l[:, 3:] * l[:, :3] + b,
              "you add the layer on top of all that lies below: what it covers must go, (1 - alpha) * "
              "below."),
        Wrong("hard alpha", lambda l, b: torch.where(l[:, 3:] > 0.5, l[:, :3], b),
              "you cut alpha to 0 or 1: soft edges are lost, and with them the reason for having alpha."),
    ]))


# ---------------------------------------------------------------- 3. Otsu's threshold

def otsu(count):
    """Histogram (n,) -> the number k of bins that are foreground (1 ... n - 1), by Otsu's rule.

    Bins 0 ... k-1 are one side, k ... n-1 the other. With w0, w1 the shares of pixels and m0, m1 the mean bin numbers
    of the sides, k makes the variance between the sides, w0 w1 (m0 - m1)^2, largest."""
    p = count.double() / count.sum()
    x = torch.arange(len(p), dtype=torch.float64)
    best, best_k = -1.0, 1
    for k in range(1, len(p)):
        w0, w1 = p[:k].sum(), p[k:].sum()
        if w0 == 0 or w1 == 0:
            continue
        m0, m1 = (p[:k] * x[:k]).sum() / w0, (p[k:] * x[k:]).sum() / w1
        between = float(w0 * w1 * (m0 - m1) ** 2)
        if between > best + 1e-12:
            best, best_k = between, k
    return best_k


def _otsu_cases(g):
    """Two humps of unequal size, with every bin occupied, so that each mistake gives another number."""
    cases = []
    for n, low, high, share in ((32, 7, 24, 0.8), (48, 10, 30, 0.25), (24, 4, 15, 0.6)):
        x = torch.arange(n, dtype=torch.float32)
        hump = share * torch.exp(-(x - low) ** 2 / 18) + (1 - share) * torch.exp(-(x - high) ** 2 / 40)
        cases.append((torch.round(900 * hump / hump.max() + 20 * torch.rand(n, generator=g)) + 1,))
    return cases


def _otsu_by(score, shift=0):
    """A mistaken version: the same loop, another score of (w0, w1, m0, m1)."""
    def answer(count):
        p, x = count.double() / count.sum(), torch.arange(len(count), dtype=torch.float64)
        values = [float(score(p[:k].sum(), p[k:].sum(), (p[:k] * x[:k]).sum() / p[:k].sum(),
                              (p[k:] * x[k:]).sum() / p[k:].sum())) for k in range(1, len(p))]
        return int(torch.tensor(values, dtype=torch.float64).argmax()) + 1 + shift
    return answer


_between = lambda w0, w1, m0, m1: w0 * w1 * (m0 - m1) ** 2

register(Check(
    name="otsu", reference=otsu, cases=_otsu_cases,
    source="lib.checks_07:otsu lib.deglad:_otsu",
    praise="Right: the cut that makes each side most alike inside, found by trying all of them.",
    hints=["Try every k from 1 to n - 1. p = count / count.sum() are shares of pixels; which belong to which side?",
           "w0 = p[:k].sum(), m0 = (p[:k] * x[:k]).sum() / w0 with x = torch.arange(n); the same for the "
           "other side.",
           "Keep the k with the largest w0 * w1 * (m0 - m1) ** 2, and return it as a whole number."],
    wrongs=[
        Wrong("off by one", _otsu_by(_between, -1),
              "off by one: you return the last bin of the foreground; the task asks for the NUMBER of its "
              "bins, which is one more."),
        Wrong("without the shares", _otsu_by(lambda w0, w1, m0, m1: (m0 - m1) ** 2),
              "the shares w0 * w1 are missing: without them, cutting a few extreme pixels off always looks "
              "best."),
        Wrong("smallest", _otsu_by(lambda *a: -_between(*a)),
              "you take the SMALLEST variance between the sides: it is the variance WITHIN them that "
              "should be small."),
        Wrong("no square", _otsu_by(lambda w0, w1, m0, m1: w0 * w1 * (m1 - m0)),
              "the distance of the means is not squared: w0 * w1 * (m0 - m1) ** 2."),
        Wrong("median", lambda count: int((count.cumsum(0) < count.sum() / 2).sum()) + 1,
              "this is the median: it puts half of the pixels on each side, whatever stands there."),
        Wrong("counts as values", lambda count: _otsu_by(_between)(torch.arange(1.0, len(count) + 1)),
              "you ignore the counts: a bin's weight is the number of pixels in it."),
    ]))


# ---------------------------------------------------------------- 4. a soft mask where a surface runs through d

def ramp_alpha(z, slope, d):
    """Share of each pixel that is nearer than d: clamp(1/2 + (d - z) / slope, 0, 1).

    z: depth at the pixel's centre; slope: how much depth changes from one pixel to the next (> 0). (B, 1, H, W) each."""
    return (0.5 + (d - z) / slope).clamp(0, 1)


def _ramp_cases(g):
    cases = []
    for b in (1, 2):
        slope = 0.02 + 0.05 * torch.rand(b, 1, 12, 12, generator=g)
        cases.append((0.5 + 0.06 * torch.randn(b, 1, 12, 12, generator=g), slope, 0.5))
    return cases


register(Check(
    name="ramp_alpha", reference=ramp_alpha, cases=_ramp_cases,
    source="lib.checks_07:ramp_alpha lib.deglad:soft_edges",
    praise="Right: depth itself says how much of the pixel lies on this side of d.",
    hints=["A pixel's depth runs from z - slope/2 at one edge to z + slope/2 at the other. Which part of that is < d?",
           "When z = d, half of the pixel is nearer. When z = d - slope/2, all of it is.",
           "(0.5 + (d - z) / slope).clamp(0, 1)"],
    wrongs=[
        Wrong("sign", lambda z, s, d: (0.5 + (z - d) / s).clamp(0, 1),
              "the sign is wrong: the NEARER the pixel (small z), the more of it is foreground."),
        Wrong("no half", lambda z, s, d: ((d - z) / s).clamp(0, 1),
              "the half is missing: z is the depth at the pixel's CENTRE, so at z = d half of it is "
              "nearer. Your edge is half a pixel off."),
        Wrong("times slope", lambda z, s, d: (0.5 + (d - z) * s).clamp(0, 1),
              "you multiply by the slope: a steep surface crosses d within a small part of the pixel, so "
              "divide."),
        Wrong("not clamped", lambda z, s, d: 0.5 + (d - z) / s,
              "alpha leaves [0, 1]: a pixel cannot be more than fully covered; clamp."),
        Wrong("hard", lambda z, s, d: (z < d).float(),
              "this is the hard mask: use the slope to find the share of the pixel."),
        Wrong("sigmoid", lambda z, s, d: torch.sigmoid((d - z) / s),
              "a sigmoid looks soft, but it is not the share of the pixel: it never reaches 0 or 1 and its "
              "slope at d is a quarter of the right one."),
    ]))


# ---------------------------------------------------------------- 5. three layers that recompose

def three_alphas(near, nearer_or_middle):
    """Coverage by what is nearer than d1, and than d2 > d1 -> alphas of three layers, front to back.

    near <= nearer_or_middle, both (B, 1, H, W) in [0, 1], soft values allowed. Laid *over* one another, front to back,
    the layers must cover what they should: the middle one's share of the picture is nearer_or_middle - near, of which
    the front layer lets only 1 - near through. Where near is 1 the middle alpha is 0."""
    middle = torch.where(near < 1, (nearer_or_middle - near) / (1 - near).clamp(min=1e-6), torch.zeros_like(near))
    return near, middle, torch.ones_like(near)


def _three_cases(g):
    cases = []
    for b in (1, 2):
        a, c = (torch.rand(b, 1, 10, 11, generator=g) for _ in range(2))
        near, both = torch.minimum(a, c), torch.maximum(a, c)
        near[..., :3], both[..., :3] = 1.0, 1.0                                       # covered wholly by the front
        near[..., 5:7], both[..., 5:7] = 0.0, 1.0
        cases.append((near, both))
    return cases


def _three(middle, last=lambda n, m: torch.ones_like(n)):
    return lambda n, m: (n, middle(n, m), last(n, m))


register(Check(
    name="three_alphas", reference=three_alphas, cases=_three_cases,
    source="lib.checks_07:three_alphas lib.deglad:layers",
    praise="Right: laid over one another, every pixel's shares add up to 1, also where edges are soft.",
    hints=["The front layer's alpha is near. The last layer stands behind everything: what alpha can it have?",
           "Of the middle layer one sees alpha * (1 - near). That should be nearer_or_middle - near.",
           "torch.where(near < 1, (nearer_or_middle - near) / (1 - near).clamp(min=1e-6), 0 * near)"],
    wrongs=[
        Wrong("difference", _three(lambda n, m: m - n),
              "the middle alpha is the difference of the coverages: *over* multiplies it with 1 - near "
              "once more, so soft edges of the front layer let the last layer shine through. Divide by 1 - "
              "near."),
        Wrong("layers overlap", _three(lambda n, m: m),
              "the middle layer still holds everything nearer than d2, the front layer too: the two "
              "overlap. Take near away."),
        Wrong("divided by zero", _three(lambda n, m: (m - n) / (1 - n)),
              "where the front layer covers all, 1 - near is 0 and you get NaN: set the middle alpha to 0 "
              "there."),
        Wrong("last is the rest", _three(lambda n, m: torch.where(n < 1, (m - n) / (1 - n).clamp(min=1e-6), 0 * n),
                                         lambda n, m: 1 - m),
              "the last layer's alpha is 1 - nearer_or_middle, but *over* already hides it behind the "
              "others: behind soft edges there would be a hole. It is 1 everywhere."),
        Wrong("shares", lambda n, m: (n, m - n, 1 - m),
              "these are the shares of the picture that each layer ends up with. An alpha is multiplied by "
              "what the layers in front let through: divide the middle one by 1 - near; the last is 1 "
              "everywhere."),
        Wrong("back to front", lambda n, m: three_alphas(n, m)[::-1],
              "the order is wrong: front to back, so near comes first."),
        Wrong("product", _three(lambda n, m: m * (1 - n)),
              "m * (1 - near) is what one would see of a layer with alpha m behind the front; the task "
              "asks for the ALPHA whose visible share is nearer_or_middle - near."),
    ]))
