# SPDX-License-Identifier: Apache-2.0
"""The data of the miniature: scenes and their scorer, digits, words, the autoencoder."""

from __future__ import annotations

import pytest
import torch

from miniature import digits, scenes
from sparse_unified.bagel.tokenizer import Tokenizer
from sparse_unified.mini.autoencoder import identity_autoencoder
from sparse_unified.mini.model import (
    MARKERS,
    TOKENIZER,
    MiniTask,
    encode,
    load_pipeline,
    new_model,
    write_model,
)


def test_a_scene_drawn_from_any_prompt_scores_1():
    generator = torch.Generator().manual_seed(0)
    prompts = scenes.all_prompts()
    assert len(prompts) == 87
    assert len({p.text for p in prompts}) == 87
    pictures = [scenes.render(prompt.draw(generator)) for prompt in prompts]
    assert scenes.score(prompts, pictures) == dict.fromkeys((*scenes.COLUMNS, "overall"), 1.0)


def test_a_scene_is_read_back_as_it_was_painted():
    generator = torch.Generator().manual_seed(1)
    for prompt in scenes.all_prompts()[::3]:
        objects = prompt.draw(generator)
        key = lambda item: (item.row, item.column)  # noqa: E731
        assert sorted(scenes.read_scene(scenes.render(objects)), key=key) == sorted(
            objects, key=key
        )


def test_every_single_mistake_scores_0():
    generator = torch.Generator().manual_seed(2)
    for prompt in scenes.all_prompts()[::2]:
        objects = prompt.draw(generator)
        first, others = objects[0], objects[1:]
        wrong_shape = next(s for s in scenes.SHAPES if s not in {o.shape for o in objects})
        used = {(o.row, o.column) for o in objects}
        free = [(r, c) for r in range(2) for c in range(2) if (r, c) not in used]
        mistakes = [others, [first._replace(shape=wrong_shape), *others]]
        mistakes += [[*objects, first._replace(row=r, column=c)] for r, c in free]
        if prompt.parts[0].colour:
            wrong = next(c for c in scenes.COLOURS if c != first.colour)
            mistakes.append([first._replace(colour=wrong), *others])
        if prompt.relation:
            second = objects[1]
            place = {"row": first.row, "column": first.column}
            mistakes.append(
                [
                    first._replace(row=second.row, column=second.column),
                    second._replace(**place),
                ]
            )
        for mistake in mistakes:
            assert scenes.score([prompt], [scenes.render(mistake)])["overall"] == 0, prompt.text


def test_a_cell_between_two_shapes_is_no_object():
    picture = scenes.render([scenes.Object(shape="square", colour="red", row=0, column=0)]) / 2
    assert scenes.read_scene(picture) == [None]
    prompt = scenes.all_prompts()[0]
    assert prompt.text == "a square"
    assert not prompt.holds(scenes.read_scene(picture))


def test_small_errors_of_pixels_are_forgiven():
    prompt = scenes.all_prompts()[-1]
    generator = torch.Generator().manual_seed(3)
    picture = scenes.render(prompt.draw(generator))
    noisy = picture + 0.1 * torch.randn(picture.shape, generator=generator)
    assert scenes.score([prompt], [noisy])["attribute"] == 1


def test_held_out_prompts_are_not_trained_on():
    train, test = scenes.split_prompts()
    both = {p.text for p in train} & {p.text for p in test}
    assert both == {"a square", "a triangle", "a cross"}
    assert {p.column for p in test} == set(scenes.COLUMNS)
    assert {p.text for p in train} | {p.text for p in test} == {
        p.text for p in scenes.all_prompts()
    }


