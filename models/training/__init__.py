"""A small trainer: pretraining, fine-tuning, recovery after pruning.

Resumable, and on a CPU deterministic by seed and number of threads. Uses a GPU if there is one.

pretrain(data, out, config, family="qwen3_moe", size="demo", tokenizer=None, progress=silent)   models.training.pretrain
finetune(base, data, out, config, pooling="mean", teacher=None, dtype="float32", progress=silent) -> Checkpoint
recover(checkpoint, data, out, config, teacher=None, progress=silent) -> Checkpoint             models.training.finetune
load_train_config(path_or_None, PRETRAIN_DEFAULTS | FINETUNE_DEFAULTS | RECOVER_DEFAULTS)       models.training.config
"""
