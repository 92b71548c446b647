"""The private names of other libraries that this package relies on, each with the reason. A test holds them to it."""

from __future__ import annotations

TRAINER_OVERRIDES = {
    "_prepare_for_training": "NIO: the moment when the model is whole, nothing wraps it, no optimizer exists, and "
    "it is known whether the training resumes. No public hook has all four.",
    "_save_checkpoint": "durable: it deletes old checkpoints before callbacks have written into the new one.",
    "_load_from_checkpoint": "durable: it leaves tensors that the library has renamed as they are.",
    "_load_best_model": "durable: likewise.",
    "_determine_best_metric": "durable: it decides whether save_strategy='best' saves when SIGTERM has come.",
    "_run_epoch": "durable: resumed at its end, a training would take another step.",
    "_push_from_checkpoint": "hub: it pushes before callbacks have written into the checkpoint, and absolute paths.",
    "_get_train_sampler": "tasks: an order of the data that depends on seed and epoch alone.",
}
"""{method of Trainer that is overridden: who does, and why}."""

TRAINER_CALLS = {
    "_get_output_dir": "each trial of a search saves in a folder of its own.",
    "_prepare_inputs": "batches of NIO go to the device as those of the training do.",
    "_remove_unused_columns": "samples of NIO have the columns that those of the training have.",
    "_get_collator_with_removed_columns": "likewise, for data sets that are none of `datasets`.",
    "_finish_current_push": "pushes arrive in their order.",
}
"""{method of Trainer that is called: why}."""

OTHERS = {
    "_BatchNorm": "torch: the base of all batch normalisation layers.",
    "_attn_implementation": "transformers: the attention that a model computes with.",
    "_bit_generator": "numpy: the state of a RandomState that is no Mersenne twister.",
    "_commit_hash": "transformers: the revision on the Hub that a model was loaded from.",
    "_compiled_call_impl": "torch: whether a module is compiled.",
    "_exit": "the standard library: an end of a process that waits for nothing.",
    **dict.fromkeys(
        (
            *("_foreach_add", "_foreach_add_", "_foreach_addcmul_", "_foreach_copy_", "_foreach_div", "_foreach_mul"),
            *("_foreach_mul_", "_foreach_norm", "_foreach_sign", "_foreach_sub"),
        ),
        "torch: arithmetic on lists of tensors, as its own optimizers use it.",
    ),
    "_forward_cls": "torch: the operation that a custom node of a graph belongs to.",
    "_gradient_checkpointing_func": "transformers: how a layer checkpoints its activations.",
    "_hf_peft_config_loaded": "transformers: whether a model has adapters.",
    "_indices": "datasets: whether rows were selected or shuffled, and stand in another order on the disk.",
    "_ml_flow": "transformers: the module of the MLflow callback, whose run may not be open.",
    "_original_forward": "accelerate: the forward that it has patched.",
    "_overloadpacket": "torch: which operation is counted.",
    "_register_atexit": "the standard library: an end of a process that waits for a push.",
    "_resolve_features": "datasets: the columns of a stream without known features.",
    "_version": "torch: whether a buffer was written to.",
    "_wandb": "transformers: the module of the Weights & Biases callback, whose run may not be open.",
}
"""{any other private name: whose, and what it tells}."""
