"""What other trainers call our keys: an unknown key is often a known one in the words of another tool. No torch.

The words are those of transformers' TrainingArguments and PEFT's LoraConfig, of LLaVA's scripts, LLaMA-Factory and
ms-swift. A key is looked up by its last part, in lower case, "-" as "_".
"""

from collections.abc import Mapping

_WORDS: Mapping[str, str] = {
    "model": "model_name_or_path model_path model_name model_id base_model pretrained_model_name_or_path llm",
    "adapt": "target_modules lora_target lora_target_modules freeze_vit train_type",
    "data.train": "dataset dataset_name dataset_dir dataset_path datasets data_path train_file train_path train_data "
    "train_dataset",
    "data.images": "image_folder image_dir image_root images_dir media_dir",
    "data.validation": "val_file val_data val_dataset validation_file validation_data valid eval_file eval_data "
    "eval_data_path eval_dataset",
    "data.tests": "test_file test_data test_dataset predict_file",
    "data.max_length": "max_seq_length max_seq_len max_len cutoff_len model_max_length sequence_len sequence_length "
    "seq_length max_tokens",
    "data.template": "chat_template prompt_template conv_version conv_mode version",
    "data.max_image_pixels": "max_pixels image_max_pixels",
    "data.validation_limit": "max_eval_samples eval_samples val_limit",
    "budget.rank": "r lora_r lora_rank lora_dim peft_rank",
    "budget.parameters": "n_parameters num_parameters trainable_parameters params",
    "scaling.value": "alpha lora_alpha lora_scaling scale",
    "scaling.rule": "rslora use_rslora",
    "allocation.n_stages": "stages n_stage num_stages",
    "seeds": "seed random_seed data_seed manual_seed",
    "schedules": "schedule method methods allocator allocators grain",
    "training.steps": "steps max_steps num_steps n_steps train_steps num_train_steps total_steps iters max_iters "
    "iterations num_iterations",
    "training.epochs": "num_train_epochs num_epochs n_epochs epoch max_epochs",
    "training.learning_rate": "lr base_lr peak_lr max_lr lora_lr llm_lr",
    "training.projector_learning_rate": "mm_projector_lr projector_lr aligner_lr merger_lr",
    "training.batch_size": "batch_size batch bs train_batch_size global_batch_size total_batch_size",
    "training.device_batch_size": "per_device_train_batch_size per_device_batch_size per_gpu_train_batch_size mbs "
    "micro_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps accumulation_steps grad_accum",
    "evaluation.batch_size": "per_device_eval_batch_size eval_batch_size test_batch_size",
    "training.warmup_ratio": "warmup warmup_steps num_warmup_steps warmup_proportion warmup_fraction",
    "training.weight_decay": "wd l2 decay",
    "training.max_grad_norm": "clip grad_clip clip_grad clip_grad_norm gradient_clipping gradient_clip_val max_norm",
    "training.dropout": "lora_dropout lora_drop",
    "training.precision": "bf16 fp16 tf32 mixed_precision amp",
    "training.optimizer": "optim optimizer_type optimiser",
    "training.gradient_checkpointing": "activation_checkpointing gradient_checkpoint use_gradient_checkpointing",
    "training.trackers": "report_to logger loggers tracker wandb",
    "training.save_steps": "save_every save_interval save_freq checkpoint_steps",
    "training.watch_steps": "eval_steps eval_interval val_check_interval",
    "training.patience": "early_stopping early_stopping_patience early_stop_patience early_stopping_steps",
    "training.keep": "load_best_model_at_end keep_best save_best save_best_only",
    "training.b_ratio": "loraplus_lr_ratio loraplus_ratio lora_plus_ratio lorap_lr_ratio lr_ratio",
    "training.tower_learning_rate": "vision_lr vision_tower_lr mm_vision_tower_lr vit_lr",
    "training.start_from": "adapter adapters adapter_path adapter_name_or_path lora_path lora_model_dir init_adapter",
    "training.packed_rows": "packing neat_packing sample_packing padding_free",
    "training.workers": "num_workers n_workers dataloader_num_workers preprocessing_num_workers",
    "training.compile": "torch_compile",
    "training.liger": "use_liger use_liger_kernel enable_liger_kernel liger_kernel",
    "training.group_by_length": "group_by_modality_length length_grouped",
    "search.trials": "n_trials num_trials max_trials",
    "dtype": "torch_dtype model_dtype compute_dtype",
    "attention": "attn_implementation attn_impl flash_attn use_flash_attention_2",
    "quantization": "load_in_4bit quantization_bit bits quant quant_method qlora",
    "device": "device_map gpu cuda accelerator",
}

_OTHERWISE: Mapping[str, str] = {
    "give the folder with the option --out": "output_dir output out save_dir run_dir logging_dir",
    'start it with `accelerate launch --config_file "$(hydra-vlm devices fsdp)"`': "deepspeed fsdp zero_stage",
    "the learning rate always follows a cosine after its warm-up": "lr_scheduler_type lr_scheduler scheduler",
    "losses are logged forty times a run, or after each step of a short one": "logging_steps log_every log_interval",
    "the same command goes on where it stopped": "resume resume_from_checkpoint overwrite_output_dir",
}

SYNONYMS: Mapping[str, str] = {word: key for key, words in _WORDS.items() for word in words.split()}
"""Another tool's word -> our key."""

OTHERWISE: Mapping[str, str] = {word: said for said, words in _OTHERWISE.items() for word in words.split()}
"""Another tool's word -> what is to be done in its place, where there is no key."""


def bare(key: str) -> str:
    """The last part of a key, as it is looked up here."""
    return key.rsplit(".", 1)[-1].lower().replace("-", "_")
