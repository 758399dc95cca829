"""Every supported family from records to a merged model, through the functions that `hydra-vlm tune` runs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from families import FAMILIES, LAYERS, Family
from hydra_vlm import schedules, trials
from hydra_vlm.benchmarks.generation import Answering, answer, image_blocks
from hydra_vlm.benchmarks.images import once_per_image
from hydra_vlm.benchmarks.protocol import Example
from hydra_vlm.commands.chat import chat
from hydra_vlm.config import load_config
from hydra_vlm.data.features import load_image
from hydra_vlm.data.records import write_records
from hydra_vlm.data.templates import IGNORED
from hydra_vlm.lora import PROJECTOR, SCHEDULE, merge, read_schedule
from hydra_vlm.measuring import measure
from hydra_vlm.models.loading import LoadedModel, load_model
from hydra_vlm.training.recipe import Finetuned, finetune, prepare
from tolerances import ROWS, assert_same_sums

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ONE_ROUND = [
    {"id": "square", "image": "square.png", "conversations": ["what is it?", "red"]},
    {"id": "wide", "image": "wide.png", "conversations": ["what is this, and where?", "a blue one."]},
]
ROUNDS = {"id": "rounds", "image": "wide.png", "conversations": ["what is it?", "red", "and its shape?", "two words"]}
TEXTS = [
    {"id": "text", "conversations": ["what is two and two?", "four"]},
    {"id": "long", "conversations": ["what is it?", "no", "and then?", "more of it"]},
]


@dataclass(frozen=True)
class Trained:
    """A family's run: how it was trained and what came out."""

    family: Family
    study: trials.Study
    loaded: LoadedModel
    done: Finetuned
    folder: Path

    def batch(self) -> dict[str, torch.Tensor]:
        data = self.study.data
        return data.reader.batch([data.train[i] for i in range(len(data.train))])

    def fresh(self) -> LoadedModel:
        return self.study.fresh_model()


def quiet(_: str) -> None:
    """Say nothing."""


def records_for(name: str) -> list[dict[str, Any]]:
    """What the family can read: PaliGemma knows no conversations, a text decoder no images."""
    if name == "llama":
        return TEXTS
    return ONE_ROUND if name == "paligemma" else [*ONE_ROUND, ROUNDS, *TEXTS]


