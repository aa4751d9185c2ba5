"""The registry finds a model where it lies, says so, and is clear when it cannot; SD 1.5's real shapes
fit."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from lib import attention, models

TESTDATA = Path(os.environ.get("LAYERS_TESTDATA", Path(__file__).parents[2] / "shared" / "testdata"))
PIPELINES = [n for n, s in models.REGISTRY.items() if s.kind == "pipeline"]


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory):
    """A text-to-image and an inpainting pipeline of the mini's shape, random and narrow, saved as folders."""
    from lib.train import tiny_pipeline
    root = tmp_path_factory.mktemp("models")
    for name, inpaint in (("tiny", False), ("tiny-inpaint", True)):
        tiny_pipeline(inpaint=inpaint).save_pretrained(root / name, safe_serialization=True)
    return root


@pytest.fixture
def nothing_here(monkeypatch, tmp_path):
    """No local models, and a hub that cannot be reached."""
    monkeypatch.setenv("LAYERS_DATA", str(tmp_path / "empty"))
    monkeypatch.delenv("LAYERS_MODELS", raising=False)

    def no_network(repo, revision, files):
        raise ConnectionError("Network is unreachable\nand a long trace")
    monkeypatch.setattr(models, "snapshot", no_network)
    return tmp_path


# ------------------------------------------------------------------ loading folders

@pytest.mark.parametrize("name, cls", [("tiny", "StableDiffusionPipeline"),
                                       ("tiny-inpaint", "StableDiffusionInpaintPipeline")])
def test_a_pipeline_folder_loads_frozen_with_ddim(tiny_folders, name, cls, capsys):
    state = torch.get_rng_state()
    pipe = models.load(str(tiny_folders / name))
    assert type(pipe).__name__ == cls and type(pipe.scheduler).__name__ == "DDIMScheduler"
    s = pipe.scheduler.config
    assert (s.clip_sample, s.set_alpha_to_one, s.steps_offset) == (False, False, 1)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not part.training and not any(p.requires_grad for p in part.parameters())
        assert next(part.parameters()).dtype == torch.float32
    assert str(tiny_folders / name) in pipe.loaded_from
    assert capsys.readouterr().out.count("\n") == 1
    assert torch.equal(state, torch.get_rng_state()), "loading must not move the random numbers"


def test_one_dtype_for_all_parts(tiny_folders):
    pipe = models.load(str(tiny_folders / "tiny"), dtype=torch.bfloat16, quiet=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}


def test_a_folder_of_half_precision_files_alone_loads(tiny_folders, tmp_path):
    """`variant="fp16"` folders: diffusers finds no weights in them unless it is told."""
    whole, folder = models.load(str(tiny_folders / "tiny"), quiet=True), tmp_path / "half"
    whole.save_pretrained(folder, variant="fp16")
    assert not list(folder.rglob("diffusion_pytorch_model.safetensors"))
    found = models.load(str(folder), quiet=True)
    for part in ("unet", "vae", "text_encoder"):
        a, b = (dict(getattr(p, part).named_parameters()) for p in (whole, found))
        assert all(torch.equal(a[k], b[k]) for k in a) and set(a) == set(b)


