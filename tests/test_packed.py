"""Rows that are packed: which positions stay, that attention finds them, and when a decoder is left as it is."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from families import FAMILIES
from hydra_vlm.config import TrainingConfig
from hydra_vlm.data.batches import WORTH_PACKING
from hydra_vlm.models.structure import image_token
from hydra_vlm.planning.reading import PACKED
from hydra_vlm.training.packed import EVEN, Packing, Pick, Spread
from hydra_vlm.training.recipe import adapting
from hydra_vlm.training.speed import sped_up
from test_speed import PLAIN, Opened, load_model_again, opened, require_equal, uniform, unlabelled

IMAGE = 9
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@st.composite
def batches(draw: st.DrawFn) -> tuple[dict[str, Tensor], Tensor]:
    """Rows of a few tokens, some with an image, that begin alike or not, and what of them is supervised."""
    rows, length = draw(st.integers(1, 5)), draw(st.integers(2, 14))
    start = draw(st.lists(st.integers(0, 3), max_size=length))
    ids = torch.zeros(rows, length, dtype=torch.long)
    mask, supervised = torch.zeros_like(ids), torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        own = draw(st.integers(1, length))
        words = (start + draw(st.lists(st.sampled_from([0, 1, 2, 3, IMAGE]), min_size=own, max_size=own)))[:own]
        ids[row, : len(words)], mask[row, : len(words)] = torch.tensor(words), 1
        last = min(len(words), length - 1)
        for place in draw(st.lists(st.integers(0, max(0, last - 1)), max_size=3)):
            supervised[row, place] = place < last
    return {"input_ids": ids, "attention_mask": mask}, supervised


@given(batches(), st.sampled_from([IMAGE, None]))
@settings(max_examples=300, deadline=None)
def test_every_supervised_position_sees_what_it_saw(drawn: tuple[dict[str, Tensor], Tensor], image: int | None) -> None:
    batch, supervised = drawn
    if not supervised.any():
        return
    packing = Packing.plan(batch, supervised, image)
    ids = batch["input_ids"]
    if packing is None:
        return
    rows, length = ids.shape
    assert len(packing.picked) <= WORTH_PACKING * rows * length
    assert packing.picked.tolist() == sorted(set(packing.picked.tolist()))
    assert set(supervised.flatten().nonzero().squeeze(1).tolist()) <= set(packing.picked.tolist())
    assert image is not None or packing.common == 0
    assert IMAGE not in ids[:, : packing.common]
    places = spread(packing.picked[None, None, :, None].double(), packing)[:, 0, :, 0].long()
    for row, place in supervised.nonzero().tolist():
        for seen in range(place + 1):
            other, where = divmod(int(places[row, seen]), length)
            assert where == seen
            assert other == row or ids[other, : seen + 1].tolist() == ids[row, : seen + 1].tolist()


def spread(packed: Tensor, packing: Packing) -> Tensor:
    found: Tensor = Spread.apply(packed, packing)
    return found


@given(batches())
@settings(max_examples=60, deadline=None)
def test_gradients_of_moved_values_are_those_of_the_moves(drawn: tuple[dict[str, Tensor], Tensor]) -> None:
    batch, supervised = drawn
    packing = Packing.plan(batch, supervised, IMAGE) if supervised.any() else None
    if packing is None:
        return
    count, (rows, _), needed = len(packing.picked), packing.shape, packing.needed
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator).requires_grad_()

    by_head, by_position = values(1, 2, count, 3), values(1, count, 2, 3)
    assert torch.autograd.gradcheck(lambda x: Pick.apply(x, packing), values(rows, needed, 2, 3))
    used = torch.zeros(rows, needed, dtype=torch.bool)  # what nobody looks at has no gradient in a decoder
    needs = (supervised * torch.arange(1, supervised.shape[1] + 1)).amax(dim=1)
    used[torch.arange(needed) < needs[:, None]] = True
    seen = used[:, None, :, None]
    assert torch.autograd.gradcheck(lambda x: spread(x, packing) * seen, by_head)
    assert torch.autograd.gradcheck(lambda x: spread(x.transpose(1, 2), packing) * seen, by_position)


def test_rows_of_about_one_length_are_packed_alike() -> None:
    ids = torch.arange(40).view(4, 10)
    supervised = torch.zeros(4, 10, dtype=torch.bool)
    supervised[:, 7] = True
    alike = Packing.plan({"input_ids": ids}, supervised, IMAGE)
    assert alike is not None
    assert (alike.places, len(alike.picked), alike.needed) == (None, 32, 8)
    supervised[0, 7], supervised[0, 2] = False, True
    assert EVEN * 27 < 32
    apart = Packing.plan({"input_ids": ids}, supervised, IMAGE)
    assert apart is not None
    assert apart.places is not None
    assert len(apart.picked) == 27


def test_padding_on_the_left_and_rows_without_tokens_are_not_packed() -> None:
    ids, supervised = torch.ones(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.bool)
    supervised[:, 5] = True
    left = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    assert Packing.plan({"input_ids": ids, "attention_mask": left}, supervised, IMAGE) is None
    assert Packing.plan({"attention_mask": torch.ones_like(ids)}, supervised, IMAGE) is None
    assert Packing.plan({"input_ids": ids}, supervised, IMAGE) is not None


@pytest.fixture(scope="module", params=FAMILIES)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def mobilevlm(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(tmp_path_factory.mktemp("mobilevlm"), "mobilevlm")


def rows_through_the_decoder(source: Opened, batch: dict[str, Tensor], **chosen: Any) -> int:
    """Positions that the first layer's keys are computed for."""
    seen = []
    keys = source.model.get_base_model().get_submodule(f"{source.loaded.parts.layers}.0.self_attn.k_proj")
    with sped_up(source.model, source.loaded.parts, TrainingConfig(**chosen)) as positions:
        assert positions is not None
        positions.read(batch)
        hook = keys.register_forward_hook(lambda _, __, output: seen.append(output.shape[:-1].numel()))
        source.model(**unlabelled(batch), use_cache=False)
        hook.remove()
    return seen[-1]