def write_data(folder: Path, records: list[dict[str, Any]]) -> Path:
    """A LLaVA-format file over two images of different sizes."""
    folder.mkdir()
    torch.manual_seed(1)
    for name, size in (("square.png", (32, 32)), ("wide.png", (60, 30))):
        pixels = torch.randint(0, 255, (size[1], size[0], 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    written = []
    for record in records:
        mark = "<image>\n" if "image" in record else ""
        turns = [
            {"from": ("human", "gpt")[i % 2], "value": (mark if i == 0 else "") + text}
            for i, text in enumerate(record["conversations"])
        ]
        written.append({**record, "conversations": turns})
    write_records(folder / "train.json", written)
    return folder / "train.json"


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """profile -> schedule -> two steps -> adapter on disk."""
    family = FAMILIES[request.param]
    home = tmp_path_factory.mktemp(family.name)
    data = write_data(home / "data", records_for(family.name))
    config = load_config(
        None,
        [
            f"model={family.save(home / 'model')}",
            f"data.train={data}",
            f"data.tests={{mine: {data}}}",
            "budget.rank=4",
            "profile.steps=3",
            "profile.skip=1",
            "allocation.n_stages=2",
            "schedules=[coarse]",
            "training.steps=2",
            "training.batch_size=2",
            "training.save_steps=1",
            "evaluation.max_new_tokens=4",
            "device=cpu",
        ],
    )
    study = trials.prepare_study(config, home / "run", quiet)
    schedule = schedules.allocate_all(study, measure(study, ["gradient_norm"], quiet))["coarse"]
    loaded = study.fresh_model()
    model = prepare(loaded, schedule, config.training, seed=0)
    done = finetune(model, loaded, study.data, config.training, 0, home / "checkpoints")
    trials.keep_weights(loaded, done.model, schedule, home)
    return Trained(family, study, loaded, done, home)


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where there is text; what a model says at padding is nobody's business."""
    with torch.no_grad():
        said = model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return said[batch["attention_mask"].bool()]


def test_the_graph_is_the_decoders(trained: Trained) -> None:
    parts, family = trained.loaded.parts, trained.family
    assert (parts.decoder, parts.tower, parts.projector) == (family.decoder, family.tower, family.projector)
    assert parts.graph.n_layers == LAYERS
    assert parts.graph.components == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_the_tower_is_untouched(trained: Trained) -> None:
    parts = trained.loaded.parts
    schedule = schedules.allocate_all(trained.study, measure(trained.study, ["gradient_norm"], quiet))["coarse"]
    loaded = trained.fresh()
    model = prepare(loaded, schedule, trained.study.config.training, seed=0)
    model(**trained.batch()).loss.backward()
    names = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    own = (f"{parts.projector}.",)
    tower = {
        n: p for n, p in names.items() if parts.tower and n.startswith(f"{parts.tower}.") and not n.startswith(own)
    }
    assert bool(tower) == (parts.tower is not None)
    assert all(p.grad is None and not p.requires_grad and "lora" not in n for n, p in tower.items())
    trained_whole = {n for n, p in names.items() if p.requires_grad and "lora" not in n}
    assert all(n.startswith(own) for n in trained_whole)
    assert bool(trained_whole) == (parts.projector is not None)
    assert all(names[n].grad is not None for n in trained_whole)
    before, after = loaded.model.state_dict(), trained.loaded.model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in tower)


def test_labels_are_the_answers_with_their_end(trained: Trained) -> None:
    reader, family = trained.study.data.reader, trained.family
    batch = trained.batch()
    for record, labels, ids in zip(records_for(family.name), batch["labels"], batch["input_ids"], strict=True):
        assert bool(((labels == IGNORED) | (labels == ids)).all())
        said = reader.tokenizer.decode(labels[labels != IGNORED])
        assert said == "".join(f"{family.lead}{text}{family.end}" for text in record["conversations"][1::2])
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert [item["length"] for item in trained.study.data.train] == lengths  # foreseen without the images


def test_prompts_are_the_processors_own(trained: Trained) -> None:
    """Against transformers' own way from messages to tensors, and as beginnings of what was trained on."""
    reader, batch = trained.study.data.reader, trained.batch()
    example = trained.study.tasks[0].examples[0]
    ours = reader.prompts([reader.prompt(example.question, example.image is not None)], [example.image])
    length = ours["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][0, :length], ours["input_ids"][0])
    assert bool((batch["labels"][0, :length] == IGNORED).all())
    if trained.family.name in ("paligemma", "mobilevlm", "llama"):
        return
    parts = [{"type": "image", "image": load_image(example.image)}, {"type": "text", "text": example.question}]
    theirs = trained.loaded.processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)


def test_two_steps_were_trained(trained: Trained) -> None:
    assert trained.done.trained["lora"] > 0
    assert [step for step, _ in trained.done.train_losses] == [1, 2]
    adapter = load_file(trained.folder / "adapter/adapter_model.safetensors")
    assert all(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)


def test_plain_peft_gives_the_trained_model_and_so_does_the_merged_one(trained: Trained) -> None:
    batch = trained.batch()
    ours = logits(trained.done.model, batch)
    plain = PeftModel.from_pretrained(trained.fresh().model, trained.folder / "adapter")
    projector = trained.loaded.parts.projector
    assert (trained.folder / "adapter" / PROJECTOR).is_file() == (projector is not None)
    if projector is not None:
        stored = load_file(trained.folder / "adapter" / PROJECTOR)
        plain.get_base_model().get_submodule(projector).load_state_dict(stored)
    assert_same_sums(logits(plain, batch), ours)
    merged = merge(plain, check_inputs={key: value for key, value in batch.items() if key != "labels"})
    assert_same_sums(logits(merged, batch), ours)
    untrained = logits(trained.fresh().model, batch)
    assert (untrained - ours).abs().max() > 1e-3


def test_batched_answers_are_those_of_single_questions(trained: Trained) -> None:
    study = trained.study
    examples = study.tasks[0].examples

    def ask(questions: tuple[Example, ...], batch_size: int, gigabytes: float = 2.0) -> list[str]:
        settings = Answering(batch_size, max_new_tokens=4, cache_gigabytes=gigabytes)
        return [p.text for p in answer(trained.done.model, study.data.reader, questions, settings)]

    def first_logits(questions: tuple[Example, ...]) -> torch.Tensor:
        texts = [study.data.reader.prompt(e.question, e.image is not None) for e in questions]
        inputs = study.data.reader.prompts(texts, [e.image for e in questions])
        said = trained.done.model.generate(
            **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        return said.logits[0]

    assert ask(examples, len(examples)) == ask(examples, 1) == ask(examples, 1, gigabytes=0)
    alone = torch.cat([first_logits((example,)) for example in examples])
    assert_same_sums(first_logits(examples), alone, ROWS)


def test_an_image_goes_through_the_tower_once_for_all_its_questions(trained: Trained) -> None:
    """Answers and first logits are those of pixels in every batch, and the tower sees each picture once."""
    model, reader = trained.done.model, trained.study.data.reader
    if trained.family.tower is None:  # nothing to keep, whatever there is room for
        assert image_blocks(once_per_image(model, reader), trained.study.tasks[0].examples, ["?"] * 3, 2.0) == {}
        return
    pictures = [e for e in trained.study.tasks[0].examples if e.image][:2]
    questions = [replace(e, id=f"{e.id}-{i}", question=e.question + "?" * i) for i in range(3) for e in pictures]
    tower = trained.loaded.model.get_submodule(trained.family.tower)
    patches = next(m for m in tower.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d | torch.nn.Linear))
    seen: list[int] = []
    hook = patches.register_forward_hook(lambda *_: seen.append(1))
    bare = replace(reader, features=None) if hasattr(reader, "features") else reader
    settings = Answering(2, max_new_tokens=4)
    ahead = answer(model, bare, questions, settings)
    once = len(seen)
    images = once_per_image(model, bare)
    images.hold({e.image for e in pictures})
    texts, paths = [bare.prompt(e.question, True) for e in questions], [e.image for e in questions]
    first = [
        model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True)
        for inputs in (images.inputs(texts, paths), bare.prompts(texts, paths))
    ]
    hook.remove()
    assert 1 <= once <= len(pictures) + 1  # the first picture once more, to learn what one takes in memory
    assert ahead == answer(model, bare, questions, replace(settings, cache_gigabytes=0))
    assert_same_sums(first[0].logits[0], first[1].logits[0], ROWS)
    for narrow in (1e-9, 2.0):  # blocks of one picture; all at once
        assert answer(model, bare, questions, replace(settings, cache_gigabytes=narrow)) == ahead


