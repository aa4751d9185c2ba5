"""lib.light against the renderer, whose geometry, normals, suns and shadows are exact."""
import math
from dataclasses import replace

import pytest
import torch

from lib import depth, light, scenes

SIZE = 128


def room(seed, things=3):
    scene = scenes.sample(scenes.seeds("val", 1, start=seed)[0], things=things)
    return scene, scenes.render([scene, scene.without(0)])


def in_camera(scene):
    """The scene's sun in the camera's coordinates: the camera looks down by its pitch."""
    x, y, z = scene.sun.direction()
    p = math.radians(scene.camera.pitch)
    return torch.tensor([x, y * math.cos(p) + z * math.sin(p), -y * math.sin(p) + z * math.cos(p)])


def space(scene, made, index=0):
    """Thing `index` put into the room without it, with its own exact depth."""
    thing = (made.ids[:1] == index).float()
    return light.Space(made.rgb[1:], made.depth[1:], made.depth[1:], made.depth[:1], thing, scene.camera.fov,
                       shape=light.normals(light.points(made.depth[:1], scene.camera.fov)), colour=made.rgb[:1])


def test_points_of_the_floor_lie_on_the_floor():
    scene, made = room(0)
    p = light.points(made.depth[1:], scene.camera.fov)
    pitch = math.radians(scene.camera.pitch)
    height = scene.camera.height + p[:, 1] * math.cos(pitch) - p[:, 2] * math.sin(pitch)
    empty = (made.ids[1:, 0] < 0) & (torch.arange(SIZE)[:, None] > 0.8 * SIZE)
    assert empty.sum() > 200 and height[empty].abs().max() < 0.02  # two centimetres


def test_a_window_of_the_picture_has_the_same_points():
    scene, made = room(1)
    whole = light.points(made.depth[:1], scene.camera.fov)
    box = (..., slice(30, 94), slice(50, 114))
    fov = math.degrees(2 * math.atan(32 / depth.pinhole((SIZE, SIZE), scene.camera.fov)[0]))
    part = light.points(made.depth[:1][box], fov, ((64 - 50) / 64, (64 - 30) / 64))
    assert torch.allclose(part, whole[box], atol=1e-4)


def test_normals_of_floor_and_ball():
    flat = light.points(torch.full((1, 1, 32, 32), 2.0), 50)
    assert torch.allclose(light.normals(flat), torch.tensor([0.0, 0, -1])[None, :, None, None].expand(1, 3, 32, 32), atol=1e-5)
    scene, made = room(2)
    p = math.radians(scene.camera.pitch)
    up = torch.tensor([0, math.cos(p), -math.sin(p)])
    floor = (made.ids[1:, 0] < 0) & (torch.arange(SIZE)[:, None] > 0.85 * SIZE)
    n = light.normals(light.points(made.depth[1:], scene.camera.fov)).permute(0, 2, 3, 1)[floor]
    assert (n @ up).median() > 0.999


def test_a_disc_is_blown_up_to_a_ball():
    y, x = torch.meshgrid(torch.arange(81) - 40.0, torch.arange(81) - 40.0, indexing="ij")
    r = 30.0
    n = light.inflate(((x**2 + y**2) <= r * r).float()[None, None])[0]
    inside = x**2 + y**2 < (0.9 * r) ** 2
    true = torch.stack([x / r, -y / r, -(1 - (x**2 + y**2) / r**2).clamp(min=0).sqrt()])
    assert ((n * true).sum(0)[inside] > math.cos(math.radians(6))).all()
    assert torch.isfinite(light.inflate(torch.zeros(1, 1, 8, 8))).all()


def test_an_upright_board_throws_its_shadow_where_geometry_says():
    """A floor 1 m below the camera, a board of 1 m at z = 4, light from behind the board at 45 degrees."""
    y = (SIZE / 2 - torch.arange(SIZE) - 0.5) / depth.pinhole((SIZE, SIZE), 60)[0]
    z = torch.where(y < -0.1, -1 / y, 10.0).view(1, 1, SIZE, 1).expand(1, 1, SIZE, SIZE)
    p = light.points(z, 60)
    row = lambda metres_up: SIZE / 2 - metres_up / 4 * depth.pinhole((SIZE, SIZE), 60)[0]
    board = torch.zeros(1, 1, SIZE, SIZE)
    board[..., round(row(0)):round(row(-1)), 56:72] = 1
    got = light.shadows(p, torch.full_like(z, 4.0), board, light.direction(0, 45)[None], 60, 0.3, steps=200)
    on_floor = p[0, 1] < -0.99
    expected = on_floor & (p[0, 2] > 3.0) & (p[0, 2] < 4.0) & (p[0, 0].abs() < 8 / depth.pinhole((SIZE, SIZE), 60)[0] * 4)
    wrong = ((got[0, 0].bool() & on_floor) ^ expected) & (p[0, 2] < 4.0)  # beyond: the board's own thickness
    assert expected.sum() > 150 and wrong.sum() < 0.25 * expected.sum()


