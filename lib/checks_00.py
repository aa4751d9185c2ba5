"""Exercises of lesson 00: the depth convention, the foreground mask, and a paste that respects depth."""
import torch

from lib.checks import Check, Wrong, register


# ---------------------------------------------------------------- 1. metres -> depth in [0, 1]

def metres_to_depth(z, near, far):
    """z (B, 1, H, W) in metres -> depth in [0, 1]: 0 at `near` and nearer, 1 at `far` and farther."""
    return ((z - near) / (far - near)).clamp(0, 1)


def _metres_cases(g):
    return [(torch.rand(1, 1, 6, 8, generator=g) * 11, 1.0, 8.0),        # 0 to 11 m: some outside
            (torch.rand(2, 1, 5, 5, generator=g) * 5 + 0.2, 0.5, 4.0)]


register(Check(
    name="metres_to_depth", reference=metres_to_depth, cases=_metres_cases,
    source="lib.checks_00:metres_to_depth lib.scenes:to_depth01",
    praise="Right: 0 is near, 1 is far, and whatever lies outside the room stays at the end of the scale.",
    hints=["Which z should give 0, and which should give 1? Write the straight line through these two "
           "points.",
           "(z - near) / (far - near) is that line. What does it give for z = 0.5 m, when near is 1 m?",
           "tensor.clamp(0, 1) holds values in [0, 1]."],
    wrongs=[
        Wrong("flipped", lambda z, near, far: ((far - z) / (far - near)).clamp(0, 1),
              "your depth is upside down: it gives 1 for near and 0 for far. In this course 0 is near and 1 "
              "is far."),
        Wrong("flipped, not clamped", lambda z, near, far: (far - z) / (far - near),
              "your depth is upside down (1 for near, 0 for far), and it leaves [0, 1] outside the room."),
        Wrong("not clamped", lambda z, near, far: (z - near) / (far - near),
              "the line is right, but things nearer than `near` come out below 0 and things beyond `far` "
              "above 1: hold the result in [0, 1]."),
        Wrong("forgot near", lambda z, near, far: (z / far).clamp(0, 1),
              "you divide by `far` only, so a thing at `near` does not get 0: subtract `near` first, and "
              "divide by far - near."),
        Wrong("divided by far only", lambda z, near, far: ((z - near) / far).clamp(0, 1),
              "a thing at `far` should get exactly 1: divide by far - near, not by far."),
        Wrong("own minimum and maximum", lambda z, near, far: (z - z.min()) / (z.max() - z.min()),
              "you scale by this picture's own nearest and farthest point, so the same chair would get "
              "another depth in the next picture: use `near` and `far`."),
        Wrong("brackets forgotten", lambda z, near, far: ((z - near) / far - near).clamp(0, 1),
              "the brackets are missing: a / b - c is (a / b) - c. Divide by (far - near)."),
        Wrong("inverse depth", lambda z, near, far: (near / z).clamp(0, 1),
              "this is inverse depth (near = high), what MiDaS and DPT give: the course's depth grows with "
              "distance."),
    ]))


# ---------------------------------------------------------------- 2. which pixels are foreground

def foreground_mask(depth, d):
    """depth (B, 1, H, W) in [0, 1], threshold d -> fg_mask (B, 1, H, W) float: 1 where depth < d (DeGLaD)."""
    return (depth < d).float()


def _mask_cases(g):
    steps = torch.randint(0, 11, (1, 1, 6, 8), generator=g).float() / 10      # many pixels lie exactly at d
    return [(steps, 0.5), (torch.rand(2, 1, 5, 7, generator=g), 0.3)]


register(Check(
    name="foreground_mask", reference=foreground_mask, cases=_mask_cases,
    source="lib.checks_00:foreground_mask lib.deglad:nearer",
    praise="Right: foreground is strictly nearer than d, so every pixel belongs to exactly one layer.",
    hints=["0 is near. Is a foreground pixel's depth smaller or larger than d?",
           "A comparison such as depth < d gives True and False; a mask in this course is float, 1 and 0.",
           "(a comparison).float() turns True into 1.0 and False into 0.0."],
    wrongs=[
        Wrong("far is foreground", lambda depth, d: (depth > d).float(),
              "you keep what is FAR. Here 0 is near, so foreground means depth < d. (On the raw output of "
              "MiDaS or DPT, where near is high, `>` would have been right: that is the sign trap.)"),
        Wrong("background mask", lambda depth, d: (depth >= d).float(),
              "this is the background mask, M_bg = depth >= d: the foreground is the other one."),
        Wrong("not strict", lambda depth, d: (depth <= d).float(),
              "a pixel exactly at d belongs to the background (M_bg = depth >= d). With <= it would be in "
              "both layers: use the strict <."),
        Wrong("bool", lambda depth, d: depth < d,
              "the pixels are right, but the mask is True/False: this course multiplies masks with pictures, "
              "so make it float with .float()."),
        Wrong("depth inside the mask", lambda depth, d: depth * (depth < d),
              "you return the depth of the foreground; a mask holds 1 where the pixel is foreground, else "
              "0."),
        Wrong("upside down threshold", lambda depth, d: (depth < 1 - d).float(),
              "you compare with 1 - d: depth and d already share the same scale."),
    ]))