def test_no_text_encoder_key_is_missing_whatever_the_prefix(tiny_folders, tmp_path):
    """The trap: a file with other key names gives random weights and no exception."""
    from safetensors.torch import load_file, save_file
    here = tiny_folders / "tiny"
    truth = {k.removeprefix("text_model."): v
             for k, v in load_file(here / "text_encoder" / "model.safetensors").items()}
    for prefix in ("", "text_model."):
        folder = tmp_path / f"p{len(prefix)}"
        shutil.copytree(here, folder)
        save_file({prefix + k: v for k, v in truth.items()}, folder / "text_encoder" / "model.safetensors",
                  metadata={"format": "pt"})
        found = models.load(str(folder), quiet=True).text_encoder.state_dict()
        found = {k.removeprefix("text_model."): v for k, v in found.items()}
        assert set(truth) <= set(found) and all(torch.equal(found[k], v) for k, v in truth.items())
    lost = {"text_model." + k: v for k, v in list(truth.items())[1:]}
    save_file(lost, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of"):
        models.load(str(folder), quiet=True)


def test_pickles_are_never_read(tiny_folders, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folders / "tiny", folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="no pipeline model"):
        models.load(str(folder))


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model_index.json is missing"):
        models.load(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    for part in ("unet", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "x.safetensors").touch()
    with pytest.raises(ValueError, match="FluxPipeline"):
        models.load(str(tmp_path))


# ------------------------------------------------------------------ finding

def test_the_local_folder_comes_before_the_hub(tiny_folders, nothing_here, monkeypatch):
    offline = nothing_here / "offline"
    repo = models.REGISTRY["sd15"].candidates[0][0]
    shutil.copytree(tiny_folders / "tiny", offline / repo)
    monkeypatch.setenv("LAYERS_MODELS", str(offline))
    pipe = models.load("sd15", quiet=True)
    assert pipe.loaded_from == str(offline / repo)
    shutil.copytree(tiny_folders / "tiny", nothing_here / "empty" / "models" / "mini")
    assert models.load("mini", quiet=True).loaded_from.endswith(os.path.join("models", "mini"))


def test_it_falls_through_to_the_next_candidate_and_says_so(tiny_folders, nothing_here, monkeypatch, capsys):
    asked = []

    def hub(repo, revision, files):
        asked.append(repo)
        if len(asked) == 1:
            raise OSError("401 Client Error: Repository Not Found")
        if len(asked) == 2:
            return str(nothing_here)  # a repository without safetensors
        assert "unet/diffusion_pytorch_model.safetensors" in files and not any("ckpt" in f for f in files)
        return str(tiny_folders / "tiny")
    monkeypatch.setattr(models, "snapshot", hub)
    pipe = models.load("sd15")
    third = models.REGISTRY["sd15"].candidates[2][0]
    assert asked == [c[0] for c in models.REGISTRY["sd15"].candidates[:3]]
    assert third in pipe.loaded_from and third in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sd15", "sd15-inpaint"])
def test_without_network_the_error_lists_what_was_tried_and_the_ways_out(nothing_here, monkeypatch, name):
    monkeypatch.setenv("LAYERS_MODELS", str(nothing_here / "mine"))
    with pytest.raises(models.ModelUnavailable) as caught:
        models.load(name)
    text = str(caught.value)
    for repo, _ in models.REGISTRY[name].candidates:
        assert f"hub {repo}: ConnectionError: Network is unreachable" in text
    for way in ("MODEL = \"mini\"", "LAYERS_MODELS", "HF_HOME", "hf download", "GB", str(nothing_here / "mine" / name)):
        assert way in text
    assert "long trace" not in text


def test_the_real_hub_client_offline_ends_in_the_same_error(nothing_here, monkeypatch):
    """The hub's own offline switch, no fake: quick, and the same message."""
    monkeypatch.undo()
    monkeypatch.setenv("LAYERS_DATA", str(nothing_here / "empty"))
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(nothing_here / "cache"))
    with pytest.raises(models.ModelUnavailable, match="Intel/zoedepth-nyu-kitti.*\n(.*\n)*.*DEPTH_MODEL = \"mini\""):
        models.load_depth("zoedepth")


@pytest.mark.parametrize("name, recipe", [("mini", "lib.train unet"), ("mini-inpaint", "lib.train inpaint")])
def test_a_missing_mini_says_how_to_get_it(nothing_here, name, recipe):
    with pytest.raises(models.ModelUnavailable, match=recipe):
        models.load(name)
    with pytest.raises(models.ModelUnavailable, match="lib.train depth"):
        models.load_depth("mini")
    with pytest.raises(models.ModelUnavailable, match="lib.train judge"):
        models.load_judge()


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="Unknown pipeline model 'sd16'.*" + ", ".join(PIPELINES)):
        models.load("sd16")
    with pytest.raises(ValueError, match="known: mini, dpt, zoedepth, depth-anything-v2, depth-anything-v2-metric"):
        models.load_depth("midas")
    with pytest.raises(ValueError, match="dpt is a depth model"):
        models.load("dpt")
    with pytest.raises(ValueError, match="lib.depth.given"):
        models.load_depth("given")
    for nonsense in ("", None, 3):
        with pytest.raises(ValueError, match="name is text"):
            models.load(nonsense)


def test_the_catalogue_has_a_row_for_every_model_and_no_invented_revision():
    rows = {r["name"]: r for r in models.catalogue()}
    assert set(rows) == set(models.REGISTRY)
    for name, spec in models.REGISTRY.items():
        assert spec.licence and (spec.kind != "depth" or "near =" in spec.convention)
        assert all(revision in (None, "refs/pr/5") for _, revision in spec.candidates)
        assert spec.candidates or name.startswith("mini") or name == "judge"
        assert not any("*.bin" in f or f.endswith((".ckpt", ".pt")) for f in spec.files)


def test_the_command_names_every_model_its_licence_and_its_place(capsys):
    models.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(models.REGISTRY)
    for line, spec in zip(lines, models.REGISTRY.values()):
        assert spec.licence in line and (line.endswith("; here") or all(repo in line for repo, _ in spec.candidates))