@pytest.mark.parametrize("azimuth", (60, -120))
def test_shadows_agree_with_the_renderer(azimuth):
    """True depth, true sun: where the renderer darkens the floor, the map casts a shadow, and little elsewhere."""
    both = []
    for seed in range(3):
        scene, _ = room(seed)
        scene = scene.lit_by(scenes.Sun(azimuth, 35))
        made = scenes.render([scene, scene.without(0)])
        lit = light.Light(in_camera(scene)[None], torch.ones(1), azimuth, 35, 99.0)
        change = light.change(space(scene, made), lit, shading_share=0)
        thing = made.ids[:1] == 0
        true = ((made.rgb[1:] + 0.02) / (made.rgb[:1] + 0.02)).log().mean(1, keepdim=True) > 0.15
        cast = (change < -0.15) & ~thing
        true &= ~thing
        both.append(torch.tensor([(cast & true).sum(), cast.sum(), true.sum()]))
    hit, cast, true = torch.stack(both).sum(0).tolist()
    assert hit / cast > 0.45 and hit / true > 0.45, (hit, cast, true)


def test_the_light_of_a_room_is_found_and_its_evidence_says_how_surely():
    sure = []
    for seed in scenes.seeds("val", 30):
        scene = scenes.sample(seed)
        made = scenes.render(scene)
        found = light.find(light.Space(made.rgb, *[made.depth] * 3, torch.ones_like(made.depth)))
        assert abs(float(found.chances.sum()) - 1) < 1e-5 and len(found.directions) == 6
        off = math.degrees(math.acos(float((found.directions[0] * in_camera(scene)).sum().clamp(-1, 1))))
        if found.evidence > 8:
            sure.append(off)
    assert len(sure) >= 24 and sum(off < 30 for off in sure) >= 0.9 * len(sure), sure
    flat = light.find(light.Space(torch.full_like(made.rgb, 0.5), *[made.depth] * 3, torch.ones_like(made.depth)))
    assert flat.evidence < 1e-3


def test_neighbours_of_one_paint_tell_the_light_and_others_say_nothing():
    """A ball of one paint, lit from the left: the truth explains it best; with a paint for each pixel nothing does."""
    y, x = torch.meshgrid(torch.linspace(1, -1, 48), torch.linspace(-1, 1, 48), indexing="ij")
    shape = torch.stack([x, y, -(1 - x**2 - y**2).clamp(min=0).sqrt()])[None]
    ball = (x**2 + y**2 < 0.95)[None, None].float()
    sides = [light.direction(azimuth, 30) for azimuth in (-100, 100, -20, 180)]
    expected = torch.cat([light.shading(shape, light.Light(d[None], torch.ones(1), 0, 30, 0.0)) for d in sides]) * ball
    paint = torch.tensor([0.7, 0.4, 0.5]).view(1, 3, 1, 1)
    nats = light.neighbours(paint * expected[:1].exp(), expected)
    assert nats.argmax() == 0 and nats[0] > 240 and nats[0] > 2 * nats[1:].max()
    many = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    assert light.neighbours(many * expected[:1].exp(), expected).max() < 8
    assert light.neighbours(torch.full((1, 3, 48, 48), 0.5), expected).max() == 0


def test_what_faced_the_sun_has_more_to_lose():
    """The same shadow is darker on a floor under a high sun than on one under a low sun, and as dark as Lambert says."""
    z = torch.full((1, 1, SIZE, SIZE), 4.0)
    rows = (SIZE / 2 - torch.arange(SIZE) - 0.5) / depth.pinhole((SIZE, SIZE), 50)[0]
    floor = torch.where(rows < -0.12, -1 / rows, 8.0).view(1, 1, SIZE, 1).expand_as(z).contiguous()
    thing = torch.zeros_like(z)
    thing[..., 60:97, 50:78] = 1
    s = light.Space(torch.full((1, 3, SIZE, SIZE), 0.5), floor, floor, z, thing, 50.0)
    deepest = []
    for elevation in (18, 48):
        lit = light.Light(light.direction(150, elevation)[None], torch.ones(1), 150, elevation, 9.0)
        deepest.append(float(light.change(s, lit, shading_share=0).min()))
        sun = math.sin(math.radians(elevation))
        assert abs(deepest[-1] - math.log(light.AMBIENT / (light.AMBIENT + sun)) / 2.2) < 0.03
    assert deepest[1] < deepest[0] - 0.1


def test_the_model_is_a_third_witness():
    scene, made = room(4)
    made = scenes.render([scene, scene.without(0)])
    s = space(scene, made)
    blank = light.Space(torch.full_like(s.picture, 0.5), *list(vars(s).values())[1:])
    true = (((made.rgb[:1] + 0.02) / (made.rgb[1:] + 0.02)).log().mean(1, keepdim=True)) * (1 - s.opaque)
    found = light.find(blank, true, 1 - s.opaque)
    assert light.find(blank).evidence < 1e-3 < found.evidence
    assert (found.directions[0] * in_camera(scene)).sum() > math.cos(math.radians(40))