def test_placed_prompts_hold_in_their_half_alone_and_are_not_tested():
    generator = torch.Generator().manual_seed(5)
    for prompt in scenes.placed_prompts():
        objects = prompt.draw(generator)
        assert prompt.holds(objects), prompt.text
        for item, part in zip(objects, prompt.parts, strict=True):
            opposite = {
                "left": {"column": 1},
                "right": {"column": 0},
                "above": {"row": 1},
                "below": {"row": 0},
                None: {},
            }[part.place]
            moved = [o._replace(**opposite) if o is item else o for o in objects]
            assert prompt.holds(moved) == (part.place is None), prompt.text
    assert not {p.text for p in scenes.placed_prompts()} & {p.text for p in scenes.all_prompts()}


def test_answers_follow_from_the_scene():
    generator = torch.Generator().manual_seed(4)
    for kind in (*scenes.QUESTION_KINDS, "place"):
        for _ in range(20):
            asked = scenes.draw_question(kind, generator)
            words = asked.text.split()
            if kind == "count":
                count = sum(scenes.PLURALS[o.shape] == words[2] for o in asked.objects)
                assert asked.answer == scenes.NUMBERS[count]
            elif kind == "colour":
                assert [asked.answer] == [o.colour for o in asked.objects if o.shape == words[4]]
            elif kind == "place":
                (only,) = asked.objects
                assert words[3] == only.shape
                if words[6] == "above":
                    assert asked.answer == ("left", "right")[only.column]
                else:
                    assert asked.answer == ("above", "below")[only.row]
            else:
                first, second = (
                    next(o for o in asked.objects if o.shape == words[i]) for i in (3, 7)
                )
                assert scenes.relation_of(first, second).split()[0] == asked.answer
    with pytest.raises(ValueError, match="'count', 'colour', 'position' or 'place', got 'x'"):
        scenes.draw_question("x", generator)


def test_score_needs_one_picture_for_each_prompt():
    with pytest.raises(ValueError, match="one for each of 1 prompts, got 0"):
        scenes.score(scenes.all_prompts()[:1], [])


def test_the_judge_of_digits_knows_held_out_digits():
    pixels, numbers = digits.load()
    train, test = digits.split()
    assert set(train.tolist()).isdisjoint(test.tolist())
    assert len(train) + len(test) == 1797
    found = digits.score(numbers[test].tolist(), pixels[test])
    assert found["overall"] >= 0.98
    assert found["frechet"] < digits.score(numbers[test].tolist(), -pixels[test])["frechet"] / 10


def test_the_tokenizer_gives_every_word_its_own_id():
    tokenizer = Tokenizer.from_directory(TOKENIZER)
    texts = [prompt.text for prompt in scenes.all_prompts()]
    texts += [digits.prompt_of(n) for n in range(10)] + [digits.QUESTION, "An unknown word"]
    for text in texts:
        assert tokenizer.encode(text) == encode(text)
    for text in texts[:-1]:
        assert tokenizer.decode(encode(text)) == text
    assert set(MARKERS) == {"bos", "eos", "start_of_image", "end_of_image"}


@pytest.mark.parametrize("downsample", [1, 2])
def test_the_autoencoder_is_the_identity(downsample):
    vae = identity_autoencoder(1.5, downsample)
    blocks = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    pixels = blocks.repeat_interleave(downsample, 2).repeat_interleave(downsample, 3)
    latent = vae.encode(pixels)
    torch.testing.assert_close(latent, 1.5 * blocks, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(latent), pixels, rtol=4e-4, atol=1e-5)


@pytest.mark.parametrize("task", MiniTask)
def test_a_written_model_is_a_checkpoint_like_any_other(task, tmp_path):
    model = new_model(task, 0)
    pipeline = load_pipeline(write_model(task, tmp_path, model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(pipeline.model.state_dict()[name], tensor), name
    assert pipeline.model.config == model.config
    side = model.config.vision.image_size
    result = pipeline.generate("a cross", seed=0, num_timesteps=3, progress=False)
    assert result.images[0].size == (side, side)
    assert pipeline.chat("which digit ?", images=result.images, max_length=2).token_ids[0] == 1