# ---------------------------------------------------------------- 3. a paste that respects depth

def paste_at_depth(image, depth, layer, at):
    """Paste a layer so that what is nearer than `at` hides it.

    image (B, 3, H, W), depth (B, 1, H, W) in [0, 1], layer (B, 4, H, W) RGBA with straight alpha, at: the
    layer's depth. out = colour * a + image * (1 - a), with a = alpha where the scene is not nearer than `at`,
    else 0.
    """
    a = layer[:, 3:] * (depth >= at).float()
    return layer[:, :3] * a + image * (1 - a)


def _paste_cases(g):
    return [(torch.rand(b, 3, 6, 7, generator=g), torch.rand(b, 1, 6, 7, generator=g),
             torch.rand(b, 4, 6, 7, generator=g), at) for b, at in ((1, 0.5), (2, 0.7))]


def _with(visible, blend):
    """A mistaken paste: `visible(alpha, depth, at)` and `blend(colour, a, image)`."""
    return lambda image, depth, layer, at: blend(layer[:, :3], visible(layer[:, 3:], depth, at), image)


_right_alpha = lambda alpha, depth, at: alpha * (depth >= at)
_right_blend = lambda colour, a, image: colour * a + image * (1 - a)

register(Check(
    name="paste_at_depth", reference=paste_at_depth, cases=_paste_cases,
    source="lib.checks_00:paste_at_depth lib.featglac:over",
    praise="Right: the table hides the chair, and half-covered pixels at the edge mix both colours.",
    hints=["Start without depth: a = layer[:, 3:], then out = colour * a + image * (1 - a).",
           "The layer is hidden where the scene is nearer, depth < at. What must a be there?",
           "a = layer[:, 3:] * (depth >= at).float(), and the same a in both terms."],
    wrongs=[
        Wrong("2-D paste", _with(lambda alpha, depth, at: alpha, _right_blend),
              "you paste over everything, as a 2-D tool does: where the scene is nearer than `at`, the layer "
              "must be hidden."),
        Wrong("occlusion reversed", _with(lambda alpha, depth, at: alpha * (depth < at), _right_blend),
              "the occlusion is reversed: you show the layer where the scene is NEARER (depth < at) and hide "
              "it where the scene is farther."),
        Wrong("hole", lambda image, depth, layer, at:
              layer[:, :3] * _right_alpha(layer[:, 3:], depth, at) + image * (1 - layer[:, 3:]),
              "there is a dark hole where the layer is hidden: the same a must stand in both terms, a and 1 "
              "- a."),
        Wrong("premultiplied",
              _with(_right_alpha, lambda colour, a, image: colour * (a > 0) + image * (1 - a)),
              "you add the full colour at half-covered pixels, as if the layer were premultiplied: with "
              "straight alpha the colour is multiplied by a."),
        Wrong("forgot 1 - a", _with(_right_alpha, lambda colour, a, image: colour * a + image),
              "you add the layer to the picture, so it glows like a double exposure: multiply the picture by "
              "1 - a."),
        Wrong("swapped", _with(_right_alpha, lambda colour, a, image: colour * (1 - a) + image * a),
              "a and 1 - a are swapped: a belongs to the layer's colour, 1 - a to the picture."),
        Wrong("alpha forgotten", _with(lambda alpha, depth, at: (depth >= at).float(), _right_blend),
              "you paste the layer's whole square wherever the scene is not nearer: the layer's own alpha, "
              "layer[:, 3:], is missing in a."),
        Wrong("hard edge",
              _with(lambda alpha, depth, at: ((alpha > 0.5) & (depth >= at)).float(), _right_blend),
              "you cut alpha to 0 or 1, which gives jagged edges: keep its soft values."),
    ]))