def test_shading_turns_the_thing_to_the_new_light():
    y, x = torch.meshgrid(torch.arange(64) - 32.0, torch.arange(64) - 32.0, indexing="ij")
    ball = ((x**2 + y**2) < 20**2).float()[None, None]
    at = lambda azimuth: light.Light(light.direction(azimuth, 30)[None], torch.ones(1), azimuth, 30, 9.0)
    shape = light.inflate(ball)
    lit_left = (light.shading(shape, at(-100)).exp() * 0.6).expand(1, 3, 64, 64)
    assert abs(light.shaded_by(lit_left, shape, ball).azimuth + 100) <= 12
    flat = torch.full((1, 1, 64, 64), 4.0)
    s = light.Space(torch.full((1, 3, 64, 64), 0.5), flat, flat, flat - 1, ball, colour=lit_left)
    change = light.change(s, at(100), shading_share=1.0)
    turned = light.shading(shape, at(100)) - light.shading(shape, at(-100))
    inner = (x**2 + y**2 < 15**2)[None, None]
    assert (change - turned.clamp(-0.8, 0.8))[inner].abs().mean() < 0.05
    assert change[..., 44:52][inner[..., 44:52]].min() > 0 > change[..., 12:20][inner[..., 12:20]].max()


def test_old_shadows_of_a_layer_go_and_are_not_thrown_twice():
    scene, made = room(5)
    z = made.depth[:1]
    own = light.Space(made.rgb[:1], z, z, z, torch.ones_like(z), scene.camera.fov, thickness=light.THING, enclosed=True)
    lit = light.Light(in_camera(scene)[None], torch.ones(1), 0, 0, 9.0)
    old = light.shown(own, lit)
    assert 0 <= old.min() and 0.3 < old.max() <= 1
    empty = scenes.render([replace(scene, things=())])  # the layer comes into another room
    layer = light.Space(empty.rgb, empty.depth, z, z, torch.ones_like(z), scene.camera.fov, thickness=light.THING,
                        enclosed=True, already=old, before=lit)
    opposite = light.Light(lit.directions * torch.tensor([-1.0, 1, -1]), torch.ones(1), 0, 0, 9.0)
    there = old > 0.5
    assert light.change(layer, opposite, shading_share=0)[there].mean() > 0.1   # the light has gone to the other side
    kept = light.change(layer, lit, shading_share=0)[there]                     # the same light: little to do
    alone = light.change(replace(layer, already=None), lit, shading_share=0)[there]
    assert kept.abs().mean() < 0.6 * alone.abs().mean()


def test_shadows_of_the_other_room_do_not_lie_on_the_layer_put_in():
    """A layer's things throw the same shadows on its own floor, whatever stands in the room it comes into."""
    scene, made = room(5)
    other = replace(room(8)[0], camera=scene.camera)
    empty, full = (scenes.render([replace(other, things=t)]) for t in ((), other.things))
    z, near = made.depth[:1], (made.depth[:1] < 4).float()
    lit = light.Light(in_camera(scene)[None], torch.ones(1), 0, 0, 9.0)
    box = dict(fov=scene.camera.fov, thickness=light.THING, enclosed=True)

    def thrown(b):
        both = torch.where(near > 0, z, b.depth)
        return light.cast(light.Space(b.rgb, b.depth, both, both, near, **box), lit)

    inner = -torch.nn.functional.max_pool2d(1 - near, 9, 1, 4) + 1 > 0.5    # the shadow's soft end reaches over the rim
    assert (thrown(empty)[inner] > 0.5).sum() > 50
    assert torch.allclose(thrown(full)[inner], thrown(empty)[inner], atol=0.05)


def test_a_copy_of_the_depth_is_the_same_depth():
    """A picture's own shadows are known by their values, not by which tensor object holds them."""
    scene, made = room(4)
    z, box = made.depth[:1], dict(fov=scene.camera.fov, thickness=light.THING, enclosed=True)
    one, other = (light.Space(made.rgb[:1], z, x, x, torch.ones_like(z), **box) for x in (z, z.clone()))
    sun = light.find(one)
    assert light.cast(one, sun).max() > 0.3 and torch.equal(light.cast(one, sun), light.cast(other, sun))


def test_usual_shadows_are_what_ambient_light_leaves():
    sun = math.sin(math.radians(26))
    assert abs(math.log((sun + light.AMBIENT) / light.AMBIENT) / 2.2 - light.USUAL) < 0.01


def test_errors():
    with pytest.raises(ValueError, match="field of view"):
        light.points(torch.ones(1, 1, 4, 4), 0)
    z, rgb = torch.ones(1, 1, 8, 8), torch.ones(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"opaque must be \(1, 1, 8, 8\)"):
        light.Space(rgb, z, z, z, torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="fill the holes"):
        light.Space(rgb, torch.full_like(z, float("nan")), z, z, z)
