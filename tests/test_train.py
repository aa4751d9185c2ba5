"""The recipes run, resume, pack and export; the shipped models are what diffusers and transformers expect."""
import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lib import scenes, setup, train

SHIPPED = setup.data_dir() / "models"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A corpus of 16 rooms in a temporary cache, and narrow networks."""
    monkeypatch.setattr(train, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(train, "CHUNK", 8)
    train.corpus(16, wild_share=.5)
    return tmp_path


def steps(name):
    with open(train.CACHE / name / "log.csv") as f:
        return [int(row["step"]) for row in csv.DictReader(f)]


def test_corpus_is_the_render_and_is_not_made_twice(small):
    data = train.Corpus(wild=False)
    assert len(data) == 8 and len(train.Corpus()) == 16
    (rgb, mm) = data.take(torch.arange(2), "rgb", "mm")
    seen = scenes.render([scenes.sample(s) for s in scenes.seeds("train", 2)])
    assert (rgb.float() / 255 - seen.rgb).abs().max() < 1 / 255
    assert (mm.float() / 1000 - seen.depth).abs().max() < 1e-3
    before = {p: p.stat().st_mtime_ns for p in train.CACHE.glob("*.npz")}
    train.corpus(16, wild_share=.5)
    assert before == {p: p.stat().st_mtime_ns for p in train.CACHE.glob("*.npz")}


def test_only_the_judge_sees_what_is_held_out(small):
    """Its own rooms hold the held-out pairs and lights; those of everybody else do not."""
    train.ruler(8)
    assert len(train.Corpus(names="ruler_*.npz")) == 8 and len(train.Corpus()) == 16
    pairs = lambda **how: {(t.kind, t.colour) for s in scenes.seeds("train", 60) for t in scenes.sample(s, **how).things}
    assert not pairs() & scenes.HELD_OUT_PAIRS and len(pairs(held_out=True) & scenes.HELD_OUT_PAIRS) >= 6
    low, high = scenes.HELD_OUT_AZIMUTH
    held = [low < abs(scenes.sample(s, held_out=True).sun.azimuth) < high for s in scenes.seeds("train", 60)]
    assert 15 < sum(held) < 60


def test_no_corpus_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CACHE", tmp_path)
    with pytest.raises(FileNotFoundError, match="lib.train corpus"):
        train.Corpus()
    with pytest.raises(FileNotFoundError, match="lib.train unet"):
        train.averaged("unet", unet=torch.nn.Linear(1, 1))


def test_a_recipe_resumes_where_it_stopped_and_changes_the_weights(small):
    train.train_depth(0, 2, batch=2)
    first = torch.load(train.CACHE / "depth" / "last.pt", weights_only=True)
    train.train_depth(0, 3, batch=2)
    second = torch.load(train.CACHE / "depth" / "last.pt", weights_only=True)
    assert (first["step"], second["step"]) == (2, 3) and second["seconds"] > first["seconds"]
    a, b = first["models"]["depth"], second["models"]["depth"]
    assert any(not torch.equal(a[k], b[k]) for k in a)
    assert all(torch.isfinite(v).all() for v in b.values())
    train.train_depth(0, 3, batch=2)  # nothing left to do
    assert torch.load(train.CACHE / "depth" / "last.pt", weights_only=True)["step"] == 3


def test_all_diffusion_recipes_run_in_order_pack_and_unpack(small, monkeypatch):
    monkeypatch.setattr(train, "make_vae", lambda channels=(8, 8, 8, 16), real=train.make_vae: real(channels))
    narrow = lambda n=4, channels=(32, 32, 32), text=128, real=train.make_unet: real(n, channels, text)
    monkeypatch.setattr(train, "make_unet", narrow)
    train.train_vae(0, 1, batch=2)
    train.train_vae(0, 1, batch=2, decoder_only=True)
    vae = train.frozen_vae()
    assert vae.config.scaling_factor != 0.18215 and not any(p.requires_grad for p in vae.parameters())
    train.train_unet(0, 1, batch=2)
    train.train_inpaint(0, 1, batch=2)
    train.train_judge(0, 1, batch=2)
    train.pack(small / "packed")
    assert {p.stem for p in (small / "packed").glob("*.safetensors")} == {"vae", "decoder", "unet", "inpaint", "judge"}
    train.unpack(small / "packed")
    assert not (train.CACHE / "unet" / "last.pt").exists()
    train.train_unet(0, 2, batch=2)  # goes on from the packed weights
    assert train.checkpoint("unet")["step"] == 2 and steps("unet")[0] == 0


def test_wider_unet_starts_as_the_old_one():
    unet = train.make_unet(4, (32, 32, 32), 32).eval()
    with torch.no_grad():
        wide = train.make_unet
        train_make, train.make_unet = wide, lambda n: wide(n, (32, 32, 32), 32)
        try:
            nine = train.widen(unet).eval()
        finally:
            train.make_unet = train_make
        x, t, text = torch.randn(1, 4, 16, 16), torch.tensor([10]), torch.randn(1, 5, 32)
        extra = torch.randn(1, 5, 16, 16)
        assert torch.allclose(nine(torch.cat([x, extra], 1), t, text).sample, unet(x, t, text).sample, atol=1e-5)


def test_mirrored_captions_and_recoloured_pictures():
    assert train.mirrored("a red ball left of a blue box light from the right") == \
        "a red ball right of a blue box light from the left"
    x, colour = torch.rand(4, 3, 8, 8), torch.ones(4, 1, 8, 8, dtype=torch.long)
    y, names = train._recoloured(x, colour, torch.Generator().manual_seed(0))
    assert torch.equal(x[2:], y[2:]) and not torch.equal(x[:2], y[:2])
    assert torch.equal(x.sort(1).values, y.sort(1).values)  # the same values in another order
    assert (names[:2] == -100).all() and (names[2:] == 1).all()


def test_every_caption_word_is_one_token():
    tokenizer = train.make_tokenizer()
    for seed in scenes.seeds("val", 60):
        text = scenes.sample(seed).caption()
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split()) + 2 <= train.MAX_TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True).split() == text.split()


def test_the_tokenizer_is_kept_and_is_the_shipped_one(tmp_path, monkeypatch):
    """Its trainer breaks ties at random: trained again, some words get other numbers than the weights know."""
    from transformers import CLIPTokenizer
    words = lambda t: {w: t(w)["input_ids"] for w in scenes.vocabulary()}
    shipped = [words(CLIPTokenizer.from_pretrained(train.SHIPPED / n / "tokenizer")) for n in ("mini", "mini-inpaint")]
    monkeypatch.setattr(train, "CACHE", tmp_path / "empty")
    assert words(train.make_tokenizer()) == shipped[0] == shipped[1]
    monkeypatch.setattr(train, "SHIPPED", tmp_path / "none")
    first = words(train.make_tokenizer())  # a new one, from now on the one in the cache
    assert words(train.make_tokenizer()) == first


# ---------------------------------------------------------------- the shipped folders
@pytest.mark.parametrize("name", ["mini", "mini-inpaint"])
def test_diffusers_loads_and_runs_the_shipped_pipelines_with_no_code_of_ours(name):
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
    cls = StableDiffusionInpaintPipeline if name.endswith("inpaint") else StableDiffusionPipeline
    pipe = cls.from_pretrained(SHIPPED / name, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert {p.dtype for p in pipe.text_encoder.parameters()} == {torch.float32}
    more = {}
    if name.endswith("inpaint"):
        from PIL import Image
        more = {"image": Image.new("RGB", (128, 128), "grey"), "mask_image": Image.new("L", (128, 128), 255)}
    picture = pipe("a red chair", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np",
                   **more).images[0]
    assert picture.shape == (128, 128, 3) and 0.01 < picture.std() < 0.6
    c = pipe.scheduler.config
    assert (c.steps_offset, c.clip_sample, c.set_alpha_to_one, c.beta_schedule) == (1, False, False, "scaled_linear")


@pytest.mark.parametrize("name", ["mini", "mini-inpaint"])
def test_no_key_of_the_text_encoder_is_missing(name):
    """Saved by one version of transformers and read by another, wrong prefixes load random weights without a word."""
    from transformers import CLIPTextModel
    _, info = CLIPTextModel.from_pretrained(SHIPPED / name / "text_encoder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with safe_open(next((SHIPPED / name / "text_encoder").glob("*.safetensors")), "pt") as f:
        assert all(k.startswith("text_model.") for k in f.keys())


def test_transformers_loads_the_depth_model_and_near_is_high():
    from transformers import DPTForDepthEstimation
    model, info = DPTForDepthEstimation.from_pretrained(SHIPPED / "mini-depth", output_loading_info=True)
    assert not info["missing_keys"]
    seen = scenes.render([scenes.sample(s) for s in scenes.seeds("test", 4)])
    with torch.no_grad():
        inverse = model.float()(seen.rgb * 2 - 1).predicted_depth
    assert torch.corrcoef(torch.stack([inverse.flatten(), seen.depth.flatten()]))[0, 1] < -0.7


def test_weights_are_small_and_have_cards_and_logs():
    files = list(SHIPPED.rglob("*.safetensors"))
    assert files and sum(f.stat().st_size for f in files) <= 45e6
    for name in ("mini", "mini-inpaint", "mini-depth", "judge", "teach", "fillnet"):
        card = json.loads((SHIPPED / name / "card.json").read_text())
        assert card["quality"] and all(r["step"] > 0 for r in card["runs"].values())
        assert all((SHIPPED / name / f"log_{run}.csv").is_file() for run in card["runs"])
        assert "Measured quality" in Path(SHIPPED / name / "README.md").read_text()


def test_the_inpainting_loss_looks_at_the_hole():
    hole = torch.zeros(2, 1, 16, 16)
    hole[0, :, 4:8, 4:8] = 1
    hole[1] = 1
    weight = train._where_it_paints(hole)
    assert torch.allclose(weight.sum((1, 2, 3)), torch.ones(2))
    assert torch.equal(weight[0, 0, 3:9, 3:9], weight[0, 0, 3, 3].expand(6, 6))       # and one latent around it
    assert weight[0, 0, 3, 3] == pytest.approx(5 * float(weight[0, 0, 0, 0])) and weight[1].std() == 0
