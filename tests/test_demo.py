"""The demo model: loads offline, refuses damaged files, knows its words, makes what is asked."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
np = pytest.importorskip("numpy")
pytest.importorskip("typer")
pytest.importorskip("PIL")

from attnproc.app.demo import metric, model, reference  # noqa: E402
from attnproc.app.demo.data import Entry  # noqa: E402
from attnproc.app.demo.mixing import Mixer  # noqa: E402
from attnproc.app.demo.palette import GROUNDS, NOVEL_LOOKS, NOVEL_PAIRS, TINTS  # noqa: E402
from attnproc.app.demo.train import Budget, Denoiser, Trainer  # noqa: E402
from attnproc.app.demo.vocabulary import LENGTH, WEIGHTS, Word, split, suggest, words  # noqa: E402

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return model.load()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    return tmp_path / "weights"


def test_pipeline_is_plain_diffusers(pipeline):
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert type(pipeline.unet).__module__.startswith("diffusers.")
    assert pipeline.unet.dtype == torch.float32


def test_weights_fit_in_16_mib():
    sizes = [file.stat().st_size for file in WEIGHTS.rglob("*.safetensors")]
    assert sum(sizes) <= 16 * 2**20


@pytest.mark.parametrize("name", [UNET, "text_encoder/model.safetensors", model.SUMS])
def test_missing_file_is_named(copied: Path, name: str):
    (copied / name).unlink()
    with pytest.raises(model.DemoWeightsError, match=r"missing; reinstall attnproc$") as caught:
        model.load(folder=copied)
    assert "\n" not in str(caught.value)


def test_damaged_file_is_named(copied: Path):
    content = bytearray((copied / UNET).read_bytes())
    content[-1] ^= 1
    (copied / UNET).write_bytes(content)
    with pytest.raises(model.DemoWeightsError, match=r"safetensors is damaged"):
        model.check(copied)


def test_words_point_at_their_tokens(pipeline):
    prompt = "A RED hovercraftx, crème!"
    found = words(prompt)
    assert found[:2] == [Word("a", 1, True), Word("red", 2, True)]
    assert [(word.text, word.known) for word in found[2:]] == [
        ("hovercraftx", False),
        ("creme", False),
    ]
    ids = pipeline.tokenizer(prompt).input_ids
    assert ids[2] == pipeline.tokenizer.convert_tokens_to_ids("red")
    assert ids[3] == pipeline.tokenizer.unk_token_id
    assert len(ids) == len(found) + 2


def test_words_stop_where_the_model_stops():
    assert len(words("cat " * 40)) == LENGTH - 2


@pytest.mark.parametrize(("wrong", "right"), [("octopuss", "octopus"), ("RoCkett", "rocket")])
def test_suggest_finds_near_words(wrong: str, right: str):
    assert right in suggest(wrong)


@pytest.mark.parametrize("nothing", ["", "???", "xqzvwk"])
def test_suggest_admits_that_nothing_is_near(nothing: str):
    assert suggest(nothing) == []


def test_held_out_colours_have_names():
    assert all(tint in TINTS and ground in GROUNDS for tint, ground in NOVEL_LOOKS)
    assert all(word.known for name in GROUNDS for word in words(name))


@pytest.fixture
def mixer() -> Mixer:
    """A training set of grey squares that are called like the things of the held-out pairs."""
    torch.manual_seed(0)
    names = sorted({name for pair in NOVEL_PAIRS for name in pair})
    entries = [Entry([name], [], 1.0, 1.0, True) for name in names]
    pictures = np.full((len(names), 4, 64, 64), 128, dtype=np.uint8)
    return Mixer(pictures, entries, device=torch.device("cpu"))


def test_held_out_combinations_are_never_drawn(mixer: Mixer):
    names = {index: word for word, index in mixer.ids.items()}
    mixer.shares = dataclasses.replace(mixer.shares, both=0.3)
    mixer.emphasise(1.0)
    batches = [mixer.draw(256) for _ in range(4)]
    drawn = [[names[token] for token in row] for batch in batches for row in batch.tokens.tolist()]

    pairs = {
        frozenset(name for name in text if name in set(sum(NOVEL_PAIRS, ())))
        for text in drawn
        if "and" in text
    }
    assert len(pairs) > 50
    assert pairs.isdisjoint(map(frozenset, NOVEL_PAIRS))

    looks = {
        tuple(word for word in text if word in GROUNDS)
        for text in drawn
        if "background" in text and "and" not in text
    }
    assert len(looks) > 30
    assert looks.isdisjoint(NOVEL_LOOKS)


def test_batches_are_in_the_models_form(mixer: Mixer):
    batch = mixer.draw(16)
    assert batch.pictures.shape == (16, 3, 64, 64)
    assert batch.pictures.abs().max() <= 1
    assert batch.tokens.shape == (16, LENGTH)
    assert bool((batch.tokens == 2).sum(1).eq(1).all())


@pytest.mark.slow
def test_training_goes_on_where_it_stopped(mixer: Mixer, tmp_path: Path):
    vocabulary_size = len(mixer.ids)
    first = Trainer(Denoiser(vocabulary_size), mixer, Budget(steps=4), batch=2)
    first.step()
    first.save(tmp_path, list(mixer.ids)[4:])
    second = Trainer(Denoiser(vocabulary_size), mixer, Budget(steps=4), batch=2)
    assert second.resume(tmp_path)
    assert second.budget.step == 1

    first_loss = first.step()
    second.resume(tmp_path)
    assert torch.equal(second.step(), first_loss)
    for one, two in zip(first.current, second.current, strict=True):
        torch.testing.assert_close(one, two)


def test_split_agrees_with_the_tokenizer(pipeline):
    text = "Côte d'Ivoire: keycap 10, mother-of-pearl"
    assert split(text) == ["cote", "divoire", "keycap", "10", "mother", "of", "pearl"]
    assert len(pipeline.tokenizer(text).input_ids) == 9


def test_pictures_show_what_was_asked(pipeline):
    known = reference.load()
    places = list(range(0, len(known.asked), 7))
    asked = [known.labels[known.asked[place]] for place in places]
    pictures = metric.generate(pipeline, asked, steps=12)

    score = metric.measure(pictures, places, known)
    shuffled = metric.measure(pictures, places[1:] + places[:1], known)
    assert score.right >= len(places) - 1
    assert score.median > 20
    assert shuffled.right == 0


def test_pairs_show_both(pipeline):
    pairs = [("rocket", "pizza"), ("robot", "rose")]
    asked = [f"{one} and {two}" for one, two in pairs]
    pictures = metric.generate(pipeline, asked, steps=12)
    halves = metric.measure_pairs(pictures, pairs, reference.load())
    assert halves.left + halves.right >= 3


def test_seed_decides_and_batches_agree(pipeline):
    def make(prompts: list[str], seeds: list[int]):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(
            prompts, num_inference_steps=3, generator=generators, output_type="np"
        ).images

    both = make(["cat", "pizza"], [1, 2])
    assert np.abs(make(["pizza"], [2])[0] - both[1]).max() < 1e-3
    assert np.abs(make(["pizza"], [3])[0] - both[1]).max() > 1e-2


def test_callback_sees_every_step(pipeline):
    seen: list[int] = []

    def note(pipe, step, timestep, values):
        seen.append(step)
        return values

    pipeline("cat", num_inference_steps=3, callback_on_step_end=note, output_type="latent")
    assert seen == [0, 1, 2]