def test_a_stopped_training_goes_on_to_the_same_adapter(trained: Trained, tmp_path: Path) -> None:
    """To the bit: each of the three models is loaded alike, so that its weights lie alike in memory."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                raise KeyboardInterrupt

    study, schedule = trained.study, read_schedule(trained.folder / "adapter" / SCHEDULE)
    settings = study.config.training
    loaded = trained.fresh()
    with pytest.raises(KeyboardInterrupt):
        finetune(prepare(loaded, schedule, settings, 0), loaded, study.data, settings, 0, tmp_path / "c", [Stop()])
    assert (tmp_path / "c" / "checkpoint-1").is_dir()
    again = trained.fresh()
    done = finetune(prepare(again, schedule, settings, 0), again, study.data, settings, 0, tmp_path / "c")
    ours = {name: p for name, p in done.model.named_parameters() if p.requires_grad}
    theirs = {name: p for name, p in trained.done.model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_chat_answers_with_the_adapter(trained: Trained) -> None:
    example = trained.study.tasks[0].examples[0]
    reader, settings = trained.study.data.reader, Answering(1, max_new_tokens=4)
    (expected,) = answer(trained.done.model, reader, [example], settings)
    image = Path(example.image) if example.image else None
    model, adapter = trained.study.config.model, trained.folder / "adapter"
    assert chat(model, example.question, image, adapter, "auto", 4, "cpu", None) == expected.text


def test_a_bfloat16_model_trains_its_projector_in_float32(trained: Trained) -> None:
    loaded = trained.fresh()
    loaded.model.to(torch.bfloat16)
    schedule = schedules.allocate_all(trained.study, measure(trained.study, ["gradient_norm"], quiet))["coarse"]
    model = prepare(loaded, schedule, trained.study.config.training, seed=0)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in trained.batch().items()}
    model(**batch).loss.backward()
    opened = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in opened.values())
    assert bool(opened) == (trained.family.projector is not None)


def test_a_whole_trial_is_scored_and_its_model_stored(trained: Trained) -> None:
    """The rest of the job: a trial from start to score, and the processor stored with a fully trained model."""
    record = trials.run_trial(trained.study, "full", None, 0, quiet)
    assert record.scores[0].n == len(trained.study.tasks[0].examples)
    again = load_model(str(trained.study.folder.trial("full-seed0") / "model"), "cpu")
    assert type(again.processor) is type(trained.loaded.processor)
    example = trained.study.tasks[0].examples[0]
    reader = trained.study.data.reader
    text = reader.prompt(example.question, example.image is not None)
    mine = type(reader)(again.processor, *([reader.form] if hasattr(reader, "form") else []))
    ours, theirs = reader.prompts([text], [example.image]), mine.prompts([text], [example.image])
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
