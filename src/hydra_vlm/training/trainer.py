"""transformers' Trainer with what HyDRA's recipes need and it lacks, no more.

* learning rates by part (`training.rates`), and by leg (`training.legs`),
* batches by length whose order follows from the seed and the epoch alone (the Trainer's draws on the global generator,
  which schedules use up differently),
* checkpoints that hold the projector beside the adapter (PEFT's hold the adapter alone), or the projector alone in
  stage I,
* gradients shown to recorders of signals before clipping,
* a step whose loss is no number is not applied; a checkpoint is whole on the disk or not there, and remembers the
  losses that were not logged yet, so that a resumed run logs what an undisturbed one does,
* a loss, of training and of validation, in which every supervised token counts the same (`training.loss`),
* the same batches and checkpoints for any number of processes, the model sharded or not.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from hydra_vlm.files import as_umask_says
from hydra_vlm.models.structure import ModelParts
from hydra_vlm.training.checkpoints import UNLOGGED, validation_losses, write_whole
from hydra_vlm.training.even_batches import EvenBatches
from hydra_vlm.training.legs import WHOLE, Leg, paced
from hydra_vlm.training.loss import Tally, draws_kept, mean_over_batch, token_losses
from hydra_vlm.training.nonfinite import FiniteSteps
from hydra_vlm.training.numbered import NUMBERS
from hydra_vlm.training.rates import Rates, parameter_groups
from hydra_vlm.training.recording import Recording
from hydra_vlm.training.sharding import (
    OPTIMIZER,
    load_whole_optimizer_state,
    shard_by_decoder_layer,
    shard_on_any_device,
    take_apart_again,
    trained_state,
    untouched,
    whole_optimizer_state,
)
from hydra_vlm.training.supervised import SupervisedPositions

PROJECTOR_FILE = "projector.safetensors"
SCHEDULER = "scheduler.pt"


class VLMTrainer(Trainer):
    """Trainer for LoRA (or the whole decoder) plus projector over a frozen tower."""

    def __init__(
        self,
        *args: Any,
        parts: ModelParts,
        rates: Rates,
        leg: Leg = WHOLE,
        lengths: Sequence[int] | np.ndarray | None = None,
        positions: SupervisedPositions | None = None,
        finite: FiniteSteps | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, compute_loss_func=mean_over_batch(positions), **kwargs)
        self.positions = positions
        self.finite = finite
        if finite is not None:
            self.add_callback(finite)  # after those that read gradients
        self.parts = parts
        self.rates = rates
        self.leg = leg
        self.lengths = lengths

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength(self.lengths, batch * self.args.world_size, self.args.seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The arguments' optimizer over a group for each part that has a learning rate of its own."""
        if self.optimizer is None:  # type: ignore[has-type]
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            decay = {"weight_decay": self.args.weight_decay}
            groups = [{**group, **decay} for group in parameter_groups(model, self.parts, self.rates)]
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The arguments' schedule of rates, changed where the leg says so."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if not self.leg.is_plain:
            scheduler.lr_lambdas = [paced(schedule, self.leg) for schedule in scheduler.lr_lambdas]
        return scheduler

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = shard_on_any_device(self.accelerator)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        if self.args.world_size > 1:
            share = loader.batch_sampler  # this process's share of the batches of all
            share.batch_sampler = EvenBatches(share.batch_sampler, self.args.world_size)
        return loader

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, after the supervised positions were read from the batch."""
        if self.positions is not None:
            self.positions.read(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.args.world_size == 1 or self.is_deepspeed_enabled or not model.training:
            return loss
        return loss + untouched(self.model, self.parts)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean over all supervised tokens of the data; training goes on as it would without.

        Where it is no number there is no loss among the metrics; how many records are to blame stands there instead.
        """
        model, tally = self.model.eval(), Tally()
        with draws_kept(self.args.device), torch.no_grad():
            for inputs in dataloader:
                numbers, labels = inputs.pop(NUMBERS), inputs.pop("labels")
                if self.positions is not None:
                    self.positions.read({**inputs, "labels": labels})
                tally.add(token_losses(model(**inputs)["logits"], labels, self.positions), labels, numbers)
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)  # type: ignore[has-type]
        if self.is_fsdp_enabled:
            take_apart_again(self.model)
        found = tally.total()
        metrics = {f"{metric_key_prefix}_loss": found.loss}
        if found.nonfinite:
            metrics = {f"{metric_key_prefix}_nonfinite": len(found.nonfinite)}
            if self.finite is not None:
                self.finite.in_validation(self.state, found.nonfinite)
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.is_fsdp_enabled:
            shard_by_decoder_layer(self.accelerator, self.model, self.parts)
            if resume_from_checkpoint is not None:
                self._load_from_checkpoint(resume_from_checkpoint)  # while the model is whole
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Recording):
                callback.record()
        return super()._clip_grad_norm(model)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        numbers = inputs.pop(NUMBERS, None)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.finite is not None:
            if self.finite.is_new_step:
                self._logged_later = self._tr_loss.clone()
            self.finite.saw(numbers, loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.finite is None:
            return norm
        undone = not self.is_deepspeed_enabled  # its engine steps within backward
        if self.finite.applies(self.state, norm, self._get_learning_rate(), undone):
            return norm
        self._tr_loss.copy_(self._logged_later)  # a step that is left out has no part in the mean that is logged next
        self._globalstep_last_logged += 1
        return None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._owes_validation():
            self.evaluate()
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            return  # was stopped after its last step: not one more
        unlogged = self.state.stateful_callbacks.pop(UNLOGGED, None)
        if unlogged is not None:
            self._tr_loss += unlogged["sum"]
            self._globalstep_last_logged = unlogged["since"]
        super()._run_epoch(*args, **kwargs)

    def _owes_validation(self) -> bool:
        """Whether a signal came between the step just done and the validation loss that follows it."""
        step = self.state.global_step
        due = self.args.eval_strategy == "steps" and step > 0
        due = due and (step % self.state.eval_steps == 0 or step >= self.state.max_steps)
        return due and step not in dict(validation_losses(self.state.log_history))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        losses = self.accelerator.gather(self._tr_loss).mean().item()
        self.state.stateful_callbacks[UNLOGGED] = {"sum": losses, "since": self._globalstep_last_logged}
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        write_whole(
            Path(self.args.output_dir),
            self.state.global_step,
            lambda: super(VLMTrainer, self)._save_checkpoint(model, trial),
            estimate=3 * trained,  # weights and AdamW's two moments
        )
        self.state.stateful_callbacks.pop(UNLOGGED)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        state = trained_state(self.model)
        if self.args.should_save:
            self._save(output_dir, state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        load_whole_optimizer_state(self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        projector, alone = self._projector(), self._projector_alone()
        if not alone:
            super()._save(output_dir, state_dict)
        if self.args.should_save and projector is not None and (alone or isinstance(self.model, PeftModel)):
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            values = projector.state_dict() if state_dict is None else self._projector_of(state_dict)
            state = {k: v.detach().cpu().contiguous() for k, v in values.items()}
            save_file(state, folder / PROJECTOR_FILE)
        if self.args.should_save:
            as_umask_says(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled and model is not None:
            return  # was loaded before the model was sharded
        if self.is_fsdp_enabled and not isinstance(self.model, PeftModel):
            for file in Path(resume_from_checkpoint).glob("model*.safetensors"):
                self.model.load_state_dict(load_file(file), strict=False)
        elif not self._projector_alone():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        projector, stored = self._projector(), Path(resume_from_checkpoint) / PROJECTOR_FILE
        if projector is not None and stored.exists():
            projector.load_state_dict(load_file(stored))

    def _projector_alone(self) -> bool:
        """Whether nothing but the projector is trained: then nothing else need be stored."""
        inside, outside = split_projector(self.model, self.parts)
        return bool(inside) and not outside

    def _projector_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """The projector's own tensors among those of the model, by their names within the projector."""
        start = f"{self.parts.projector}."
        plain = {name.removeprefix("base_model.model."): value for name, value in state.items()}
        return {name.removeprefix(start): value for name, value in plain.items() if name.startswith(start)}

    def _projector(self) -> nn.Module | None:
        if self.parts.projector is None:
            return None
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return base.get_submodule(self.parts.projector)


WINDOW = 8
"""So many batches are drawn together and sorted by length; then batches are shuffled, so that length is no schedule."""


class ByLength(Sampler[int]):
    """Record numbers in an order whose batches hold records of about one length, anew for every epoch.

    `lengths` in tokens, image tokens counted. The order depends on nothing but lengths, batch size, seed and epoch.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """What accelerate calls at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng([self.seed, self.epoch])
        count, size = len(self.lengths), self.batch_size
        numbers = draw.permutation(count)
        windows = np.arange(count) // (WINDOW * size)
        alike = numbers[np.lexsort((self.lengths[numbers], windows))]
        full = count // size
        batches, rest = alike[: full * size].reshape(full, size), alike[full * size :]  # the only short one comes last
        return iter([*draw.permutation(batches).ravel().tolist(), *rest.tolist()])


def split_projector(model: nn.Module, parts: ModelParts) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters trained in the projector itself, and all others: LoRA's too, wherever they lie."""
    inside: list[nn.Parameter] = []
    outside: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            place = name.removeprefix("base_model.model.")
            own = parts.projector is not None and place.startswith(f"{parts.projector}.") and ".lora_" not in place
            (inside if own else outside).append(parameter)
    return inside, outside