def test_families_are_packed_as_plans_take_them(each: Opened) -> None:
    batch = each.batch(each.records)
    whole = batch["input_ids"].numel()
    found = rows_through_the_decoder(each, batch)
    assert rows_through_the_decoder(each, batch, packed_rows=False) == whole
    assert (found < WORTH_PACKING * whole) == (each.model.config.model_type in PACKED)
    if found < whole:
        supervised = batch["labels"][:, 1:] != -100
        mark = image_token(each.model.config, each.loaded.parts)
        packing = Packing.plan(batch, torch.nn.functional.pad(supervised, (0, 1)), mark)
        assert packing is None or found == len(packing.picked)


def test_the_decoders_result_keeps_its_shape(mobilevlm: Opened) -> None:
    batch = mobilevlm.batch(mobilevlm.records)
    decoder = mobilevlm.model.get_base_model().get_submodule(mobilevlm.loaded.parts.decoder)
    results: list[Tensor] = []
    for packed in (False, True):
        with sped_up(mobilevlm.model, mobilevlm.loaded.parts, TrainingConfig(packed_rows=packed)) as positions:
            assert positions is not None
            positions.read(batch)
            hook = decoder.register_forward_hook(lambda _, __, output: results.append(output.last_hidden_state))
            mobilevlm.model(**unlabelled(batch), use_cache=False)
            hook.remove()
            supervised = positions.rows
    plain, ours = results
    assert ours.shape == plain.shape
    torch.testing.assert_close(ours.flatten(0, 1)[supervised], plain.flatten(0, 1)[supervised])


def test_a_common_beginning_is_computed_once(mobilevlm: Opened) -> None:
    texts = mobilevlm.batch([record for record in mobilevlm.records if not record.image] * 3)
    plain = mobilevlm.loss_and_gradients(texts, **PLAIN)
    require_equal(mobilevlm.loss_and_gradients(texts), plain)
    alone = mobilevlm.batch([record for record in mobilevlm.records if not record.image][:1])
    assert rows_through_the_decoder(mobilevlm, texts) < 3 * rows_through_the_decoder(mobilevlm, alone)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fused", [True, False])
def test_any_attention_finds_its_rows(mobilevlm: Opened, attention: str, fused: bool) -> None:
    base = mobilevlm.model.get_base_model()
    before = base.config.get_text_config()._attn_implementation
    ragged, even = mobilevlm.batch(mobilevlm.records), mobilevlm.batch(mobilevlm.records[:1] * 2)
    ragged_plain, even_plain = (mobilevlm.loss_and_gradients(batch, **PLAIN) for batch in (ragged, even))
    base.set_attn_implementation(attention)
    try:
        require_equal(mobilevlm.loss_and_gradients(ragged, fused_layers=fused), ragged_plain)
        require_equal(mobilevlm.loss_and_gradients(even, fused_layers=fused), even_plain)
    finally:
        base.set_attn_implementation(before)


def test_a_decoder_that_mixes_positions_otherwise_is_left_as_it_is(mobilevlm: Opened) -> None:
    batch = mobilevlm.batch(mobilevlm.records)
    whole = batch["input_ids"].numel()
    assert rows_through_the_decoder(mobilevlm, batch) < whole
    norm = mobilevlm.model.get_base_model().get_submodule(f"{mobilevlm.loaded.parts.layers}.1.input_layernorm")
    mixing = norm.register_forward_hook(lambda _, __, output: output + output.roll(1, dims=1))
    assert rows_through_the_decoder(mobilevlm, batch) == whole
    mixing.remove()
    attention = mobilevlm.model.get_base_model().get_submodule(mobilevlm.loaded.parts.decoder).config
    attention.is_causal = False  # sees what comes behind
    assert rows_through_the_decoder(mobilevlm, batch) == whole
    del attention.is_causal
    assert rows_through_the_decoder(mobilevlm, batch) < whole


def test_what_draws_at_random_is_not_packed(mobilevlm: Opened) -> None:
    again, dropping = load_model_again(mobilevlm), TrainingConfig(dropout=0.5)
    with adapting(again, uniform(again), dropping, 0) as model, sped_up(model, again.parts, dropping) as positions:
        assert positions is not None
        assert positions.plan is None
    text = again.model.config.get_text_config()
    text.attention_dropout = 0.5
    for layer in again.model.get_submodule(again.parts.layers):
        layer.self_attn.attention_dropout = 0.5
    whole = TrainingConfig()
    with adapting(again, uniform(again), whole, 0) as model, sped_up(model, again.parts, whole) as positions:
        assert positions is not None
        assert positions.plan is None


def test_positions_that_differ_between_rows_are_not_taken_for_common(mobilevlm: Opened) -> None:
    batch = mobilevlm.batch([record for record in mobilevlm.records if not record.image] * 2)
    rows, length = batch["input_ids"].shape
    places = torch.arange(length).expand(rows, length) + torch.arange(rows)[:, None]
    moved = batch | {"position_ids": places}
    require_equal(mobilevlm.loss_and_gradients(moved), mobilevlm.loss_and_gradients(moved, **PLAIN))
    assert rows_through_the_decoder(mobilevlm, moved) == rows * length
    assert rows_through_the_decoder(mobilevlm, batch | {"position_ids": places[:1]}) < rows * length
