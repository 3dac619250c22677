"""A small trainer: pretraining, fine-tuning, recovery after pruning. Deterministic by seed, resumable, on any device.

pretrain(data, out, config, family="qwen3_moe", size="demo", tokenizer=None, progress=silent)   models.training.pretrain
finetune(base, data, out, config, pooling="mean", teacher=None, dtype="float32", progress=silent) -> Checkpoint
recover(checkpoint, data, out, config, teacher=None, progress=silent) -> Checkpoint             models.training.finetune
load_train_config(path_or_None, PRETRAIN_DEFAULTS | FINETUNE_DEFAULTS | RECOVER_DEFAULTS)       models.training.config
"""
