"""The batch on a card that is not there (tests/pretend_card.py): CUDA's rules, the CPU's numbers, half
precision."""
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from lib import batch, bench, benchmark, jobs, models, processors, setup, video  # noqa: E402
from pretend_card import Card, plugged_in  # noqa: E402


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a random pipeline and two frames of the sample."""
    base = tmp_path_factory.mktemp("card")
    bench.random_pipeline(base / "random", "tiny")
    (base / "in").mkdir()
    for frame in video.frames(setup.data_dir() / "scenes" / "walk.mp4", 4.0):
        Image.fromarray(frame.image[:160, :224]).save(base / "in" / f"{frame.index}.png")
    return base


def settings(home, **more):
    return {"model": str(home / "random"), "steps": 2, "insert": "", **more}


def edited(home, device, precise=False, **more):
    """(processor, its answer for the first frame)."""
    made = processors.Edit(settings(home, **more), device)
    entry = made.decode({"id": "0.png", "path": str(home / "in" / "0.png")})
    (output,) = made.infer([entry], [7], precise)
    assert made.check(output, entry) == ""
    return made, output


def dtypes(pipe):
    return {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()}


def test_the_pretended_card_has_cuda_s_rules():
    x = torch.arange(6.0).view(2, 3)
    with plugged_in() as seen:
        on = x.to("cuda")
        assert isinstance(on, Card) and on.is_cuda and on.device == torch.device("cuda", 0) and not x.is_cuda
        assert (on + 1).is_cuda and (on * torch.tensor(2.0)).is_cuda and on.half().dtype == torch.float16
        made = torch.zeros(2, device="cuda"), torch.zeros_like(on), torch.cat([on, on])
        assert all(y.is_cuda for y in made)
        assert not on.cpu().is_cuda and torch.equal(on.cpu(), x) and torch.ones(2).to(on).is_cuda
        x[:1] = on[:1]                                     # a copy may cross
        assert not x.is_cuda and float(x[torch.tensor(1, device="cuda"), 2]) == 5
        for wrong, words in ((lambda: on + x, "same device"),
                             (lambda: torch.cat([on, torch.tensor([1.0])]), "same device"),
                             (lambda: torch.nn.functional.linear(on, x), "same device"),
                             (lambda: on.numpy(), "numpy"),
                             (lambda: np.asarray(on), "numpy"),
                             (lambda: x[torch.tensor([0], device="cuda")], "indices"),
                             (lambda: torch.randn(2, device="cuda", generator=torch.Generator("cpu")),
                              "generator"),
                             (lambda: torch.nn.Linear(3, 3).to("cuda")(x), "same device")):
            with pytest.raises((RuntimeError, TypeError), match=words):
                wrong()
        layer = torch.nn.Linear(3, 3).to("cuda", torch.float16)
        assert {(type(p), p.dtype) for p in layer.parameters()} == {(Card, torch.float16)}
        with pytest.raises(RuntimeError, match="[Hh]alf"):
            layer(on)
        torch.cuda.synchronize()
    assert seen["waits"] == 1 and seen["moved_in"] > 3 and not torch.ones(2).to("cpu").is_cuda


@pytest.mark.parametrize("more", [{}, {"mechanism": "guide"}, {"insert": "red chair"}, {"dtype": "float32"}],
                         ids=["inject", "guide", "words", "float32"])
def test_an_edit_is_the_same_there_as_here(home, more):
    """Half precision on the card unless told otherwise; every tensor where it must be; the same bits as on
    the CPU."""
    with plugged_in() as seen:
        made, there = edited(home, "cuda", **more)
        want = torch.float32 if "dtype" in more else torch.float16
        assert made.dtype == want and dtypes(made.pipe) == {want} and made.half == (want == torch.float16)
        assert all(isinstance(p, Card) for p in made.pipe.unet.parameters())
    assert seen["waits"] >= 2                              # it waits for the card before it reads the clock
    _, here = edited(home, "cpu", **{"dtype": "float16", **more})
    assert type(there.picture) is np.ndarray and there.picture.dtype == np.float32
    assert np.array_equal(there.picture, here.picture) and there.metrics == here.metrics


def test_full_precision_is_full_and_then_half_again(home):
    with plugged_in():
        made = processors.Edit(settings(home), "cuda")
        entry, worked = made.decode({"id": "0.png", "path": str(home / "in" / "0.png")}), []
        for part in (made.pipe.unet, made.pipe.vae.decoder, made.pipe.text_encoder):
            part.register_forward_pre_hook(lambda module, args, kwargs: worked.append(
                next(module.parameters()).dtype), with_kwargs=True)
        (half,), (full,), (again,) = (made.infer([entry], [7], precise) for precise in (False, True, False))
        third = len(worked) // 3
        assert worked == [torch.float16] * third + [torch.float32] * third + [torch.float16] * third
        assert dtypes(made.pipe) == {torch.float16}
    assert np.array_equal(half.picture, again.picture) and not np.array_equal(half.picture, full.picture)


def test_no_room_for_full_precision_leaves_the_pipeline_whole(home, monkeypatch):
    """Memory runs out after the U-Net is in float32 and before the VAE is: the next picture must find one
    dtype."""
    with plugged_in():
        made = processors.Edit(settings(home), "cuda")
        entry, real = made.decode({"id": "0.png", "path": str(home / "in" / "0.png")}), models._cast

        def cast(pipe, device, dtype):
            if dtype == torch.float32:
                pipe.unet.to(device, dtype)
                raise torch.OutOfMemoryError("CUDA out of memory")
            real(pipe, device, dtype)
        monkeypatch.setattr(models, "_cast", cast)
        with pytest.raises(torch.OutOfMemoryError):
            made.infer([entry], [7], precise=True)
        assert dtypes(made.pipe) == {torch.float16} and made.infer([entry], [7])[0].picture.shape[-1] == 3


def test_less_memory_means_the_same_picture(home):
    from lib import attention
    with plugged_in():
        made, plain = edited(home, "cuda")
        kept, real = [], attention.Bank.at
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention.Bank, "at", lambda self,
                          *a: kept.append(real(self, *a)["k"].is_cuda) or real(self, *a))
            entry = made.decode({"id": "0.png", "path": str(home / "in" / "0.png")})
            made.infer([entry], [7])
            assert kept and all(kept)
            kept.clear()
            assert made.spare() and not made.spare()
            (spared,) = made.infer([entry], [7])
            assert kept and not any(kept)
    assert np.array_equal(plain.picture, spared.picture) and not processors.Edit(settings(home),
                                                                                 "cpu").spare()


def test_a_job_on_the_card_with_numbers_beyond_half_precision(home, tmp_path):
    """A decoder whose values pass 65504 for every picture: each is NaN in half precision, and whole in
    full."""
    pipe = models.load(str(home / "random"), quiet=True)
    large = 6e4 / pipe.vae.post_quant_conv.weight.data.abs().max()
    pipe.vae.post_quant_conv.weight.data *= large
    pipe.vae.post_quant_conv.bias.data *= large
    pipe.vae.decoder.conv_in.weight.data /= large
    pipe.save_pretrained(tmp_path / "random-large", safe_serialization=True)
    job = jobs.open_or_create(tmp_path / "job", home / "in", "edit",
                              settings(home, model=str(tmp_path / "random-large")))
    with plugged_in() as seen:
        assert batch.work(job, device="cuda") == batch.DONE
    rows = job.rows()
    assert [row["status"] for row in rows] == ["ok"] * 2, [row["message"] for row in rows]
    assert all(row["precise"] for row in rows) and seen["emptied"] >= 2
    assert batch.status(job, verify=True)["damaged"] == []


def test_the_benchmark_of_a_card_runs_there():
    """`python -m lib.benchmark gpu`, with a tiny pipeline."""
    with plugged_in():
        result = benchmark.gpu(benchmark.TINY, steps=4, repeats=1, peak_size=64)
    assert result["card"] == "a card that is not there" and result["dtype"] == "float16"
    assert set(result["rows"]) == {"plain", "inject",
                                   "guide"} and all(r["passes"] for r in result["rows"].values())


def test_the_bench_puts_both_processes_on_the_first_card(monkeypatch, tmp_path, home):
    """`bench --device cuda`: which runs it asks for, in which environment."""
    seen = []
    monkeypatch.setattr(bench.engines, "gpus", lambda: ["0", "1"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def timed(job, workers, device, pin):
        seen.append((workers, device, pin, bench.os.environ["CUDA_VISIBLE_DEVICES"],
                     job.facts["settings"]["dtype"]))
        rows = [{"metrics": {"passes": 10}, "time": 1.0, "seconds": {}, "peak_mb": 9.0, "worker": "a"}]
        return {"rate": 2.0, "rows": rows, "busy": 0.9, "commit": 0.01, "wait": 0.0}
    monkeypatch.setattr(bench, "timed_run", timed)
    monkeypatch.setattr(bench, "Watch", Watched)
    said = []
    bench._edits(tmp_path, 4, 2, "cuda", str(home / "random"), "auto", said.append)
    assert seen == [(1, "cuda", False, "0", "auto"), (2, "cuda", False, "0", "auto")]
    assert "2 processes on cuda" in "\n".join(said) and "watched 0" in "\n".join(said)


class Watched(bench.Watch):
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def words(self, rows=()):
        return f"watched {self.card}"