# ------------------------------------------------------------------ depth models and the judge

def save_depth(folder, kind="mini"):
    from transformers import DPTConfig, DPTForDepthEstimation
    torch.manual_seed(0)
    model = DPTForDepthEstimation(DPTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5]))
    with torch.no_grad():  # alive and not flat
        for p in model.parameters():
            if p.ndim > 1:
                torch.nn.init.xavier_normal_(p, gain=1.5)
    model.head.head[-2].bias.data.fill_(1.0)
    model.save_pretrained(folder)
    if kind == "mini":
        (folder / "card.json").write_text(json.dumps({"inverse_scale": 2.0}))
    return model


def test_a_depth_folder_loads_with_the_adapter_of_its_kind(tmp_path, monkeypatch):
    from lib.scenes import FAR, NEAR
    save_depth(tmp_path / "models" / "mini-depth")
    monkeypatch.setenv("LAYERS_DATA", str(tmp_path))
    monkeypatch.delenv("LAYERS_MODELS", raising=False)
    image = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    for name in ("mini", "mini-depth"):
        estimate = models.load_depth(name, quiet=True)
        found = estimate(image)
        assert found.kind == "metric" and (found.near, found.far) == (NEAR, FAR) and found.size == (48, 64)
        assert estimate.used.endswith("mini-depth")
    save_depth(tmp_path / "plain", kind="dpt")
    assert models.load_depth(str(tmp_path / "plain"), quiet=True)(image).kind == "inverse-relative"


def test_the_judge_loads_from_a_folder(tmp_path, monkeypatch):
    from lib.metrics import Judge
    torch.manual_seed(0)
    Judge().save(tmp_path / "models" / "judge")
    monkeypatch.setenv("LAYERS_DATA", str(tmp_path))
    judge = models.load_judge(quiet=True)
    assert not judge.training and judge.loaded_from.endswith("judge")
    assert judge(torch.rand(1, 3, 32, 32))["depth"].shape == (1, 1, 32, 32)


def test_taesd_from_the_test_data():
    folder = TESTDATA / "taesd"
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set LAYERS_TESTDATA")
    vae = models.load_vae(str(folder), quiet=True)
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    with torch.no_grad():
        back = vae.decode(vae.encode(ramp).latents).sample
    assert (back - ramp).abs().mean() < 0.08


# ------------------------------------------------------------------ SD 1.5's real shapes, without its weights

def sd15_unet(**changes):
    from diffusers import UNet2DConditionModel
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, **changes)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_registry_sizes_follow_from_the_real_shapes():
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                            num_attention_heads=12))
    unet, inpaint = sd15_unet(), sd15_unet(in_channels=9)
    assert parameters(unet) == 859_520_964 and parameters(inpaint) == 859_535_364
    rest = parameters(vae) + parameters(text)
    assert models.REGISTRY["sd15"].size == 4 * (parameters(unet) + rest)
    assert models.REGISTRY["sd15-inpaint"].size == 4 * (parameters(inpaint) + rest)


def test_attention_layers_of_sd15_and_of_the_mini_have_one_description():
    """Names and latent fractions are found by walking the network, so the same code serves both."""
    real = attention.layers(sd15_unet())
    assert len(real) == 16 and len({x.name for x in real}) == 16
    count = {f: sum(x.fraction == f for x in real) for f in (1.0, 0.5, 0.25, 0.125)}
    assert count == {1.0: 5, 0.5: 5, 0.25: 5, 0.125: 1}
    assert [x.place for x in real] == ["down"] * 6 + ["mid"] + ["up"] * 9
    assert real[-1].name == "up_blocks.3.attentions.2.transformer_blocks.0.attn1"
    from lib.train import tiny_pipeline
    mini = attention.layers(tiny_pipeline().unet)
    assert {x.fraction for x in mini} == {1.0, 0.5, 0.25} and {x.place for x in mini} == {"down", "mid", "up"}


def test_the_shipped_models_load_if_they_are_here():
    here = [r["name"] for r in models.catalogue() if r["here"] and r["kind"] == "pipeline"]
    if not here:
        pytest.skip("no shipped pipeline in data/models yet")
    for name in here:
        pipe = models.load(name, quiet=True)
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        assert pipe.unet.config.in_channels in (4, 9) and size >= 128


def test_a_short_name_is_found_as_what_it_stands_for():
    assert models.find("mini", "depth")[0] == models.find("mini-depth", "depth")[0]
    assert models.find("mini", "pipeline")[0] != models.find("mini", "depth")[0]
    with pytest.raises(ValueError, match="Unknown depth model 'sd15' .sd15 is a pipeline model."):
        models.check_name("sd15", "depth")
